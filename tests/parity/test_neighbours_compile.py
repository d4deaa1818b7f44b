"""torch.compile: a layer's visits, its parts or the whole model are compiled, and every plan stays right."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from dynadepth.errors import UnsupportedModelError, WrapError
from dynadepth.plans import identity_plan
from dynadepth.wrapping.bake import bake
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from tests.parity.drivers import baked_rows, drive
from tests.tiny import random_batch, tiny_model

# Compiling is slow, so the models have two layers and the plans few visits.
PLANS = ([0, 2], [2, 1])


class Graphs:
    """A backend that runs graphs as they are and counts them, and how often they run."""

    def __init__(self):
        self.made = self.runs = 0

    def __call__(self, graph, _inputs):
        self.made += 1

        def run(*inputs):
            self.runs += 1
            return graph.forward(*inputs)

        return run


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    # The slots of a cache have numbers, so each visit has graphs of its own, and the limit is one for all of them.
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch._dynamo.reset()


def compile_layers(model, graphs):
    for layer in model.model.layers:
        layer.compile(backend=graphs)


def compile_parts(model, graphs):
    for layer in model.model.layers:
        layer.mlp.compile(backend=graphs)


def compile_whole(model, graphs):
    model.compile(backend=graphs)


def assert_plans(model, base):
    ids, mask = random_batch([6], seed=1)
    for plan in PLANS:
        with model.dynadepth.plans(plan):
            for mode in ("full", "steps"):
                difference = drive(model, ids, mask, 4, mode) - drive(
                    bake(base, plan), ids, mask, 4, mode
                )
                assert difference.abs().max() < 1e-9, (plan, mode)
    ids, mask = random_batch([4, 6], seed=1)
    with model.dynadepth.plans(PLANS):
        logits = drive(model, ids, mask, 6, "full")
    for row, rows in enumerate(baked_rows(base, np.array(PLANS), ids, mask, padded=False)):
        assert (logits[row][mask[row].bool()] - rows).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("compiled", "when"),
    [
        (compile_layers, "after"),
        (compile_parts, "before"),
        (compile_parts, "after"),
        (compile_whole, "after"),
    ],
)
def test_a_compiled_model_follows_any_plan(compiled, when):
    graphs, model, base = Graphs(), tiny_model(num_layers=2), tiny_model(num_layers=2)
    ids, mask = random_batch([9], seed=1)
    if when == "before":
        compiled(model, graphs)
        drive(model, ids, mask, 9, "full")
    wrap_model(model, plan=PLANS[0])
    if when == "after":
        compiled(model, graphs)
    assert_plans(model, base)
    assert graphs.runs > graphs.made > 0
    unwrap_model(model)
    assert (
        drive(model, ids, mask, 9, "full") - drive(base, ids, mask, 9, "full")
    ).abs().max() < 1e-9


def test_a_compiled_layer_runs_once_for_each_visit_and_is_compiled_once_for_all_plans():
    graphs = Graphs()
    model = wrap_model(tiny_model(num_layers=2), plan=identity_plan(2))
    compile_layers(model, graphs)
    ids, mask = random_batch([9], seed=1)
    drive(model, ids, mask, 9, "full")
    made = graphs.made
    assert made > 0
    assert graphs.runs == 2
    for plan in PLANS:
        graphs.runs = 0
        with model.dynadepth.plans(plan):
            drive(model, ids, mask, 9, "full")
        assert graphs.runs == sum(plan)
    assert graphs.made == made


def test_copies_of_a_compiled_model_are_not_compiled_and_run_their_own_weights():
    graphs = Graphs()
    model = wrap_model(tiny_model(num_layers=2), plan=PLANS[0])
    compile_layers(model, graphs)
    twin, other = copy.deepcopy(model), tiny_model(num_layers=2, seed=1)
    twin.load_state_dict(other.state_dict())
    assert_plans(twin, other)
    assert graphs.runs == 0


def test_a_layer_compiled_before_wrapping_is_refused():
    model = tiny_model(num_layers=2)
    compile_layers(model, Graphs())
    before = [type(layer) for layer in model.model.layers]
    with pytest.raises(WrapError, match=r"layer 0 was compiled .* call layer.compile\(\)"):
        wrap_model(model, plan=PLANS[0])
    assert [type(layer) for layer in model.model.layers] == before
    assert "dynadepth" not in model.__dict__


def test_the_model_that_torch_compile_returns_is_wrapped_inside():
    model, base = tiny_model(num_layers=2), tiny_model(num_layers=2)
    ids, mask = random_batch([6], seed=1)
    whole = torch.compile(model, backend="eager")
    drive(whole, ids, mask, 6, "full")
    assert wrap_model(whole, plan=PLANS[0]) is whole
    assert whole.dynadepth is model.dynadepth
    assert_plans(whole, base)
    unwrap_model(whole)
    assert not hasattr(model, "dynadepth")
    difference = drive(whole, ids, mask, 6, "full") - drive(base, ids, mask, 6, "full")
    assert difference.abs().max() < 1e-9


def test_a_model_compiled_whole_is_unwrapped_from_outside():
    model = wrap_model(tiny_model(num_layers=2), plan=PLANS[0])
    whole = torch.compile(model, backend="eager")
    assert unwrap_model(whole) is whole
    assert not hasattr(model, "dynadepth")
    assert "generate" not in model.__dict__


def test_what_hides_the_layers_is_refused():
    with pytest.raises(
        UnsupportedModelError, match="DataParallel around a LlamaForCausalLM; call wrap_model"
    ):
        wrap_model(nn.DataParallel(tiny_model(num_layers=2)), plan=PLANS[0])
