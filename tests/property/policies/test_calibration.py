"""Budgets over random step functions: what is chosen is the nearest depth that can be had."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynadepth.errors import BudgetError
from dynadepth.policies.calibration import calibrate

# Steps that are wide and high enough for the bisection to have to find every one.
_JUMPS = st.lists(st.integers(-2000, 2000), min_size=1, max_size=12, unique=True)


@st.composite
def step_functions(draw):
    jumps = sorted(jump / 100.0 for jump in draw(_JUMPS))
    heights = draw(
        st.lists(st.integers(1, 200), min_size=len(jumps) + 1, max_size=len(jumps) + 1, unique=True)
    )
    return jumps, sorted((height / 100.0 for height in heights), reverse=True)


@given(step_functions(), st.integers(1, 150), st.integers(0, 50), st.floats(0.0, 1.0))
def test_the_nearest_attainable_depth_is_chosen(function, lowest, width, place):
    jumps, depths = function
    lowest, highest = lowest / 100.0, (lowest + width) / 100.0

    def depth_at(penalty):
        return depths[int(np.searchsorted(jumps, penalty, side="right"))]

    if depths[-1] > highest or depths[0] < lowest:
        return
    table = calibrate(
        depth_at, lowest=lowest, highest=highest, resolution=1e-6, max_evaluations=2000
    )
    assert table.range == (max(lowest, depths[-1]), min(highest, depths[0]))
    assert all(depth_at(p) == d for p, d in zip(table.lambdas, table.depths, strict=True))
    low, high = table.range
    for budget in (low, high, low + place * (high - low)):
        nearest = min(abs(depth - budget) for depth in depths)
        chosen = depth_at(table.penalty_for(budget))
        assert abs(chosen - budget) <= nearest + 1e-6
    for budget in (low - 0.001, high + 0.001):
        with pytest.raises(BudgetError):
            table.penalty_for(budget)


@given(step_functions(), st.integers(3, 30))
def test_more_budget_never_means_less_depth(function, limit):
    jumps, depths = function

    def depth_at(penalty):
        return depths[int(np.searchsorted(jumps, penalty, side="right"))]

    table = calibrate(
        depth_at,
        lowest=depths[-1],
        highest=depths[0],
        max_evaluations=limit,
    )
    budgets = np.linspace(*table.range, 23)
    chosen = [depth_at(table.penalty_for(min(float(budget), table.highest))) for budget in budgets]
    assert chosen == sorted(chosen)
