"""Other libraries change decoder layers: they patch classes, put modules round layers, exchange and remove them."""

import copy
import functools
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from dynadepth.errors import UnsupportedModelError, WrapError
from dynadepth.execution.sweep import Sweeper
from dynadepth.models.structure import layer_stack
from dynadepth.proving.prove import proved_stack
from dynadepth.wrapping.bake import bake
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from tests.parity.drivers import MODES, drive
from tests.tiny import FAMILIES, MECHANISMS, random_batch, tiny_model

PLAN = np.array([0, 2, 1, 2], dtype=np.uint8)
IDENTITY = "0-3"


def assert_equal_in_all_modes(model, expected):
    ids, mask = random_batch([9, 9], seed=1)
    for mode in MODES:
        assert torch.equal(drive(model, ids, mask, 5, mode), drive(expected, ids, mask, 5, mode))


@pytest.fixture
def patched(monkeypatch):
    """Double what the layers of a model's class give, as a library that replaces the forward of a class does."""

    def patch(model):
        layer_class = type(layer_stack(model).layers[0])
        layer_class = getattr(layer_class, "_dynadepth_base", layer_class)
        original = layer_class.forward

        @functools.wraps(original)
        def forward(self, *args, **kwargs):
            output = original(self, *args, **kwargs)
            return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2

        monkeypatch.setattr(layer_class, "forward", forward)

    return patch


@pytest.mark.parametrize("when", ["before wrapping", "between two wrappings", "while wrapped"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_layer_class_is_what_runs(patched, family, when):
    model, base = tiny_model(family), tiny_model(family)
    ids, mask = random_batch([6], seed=1)
    plain = drive(base, ids, mask, 4, "full")
    if when == "before wrapping":
        patched(model)
    wrap_model(model, plan=IDENTITY)
    if when == "between two wrappings":
        unwrap_model(model)
        patched(model)
        wrap_model(model, plan=IDENTITY)
    if when == "while wrapped":
        assert torch.equal(drive(model, ids, mask, 4, "full"), plain)
        patched(model)
    assert not torch.equal(drive(base, ids, mask, 4, "full"), plain)
    assert_equal_in_all_modes(model, base)
    with model.dynadepth.plans(PLAN):
        difference = drive(model, ids, mask, 4, "full") - drive(
            bake(base, PLAN), ids, mask, 4, "full"
        )
        assert difference.abs().max() < 1e-9


def test_a_sweep_runs_a_class_that_was_patched_since_the_last_one(patched):
    model = tiny_model()
    ids, mask = random_batch([6], seed=1)
    score = torch.tensor([[0, 5]])
    with Sweeper(model, proved_stack(model)) as sweeper:
        before = sweeper.sweep(ids, mask, [[1, 1, 1, 1]], [0], score=score).logits
    patched(model)
    with Sweeper(model, proved_stack(model)) as sweeper:
        after = sweeper.sweep(ids, mask, [[1, 1, 1, 1]], [0], score=score).logits
    assert not torch.allclose(after, before)
    assert torch.allclose(after[0], model(ids, attention_mask=mask).logits[0, 5], atol=1e-9)


def test_a_patch_that_hides_how_the_layer_is_called_is_refused(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(type(model.model.layers[0]), "forward", lambda self, *args, **kwargs: 0)
    with pytest.raises(UnsupportedModelError, match="no argument by name"):
        wrap_model(model, plan=IDENTITY)


class Steered(nn.Module):
    """What a steering library puts round a layer."""

    def __init__(self, layer, push=0.0):
        super().__init__()
        self.layer, self.push = layer, push

    def forward(self, *args, **kwargs):
        output = self.layer(*args, **kwargs)
        if isinstance(output, tuple):
            return (output[0] + self.push, *output[1:])
        return output + self.push


def steer(model, layer_idx, push=0.0):
    layers = layer_stack(model).layers
    layers[layer_idx] = Steered(layers[layer_idx], push)


def unsteer(model):
    layers = layer_stack(model).layers
    for layer_idx, layer in enumerate(layers):
        if isinstance(layer, Steered):
            layers[layer_idx] = layer.layer


@pytest.mark.parametrize("family", MECHANISMS)
def test_a_module_put_round_a_layer_adds_what_it_adds(family):
    model, base = tiny_model(family), tiny_model(family)
    wrap_model(model, plan=IDENTITY)
    for each in (model, base):
        steer(each, 2, push=0.5)
    assert_equal_in_all_modes(model, base)
    with pytest.raises(WrapError, match="is wrapped"):
        bake(model, PLAN)
    with pytest.raises(WrapError, match="wrapped already"):
        wrap_model(model, plan=IDENTITY)


@pytest.mark.parametrize("order", ["unwrapped first", "taken off first", "copied"])
@pytest.mark.parametrize("family", MECHANISMS)
def test_undo_finds_layers_inside_what_was_put_round_them(family, order):
    model, base = tiny_model(family), tiny_model(family)
    wrap_model(model, plan=PLAN)
    steer(model, 1)
    steer(model, 3)
    if order == "copied":
        model = copy.deepcopy(model)
    if order == "taken off first":
        unsteer(model)
        unwrap_model(model)
    else:
        unwrap_model(model)
        unsteer(model)
    assert [type(module) for module in model.modules()] == [type(each) for each in base.modules()]
    assert not [key for module in model.modules() for key in module.__dict__ if "dynadepth" in key]
    assert_equal_in_all_modes(model, base)
    assert_equal_in_all_modes(wrap_model(model, plan=IDENTITY), base)


def exchanged(layers):
    layers[1], layers[2] = layers[2], layers[1]


def replaced(layers):
    layers[2] = tiny_model().model.layers[2]


def removed(layers):
    del layers[3]


def appended(layers):
    layers.append(tiny_model().model.layers[3])


def doubled(layers):
    layers[2] = layers[1]


def with_a_forward_of_its_own(layers):
    layers[2].forward = lambda hidden_states, **_: hidden_states


CHANGES = (exchanged, replaced, removed, appended, doubled, with_a_forward_of_its_own)


@pytest.mark.parametrize("change", CHANGES)
def test_a_stack_that_no_longer_fits_is_refused_and_undone(change):
    model = wrap_model(tiny_model(), plan=PLAN)
    ids, mask = random_batch([6], seed=1)
    before = list(model.model.layers)
    change(model.model.layers)
    for call in (model, functools.partial(model.generate, max_new_tokens=2)):
        with pytest.raises(WrapError, match=r"4 decoder layers.*unwrap_model\(model\)"):
            call(input_ids=ids, attention_mask=mask)
    unwrap_model(model)
    # Also the layers that stand in the model no longer.
    for layer in before:
        layer.__dict__.pop("forward", None)
        assert type(layer) is type(tiny_model().model.layers[0])
        assert "_dynadepth_installed" not in layer.__dict__
    model.model.layers = nn.ModuleList(before)
    assert_equal_in_all_modes(model, tiny_model())


def test_a_list_that_was_replaced_by_a_shorter_one_is_refused_and_undone():
    model = wrap_model(tiny_model(), plan=PLAN)
    layers = model.model.layers
    model.model.layers = layers[:3]
    with pytest.raises(WrapError, match="there are 3 layers"):
        model(torch.tensor([[5, 6]]))
    unwrap_model(model)
    model.model.layers = layers
    assert_equal_in_all_modes(model, tiny_model())


def test_a_layer_that_was_thrown_away_is_not_kept():
    model = wrap_model(tiny_model(), plan=PLAN)
    gone = weakref.ref(model.model.layers[3])
    del model.model.layers[3]
    gc.collect()
    assert gone() is None
