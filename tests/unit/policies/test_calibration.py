"""Budgets: the table from penalty to depth, and what is no budget."""

import math

import numpy as np
import pytest

from dynadepth.errors import BudgetError, ConfigError
from dynadepth.policies.calibration import Calibration, PenaltyMix, calibrate

TABLE = {"lambdas": [2.0, 0.5, -1.0], "depths": [0.5, 0.75, 1.125], "lowest": 0.5, "highest": 1.0}


@pytest.fixture
def table():
    return Calibration.from_dict(TABLE)


class Steps:
    """A mean depth that falls in steps, and how often it was asked for."""

    def __init__(self, jumps, depths):
        self.jumps, self.depths, self.asked = jumps, depths, []

    def __call__(self, penalty):
        self.asked.append(penalty)
        return self.depths[sum(penalty >= jump for jump in self.jumps)]


@pytest.mark.parametrize(
    ("budget", "penalty", "depth"),
    [
        (0.5, 2.0, 0.5),
        (0.62, 2.0, 0.5),
        (0.63, 0.5, 0.75),
        (1.0, -1.0, 1.125),
        (0.8, 0.5, 0.75),
        (np.float32(0.5), 2.0, 0.5),
        (1, -1.0, 1.125),
        # Halfway between two depths, exactly in float32: the lower one.
        (0.625, 2.0, 0.5),
    ],
)
def test_the_nearest_entry_is_chosen(table, budget, penalty, depth):
    assert table.penalty_for(budget) == penalty
    assert table.depth_for(budget) == depth


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (-1, "budget -1 is out of reach"),
        (0, "budget 0 is out of reach"),
        (math.nan, "budget nan is out of reach"),
        (3, "budget 3 is out of reach"),
        (1.01, "budget 1.01 is out of reach"),
        (math.inf, "budget inf is out of reach"),
        ("0.8", "budget '0.8' is a str, not a number"),
        (True, "budget True is a bool, not a number"),
        (None, "budget None is a NoneType, not a number"),
    ],
)
def test_what_is_no_budget_is_refused_by_name_of_the_range(table, budget, text):
    with pytest.raises(BudgetError) as caught:
        table.penalty_for(budget)
    assert str(caught.value).startswith(text)
    assert "within the calibrated range, 0.5 to 1.0" in str(caught.value)


def test_the_ends_named_in_the_error_are_accepted():
    depths = (1 / 3, 2 / 3)
    table = Calibration(lambdas=(1.0, 0.0), depths=depths, lowest=1 / 3, highest=2 / 3)
    with pytest.raises(BudgetError) as caught:
        table.penalty_for(0.1)
    named = str(caught.value).split("range, ")[1].split(" (")[0].split(" to ")
    assert [table.depth_for(float(end)) for end in named] == list(depths)


def test_to_dict_comes_back(table):
    assert Calibration.from_dict(table.to_dict()) == table


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lowst": 1.0}, "did you mean 'lowest'"),
        ({"depths": [0.5, 0.5, 1.1]}, "depths must rise"),
        ({"lambdas": [2.0, 3.0, -1.0]}, "lambdas fall"),
        ({"depths": [0.5, 0.75]}, "3 lambdas and 2 depths"),
        ({"depths": [0.5, math.nan, 1.1]}, "finite number"),
        ({"lambdas": "abc"}, "finite number"),
        ({"lowest": 0.4}, "expected a range within its depths 0.5 to 1.125"),
        ({"highest": 0.4}, "expected a range within its depths"),
        ({"lambdas": [], "depths": []}, "at least one"),
    ],
)
def test_a_damaged_table_is_refused(change, text):
    with pytest.raises(ConfigError, match=text):
        Calibration.from_dict({**TABLE, **change})


def test_entries_that_cannot_be_trusted_are_mixed_over():
    depths = (0.5, 0.6, 0.7, 0.8, 1.0)
    table = Calibration(lambdas=(5.0, 4.0, 3.0, 2.0, 1.0), depths=depths, lowest=0.5, highest=0.9)
    spread = {5.0: 1.0, 4.0: 0.01, 3.0: 0.002, 2.0: 0.0021, 1.0: 1.0}
    steady = table.steady(spread.__getitem__, 0.002)
    assert (steady.lambdas, steady.depths) == ((5.0, 3.0, 1.0), (0.5, 0.7, 1.0))
    assert steady.range == table.range
    assert steady.mix_for(0.6) == PenaltyMix(5.0, 3.0, pytest.approx(0.5))
    assert table.steady(spread.__getitem__, 1.0) == table


def test_steps_are_found_with_few_evaluations():
    steps = Steps([-2.0, 0.1, 0.9, 1.7, 3.0], [1.2, 1.0, 0.9, 0.8, 0.6, 0.1])
    table = calibrate(steps, lowest=0.6, highest=1.0)
    assert table.depths == (0.6, 0.8, 0.9, 1.0)
    assert table.range == (0.6, 1.0)
    assert [steps(penalty) for penalty in table.lambdas] == list(table.depths)


def test_no_penalty_is_asked_twice_and_none_far_from_the_range():
    asked = []

    def depth(penalty):
        asked.append((penalty, 2.0 / (1.0 + math.exp(penalty))))
        return asked[-1][1]

    calibrate(depth, lowest=0.7, highest=0.8, resolution=0.01)
    assert len(asked) == len(set(asked)) > 10
    assert sum(not 0.65 < found < 0.85 for _, found in asked) <= 4


def test_a_range_between_steps_reaches_over_them():
    table = calibrate(Steps([0.0], [1.1, 0.4]), lowest=0.5, highest=1.0)
    assert table.depths == (0.4, 1.1)
    assert table.range == (0.5, 1.0)
    assert table.depth_for(0.5) == 0.4


def test_a_smooth_depth_is_cut_as_finely_as_asked():
    table = calibrate(lambda x: 1.2 / (1.0 + math.exp(x)), lowest=0.3, highest=1.0, resolution=0.02)
    assert max(np.diff(table.depths)) < 0.02
    assert table.range == (0.3, 1.0)
    for budget in np.linspace(0.3, 1.0, 57):
        assert abs(table.depth_for(float(budget)) - budget) <= 0.01


@pytest.mark.parametrize("limit", [3, 8, 20])
def test_the_limit_of_evaluations_is_kept_and_the_table_stays_true(limit):
    asked = []

    def depth(penalty):
        asked.append(penalty)
        return 1.2 / (1.0 + math.exp(penalty))

    table = calibrate(depth, lowest=0.3, highest=1.0, max_evaluations=limit)
    assert len(asked) <= limit
    assert [depth(penalty) for penalty in table.lambdas] == list(table.depths)


def test_a_policy_that_cannot_go_deeper_narrows_the_range():
    table = calibrate(Steps([0.5, 1.5], [0.95, 0.8, 0.7]), lowest=0.5, highest=1.0)
    assert table.range == (0.7, 0.95)
    with pytest.raises(BudgetError, match=r"range, 0\.7 to 0\.95"):
        table.penalty_for(1.0)


def test_one_depth_only():
    table = calibrate(lambda _: 0.75, lowest=0.5)
    assert (table.lambdas, table.depths, table.range) == ((0.0,), (0.75,), (0.75, 0.75))
    with pytest.raises(ConfigError, match=r"reaches mean depths from 0\.75 to 0\.75, none of the"):
        calibrate(lambda _: 0.75, lowest=0.8)


def test_entries_out_of_order_are_left_out():
    depths = {0.0: 1.0, 1.0: 0.8, 4.0: 0.5}

    def depth(penalty):
        known = {2.5: 0.85, 1.75: 0.75}
        return known.get(penalty, depths.get(penalty, 0.5 if penalty > 4 else 1.0))

    table = calibrate(depth, lowest=0.5, highest=1.0, max_evaluations=5)
    assert list(table.depths) == sorted(table.depths)
    assert all(a > b for a, b in zip(table.lambdas, table.lambdas[1:], strict=False))
    assert table.range == (0.5, 1.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"lowest": 0.0},
        {"lowest": 0.9, "highest": 0.8},
        {"lowest": 0.5, "highest": 2.5},
        {"lowest": 0.5, "resolution": 0.0},
        {"lowest": math.nan},
        {"lowest": 0.5, "max_evaluations": 2},
    ],
)
def test_settings_out_of_range_are_refused_before_any_evaluation(settings):
    asked = []
    with pytest.raises(ConfigError, match="cannot calibrate from"):
        calibrate(asked.append, **settings)
    assert asked == []


def test_a_depth_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match=r"mean depth at lambda 0\.0 is nan"):
        calibrate(lambda _: math.nan, lowest=0.5)
