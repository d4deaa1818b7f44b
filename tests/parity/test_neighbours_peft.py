"""PEFT, put on before and after wrapping: adapters run in every visit as they do in the baked model."""

from functools import partial

import numpy as np
import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)

from dynadepth.errors import CheckpointError, UnsupportedModelError, WrapError
from dynadepth.models.fingerprint import fingerprint
from dynadepth.plans import identity_plan
from dynadepth.policies.base import Policy
from dynadepth.proving.prove import proved_stack
from dynadepth.wrapping.bake import bake
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from tests.parity.drivers import MODES, baked_rows, drive, mixed_plans
from tests.tiny import random_batch, tiny_model
from tests.tiny_routers import random_routers

# PEFT's adapters go by the names of modules, which these have in common.
FAMILIES = ("llama", "gemma3", "qwen3")
PLAN = np.array([0, 2, 1, 2], dtype=np.uint8)
ORDERS = ("wrapped first", "adapters first")


def with_lora(model, **settings):
    """Put adapters on that change the logits: a fresh `lora_B` is zero."""
    targets = ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, **settings)
    adapted = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(3)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            drawn = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            weight.data.copy_(0.3 * drawn)
    return adapted


def adapted_and_wrapped(order, family="llama", plan=PLAN):
    if order == "wrapped first":
        return with_lora(wrap_model(tiny_model(family), plan=plan))
    adapted = with_lora(tiny_model(family))
    assert wrap_model(adapted, plan=plan) is adapted
    return adapted


def reference(family="llama"):
    """The model with adapters, as PEFT itself runs it, for `bake`."""
    return with_lora(tiny_model(family)).get_base_model()


def assert_same(model, expected, ids, mask):
    for mode in MODES:
        difference = drive(model, ids, mask, 5, mode) - drive(expected, ids, mask, 5, mode)
        assert difference.abs().max() < 1e-9, mode


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_run_in_every_visit(family, order):
    model, base = adapted_and_wrapped(order, family), reference(family)
    ids, mask = random_batch([9, 9], seed=1)
    expected = bake(base, PLAN)
    assert_same(model, expected, ids, mask)
    bare = drive(bake(tiny_model(family), PLAN), ids, mask, 5, "full")
    assert (drive(model, ids, mask, 5, "full") - bare).abs().max() > 1e-2
    for settings in ({}, {"num_beams": 3}, {"use_cache": False}):
        settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask, **settings}
        assert torch.equal(
            model.generate(input_ids=ids, **settings), expected.generate(ids, **settings)
        )
    plans = mixed_plans(4, 3, seed=2)
    ids, mask = random_batch([6, 9, 4], seed=1)
    with model.dynadepth.plans(plans):
        logits = drive(model, ids, mask, 5, "steps")
    for row, rows in enumerate(baked_rows(base, plans, ids, mask, padded=False)):
        assert (logits[row][mask[row].bool()] - rows).abs().max() < 1e-9


@pytest.mark.parametrize("order", ORDERS)
def test_disabled_and_merged_adapters_follow_the_plan(order):
    model, base = adapted_and_wrapped(order), tiny_model()
    ids, mask = random_batch([9], seed=1)
    with model.disable_adapter():
        assert_same(model, bake(base, PLAN), ids, mask)
    merged = model.merge_and_unload()
    assert_same(merged, bake(with_lora(base).merge_and_unload(), PLAN), ids, mask)
    unwrap_model(merged)
    assert_same(merged, with_lora(tiny_model()).merge_and_unload(), ids, mask)


def test_adapters_are_named_and_saved_the_same_in_both_orders(tmp_path):
    plain = with_lora(tiny_model())
    keys = list(get_peft_model_state_dict(plain))
    ids, mask = random_batch([9], seed=1)
    for order in ORDERS:
        model = adapted_and_wrapped(order)
        assert list(get_peft_model_state_dict(model)) == keys
        assert list(model.state_dict()) == list(plain.state_dict())
        model.save_pretrained(tmp_path / order)
        again = PeftModel.from_pretrained(tiny_model(), tmp_path / order)
        assert_same(again, plain, ids, mask)


@pytest.mark.parametrize("order", ORDERS)
def test_a_peft_model_is_unwrapped_from_outside_or_inside(order):
    plain = with_lora(tiny_model())
    ids, mask = random_batch([9], seed=1)
    settings = {"max_new_tokens": 6, "do_sample": False, "input_ids": ids}
    for outside in (True, False):
        model = adapted_and_wrapped(order)
        assert model.dynadepth is model.get_base_model().dynadepth
        with pytest.raises(WrapError, match="PeftModelForCausalLM is wrapped already"):
            wrap_model(model, plan=PLAN)
        unwrap_model(model if outside else model.get_base_model())
        assert not hasattr(model, "dynadepth")
        assert "generate" not in model.get_base_model().__dict__
        assert_same(model, plain, ids, mask)
        assert torch.equal(model.generate(**settings), plain.generate(**settings))
        with pytest.raises(WrapError, match="is not wrapped"):
            unwrap_model(model)


def test_replicated_layers_are_planned_as_layers_of_their_own():
    plan = [0, 2, 1, 2, 1]
    replicated = with_lora(tiny_model(), layer_replication=[[0, 3], [2, 4]])
    expected = bake(replicated.get_base_model(), plan)
    ids, mask = random_batch([9], seed=1)
    assert_same(wrap_model(replicated, plan=plan), expected, ids, mask)

    # Copies of installed layers carry the numbers of their originals: refused, and undone by wrapping again.
    late = with_lora(wrap_model(tiny_model(), plan=PLAN), layer_replication=[[0, 3], [2, 4]])
    for call in (late, partial(late.generate, max_new_tokens=2)):
        with pytest.raises(
            WrapError, match=r"layer_replication of PEFT does\).*unwrap_model\(model\)"
        ):
            call(input_ids=ids)
    assert_same(wrap_model(unwrap_model(late), plan=plan), expected, ids, mask)


class Reading(Policy):
    """Reads the prompt at the first layer."""

    num_layers = 4
    decision_layers = (0,)

    def initial_plans(self, num_rows):
        return np.tile(identity_plan(4), (num_rows, 1))

    def decide(self, layer_idx, hidden_states, prompts):
        return self.initial_plans(len(hidden_states))


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("order", ORDERS)
def test_a_tuned_prompt_runs_a_given_plan_and_no_policy_that_reads(order):
    def tuned(model):
        torch.manual_seed(0)
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        return get_peft_model(model, config).eval()

    ids, mask = random_batch([6, 9], seed=1)
    model = tiny_model()
    model = (
        tuned(wrap_model(model, plan=PLAN))
        if order == ORDERS[0]
        else wrap_model(tuned(model), plan=PLAN)
    )
    expected = tuned(bake(tiny_model(), PLAN))
    logits = [run(ids, attention_mask=mask).logits for run in (model, expected)]
    assert torch.equal(*logits)
    settings = {"max_new_tokens": 5, "do_sample": False, "input_ids": ids, "attention_mask": mask}
    assert torch.equal(model.generate(**settings), expected.generate(**settings))
    wrap_model(unwrap_model(model), policy=Reading())
    with pytest.raises(UnsupportedModelError, match="another library prepares the inputs"):
        model.generate(**settings)


def test_a_tuned_prefix_is_refused():
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = wrap_model(get_peft_model(tiny_model(), config).eval(), plan=PLAN)
    with pytest.raises(
        UnsupportedModelError, match="already holds 3 tokens of the unwrapped model"
    ):
        model(random_batch([6])[0])


def test_rows_with_adapters_of_their_own_need_a_plan_in_common():
    def two(model):
        adapted = with_lora(model)
        adapted.add_adapter("other", adapted.peft_config["default"])
        generator = torch.Generator().manual_seed(4)
        for name, weight in adapted.named_parameters():
            if "lora_" in name and "other" in name:
                weight.data = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        return adapted.eval()

    ids, mask = random_batch([9, 9], seed=1)
    names = {"adapter_names": ["other", "default"]}
    model = wrap_model(two(tiny_model()), plan=PLAN)
    # Mixed adapters go through the PEFT model, so the baked model sits inside one too.
    expected = two(tiny_model())
    expected.base_model.model = bake(expected.get_base_model(), PLAN)
    logits = [run(ids, attention_mask=mask, **names).logits for run in (model, expected)]
    assert (logits[0] - logits[1]).abs().max() < 1e-9
    with (
        model.dynadepth.plans(mixed_plans(4, 2, seed=2)),
        pytest.raises(ValueError, match="adapter_names"),
    ):
        model(ids, attention_mask=mask, **names)


def test_adapters_put_on_first_make_another_base_model():
    routers = random_routers(fingerprint=fingerprint(tiny_model()))
    with pytest.raises(CheckpointError, match="differ"):
        wrap_model(with_lora(tiny_model()), budget=0.8, routers=routers)
    model = with_lora(wrap_model(tiny_model(), budget=0.8, routers=routers))
    ids, mask = random_batch([9], seed=1)
    logits = drive(model, ids, mask, 9, "full")
    assert_same(model, bake(reference(), model.dynadepth.last_plans[0]), ids, mask)
    assert (logits - drive(reference(), ids, mask, 9, "full")).abs().max() > 1e-2


@pytest.mark.parametrize("what", [lambda model: bake(model, PLAN), proved_stack])
def test_what_does_not_look_inside_says_what_to_give(what):
    with pytest.raises(UnsupportedModelError, match=r"PeftModel.*merge_and_unload.*get_base_model"):
        what(with_lora(tiny_model()))
