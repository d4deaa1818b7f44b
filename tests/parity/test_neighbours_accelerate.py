"""accelerate: dispatched and offloaded models run the plan, and a layer that is skipped loads no weights."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, remove_hook_from_submodules

from dynadepth.errors import WrapError
from dynadepth.wrapping.bake import bake
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from tests.parity.drivers import MODES, baked_rows, drive, mixed_plans
from tests.tiny import random_batch, tiny_model

PLAN = np.array([0, 2, 1, 2], dtype=np.uint8)


def dispatched(model, folder):
    """The layers on disk, all else on the CPU; layers have hooks too, which `cpu_offload` gives to their parts only."""
    places = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    places |= {f"model.layers.{layer}": "disk" for layer in range(4)}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


def on_the_host(model, _folder):
    return cpu_offload(model, execution_device=torch.device("cpu"))


def on_disk(model, folder):
    return disk_offload(model, folder, execution_device=torch.device("cpu"))


OFFLOADS = (dispatched, on_the_host, on_disk)


def placed_and_wrapped(offload, order, folder):
    model = tiny_model("gemma3")
    if order == "wrapped first":
        wrap_model(model, plan=PLAN)
    model = offload(model, str(folder))
    if order == "placed first":
        wrap_model(model, plan=PLAN)
    return model


def assert_same(model, expected):
    ids, mask = random_batch([9, 9], seed=1)
    for mode in MODES:
        difference = drive(model, ids, mask, 5, mode) - drive(expected, ids, mask, 5, mode)
        assert difference.abs().max() < 1e-9, mode


@pytest.fixture
def loads(monkeypatch):
    """How often the weights of each layer's modules are brought to the device they run on."""
    counted = Counter()
    load = AlignDevicesHook.pre_forward

    def count(hook, module, *args, **kwargs):
        if hook.offload and any(True for _ in module.parameters(recurse=False)):
            counted[module] += 1
        return load(hook, module, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", count)

    def of_layers(model):
        numbers = [
            sum(counted[module] for module in layer.modules()) for layer in model.model.layers
        ]
        counted.clear()
        return numbers

    return of_layers


@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
@pytest.mark.parametrize("order", ["wrapped first", "placed first"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_offloaded_model_runs_the_plan_and_loads_what_runs(offload, order, tmp_path, loads):
    model, base = placed_and_wrapped(offload, order, tmp_path), tiny_model("gemma3")
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    expected = bake(base, PLAN)
    assert_same(model, expected)
    ids, mask = random_batch([9, 9], seed=1)
    per_visit = sum(
        any(True for _ in module.parameters(recurse=False))
        for module in base.model.layers[0].modules()
    )
    loads(model)
    drive(model, ids, mask, 9, "full")
    assert loads(model) == [per_visit * int(action) for action in PLAN]
    settings = {"max_new_tokens": 4, "do_sample": False, "attention_mask": mask}
    assert torch.equal(model.generate(ids, **settings), expected.generate(ids, **settings))

    plans = mixed_plans(4, 3, seed=2)
    ids, mask = random_batch([6, 9, 4], seed=1)
    with model.dynadepth.plans(plans):
        logits = drive(model, ids, mask, 5, "steps")
    for row, rows in enumerate(baked_rows(base, plans, ids, mask, padded=False)):
        assert (logits[row][mask[row].bool()] - rows).abs().max() < 1e-9

    twin = copy.deepcopy(model)
    unwrap_model(model)
    assert_same(twin, expected)
    assert_same(model, base)
    drive(model, ids, mask, 9, "full")
    assert loads(model)[0] > 0


@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
@pytest.mark.parametrize("order", ["wrapped first", "placed first"])
def test_hooks_may_go_before_the_plan_or_after_it(order, tmp_path):
    base = tiny_model("gemma3")
    expected = bake(base, PLAN)
    model = placed_and_wrapped(dispatched, order, tmp_path)
    remove_hook_from_submodules(model)
    assert "forward" in model.model.layers[0].__dict__
    assert_same(model, expected)
    unwrap_model(model)
    assert_same(model, base)
    # accelerate leaves the layers' own forward behind as an attribute, which is no change by another library.
    wrap_model(model, plan=PLAN)
    assert_same(model, expected)

    model = placed_and_wrapped(dispatched, order, tmp_path)
    unwrap_model(model)
    remove_hook_from_submodules(model)
    assert_same(model, base)


def test_a_replaced_forward_under_a_hook_of_accelerate_is_refused(tmp_path):
    model = tiny_model("gemma3")
    model.model.layers[2].forward = lambda hidden_states, *_, **__: hidden_states
    dispatched(model, str(tmp_path))
    with pytest.raises(
        WrapError, match=r"forward of decoder layer 2 .* was replaced by another library"
    ):
        wrap_model(model, plan=PLAN)
