"""What torch and transformers do with a whole model: outputs of layers, copies, pickles, checkpoints on disk."""

import copy
import io

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dynadepth.errors import WrapError
from dynadepth.models.fingerprint import fingerprint
from dynadepth.models.structure import layer_stack
from dynadepth.wrapping.bake import bake
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from tests.parity.drivers import MODES, drive, mixed_plans
from tests.tiny import MECHANISMS, random_batch, tiny_model
from tests.tiny_routers import random_routers

PLAN = np.array([0, 2, 1, 2], dtype=np.uint8)
# The layer below each entry of `hidden_states` has had all its visits: how many these are in the baked model.
VISITS_BELOW = [0, 0, 2, 3, 5]


def assert_same(model, expected):
    ids, mask = random_batch([9, 9], seed=1)
    for mode in MODES:
        difference = drive(model, ids, mask, 5, mode) - drive(expected, ids, mask, 5, mode)
        assert difference.abs().max() < 1e-9, mode


@pytest.mark.parametrize("when", ["first asked wrapped", "first asked before"])
@pytest.mark.parametrize("family", MECHANISMS)
def test_hidden_states_are_those_between_layers(family, when):
    model = tiny_model(family)
    ids, _ = random_batch([9, 9], seed=1)
    if when == "first asked before":
        model(ids, output_hidden_states=True)
    wrap_model(model, plan=PLAN)
    expected = bake(tiny_model(family), PLAN)
    given, whole = (each(ids, output_hidden_states=True) for each in (model, expected))
    assert len(given.hidden_states) == 5
    assert len(whole.hidden_states) == 6
    for states, below in zip(given.hidden_states, VISITS_BELOW, strict=True):
        assert (states - whole.hidden_states[below]).abs().max() < 1e-9
    unwrap_model(model)
    again, base = (each(ids, output_hidden_states=True) for each in (model, tiny_model(family)))
    assert all(
        torch.equal(*states) for states in zip(again.hidden_states, base.hidden_states, strict=True)
    )


def test_hidden_states_of_rows_with_plans_of_their_own_hold_every_row():
    model, base = wrap_model(tiny_model(), plan=PLAN), tiny_model()
    ids, _ = random_batch([9, 9, 9], seed=1)
    plans = mixed_plans(4, 3, seed=2)
    with model.dynadepth.plans(plans):
        given = model(ids, output_hidden_states=True).hidden_states
    assert len(given) == 5
    for row, plan in enumerate(plans):
        whole = bake(base, plan)(ids[row : row + 1], output_hidden_states=True).hidden_states
        for layer, states in enumerate(given):
            below = int(plan[:layer].sum())
            if layer < 4 and below < plan.sum():
                assert (states[row] - whole[below][0]).abs().max() < 1e-9
        assert (given[4][row] - whole[-1][0]).abs().max() < 1e-9


TUPLES = ("bloom", "falcon")


@pytest.mark.parametrize("family", TUPLES)
def test_attentions_of_layers_that_return_them_have_one_entry_for_each_layer(family):
    """The last visit's, if all rows made it; None where a layer is skipped or only some rows run it."""
    model = wrap_model(tiny_model(family, attention="eager"), plan=PLAN)
    ids, _ = random_batch([9, 9], seed=1)
    given = model(ids, output_attentions=True).attentions
    whole = bake(tiny_model(family, attention="eager"), PLAN)(
        ids, output_attentions=True
    ).attentions
    assert given[0] is None
    for layer, execution in ((1, 1), (2, 2), (3, 4)):
        assert torch.equal(given[layer], whole[execution])
    with model.dynadepth.plans([[1, 1, 1, 1], [1, 0, 1, 1]]):
        given = model(ids, output_attentions=True).attentions
    assert [entry is None for entry in given] == [False, True, False, False]


@pytest.mark.parametrize("family", [name for name in MECHANISMS if name not in TUPLES])
def test_attentions_have_one_entry_for_each_execution(family):
    model = wrap_model(tiny_model(family, attention="eager"), plan=PLAN)
    base = tiny_model(family, attention="eager")
    ids, _ = random_batch([9, 9, 9], seed=1)
    given, whole = (
        each(ids, output_attentions=True).attentions for each in (model, bake(base, PLAN))
    )
    assert len(given) == len(whole) == 5
    assert all(torch.equal(*entry) for entry in zip(given, whole, strict=True))

    # Rows with plans of their own: an entry holds the rows that run, in order.
    plans = mixed_plans(4, 3, seed=2)
    with model.dynadepth.plans(plans):
        given = model(ids, output_attentions=True).attentions
    alone = [
        iter(bake(base, plan)(ids[row : row + 1], output_attentions=True).attentions)
        for row, plan in enumerate(plans)
    ]
    executions = [
        (layer, visit) for layer in range(4) for visit in (0, 1) if (plans[:, layer] > visit).any()
    ]
    assert len(given) == len(executions)
    for entry, (layer, visit) in zip(given, executions, strict=True):
        runs = [row for row in range(3) if plans[row, layer] > visit]
        expected = torch.cat([next(alone[row]) for row in runs])
        # eager attention rounds its softmax to float32
        assert (entry - expected).abs().max() < 1e-5
    assert all(next(rest, None) is None for rest in alone)


def reloaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("family", MECHANISMS)
@pytest.mark.parametrize("twin_of", [copy.deepcopy, reloaded])
def test_a_twin_stands_alone(twin_of, family):
    model, base = wrap_model(tiny_model(family), plan=PLAN), tiny_model(family)
    twin, expected = twin_of(model), bake(base, PLAN)
    assert_same(twin, expected)
    assert twin.dynadepth is not model.dynadepth
    assert [type(module) for module in twin.modules()] == [
        type(module) for module in model.modules()
    ]
    ids, _ = random_batch([9], seed=1)
    settings = {"max_new_tokens": 5, "do_sample": False}
    with twin.dynadepth.plans([1, 1, 0, 1]):
        assert_same(model, expected)
        assert torch.equal(
            twin.generate(ids, **settings), bake(base, [1, 1, 0, 1]).generate(ids, **settings)
        )
        assert torch.equal(model.generate(ids, **settings), expected.generate(ids, **settings))

    # The twin runs its own weights.
    other = tiny_model(family, seed=1)
    twin.load_state_dict(other.state_dict())
    assert_same(twin, bake(other, PLAN))
    assert_same(model, expected)

    unwrap_model(model)
    assert_same(model, base)
    assert_same(twin, bake(other, PLAN))
    unwrap_model(twin)
    assert_same(twin, other)
    assert type(layer_stack(twin).layers[0]) is type(layer_stack(other).layers[0])
    assert_same(wrap_model(twin, plan=PLAN), bake(other, PLAN))


@pytest.mark.parametrize("twin_of", [copy.deepcopy, reloaded])
def test_a_twin_decides_with_routers_of_its_own(twin_of):
    base = tiny_model(dtype=torch.float32)
    routers = random_routers(fingerprint=fingerprint(base))
    model = wrap_model(tiny_model(dtype=torch.float32), budget=0.7, routers=routers)
    twin = twin_of(model)
    unwrap_model(model)
    ids, mask = random_batch([9], seed=1)
    assert torch.equal(drive(model, ids, mask, 9, "full"), drive(base, ids, mask, 9, "full"))
    logits = drive(twin, ids, mask, 9, "full")
    plan = twin.dynadepth.last_plans[0]
    assert plan.tolist() != [1, 1, 1, 1]
    assert torch.equal(logits, drive(bake(base, plan), ids, mask, 9, "full"))


@pytest.mark.parametrize("family", MECHANISMS)
def test_a_saved_wrapped_model_is_the_base_byte_for_byte(family, tmp_path):
    base, model = tiny_model(family), wrap_model(tiny_model(family), plan=PLAN)
    drive(model, *random_batch([9]), 5, "steps")
    for name, saved in (("base", base), ("wrapped", model)):
        saved.save_pretrained(tmp_path / name)
    files = [
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("base", "wrapped")
    ]
    assert files[0].keys() >= {"config.json", "model.safetensors"}
    assert files[0] == files[1]
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "wrapped", dtype=torch.float64, experts_implementation="eager"
    )
    assert not hasattr(again, "dynadepth")
    assert_same(again, base)
    assert_same(model, bake(base, PLAN))


@pytest.mark.parametrize("name", ["generate", "generate_batch"])
def test_a_replaced_method_is_refused(name):
    model = tiny_model()
    setattr(model, name, lambda *_, **__: None)
    before = dict(model.__dict__)
    with pytest.raises(WrapError, match=f"another library has replaced this model's {name}"):
        wrap_model(model, plan=PLAN)
    assert model.__dict__ == before
