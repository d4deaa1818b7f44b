"""A sweep of N plans equals N separate forwards.

Tolerances, as stated for each dtype: float64 1e-9; float32 1e-4 (batched matrix products round differently for another
number of rows, and `initializer_range=0.5` magnifies it).
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from dynadepth.errors import PlanError, WrapError
from dynadepth.execution.sweep import Sweeper
from dynadepth.models.structure import layer_stack
from dynadepth.proving.prove import proved_stack
from dynadepth.training.features import block_influence, prompt_features
from dynadepth.wrapping.bake import bake
from dynadepth.wrapping.wrap import wrap_model
from tests.parity.drivers import Watch, drive
from tests.tiny import FAMILIES, KINDS, MECHANISMS, random_batch, tiny_model

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def separate(model, ids, mask, plan, row):
    real = mask[row].bool()
    return drive(bake(model, plan), ids[row : row + 1, real], mask[row : row + 1, real], 0, "full")[
        0
    ]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("family", "attention"), KINDS)
def test_sweep_equals_separate_forwards(family, attention, dtype):
    model = tiny_model(family, attention=attention, dtype=dtype)
    ids, mask = random_batch([9, 5, 12], seed=1)
    rng = np.random.default_rng(0)
    plans = rng.integers(0, 3, size=(24, 4)).astype(np.uint8)
    plans[plans.sum(axis=1) == 0, 2] = 1
    plans[:3] = [[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 2, 2]]
    example = rng.integers(0, 3, size=24)
    positions = ids.shape[1] - 1 - rng.integers(0, 5, size=40)
    score = torch.tensor(np.stack([rng.integers(0, 24, size=40), positions], axis=1))
    with Sweeper(model, proved_stack(model)) as sweeper:
        result = sweeper.sweep(ids, mask, plans, example, score=score)
    assert result.naive_visits == plans.sum()
    assert result.executed_visits < result.naive_visits
    references = {
        plan: separate(model, ids, mask, plans[plan], int(example[plan]))
        for plan in set(score[:, 0].tolist())
    }
    for logits, (plan, position) in zip(result.logits, score.tolist(), strict=True):
        pads = ids.shape[1] - int(mask[int(example[plan])].sum())
        reference = references[plan][position - pads]
        assert (logits - reference).abs().max().item() < TOLERANCE[dtype]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_plans_and_prompts(data):
    model = tiny_model("gemma3")
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    ids, mask = random_batch(lengths, seed=data.draw(st.integers(0, 9)))
    plan = st.lists(st.integers(0, 2), min_size=4, max_size=4).filter(any)
    plans = np.array(data.draw(st.lists(plan, min_size=1, max_size=8)), dtype=np.uint8)
    example = data.draw(
        st.lists(st.integers(0, len(lengths) - 1), min_size=len(plans), max_size=len(plans))
    )
    score = torch.tensor([[row, ids.shape[1] - 1] for row in range(len(plans))])
    with Sweeper(model, proved_stack(model)) as sweeper:
        result = sweeper.sweep(ids, mask, plans, np.array(example), score=score)
    for row, logits in enumerate(result.logits):
        reference = separate(model, ids, mask, plans[row], example[row])[-1]
        assert (logits - reference).abs().max().item() < 1e-9


@pytest.mark.parametrize("num_plans", [2, 3, 9])
def test_a_stack_that_needs_as_many_rows_as_it_was_given_gets_them(num_plans):
    """GPT-BigCode gives its result the shape of its input, whatever its layers return."""
    config = AutoConfig.for_model(
        "gpt_bigcode",
        vocab_size=97,
        n_embd=32,
        n_head=4,
        n_layer=4,
        n_positions=64,
        initializer_range=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    ids, mask = random_batch([9, 5, 12], seed=1)
    rng = np.random.default_rng(0)
    plans = rng.integers(0, 3, size=(num_plans, 4)).astype(np.uint8)
    plans[:, 2] = 1
    example = np.arange(num_plans) % 3
    score = torch.tensor([[row, 11] for row in range(num_plans)])
    stack = proved_stack(model)
    assert stack.traits.fixed_rows
    watch = Watch([0, 2])
    with Sweeper(model, stack) as sweeper:
        found = sweeper.sweep(ids, mask, plans, example, score=score, observer=watch).logits
    assert [len(states) for _, states, _ in watch.seen][:1] == [3]
    for row, plan in enumerate(plans):
        one = slice(int(example[row]), int(example[row]) + 1)
        expected = drive(bake(model, plan), ids[one], mask[one], 0, "full")[0, -1]
        assert (found[row] - expected).abs().max() < 1e-9


@pytest.mark.parametrize(
    "family",
    [name for name in FAMILIES if name not in ("bloom", "opt")],
)
def test_after_its_last_visit_a_plan_costs_the_scored_tokens_only(family):
    """Of results that no layer visits again only scored tokens pass it, from the last observed layer on."""
    model = tiny_model(family)
    traits = proved_stack(model).traits
    assert traits is not None
    name = traits.feed_forward
    assert name is not None
    ids, mask = random_batch([9, 5, 12], seed=1)
    plans = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 2, 0, 0], [1, 1, 1, 0]], dtype=np.uint8)
    example = np.array([0, 1, 2, 0])
    score = torch.tensor([[0, 11], [0, 10], [1, 11], [2, 11], [3, 11], [3, 11]])
    passed = []
    handles = [
        getattr(layer, name).register_forward_hook(
            lambda _module, args, _output: passed.append(args[0].shape[:2].numel()), prepend=True
        )
        for layer in layer_stack(model).layers
    ]
    with Sweeper(model, proved_stack(model)) as sweeper:
        result = sweeper.sweep(ids, mask, plans, example, score=score)
        counts, passed[:] = list(passed), []
        watched = sweeper.sweep(ids, mask, plans, example, score=score, observer=Watch((3,)))
    for handle in handles:
        handle.remove()
    # Layer 1: prompt 0 goes on, prompts 1 and 2 end here, prompt 2 after its repeat.
    assert counts == [3 * 12, 2 * 12 + 1, 1, 12, 2]
    assert passed == [3 * 12, 3 * 12, 12, 12, 2]
    for logits, again, (plan, position) in zip(
        result.logits, watched.logits, score.tolist(), strict=True
    ):
        row = int(example[plan])
        reference = separate(model, ids, mask, plans[plan], row)[
            position - ids.shape[1] + int(mask[row].sum())
        ]
        assert (logits - reference).abs().max().item() < 1e-9
        assert (again - reference).abs().max().item() < 1e-9


def test_a_sweeper_leaves_no_trace_also_after_an_error():
    model = tiny_model("llama")
    ids, mask = random_batch([6])
    keys = [set(module.__dict__) for module in model.modules()]
    before = drive(model, ids, mask, 6, "full")
    score = torch.tensor([[0, 5]])
    with pytest.raises(ZeroDivisionError), Sweeper(model, proved_stack(model)):
        raise ZeroDivisionError
    with (
        Sweeper(model, proved_stack(model)) as sweeper,
        pytest.raises(PlanError, match="names prompt 3"),
    ):
        sweeper.sweep(ids, mask, [[1, 0, 1, 1]], [3], score=score)
    with (
        Sweeper(model, proved_stack(model)) as sweeper,
        pytest.raises(PlanError, match=r"positions below 6"),
    ):
        sweeper.sweep(ids, mask, [[1, 0, 1, 1]], [0], score=torch.tensor([[0, 6]]))
    assert [set(module.__dict__) for module in model.modules()] == keys
    assert torch.equal(drive(model, ids, mask, 6, "full"), before)
    wrap_model(model, plan=[1, 1, 1, 1])
    with pytest.raises(WrapError, match="wrapped already"), Sweeper(model, proved_stack(model)):
        pass


@pytest.mark.parametrize("family", MECHANISMS)
def test_features_are_the_states_of_the_baked_model(family):
    model = tiny_model(family)
    ids, mask = random_batch([9, 5], seed=2)
    # The last layer runs: transformers' last hidden state is the normed one.
    plans = np.array([[1, 0, 2, 1], [2, 0, 1, 2]], dtype=np.uint8)
    features = prompt_features(model, ids, mask, plans, num_windows=2)
    assert features.shape == (2, 4, 3, 32)
    for row, plan in enumerate(plans):
        real = mask[row].bool()
        with torch.no_grad():
            states = bake(model, plan)(
                ids[row : row + 1, real], output_hidden_states=True
            ).hidden_states
        half = int(real.sum()) // 2
        visits = 0
        for layer, action in enumerate(plan):
            entering = states[visits][0].float()
            expected = torch.stack([entering[:half].mean(0), entering[half:].mean(0), entering[-1]])
            assert torch.allclose(features[row, layer], expected, atol=1e-5)
            visits += int(action)
    assert "dynadepth" not in model.__dict__


def test_block_influence_of_a_layer_that_does_nothing_is_zero():
    model = tiny_model("llama")
    ids, mask = random_batch([9, 5], seed=2)
    with torch.no_grad():
        for name, parameter in model.model.layers[2].named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
    influence = block_influence(model, ids, mask)
    assert influence[2] == pytest.approx(0, abs=1e-6)
    assert (np.delete(influence, 2) > 0.01).all()
    padded = block_influence(model, *random_batch([9, 5], seed=2, side="right"))
    assert np.allclose(influence, padded, atol=1e-6)
