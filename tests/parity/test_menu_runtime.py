"""A wrapped model with a menu does for every prompt what the baked model of the plan that it chose does."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch

from dynadepth.errors import ConfigError, PlanError
from dynadepth.policies.calibration import PenaltyMix
from dynadepth.policies.menu_policy import MenuPolicy
from dynadepth.wrapping.bake import bake
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from tests.parity.drivers import MODES, baked_rows, drive
from tests.tiny import MECHANISMS, VOCAB_SIZE, random_batch, tiny_model
from tests.tiny_menus import PLANS, random_menu

LENGTHS = [9, 5, 7, 12, 1, 8, 6, 11]
NEW = 5
TOLERANCE = 1e-9
STEPS = {
    "one step": {"layers": (2,), "windows": (3,)},
    "two steps": {"layers": (2, 4), "windows": (0, 3), "inner": (0, 8)},
}
# Half of the prompts pay the one price, half the other.
MIX = PenaltyMix(shallow=2.0, deep=-2.0, share=0.5)


def policy_of(steps, *, penalty=MIX, seed=2):
    return MenuPolicy(random_menu(**STEPS[steps], hidden_size=32, seed=seed).menu, penalty)


def continued(side, seed=5):
    """Return padded prompts with NEW more tokens for every row, and the prompts' width."""
    ids, mask = random_batch(LENGTHS, seed=seed, side=side)
    generator = torch.Generator().manual_seed(seed + 1)
    more = torch.randint(2, VOCAB_SIZE, (len(LENGTHS), NEW), generator=generator)
    return torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1), ids.shape[1]


def run(base, policy, ids, mask, width, mode):
    """Return logits and plans of a batch by a fresh wrapped model."""
    model = wrap_model(copy.deepcopy(base), policy=policy)
    logits = drive(model, ids, mask, width, mode)
    return logits, model.dynadepth.last_plans


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("family", MECHANISMS)
def test_a_row_of_a_padded_batch_is_the_prompt_alone_and_the_baked_model(family, steps, side, mode):
    base, policy = tiny_model(family, num_layers=6), policy_of(steps)
    ids, mask, width = continued(side)
    logits, plans = run(base, policy, ids, mask, width, mode)
    menu = {plan.tobytes() for plan in PLANS}
    assert {plan.tobytes() for plan in plans} <= menu
    assert len(np.unique(plans, axis=0)) > 2, "the case must tell prompts apart"
    expected = baked_rows(base, plans, ids, mask, padded=side == "right")
    for row, reference in enumerate(expected):
        real = mask[row].bool()
        difference = (logits[row][real] - reference).abs().max().item()
        assert difference < TOLERANCE, (row, plans[row], difference)
        # A sliding window counts columns, so padding on the right has to stay.
        kept = torch.ones_like(real) if side == "right" else real
        alone, plan = run(
            base,
            policy,
            ids[row : row + 1, kept],
            mask[row : row + 1, kept],
            int(kept[:width].sum()),
            mode,
        )
        assert plan.tolist() == [plans[row].tolist()]
        assert (alone[0][real[kept]] - reference).abs().max().item() < TOLERANCE


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("family", MECHANISMS)
def test_generate_equals_the_baked_models_of_the_plans_chosen(family, steps, settings):
    base, policy = tiny_model(family, num_layers=6), policy_of(steps, seed=4)
    ids, mask = random_batch(LENGTHS, seed=4)
    settings = {"max_new_tokens": 6, "do_sample": False, **settings}
    model = wrap_model(copy.deepcopy(base), policy=policy)
    tokens = model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    plans = model.dynadepth.last_plans
    beams = settings.get("num_beams", 1)
    assert plans.shape == (len(ids) * beams, 6)
    assert (plans.reshape(len(ids), beams, 6) == plans[::beams, None]).all()
    assert len(np.unique(plans, axis=0)) > 2
    for row, plan in enumerate(plans[::beams]):
        real = ids[row : row + 1, mask[row].bool()]
        expected = bake(base, plan).generate(real, **settings)[0, real.shape[1] :]
        assert tokens[row].tolist() == expected.tolist(), (row, plan)
        assert model.generate(real, **settings)[0, real.shape[1] :].tolist() == expected.tolist()
        assert (model.dynadepth.last_plans == plan).all()


@pytest.mark.parametrize("steps", STEPS)
def test_rows_run_each_layer_together(steps):
    """One call for each visit of a layer, of all rows that make it; none where no row does."""
    model = tiny_model("llama", num_layers=6)
    calls = []
    for layer_idx, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(
            lambda _, args, layer_idx=layer_idx: calls.append((layer_idx, len(args[0])))
        )
    wrap_model(model, policy=policy_of(steps))
    ids, mask = random_batch(LENGTHS, seed=4)
    with torch.no_grad():
        model(ids, attention_mask=mask)
        plans = model.dynadepth.last_plans
        expected = [
            (layer_idx, int((plans[:, layer_idx] >= visit).sum()))
            for layer_idx in range(6)
            for visit in (1, 2)
            if (plans[:, layer_idx] >= visit).any()
        ]
        assert calls == expected
        assert len(np.unique(plans, axis=0)) > 2

        # Prompts that get equal plans cost as many calls as one prompt.
        per_prompt = Counter()
        for row in range(len(ids)):
            calls.clear()
            model(ids[row : row + 1], attention_mask=mask[row : row + 1])
            per_prompt[tuple(plans[row])] = len(calls)
        for plan, count in per_prompt.items():
            rows = [row for row in range(len(ids)) if tuple(plans[row]) == plan]
            calls.clear()
            model(ids[rows], attention_mask=mask[rows])
            assert len(calls) == count == sum(plan)
            assert {rows_run for _, rows_run in calls} == {len(rows)}


def test_tokens_are_known_however_they_are_given():
    base, policy = tiny_model("llama", num_layers=6), policy_of("two steps")
    ids, mask = random_batch(LENGTHS, seed=4)
    model = wrap_model(copy.deepcopy(base), policy=policy)
    embeds = model.get_input_embeddings()(ids)
    found = {}
    with torch.no_grad():
        for name, arguments in {
            "position": ((ids, mask), {}),
            "name": ((), {"input_ids": ids, "attention_mask": mask}),
            "embeddings": ((), {"inputs_embeds": embeds, "attention_mask": mask}),
        }.items():
            model(*arguments[0], **arguments[1])
            found[name] = model.dynadepth.last_plans
        assert np.array_equal(found["position"], found["name"])
        # Embeddings have numbers of their own, that do not depend on the batch either.
        for row in range(len(ids)):
            real = mask[row].bool()
            model(inputs_embeds=embeds[row : row + 1, real])
            assert model.dynadepth.last_plans.tolist() == [found["embeddings"][row].tolist()]


@pytest.mark.parametrize("steps", STEPS)
def test_identity_is_bit_equal_where_every_prompt_chooses_it(steps):
    base = tiny_model("llama", num_layers=6)
    trained = random_menu(**STEPS[steps], hidden_size=32).menu
    for head in trained.heads:
        head.bias[0] += 1e6
    ids, mask, width = continued("left")
    for mode in MODES:
        logits, plans = run(base, MenuPolicy(trained), ids, mask, width, mode)
        assert (plans == 1).all()
        assert torch.equal(logits, drive(base, ids, mask, width, mode))


class TestLimits:
    def test_a_menu_of_one_step_runs_what_the_limits_leave_of_the_chosen_plans(self):
        base, policy = tiny_model("llama", num_layers=6), policy_of("one step", penalty=0.0)
        ids, mask, width = continued("left")
        _, free = run(base, policy, ids, mask, width, "steps")
        assert free.max() == 2
        assert (free[:, 4] == 0).any()
        model = wrap_model(copy.deepcopy(base), policy=policy, max_depth=1, protect=(4,))
        logits = drive(model, ids, mask, width, "steps")
        plans = model.dynadepth.last_plans
        expected = np.minimum(free, 1)
        expected[:, 4] = 1
        assert np.array_equal(plans, expected)
        for row, reference in enumerate(baked_rows(base, plans, ids, mask, padded=False)):
            assert (logits[row][mask[row].bool()] - reference).abs().max().item() < TOLERANCE

    @pytest.mark.parametrize("limits", [{"max_depth": 1}, {"protect": (3,)}], ids=str)
    def test_a_later_step_that_the_limits_leave_no_plan_is_an_error(self, limits):
        base = tiny_model("llama", num_layers=6)
        policy = policy_of("two steps", penalty=0.0)
        # The plan that repeats a layer and skips the next wins the first step for all prompts.
        policy.menu.heads[0].bias[4] += 1e6
        ids, mask = random_batch(LENGTHS, seed=4)
        model = wrap_model(copy.deepcopy(base), policy=policy)
        with torch.no_grad():
            model(ids, attention_mask=mask)
            assert (model.dynadepth.last_plans == PLANS[4]).all()
            unwrap_model(model)
            before = dict(model.__dict__)
            with pytest.raises(ConfigError, match="before layer 4 so that no plan of it is left"):
                wrap_model(model, policy=policy, **limits)
            assert model.__dict__ == before
            assert torch.equal(
                model(ids, attention_mask=mask).logits, base(ids, attention_mask=mask).logits
            )

    def test_a_menu_for_another_model_is_refused(self):
        with pytest.raises(PlanError, match="plans 6 layers, but the model has 4"):
            wrap_model(tiny_model(num_layers=4), policy=policy_of("one step"))
        model = wrap_model(
            tiny_model(num_layers=6), policy=MenuPolicy(random_menu(hidden_size=48).menu)
        )
        with pytest.raises(ConfigError, match="states of width 32; this menu reads width 48"):
            model(torch.tensor([[5, 6]]))
