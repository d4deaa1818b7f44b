"""Budgets that change while a model is wrapped, and plans asked for without generating."""

import copy
import threading

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from dynadepth.errors import BudgetError, ConfigError, PlanError, UnsupportedModelError, WrapError
from dynadepth.models.fingerprint import fingerprint
from dynadepth.policies.calibration import Calibration
from dynadepth.policies.menu_policy import MenuPolicy
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from tests.tiny import FAMILIES, MECHANISMS, random_batch, tiny_model
from tests.tiny_menus import random_menu
from tests.tiny_routers import random_routers

LENGTHS = [5, 9, 7, 8, 6, 4]
BUDGETS = (0.5, 0.7, 1.0)
KINDS = ("routers", "menu")
# The scores of tiny models are of order 10, so that these penalties move them.
CALIBRATION = Calibration(
    lambdas=(200.0, 3.0, 0.0, -200.0), depths=(0.5, 0.7, 0.9, 1.0), lowest=0.5, highest=1.0
)


def trained(kind, model):
    settings = {"fingerprint": fingerprint(model), "calibration": CALIBRATION}
    if kind == "routers":
        return random_routers(num_layers=6, **settings)
    return random_menu(layers=(2, 4), windows=(3, 0), inner=(0, 0), hidden_size=32, **settings)


def wrapped(kind="menu", budget=0.5, family="llama", **settings):
    model = tiny_model(family, num_layers=6)
    return wrap_model(model, budget=budget, routers=trained(kind, model), **settings)


def inputs(seed=1):
    ids, mask = random_batch(LENGTHS, seed=seed)
    return {"input_ids": ids, "attention_mask": mask}


def plans_of(model):
    model(**inputs())
    return model.dynadepth.last_plans


@pytest.fixture(scope="module", params=KINDS)
def by_budget(request):
    """The plans at each budget, each by a model wrapped with it."""
    return request.param, {budget: plans_of(wrapped(request.param, budget)) for budget in BUDGETS}


def test_a_budget_that_is_set_is_that_of_a_model_wrapped_with_it(by_budget):
    kind, expected = by_budget
    assert len({plans.tobytes() for plans in expected.values()}) == len(BUDGETS)
    model = wrapped(kind)
    for budget in (0.7, 1.0, 0.5, 0.7, np.float32(0.7)):
        model.dynadepth.budget = budget
        assert model.dynadepth.budget == float(budget)
        if isinstance(budget, float):
            assert np.array_equal(plans_of(model), expected[budget])
    assert "at budget 0.7" in repr(model.dynadepth)


def test_a_block_has_a_budget_of_its_own(by_budget):
    kind, expected = by_budget
    model = wrapped(kind)
    with model.dynadepth.at_budget(0.7):
        assert np.array_equal(plans_of(model), expected[0.7])
        with model.dynadepth.at_budget(1.0):
            assert np.array_equal(plans_of(model), expected[1.0])
            with model.dynadepth.plans("0-5"):
                assert (plans_of(model) == 1).all()
        assert np.array_equal(plans_of(model), expected[0.7])
    assert np.array_equal(plans_of(model), expected[0.5])
    assert model.dynadepth.budget == 0.5
    with model.dynadepth.plans("0-5"), model.dynadepth.at_budget(0.7):
        assert np.array_equal(plans_of(model), expected[0.7])


def test_each_thread_has_its_own_budget(by_budget):
    kind, expected = by_budget
    model, wrong = wrapped(kind), []
    meet = threading.Barrier(len(BUDGETS))

    def run(budget):
        with model.dynadepth.at_budget(budget):
            meet.wait()
            found = [model.dynadepth.plan_prompts(**inputs()) for _ in range(5)]
        wrong.extend(plans for plans in found if not np.array_equal(plans, expected[budget]))

    threads = [threading.Thread(target=run, args=(budget,)) for budget in BUDGETS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("kind", KINDS)
def test_caches_under_way_keep_their_plans(kind):
    model, other = wrapped(kind, 0.5), wrapped(kind, 0.5)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    with torch.no_grad():
        for each, cache in zip((model, other), caches, strict=True):
            each(**inputs(), past_key_values=cache)
        model.dynadepth.budget = 1.0
        token = torch.full((len(LENGTHS), 1), 7)
        mask = torch.cat([inputs()["attention_mask"], torch.ones_like(token)], dim=1)
        given = [
            each(token, attention_mask=mask, past_key_values=cache).logits
            for each, cache in zip((model, other), caches, strict=True)
        ]
    assert torch.equal(*given)
    assert not np.array_equal(plans_of(model), plans_of(other))


@pytest.mark.parametrize("budget", [0.4, 1.2, "0.7", None, True, float("nan")])
def test_a_budget_that_cannot_be_kept_changes_nothing(budget):
    model = wrapped()
    expected = plans_of(model)
    with pytest.raises(BudgetError):
        model.dynadepth.budget = budget
    with pytest.raises(BudgetError), model.dynadepth.at_budget(budget):
        pass
    assert model.dynadepth.budget == 0.5
    assert np.array_equal(plans_of(model), expected)


def test_a_model_wrapped_without_a_budget_has_none():
    menu = random_menu(hidden_size=32).menu
    for settings in ({"plan": "0-5"}, {"policy": MenuPolicy(menu, 0.5)}):
        model = wrap_model(tiny_model(num_layers=6), **settings)
        assert model.dynadepth.budget is None
        with pytest.raises(ConfigError, match="wrapped with a plan or a policy"):
            model.dynadepth.budget = 0.7
        with (
            pytest.raises(ConfigError, match="wrapped with a plan or a policy"),
            model.dynadepth.at_budget(0.7),
        ):
            pass


def test_limits_and_the_backend_stay():
    model = wrapped("routers", max_depth=1.0, router_backend="onnx")
    for budget in BUDGETS:
        model.dynadepth.budget = budget
        assert (plans_of(model).sum(axis=1) <= 6).all()
        assert type(model.dynadepth.policy).__name__ == "OnnxRouterPolicy"
    repeating = wrapped("routers", 1.0)
    assert (plans_of(repeating).sum(axis=1) > 6).any()


def test_a_copy_has_a_budget_of_its_own():
    model = wrapped()
    twin = copy.deepcopy(model)
    twin.dynadepth.budget = 1.0
    assert (model.dynadepth.budget, twin.dynadepth.budget) == (0.5, 1.0)
    assert not np.array_equal(plans_of(model), plans_of(twin))
    assert np.array_equal(twin.dynadepth.plan_prompts(**inputs()), plans_of(twin))
    weights = twin.model.embed_tokens.weight.data
    weights.copy_(weights.flip(0))
    assert not np.array_equal(twin.dynadepth.plan_prompts(**inputs()), plans_of(model))
    unwrap_model(twin)
    assert np.array_equal(model.dynadepth.plan_prompts(**inputs()), plans_of(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_plans_asked_for_are_those_of_generate(family, kind):
    model = wrapped(kind, 0.7, family=family)
    before = model.dynadepth.totals
    found = model.dynadepth.plan_prompts(**inputs())
    assert model.dynadepth.totals == before
    assert model.dynadepth.last_plans is None
    assert found.dtype == np.uint8
    model.generate(**inputs(), max_new_tokens=2, do_sample=False)
    assert np.array_equal(found, model.dynadepth.last_plans)
    found[:] = 1
    assert not np.array_equal(found, model.dynadepth.last_plans)


@pytest.mark.parametrize("family", MECHANISMS)
def test_no_layer_runs_that_no_decision_needs(family):
    model = wrapped("menu", 0.5, family=family)
    ran = []
    for layer_idx, layer in enumerate(model.model.layers if family == "llama" else []):
        layer.mlp.register_forward_hook(lambda *_, layer_idx=layer_idx: ran.append(layer_idx))
    with model.dynadepth.watch(lambda event: ran.append(event)):
        model.dynadepth.plan_prompts(**inputs())
    # The last decision is at layer 4, and nobody watches a forward that only plans.
    assert set(ran) <= {0, 1, 2, 3}
    model.dynadepth.plan_prompts(inputs_embeds=model.get_input_embeddings()(inputs()["input_ids"]))


def test_plans_asked_for_are_those_of_the_block_around():
    model = wrapped("menu", 0.7)
    rows = np.tile([1, 0, 2], (len(LENGTHS), 2))
    with model.dynadepth.plans(rows):
        assert np.array_equal(model.dynadepth.plan_prompts(**inputs()), rows)
    lengths = [max(1, length - 2) for length in LENGTHS]
    cut = inputs()
    whole = model.dynadepth.plan_prompts(**cut)
    with model.dynadepth.prompt(lengths):
        model(**cut)
        assert np.array_equal(model.dynadepth.plan_prompts(**cut), model.dynadepth.last_plans)
        assert not np.array_equal(model.dynadepth.last_plans, whole)


def test_groups_of_equal_plans_generate_what_the_batch_does():
    model = wrapped("menu", 0.7)
    expected = model.generate(**inputs(), max_new_tokens=4, do_sample=False)
    plans = model.dynadepth.plan_prompts(**inputs())
    for plan in np.unique(plans, axis=0):
        rows = np.flatnonzero((plans == plan).all(axis=1))
        group = {name: value[rows] for name, value in inputs().items()}
        with model.dynadepth.plans(plan):
            found = model.generate(**group, max_new_tokens=4, do_sample=False)
        assert torch.equal(found, expected[rows])


def test_wrong_requests_for_plans():
    model = wrapped("menu", 0.7)
    with pytest.raises(ConfigError, match="no prompts"):
        model.dynadepth.plan_prompts()
    with pytest.raises(PlanError), model.dynadepth.plans(np.ones((4, 6), dtype=np.uint8)):
        model.dynadepth.plan_prompts(**inputs())
    ids = inputs()["input_ids"].flip(1)
    model.config.pad_token_id = None
    with pytest.raises(UnsupportedModelError, match="no attention_mask was given"):
        model.dynadepth.plan_prompts(ids)
    controller = model.dynadepth
    unwrap_model(model)
    with pytest.raises(WrapError, match="no longer wrapped"):
        controller.plan_prompts(**inputs())
