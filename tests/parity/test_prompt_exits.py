"""Prompts answered with one token: who leaves is read through its head, who goes on is the base model's own."""

import numpy as np
import pytest
import torch

from dynadepth import unwrap_model, wrap_model
from dynadepth.errors import BudgetError, ConfigError, WrapError
from dynadepth.exits.dial import Dial
from dynadepth.exits.exit_heads import TrainedHead
from dynadepth.models.structure import layer_stack
from tests.tiny import KINDS, MECHANISMS, random_batch, tiny_model
from tests.tiny_exits import PROMISES, random_exits

LENGTHS = [7, 4, 9, 5, 1, 6, 8, 3]
# Where `PROMISES` has a threshold of 0.
BUDGET = 0.75


def reference(model, exits, ids, threshold):
    """Return the logits after one prompt, and how many layers it ran."""
    layers = layer_stack(model).layers
    entering, given = {}, []

    def note(layer_idx):
        def hook(_module, args, kwargs):
            entering[layer_idx] = args[0] if args else kwargs["hidden_states"]

        return hook

    def replace(_module, _args, output):
        if not given:
            return None
        return (given[0], *output[1:]) if isinstance(output, tuple) else given[0]

    handles = [
        layer.register_forward_pre_hook(note(layer_idx), with_kwargs=True)
        for layer_idx, layer in enumerate(layers)
    ]
    handles.append(layers[-1].register_forward_hook(replace))
    try:
        with torch.no_grad():
            logits, run = model(ids, use_cache=False).logits[0, -1], len(layers)
            for weights in exits.heads:
                head = TrainedHead(weights, Dial(threshold, fidelity=1.0))
                state = entering[weights.layer_idx]
                if bool(head.leaves(state[:, -1])):
                    given[:] = [head.final(state)]
                    return model(ids, use_cache=False).logits[0, -1], weights.layer_idx
    finally:
        for handle in handles:
            handle.remove()
    return logits, run


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "attention"), KINDS)
def test_answers_are_those_of_each_prompt_alone(family, attention, side):
    model = tiny_model(family, attention=attention)
    exits = random_exits(model, answers=PROMISES)
    ids, mask = random_batch(LENGTHS, seed=11, side=side)
    alone = [
        reference(model, exits, row[keep.bool()][None], 0.0)
        for row, keep in zip(ids, mask, strict=True)
    ]
    run = np.array([layers for _, layers in alone])
    assert len(set(run.tolist())) > 1
    wrap_model(model, routers=exits, budget=BUDGET)
    found = model.dynadepth.answer_prompts(ids, mask)
    assert found.layers_run.tolist() == run.tolist()
    for (expected, layers), logits in zip(alone, found.logits, strict=True):
        # Lenses compute in float32.
        limit = 1e-9 if layers == 4 else 1e-4
        assert float((logits - expected).abs().max()) < limit
    # Afterwards it decodes as before.
    with torch.no_grad():
        again = model(ids, attention_mask=mask, use_cache=False).logits
    unwrap_model(model)
    with torch.no_grad():
        assert torch.equal(again, model(ids, attention_mask=mask, use_cache=False).logits)


@pytest.mark.parametrize("family", MECHANISMS)
def test_lossless_lets_no_prompt_leave(family):
    model = tiny_model(family)
    ids, mask = random_batch([5, 5], seed=12)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits[:, -1]
    wrap_model(model, routers=random_exits(model, answers=PROMISES), fidelity=1.0)
    found = model.dynadepth.answer_prompts(ids, mask)
    assert found.layers_run.tolist() == [4, 4]
    assert float((found.logits - expected).abs().max()) < 1e-9


def test_all_leave_and_no_later_layer_runs():
    model = tiny_model()
    exits = random_exits(model, answers=PROMISES, layers=(1, 3))
    for head in exits.heads:
        head.tensors["router.bias"].fill_(1e6)
    wrap_model(model, routers=exits, budget=BUDGET)
    seen = []
    with model.dynadepth.watch(lambda event: seen.append((event.layer_idx, event.rows))):
        found = model.dynadepth.answer_prompts(*random_batch([5, 3], seed=13))
    assert found.layers_run.tolist() == [1, 1]
    assert seen == [(0, (0, 1))]
    assert model.dynadepth.last_depths.tolist() == [0.25, 0.25]
    assert model.dynadepth.totals.prompts == 2


def test_the_dial_is_the_models_and_can_be_set():
    model = tiny_model()
    exits = random_exits(model, answers=PROMISES)
    ids, mask = random_batch(LENGTHS, seed=14)
    wrap_model(model, routers=exits, budget=BUDGET)
    first = model.dynadepth.answer_prompts(ids, mask).layers_run
    model.dynadepth.budget = 1.0
    assert model.dynadepth.answer_prompts(ids, mask).layers_run.tolist() == [4] * len(LENGTHS)
    # What 95 % of held-out prompts prove, not what is likely of text that audits watch.
    model.dynadepth.fidelity = 0.85
    assert (model.dynadepth.answer_prompts(ids, mask).layers_run == first).all()
    model.dynadepth.fidelity = 0.95
    with pytest.raises(BudgetError, match=r"needs more held-out prompts than 40"):
        model.dynadepth.answer_prompts(ids, mask)


def test_it_reads_the_prompt_alone_where_its_length_is_given():
    model = tiny_model()
    wrap_model(model, routers=random_exits(model, answers=PROMISES), budget=BUDGET)
    ids, mask = random_batch([9, 6], seed=15, side="right")
    short = model.dynadepth.answer_prompts(ids[:, :5], mask[:, :5])
    with model.dynadepth.prompt([5, 5]):
        found = model.dynadepth.answer_prompts(ids, mask)
    assert found.layers_run.tolist() == short.layers_run.tolist()
    assert float((found.logits - short.logits).abs().max()) < 1e-4


def test_what_is_refused():
    model = tiny_model()
    ids, mask = random_batch([5, 3], seed=16)
    wrap_model(model, routers=random_exits(model), budget=BUDGET)
    with pytest.raises(ConfigError, match="train them again"):
        model.dynadepth.answer_prompts(ids, mask)
    unwrap_model(model)
    wrap_model(model, plan="0-3")
    with pytest.raises(ConfigError, match="not wrapped with trained exits"):
        model.dynadepth.answer_prompts(ids, mask)
    unwrap_model(model)
    exits = random_exits(model, answers=PROMISES)
    wrap_model(model, routers=exits, budget=BUDGET, protect=[0, 3])
    with pytest.raises(ConfigError, match=r"protect names layers \[3\]"):
        model.dynadepth.answer_prompts(ids, mask)
    unwrap_model(model)
    wrap_model(model, routers=exits, budget=BUDGET, protect=[0])
    with pytest.raises(ConfigError, match="answer_prompts was given no prompts"):
        model.dynadepth.answer_prompts()
    with (
        model.dynadepth.plans("0-3"),
        pytest.raises(ConfigError, match=r"inside plans\(\.\.\.\)"),
    ):
        model.dynadepth.answer_prompts(ids, mask)
    controller = model.dynadepth
    unwrap_model(model)
    with pytest.raises(WrapError, match="no longer wrapped"):
        controller.answer_prompts(ids, mask)
