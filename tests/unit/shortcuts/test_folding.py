"""Maps folded into a layer's output projection: exact where a layer allows it, refused with the reason elsewhere."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dynadepth.errors import ConfigError, PlanError, UnsupportedModelError
from dynadepth.models.structure import layer_stack
from dynadepth.proving.prove import proved_stack
from dynadepth.shortcuts.folding import find_projection, fit_fold, skipped_runs
from dynadepth.shortcuts.maps import LinearShortcut
from dynadepth.shortcuts.moments import Moments
from dynadepth.wrapping.bake import bake, save_checkpoint
from tests.tiny import FAMILIES, VARIANTS, random_batch, tiny_model

WIDTH = 32
NORM = "does not add the output of its mlp as it is; a norm, or something else, is behind it"
EXPERTS = "its mlp does not end in one projection to a state, as experts do not"
NO_MODULE = "no feed-forward module that takes and returns states alone"
# Why nothing can be folded into the third layer of these.
REFUSED = {
    **dict.fromkeys(("gemma2", "gemma3", "olmo2", "glm4"), NORM),
    **dict.fromkeys(("mixtral", "qwen2_moe", "olmoe"), EXPERTS),
    **dict.fromkeys(("opt", "opt, post-norm", "bloom", "gpt_oss", "llama4"), NO_MODULE),
}
FOLDED = [name for name in (*FAMILIES, *VARIANTS) if name not in REFUSED]
PLAN = [1, 1, 1, 0]


def random_map(projection, *, seed=0):
    """Return a strong map, with a bias where the projection has one."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) / WIDTH**0.5
    bias = torch.randn(WIDTH, generator=generator, dtype=torch.float64) * projection.has_bias
    return LinearShortcut(first, None, bias)


def returned(module, run):
    """Return what a module gives during a forward: the states alone, copied."""
    seen = []
    handle = module.register_forward_hook(
        lambda _module, _args, output: seen.append(
            (output if isinstance(output, torch.Tensor) else output[0]).clone()
        )
    )
    with torch.no_grad():
        run()
    handle.remove()
    return seen[0]


def close(found, expected, bound=1e-11):
    return float((found - expected).abs().max()) <= bound * (1 + float(expected.abs().max()))


@pytest.mark.parametrize("family", FOLDED)
def test_what_the_module_adds_goes_through_the_map(family):
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stack = proved_stack(model)
    projection = find_projection(stack, 2)
    layer, module = stack.layers[2], stack.layers[2].get_submodule(stack.traits.feed_forward)
    shortcut = random_map(projection)
    turned = torch.eye(WIDTH, dtype=torch.float64) + shortcut.A
    ids, mask = random_batch([9, 5])

    def run():
        model(ids, attention_mask=mask)

    output, leaving = returned(module, run), returned(layer, run)
    projection.fold(shortcut)
    assert close(returned(module, run), output @ turned + shortcut.b / projection.share)
    share = {"granite": 0.5}.get(family, 1.0)
    assert projection.share == pytest.approx(share, rel=1e-12)
    moved = share * (output @ turned - output) + shortcut.b
    assert close(returned(layer, run), leaving + moved)
    projection.fold(None)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(returned(layer, run), leaving)


@pytest.mark.parametrize("family", FOLDED)
def test_a_folded_checkpoint_reloads_to_the_same_logits(family, tmp_path):
    model = tiny_model(family)
    baked = bake(model, PLAN)
    projection = find_projection(layer_stack(baked).with_traits(proved_stack(model).traits), 2)
    projection.fold(random_map(projection))
    save_checkpoint(baked, tmp_path / "folded", plan=PLAN)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "folded",
        dtype=torch.float64,
        experts_implementation="eager",
        attn_implementation=model.config._attn_implementation,
    )
    ids, _ = random_batch([12])
    with torch.no_grad():
        logits = again(ids).logits
        assert torch.equal(logits, baked(ids).logits)
        assert not close(logits, bake(model, PLAN)(ids).logits, 1e-2)


@pytest.mark.parametrize("family", REFUSED)
def test_a_layer_without_a_projection_or_with_a_norm_behind_it_is_refused(family):
    model = tiny_model(family)
    stack = proved_stack(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match="folded into layer 2 of this") as refusal:
        find_projection(stack, 2)
    assert REFUSED[family] in str(refusal.value)
    assert "`dynadepth bake`" in str(refusal.value)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(module._forward_hooks for module in model.modules())


def test_half_precision_changes_no_verdict():
    for family, refused in (("llama", False), ("granite", False), ("gemma3", True)):
        traits = proved_stack(tiny_model(family)).traits
        stack = layer_stack(tiny_model(family, dtype=torch.bfloat16)).with_traits(traits)
        if refused:
            with pytest.raises(UnsupportedModelError, match="a norm"):
                find_projection(stack, 1)
        else:
            expected = 0.5 if family == "granite" else 1.0
            assert find_projection(stack, 1).share == pytest.approx(expected, rel=1e-2)


def test_of_layers_with_and_without_experts_those_without_take_maps():
    stack = proved_stack(tiny_model("qwen2_moe"))
    assert find_projection(stack, 1).share == pytest.approx(1.0)
    with pytest.raises(UnsupportedModelError, match="into layer 0 of this qwen2_moe"):
        find_projection(stack, 0)


def test_a_shared_expert_is_not_the_whole_output():
    """Its projection gives states and runs last, but the other experts' output is added to it."""
    model = tiny_model("qwen2_moe")
    stack = proved_stack(model)
    mlp = stack.layers[2].mlp
    mlp.shared_expert_gate = torch.nn.Identity()
    mlp.forward = lambda states: mlp.gate(states.flatten(0, 1))[0].sum() + mlp.shared_expert(states)
    with pytest.raises(UnsupportedModelError, match="does more with the output of its projection"):
        find_projection(stack, 2)


def test_quantised_and_absent_weights_are_refused():
    model = tiny_model()
    stack = proved_stack(model)
    projection = stack.layers[1].mlp.down_proj
    projection.weight = torch.nn.Parameter(
        projection.weight.detach().to(torch.float8_e4m3fn), requires_grad=False
    )
    with pytest.raises(UnsupportedModelError, match="the weights of its mlp are quantised"):
        find_projection(stack, 1)
    stack.layers[2].to("meta")
    with pytest.raises(UnsupportedModelError, match="quantised or not in memory"):
        find_projection(stack, 2, called=7)
    with pytest.raises(UnsupportedModelError, match="into layer 7 of this llama"):
        find_projection(stack, 2, called=7)


def test_a_weight_that_layers_share_changes_in_one_of_them():
    model = tiny_model()
    stack = proved_stack(model)
    first, second = (stack.layers[index].mlp.down_proj for index in (1, 3))
    second.weight = first.weight
    before = first.weight.detach().clone()
    projection = find_projection(stack, 1)
    projection.fold(random_map(projection))
    assert not torch.equal(first.weight, before)
    assert torch.equal(second.weight, before)


def test_a_bias_needs_a_place():
    projection = find_projection(proved_stack(tiny_model("llama")), 1)
    assert not projection.has_bias
    with pytest.raises(ConfigError, match="a map with a bias .* projection that has none"):
        projection.fold(LinearShortcut(None, None, torch.ones(WIDTH)))


def test_runs_of_a_plan():
    runs = skipped_runs(np.array([2, 0, 0, 1, 0, 1, 2, 0], dtype=np.uint8))
    found = [(run.first, run.last, run.below, run.place) for run in runs]
    assert found == [(1, 2, 0, 1), (4, 4, 3, 2), (7, 7, 6, 5)]
    with pytest.raises(PlanError, match="plan 0110 skips layer 0; .* before layer 0 there is none"):
        skipped_runs([0, 1, 1, 0])
    with pytest.raises(PlanError, match="plan 112 skips no layer, so there is nothing to fold"):
        skipped_runs([1, 1, 2])


@pytest.mark.parametrize("bias", [False, True])
def test_the_fit_is_weighted_ridge_regression_towards_the_identity(bias):
    generator = torch.Generator().manual_seed(0)
    added, state, lacking = torch.randn(3, 200, 4, generator=generator, dtype=torch.float64)
    state = state * torch.rand(200, 1, generator=generator, dtype=torch.float64).exp() ** 3
    lacking = lacking + 0.7
    moments = Moments.zero(4)
    for rows in (slice(0, 90), slice(90, 200)):
        moments.add(added[rows], (added + lacking)[rows], weighed_by=state[rows])
    found = fit_fold(moments, ridge=0.3, bias=bias)
    weight = 1 / state.square().mean(dim=1, keepdim=True)
    middle = [(weight * each).sum(dim=0) / weight.sum() * bias for each in (added, lacking)]
    left, right = added - middle[0], lacking - middle[1]
    square = left.T @ (weight * left)
    ridge = 0.3 * square.diagonal().mean() * torch.eye(4, dtype=torch.float64)
    expected = torch.linalg.solve(square + ridge, left.T @ (weight * right))
    assert close(found.A, expected)
    assert found.B is None
    assert close(found.b, middle[1] - middle[0] @ expected)
    assert bool(found.b.any()) == bias


class Linearly:
    """Forward hooks that make a layer add a fixed map of what the module of the layer below it has added."""

    def __init__(self, turned, bias, share):
        self.turned, self.bias, self.share = turned, bias, share

    def keep(self, _module, _args, output):
        self.output = output.clone()

    def replace(self, _module, args, kwargs, output):
        entering = args[0] if args else kwargs["hidden_states"]
        leaving = entering + self.share * self.output @ self.turned + self.bias
        return leaving if isinstance(output, torch.Tensor) else type(output)([leaving, *output[1:]])


@pytest.mark.parametrize("family", ["llama", "gpt2", "granite", "falcon", "gpt_neox"])
def test_a_run_that_is_linear_is_recovered(family):
    model = tiny_model(family)
    stack = proved_stack(model)
    below, skipped = stack.layers[1], stack.layers[2]
    module = below.get_submodule(stack.traits.feed_forward)
    plain = bake(model, [1, 1, 0, 1])
    projection = find_projection(layer_stack(plain).with_traits(stack.traits), 1)
    wanted = random_map(projection)
    linear = Linearly(wanted.A, wanted.b, projection.share)
    module.register_forward_hook(linear.keep)
    skipped.register_forward_hook(linear.replace, with_kwargs=True)
    ids, mask = random_batch([11] * 12, seed=1)

    def run():
        model(ids, attention_mask=mask)

    added = projection.share * returned(module, run).flatten(0, 1)
    state, behind = (returned(layer, run).flatten(0, 1) for layer in (below, skipped))
    moments = Moments.zero(WIDTH)
    moments.add(added, added + (behind - state), weighed_by=state)
    # No ridge is lower than ten times float32's rounding, which is all that is left of the difference.
    found = fit_fold(moments, ridge=1e-13, bias=projection.has_bias)
    assert close(found.A, wanted.A, 1e-4)
    others, _ = random_batch([10], seed=2)
    with torch.no_grad():
        base = model(others).logits
        assert not close(plain(others).logits, base, 1e-1)
        projection.fold(found)
        assert close(plain(others).logits, base, 2e-5)
