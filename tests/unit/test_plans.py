"""Plans: the checks that every plan passes, and the arithmetic of depth."""

import numpy as np
import pytest
import torch

from dynadepth.errors import PlanError
from dynadepth.plans import (
    EXECUTE,
    NUM_ACTIONS,
    REPEAT,
    SKIP,
    check_plans,
    identity_plan,
    parse_plan,
    plan_depth,
    plan_text,
)


def test_an_action_is_the_number_of_times_a_layer_runs():
    assert [int(SKIP), int(EXECUTE), int(REPEAT)] == [0, 1, 2]
    assert NUM_ACTIONS == 3


def test_the_identity_plan_executes_every_layer():
    plan = identity_plan(5)
    assert plan.dtype == np.uint8
    assert plan.tolist() == [1, 1, 1, 1, 1]
    assert float(plan_depth(plan)) == 1.0


@pytest.mark.parametrize(
    "plans",
    [
        [1, 0, 2],
        [[1, 0, 2]],
        (1, 0, 2),
        np.array([1, 0, 2], dtype=np.int64),
        np.array([[1, 0, 2]], dtype=np.uint8),
        torch.tensor([1, 0, 2]),
    ],
)
def test_plans_come_as_anything_that_numpy_reads(plans):
    checked = check_plans(plans, 3)
    assert checked.dtype == np.uint8
    assert checked.tolist() == [[1, 0, 2]]


def test_checked_plans_are_a_copy():
    given = np.array([[1, 0, 2]], dtype=np.uint8)
    checked = check_plans(given, 3)
    checked[0, 0] = 0
    assert given[0, 0] == 1


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ([1, 1], "names 2 layers, but the model has 3 decoder layers"),
        ([[1, 1, 1, 1]], "names 4 layers, but the model has 3 decoder layers"),
        ([[1, 1, 3]], r"plan 0 has action 3 at layer 2; expected 0 \(skip\), 1 \(execute\) or 2"),
        ([[1, 1, 1], [1, -1, 1]], "plan 1 has action -1 at layer 1"),
        # 257 is 1 as uint8: the check comes before the conversion.
        ([257, 1, 1], "plan 0 has action 257 at layer 0"),
        ([[1, 1, 1], [0, 0, 0]], "plan 1 skips all 3 layers; at least one layer must run"),
        ([1.0, 1.0, 0.5], r"an array of float64 with shape \(3,\); expected whole numbers"),
        ([True, True, False], "an array of bool"),
        ("111", "an array of <U3"),
        (1, r"shape \(\); expected whole numbers of shape \(3,\) or \(rows, 3\)"),
        ([[[1, 1, 1]]], r"shape \(1, 1, 3\)"),
        ([], r"shape \(0,\)"),
        ([[1, 1, 1], [1, 1]], "plans cannot be read as one array"),
        (None, "an array of object"),
    ],
)
def test_wrong_plans_are_named(plans, message):
    with pytest.raises(PlanError, match=message):
        check_plans(plans, 3)


def test_the_number_of_rows_is_checked_when_it_matters():
    assert len(check_plans([[1, 1], [1, 0]], 2, num_rows=2)) == 2
    with pytest.raises(PlanError, match="2 plans were given for 3 rows; give one plan for each"):
        check_plans([[1, 1], [1, 0]], 2, num_rows=3)


def test_depth_is_a_fraction_of_the_layers():
    depths = plan_depth(np.array([[0, 1, 0, 0], [2, 2, 2, 2], [1, 1, 1, 1]], dtype=np.uint8))
    assert depths.tolist() == [0.25, 2.0, 1.0]
    # 130 repeats do not overflow uint8.
    assert float(plan_depth(np.full(130, 2, dtype=np.uint8))) == 2.0


def test_a_plan_is_written_as_digits():
    assert plan_text(np.array([1, 0, 2], dtype=np.uint8)) == "102"
    assert plan_text([1, 1]) == "11"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "plan '' cannot be read; expected 3 digits, one for each layer"),
        ("11x", "plan '11x' cannot be read"),
        ("1 1", "plan '1 1' cannot be read"),
        ("113", "plan '113' cannot be read"),
        # A digit to str.isdigit, but not one of ours.
        ("11²", "plan '11²' cannot be read"),
        ("11", "names 2 layers, but the model has 3"),
        ("000", "skips all 3 layers"),
    ],
)
def test_wrong_text_is_named(text, message):
    with pytest.raises(PlanError, match=message):
        parse_plan(text, 3)
