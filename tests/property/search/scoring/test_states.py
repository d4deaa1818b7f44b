"""Numbers of prefixes: equal for equal actions before a layer, and counted in the order of the plans."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dynadepth.plans import prefix_numbers


@st.composite
def batches(draw):
    num_layers = draw(st.integers(1, 9))
    shape = (draw(st.integers(1, 30)), num_layers)
    # Few actions, so that prefixes agree often.
    plans = draw(arrays.arrays(np.uint8, shape, elements=st.sampled_from([0, 1, 1, 2])))
    return plans, draw(st.integers(0, num_layers))


@given(batches())
def test_numbers_are_those_of_distinct_prefixes(batch):
    plans, layer = batch
    numbers = prefix_numbers(plans, layer)
    prefixes = [tuple(plan[:layer]) for plan in plans.tolist()]
    assert numbers.shape == (len(plans),)
    assert numbers.dtype == np.int64
    listed = list(dict.fromkeys(prefixes))
    assert numbers.tolist() == [listed.index(prefix) for prefix in prefixes]


@given(batches())
def test_a_longer_prefix_parts_plans_and_never_joins_them(batch):
    plans, layer = batch
    before, after = prefix_numbers(plans, layer - 1 if layer else 0), prefix_numbers(plans, layer)
    # One shorter prefix behind each longer one, and numbers that never run ahead of the plans.
    assert len({*zip(after.tolist(), before.tolist(), strict=True)}) == after.max() + 1
    assert (np.maximum.accumulate(after) <= np.arange(len(plans))).all()
    assert (after >= before).all()


@given(batches())
def test_memory_order_and_later_actions_do_not_matter(batch):
    plans, layer = batch
    numbers = prefix_numbers(plans, layer).tolist()
    assert prefix_numbers(np.asfortranarray(plans), layer).tolist() == numbers
    other = plans.copy()
    other[:, layer:] = 2 - other[:, layer:]
    assert prefix_numbers(other, layer).tolist() == numbers


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_first_plan_has_number_0(layer):
    plans = np.array([[2, 0], [1, 0], [2, 1], [1, 0]], dtype=np.uint8)
    expected = {0: [0, 0, 0, 0], 1: [0, 1, 0, 1], 2: [0, 1, 2, 1]}[layer]
    assert prefix_numbers(plans, layer).tolist() == expected
