"""Law 4: undo leaves no trace, also after an exception in the middle of a forward. And what wrapping refuses."""

import math
import threading

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import DynamicCache, GenerationConfig, StaticCache

from dynadepth.errors import (
    BudgetError,
    ConfigError,
    DynadepthError,
    PlanError,
    UnsupportedModelError,
    WrapError,
)
from dynadepth.execution.layer_call import _gather_argument
from dynadepth.models.fingerprint import fingerprint
from dynadepth.plans import identity_plan
from dynadepth.policies.base import Policy, StaticPolicy
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from tests.parity.drivers import MODES, baked_rows, drive, mixed_plans
from tests.tiny import FAMILIES, random_batch, tiny_model
from tests.tiny_routers import random_routers

PLAN = np.array([0, 2, 1, 2], dtype=np.uint8)


def traces(model):
    """Everything that an undo must bring back, of every module."""
    return [
        (
            name,
            type(module),
            tuple(module.__dict__),
            tuple(module._forward_pre_hooks),
            tuple(module._forward_hooks),
            tuple(module._forward_pre_hooks_with_kwargs),
            tuple(module._forward_hooks_always_called),
        )
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_unwrap_leaves_no_trace(family):
    model = tiny_model(family)
    ids, mask = random_batch([6, 9], seed=1)
    before, keys = traces(model), list(model.state_dict())
    outputs = [drive(model, ids, mask, 5, mode) for mode in MODES]
    config = model.config.to_dict()
    wrap_model(model, plan=PLAN)
    assert list(model.state_dict()) == keys
    assert [type(module).__name__ for module in model.modules()] == [
        kind.__name__ for _, kind, *_ in before
    ]
    assert all(
        isinstance(module, kind)
        for module, (_, kind, *_) in zip(model.modules(), before, strict=True)
    )
    assert not torch.equal(drive(model, ids, mask, 5, "full"), outputs[0])
    model.generate(ids, attention_mask=mask, max_new_tokens=3)
    assert unwrap_model(model) is model
    assert traces(model) == before
    assert list(model.state_dict()) == keys
    assert model.config.to_dict() == config
    assert "generate" not in model.__dict__
    for mode, output in zip(MODES, outputs, strict=True):
        assert torch.equal(drive(model, ids, mask, 5, mode), output)


class Failing(Policy):
    """Raises in the middle of a forward."""

    num_layers = 4
    decision_layers = (2,)

    def initial_plans(self, num_rows):
        return np.tile(identity_plan(4), (num_rows, 1))

    def decide(self, layer_idx, hidden_states, prompts):
        raise ZeroDivisionError


def test_unwrap_after_an_exception_in_a_forward():
    model = tiny_model("gemma3")
    ids, mask = random_batch([6, 9], seed=1)
    before, output = traces(model), drive(model, ids, mask, 5, "full")
    wrap_model(model, policy=Failing())
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            model(ids, attention_mask=mask)
        with pytest.raises(ZeroDivisionError):
            model.generate(ids, attention_mask=mask, max_new_tokens=3)
    with model.dynadepth.plans(PLAN):
        expected = baked_rows(unwrapped(model), np.array([PLAN] * 2), ids, mask, padded=False)
        logits = drive(model, ids, mask, 5, "full")
    for row, reference in enumerate(expected):
        assert (logits[row][mask[row].bool()] - reference).abs().max() < 1e-9
    unwrap_model(model)
    assert traces(model) == before
    assert torch.equal(drive(model, ids, mask, 5, "full"), output)


def unwrapped(model):
    """Return an independent unwrapped twin."""
    twin = tiny_model(model.config.model_type.removesuffix("_text"))
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ConfigError, "none of budget, fidelity, plan, policy and exits"),
        ({"plan": PLAN, "budget": 0.8}, ConfigError, "budget and plan; expected exactly one"),
        ({"plan": [1, 1, 1]}, PlanError, "names 3 layers, but the model has 4"),
        ({"plan": [1, 1, 3, 1]}, PlanError, "action 3 at layer 2"),
        ({"plan": [0, 0, 0, 0]}, PlanError, "skips all 4 layers"),
        ({"plan": [1.0, 1, 1, 1]}, PlanError, "expected whole numbers"),
        (
            {"plan": PLAN, "routers": "somewhere"},
            ConfigError,
            "routers and router_backend go with budget",
        ),
        ({"plan": PLAN, "max_depth": 1}, PlanError, "5 visits .* max_depth allows 4"),
        (
            {"plan": PLAN, "max_depth": 0.5},
            ConfigError,
            "max_depth is 0.5; expected a number of at least 1",
        ),
        ({"plan": PLAN, "protect": [0]}, PlanError, r"layers \[0\] are protected"),
        (
            {"plan": PLAN, "protect": [4]},
            ConfigError,
            "protect names layer 4; expected layer numbers from 0 to 3",
        ),
        ({"policy": StaticPolicy([1, 1])}, PlanError, "plans 2 layers, but the model has 4"),
        ({"plan": PLAN, "router_backend": "jax"}, ConfigError, "router_backend is 'jax'"),
    ],
)
def test_refused_settings_leave_the_model_alone(settings, error, message):
    model = tiny_model("llama")
    before = traces(model)
    with pytest.raises(error, match=message) as caught:
        wrap_model(model, **settings)
    assert isinstance(caught.value, DynadepthError)
    assert traces(model) == before


@pytest.mark.parametrize(
    ("budget", "message"),
    [(-1, "-1"), (0, "0"), (math.nan, "nan"), (3, "0.5"), ("0.8", "0.8"), (0.3, "0.5")],
)
def test_a_refused_budget_leaves_the_model_alone(budget, message):
    model = tiny_model("llama")
    before = traces(model)
    with pytest.raises(BudgetError, match=message):
        wrap_model(model, budget=budget, routers=random_routers(fingerprint=fingerprint(model)))
    assert traces(model) == before


def test_refused_models():
    from transformers import BertConfig, BertModel

    small = BertConfig(
        hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8, vocab_size=9
    )
    with pytest.raises(
        UnsupportedModelError,
        match="BertModel has no output head; expected the causal language model of bert",
    ):
        wrap_model(BertModel(small), plan=[1])
    model = tiny_model("llama")
    with pytest.raises(WrapError, match="is not wrapped"):
        unwrap_model(model)
    wrap_model(model, plan=PLAN)
    with pytest.raises(WrapError, match="wrapped already"):
        wrap_model(model, plan=PLAN)
    unwrap_model(model)
    model.model.layers[1].forward = model.model.layers[0].forward
    before = traces(model)
    with pytest.raises(
        WrapError, match=r"forward of decoder layer 1 .* was replaced by another library"
    ):
        wrap_model(model, plan=PLAN)
    assert traces(model) == before


def test_a_mask_that_cannot_be_split_by_row_is_refused_only_where_rows_differ():
    class Blocks:
        """Stands for the mask of flex attention, which is no tensor."""

    index, by_row = torch.tensor([0]), frozenset({"attention_mask"})
    with pytest.raises(UnsupportedModelError, match="attention_mask is a Blocks, which cannot"):
        _gather_argument("attention_mask", Blocks(), index, 2, by_row)
    assert _gather_argument("attention_mask", None, index, 2, by_row) is None
    assert _gather_argument("use_cache", True, index, 2, by_row) is True


def test_refused_calls():
    model = tiny_model("llama")
    ids, mask = random_batch([6, 9], seed=1)
    filled = model(ids, attention_mask=mask, use_cache=True).past_key_values
    wrap_model(model, plan=PLAN)
    with pytest.raises(
        UnsupportedModelError, match="already holds 9 tokens of the unwrapped model"
    ):
        model(ids, past_key_values=filled)
    offloaded = StaticCache(config=model.config, max_cache_len=20)
    offloaded.offloading = True
    with pytest.raises(UnsupportedModelError, match=r"StaticCache with offloading; .*DynamicCache"):
        model(ids, past_key_values=offloaded)
    with pytest.raises(UnsupportedModelError, match="assistant_early_exit"):
        model.generate(ids, assistant_early_exit=1)
    wanted = GenerationConfig(assistant_early_exit=1)
    with pytest.raises(UnsupportedModelError, match="assistant_early_exit"):
        model.generate(ids, wanted)
    with pytest.raises(
        UnsupportedModelError, match="generate_batch packs all requests into one row"
    ):
        model.generate_batch([ids[0].tolist()])
    with (
        pytest.raises(PlanError, match="3 plans were given for a batch of 2 rows"),
        model.dynadepth.plans([PLAN] * 3),
    ):
        model(ids)
    with (
        pytest.raises(PlanError, match="expected one number of at least 1"),
        model.dynadepth.prompt([0, 3]),
    ):
        pass
    cache = DynamicCache(config=model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(PlanError, match="holds 2 planned rows, but the batch has 1"):
        model(ids[:1], past_key_values=cache)
    unwrap_model(model)
    with pytest.raises(UnsupportedModelError, match="states of a wrapped model"):
        model(ids, past_key_values=cache)


class Reading(Policy):
    """Skips layers by the sum of the prompt's states; keeps what it was shown."""

    num_layers = 4
    decision_layers = (0, 1, 2, 3)

    def __init__(self):
        self.masks = []

    def initial_plans(self, num_rows):
        return np.tile(identity_plan(4), (num_rows, 1))

    def decide(self, layer_idx, hidden_states, prompts):
        self.masks.append(prompts.mask.clone())
        total = (hidden_states * prompts.mask.unsqueeze(-1)).sum(dim=(1, 2))
        return np.asarray((total * 10).long().remainder(3).to(torch.uint8)).reshape(-1, 1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_planned_once_from_its_own_tokens(family, side):
    model = tiny_model(family)
    base = tiny_model(family)
    ids, mask = random_batch([6, 9, 4], seed=1, side=side)
    policy = Reading()
    wrap_model(model, policy=policy)
    logits = drive(model, ids, mask, 9, "full")
    plans = model.dynadepth.last_plans.copy()
    assert all(torch.equal(seen, mask.bool()) for seen in policy.masks)
    for row, reference in enumerate(baked_rows(base, plans, ids, mask, padded=side == "right")):
        assert (logits[row][mask[row].bool()] - reference).abs().max() < 1e-9
    # Alone, without padding, the same prompt gets the same plan, and decoding never plans again.
    for row in range(3):
        policy.masks.clear()
        single = ids[row : row + 1, mask[row].bool()]
        model.generate(single, max_new_tokens=4, do_sample=False)
        assert (model.dynadepth.last_plans == plans[row]).all()
        assert len(policy.masks) == 4
        model.generate(single, max_new_tokens=4, do_sample=False, use_cache=False)
        assert (model.dynadepth.last_plans == plans[row]).all()
        assert len(policy.masks) == 8
    # A scored continuation is not the prompt.
    more = torch.cat([ids, torch.full((3, 2), 7)], 1)
    longer = torch.cat([mask, torch.ones(3, 2, dtype=torch.long)], 1)
    if side == "left":
        with model.dynadepth.prompt([6, 9, 4]):
            drive(model, more, longer, 0, "full")
        assert (model.dynadepth.last_plans == plans).all()


def test_without_a_2d_mask_padding_is_read_from_the_layers_own_mask():
    model = tiny_model("llama", attention="eager")
    ids, mask = random_batch([6, 9], seed=1)
    policy = Reading()
    wrap_model(model, policy=policy)
    causal = torch.ones(9, 9, dtype=torch.bool).tril() & mask.bool()[:, None, None, :]
    additive = torch.zeros(2, 1, 9, 9, dtype=torch.float64).masked_fill(
        ~causal, torch.finfo(torch.float64).min
    )
    model(ids, attention_mask=additive)
    assert all(torch.equal(seen, mask.bool()) for seen in policy.masks)


class Greedy(Policy):
    """Wants every layer twice, or none."""

    num_layers = 4
    decision_layers = (0, 1, 2, 3)

    def __init__(self, action):
        self.action = action

    def initial_plans(self, num_rows):
        return np.tile(identity_plan(4), (num_rows, 1))

    def decide(self, layer_idx, hidden_states, prompts):
        return np.full((len(hidden_states), 1), self.action, dtype=np.uint8)


def test_a_reading_policy_refuses_what_would_mix_or_cut_prompts():
    model = tiny_model("llama")
    ids, _ = random_batch([9])
    wrap_model(model, policy=Reading())
    with pytest.raises(
        UnsupportedModelError, match="prefill_chunk_size=3 shows the policy only a part"
    ):
        model.generate(ids, GenerationConfig(prefill_chunk_size=3))
    with pytest.raises(UnsupportedModelError, match="guidance without a cache"):
        model.generate(ids, guidance_scale=1.5, negative_prompt_ids=ids, use_cache=False)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with pytest.raises(UnsupportedModelError, match="packs several prompts"):
        model(ids, position_ids=packed)


def test_the_negative_prompt_of_guidance_is_planned_from_all_its_own_tokens():
    model = tiny_model("llama")
    ids, _ = random_batch([9])
    negative, _ = random_batch([14], seed=5)
    policy = Reading()
    wrap_model(model, policy=policy)
    settings = {"max_new_tokens": 3, "do_sample": False}
    model.generate(ids, guidance_scale=1.5, negative_prompt_ids=negative, **settings)
    seen = [tuple(mask.sum(dim=1).tolist()) for mask in policy.masks]
    assert seen == [(9,)] * 4 + [(14,)] * 4


@pytest.mark.parametrize("actions", [[[3]], [[2.7]], [[257]], [[-1]], [[1, 1]]])
def test_a_policy_that_gives_no_actions_is_refused(actions):
    class Wrong(Reading):
        def decide(self, layer_idx, hidden_states, prompts):
            return np.asarray(actions)

    model = tiny_model("llama")
    wrap_model(model, policy=Wrong())
    with pytest.raises(
        PlanError, match=r"Wrong gave .* at layer 0; expected whole numbers 0, 1 and 2"
    ):
        model(random_batch([4])[0])


def test_limits_hold_for_every_prompt():
    model = tiny_model("llama")
    ids, _ = random_batch([6, 6])
    for policy, settings, expected in (
        (Greedy(2), {"max_depth": 1.5}, [2, 2, 1, 1]),
        (Greedy(2), {"max_depth": 1.0}, [1, 1, 1, 1]),
        (Greedy(2), {"protect": [1, 2]}, [2, 1, 1, 2]),
        (Greedy(0), {"protect": [1]}, [0, 1, 0, 0]),
        (Greedy(0), {}, [0, 0, 0, 1]),
    ):
        wrap_model(model, policy=policy, **settings)
        model(ids)
        assert model.dynadepth.last_plans.tolist() == [expected] * 2
        unwrap_model(model)


def test_two_threads_on_one_model_do_not_mix():
    model = tiny_model("llama")
    plans = mixed_plans(4, 2, seed=7)
    batches = [random_batch([7], seed=seed) for seed in range(2)]
    expected = [baked_rows(model, plans[i : i + 1], *batches[i], padded=False)[0] for i in range(2)]
    wrap_model(model, plan=identity_plan(4))
    wrong = []

    def work(i):
        for _ in range(30):
            with model.dynadepth.plans(plans[i]):
                logits = drive(model, *batches[i], 4, "steps")[0]
            if (logits - expected[i]).abs().max() > 1e-9:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_hooks_of_accelerate_run_the_plan_and_survive_the_undo():
    model, base = tiny_model("llama"), tiny_model("llama")
    for layer in model.model.layers:
        add_hook_to_module(layer, ModelHook())
    ids, mask = random_batch([9])
    (expected,) = baked_rows(base, PLAN[None], ids, mask, padded=False)
    wrap_model(model, plan=PLAN)
    assert (drive(model, ids, mask, 5, "steps")[0] - expected).abs().max() < 1e-9
    unwrap_model(model)
    assert torch.equal(drive(model, ids, mask, 5, "full"), drive(base, ids, mask, 5, "full"))
    assert all(hasattr(layer, "_hf_hook") for layer in model.model.layers)
