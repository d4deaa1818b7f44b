"""A planned sweep, carried out on symbols: every plan gets its own visits, and what can be shared is shared."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dynadepth._core import plan_sweep
from dynadepth.errors import PlanError


@st.composite
def batches(draw):
    num_layers = draw(st.integers(1, 8))
    num_plans = draw(st.integers(1, 30))
    num_examples = draw(st.integers(1, 4))
    actions = st.integers(0, 2)
    plans = draw(arrays.arrays(np.uint8, (num_plans, num_layers), elements=actions))
    plans[~plans.any(axis=1), 0] = 1
    example = draw(arrays.arrays(np.uint32, num_plans, elements=st.integers(0, num_examples - 1)))
    return plans, example, num_examples


def visit(layer, state):
    """A layer as a function that tells its order: it appends its number to the state."""
    return f"{state}.{layer}"


def execute(sweep, num_examples):
    states = np.array([f"prompt{number}" for number in range(num_examples)], dtype=object)
    executed = 0
    for layer in range(sweep.num_layers):
        first, second, gather, example = sweep.layer(layer)
        once = np.array([visit(layer, state) for state in states[first]], dtype=object)
        twice = np.array([visit(layer, state) for state in once[second]], dtype=object)
        executed += len(once) + len(twice)
        states = np.concatenate([states, once, twice])[gather]
        assert [state.split(".")[0] for state in states] == [f"prompt{row}" for row in example]
    return states.tolist(), executed


@given(batches())
def test_every_plan_gets_its_own_visits(batch):
    plans, example, num_examples = batch
    sweep = plan_sweep(plans, example, num_examples)
    expected = []
    for plan, prompt in zip(plans.tolist(), example.tolist(), strict=True):
        state = f"prompt{prompt}"
        for layer, action in enumerate(plan):
            for _ in range(action):
                state = visit(layer, state)
        expected.append(state)
    states, executed = execute(sweep, num_examples)
    assert states == expected
    assert executed == sweep.executed_visits
    assert sweep.naive_visits == plans.sum()


@given(batches())
def test_each_distinct_prefix_is_computed_once(batch):
    plans, example, num_examples = batch
    distinct = {
        (prompt, tuple(plan[:layer]), time)
        for plan, prompt in zip(plans.tolist(), example.tolist(), strict=True)
        for layer, action in enumerate(plan)
        for time in range(action)
    }
    assert plan_sweep(plans, example, num_examples).executed_visits == len(distinct)


@given(batches())
def test_plans_enter_each_layer_in_their_own_state(batch):
    plans, example, num_examples = batch
    sweep = plan_sweep(plans, example, num_examples)
    states = np.array([f"prompt{number}" for number in range(num_examples)], dtype=object)
    for layer in range(sweep.num_layers):
        entering = sweep.entering(layer)
        expected = []
        for plan, prompt in zip(plans.tolist(), example.tolist(), strict=True):
            state = f"prompt{prompt}"
            for before, action in enumerate(plan[:layer]):
                for _ in range(action):
                    state = visit(before, state)
            expected.append(state)
        assert entering.dtype == np.int64
        assert states[entering].tolist() == expected
        # Equal states have one row only if the prefixes are equal: which layers were skipped counts too.
        prefixes = [
            (prompt, *plan[:layer])
            for plan, prompt in zip(plans.tolist(), example.tolist(), strict=True)
        ]
        assert len({*zip(entering.tolist(), prefixes, strict=True)}) == len({*prefixes})
        assert len({*entering.tolist()}) == len({*prefixes})
        first, second, gather, _ = sweep.layer(layer)
        once = np.array([visit(layer, state) for state in states[first]], dtype=object)
        twice = np.array([visit(layer, state) for state in once[second]], dtype=object)
        states = np.concatenate([states, once, twice])[gather]


@given(batches())
def test_plans_leave_each_layer_as_they_enter_the_next_and_settle_after_their_last_visit(batch):
    plans, example, num_examples = batch
    sweep = plan_sweep(plans, example, num_examples)
    num_states = num_examples
    for layer in range(sweep.num_layers):
        first, second, gather, _ = sweep.layer(layer)
        leaving, settled = sweep.leaving(layer), sweep.settled(layer)
        last = layer + 1 == sweep.num_layers
        entering = np.arange(len(plans)) if last else sweep.entering(layer + 1)
        assert gather[entering].tolist() == leaving.tolist()
        read = {*second.tolist()}
        read |= {
            int(row) - num_states
            for plan, row in zip(plans, leaving, strict=True)
            if row >= num_states and plan[layer + 1 :].any()
        }
        assert settled.tolist() == sorted({*range(len(first) + len(second))} - read)
        num_states = len(gather)


@given(batches())
def test_indices_are_what_torch_indexes_with(batch):
    plans, example, num_examples = batch
    sweep = plan_sweep(plans, example, num_examples)
    assert all(
        indices.dtype == np.int64
        for layer in range(sweep.num_layers)
        for indices in sweep.layer(layer)
    )
    assert len(sweep.layer(sweep.num_layers - 1)[2]) == len(plans)


def test_arrays_need_not_be_contiguous():
    plans = np.array([[1, 0, 2], [1, 1, 1]], dtype=np.uint8, order="F")
    example = np.array([0, 9, 1, 9], dtype=np.uint32)[::2]
    assert plan_sweep(plans, example, 2).executed_visits == 6


def plans_of(*rows):
    return np.array(rows, dtype=np.uint8)


@pytest.mark.parametrize(
    ("plans", "example", "num_examples", "message"),
    [
        (plans_of([1, 3]), [0], 1, "plan 0 has action 3 at layer 1; expected 0"),
        (plans_of([1, 1], [0, 0]), [0, 0], 1, "plan 1 skips all 2 layers"),
        (plans_of([1, 1]), [4], 3, "plan 0 belongs to prompt 4, but the batch has 3 prompts"),
        (plans_of([1, 1]), [0, 0], 1, "2 actions were given for 2 plans of 2 layers"),
        (
            np.zeros((0, 2), np.uint8),
            [],
            1,
            "at least one plan, one prompt and one layer; got 0 plans",
        ),
        (np.zeros((1, 0), np.uint8), [0], 1, "got 1 plans, 1 prompts, 0 layers"),
        (plans_of([1]), [0], 0, "got 1 plans, 0 prompts, 1 layers"),
    ],
)
def test_bad_input_is_named(plans, example, num_examples, message):
    with pytest.raises(PlanError, match=message):
        plan_sweep(plans, np.array(example, dtype=np.uint32), num_examples)


def test_a_layer_beyond_the_last_is_an_index_error():
    sweep = plan_sweep(plans_of([1, 1]), np.zeros(1, np.uint32), 1)
    with pytest.raises(IndexError, match="layer 2 is not in the sweep; expected an index below 2"):
        sweep.layer(2)
    with pytest.raises(IndexError, match="layer 2 is not in the sweep; expected an index below 2"):
        sweep.entering(2)
    with pytest.raises(IndexError, match="layer 2 is not in the sweep"):
        sweep.leaving(2)
    with pytest.raises(IndexError, match="layer 2 is not in the sweep"):
        sweep.settled(2)


def test_other_dtypes_are_refused_not_converted():
    with pytest.raises(TypeError):
        plan_sweep(np.ones((1, 2), dtype=np.int64), np.zeros(1, np.uint32), 1)
