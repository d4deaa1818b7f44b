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
    plan_ranges,
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
        "102",
        "0,2,2",
        ["0,2,2"],
        ("102",),
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
        (np.array(["111"]), "an array of <U3"),
        (["111", [1, 1]], "plans cannot be read as one array"),
        (["111", "11x"], "plan '11x' cannot be read"),
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


def test_texts_are_one_plan_for_each_row():
    assert check_plans(["0-1", [1, 0, 2], "111"], 3).tolist() == [[1, 1, 0], [1, 0, 2], [1, 1, 1]]
    with pytest.raises(PlanError, match="2 plans were given for 1 rows"):
        check_plans(["0-1", "111"], 3, num_rows=1)


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


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("0-4", [1, 1, 1, 1, 1]),
        ("0-1,3-4,4", [1, 1, 0, 1, 2]),
        # A layer is named twice in a row by two ranges that meet, or by itself.
        ("0-2,2-4", [1, 1, 2, 1, 1]),
        ("0-2,2,3-4", [1, 1, 2, 1, 1]),
        ("0,0,1,1", [2, 2, 0, 0, 0]),
        ("3-3", [0, 0, 0, 1, 0]),
        ("3,3", [0, 0, 0, 2, 0]),
        (" 0 - 1 , 4 ", [1, 1, 0, 0, 1]),
        ("00-01", [1, 1, 0, 0, 0]),
    ],
)
def test_ranges_name_the_layers_in_the_order_of_their_visits(text, plan):
    assert parse_plan(text, 5).tolist() == plan


def test_a_plan_is_written_as_the_fewest_ranges():
    assert plan_ranges([1] * 12 + [0, 0] + [1] * 13 + [2]) == "0-11,14-27,27"
    assert plan_ranges(np.array([1, 2, 2, 1], dtype=np.uint8)) == "0-1,1-2,2-3"


def test_digits_without_a_comma_or_a_dash_are_never_a_layer_number():
    assert parse_plan("12", 2).tolist() == [1, 2]
    assert parse_plan("12-12", 13).tolist() == [0] * 12 + [1]
    with pytest.raises(
        PlanError, match=r"is digits, one for each layer: write \"12-12\" for layer"
    ):
        parse_plan("12", 28)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-3", "names layer 3, but the model has layers 0 to 2"),
        ("0,999999999", "names layer 999999999, but the model has layers 0 to 2"),
        ("2-0", "has the range '2-0', which goes backwards; write 0-2"),
        ("2,0", "goes back from layer 2 to layer 0; a plan visits layers in ascending order"),
        ("0-2,1", "goes back from layer 2 to layer 1"),
        ("0,0,0", "names layer 0 three times"),
        ("0-1,1,1-2", "names layer 1 three times"),
        ("0-1,", "cannot be read at ''"),
        (",", "cannot be read at ''"),
        ("-", "cannot be read at '-'"),
        ("-1", "cannot be read at '-1'"),
        ("0--2", "cannot be read at '0--2'"),
        ("0-1-2", "cannot be read at '0-1-2'"),
        ("0-1,1.5", "cannot be read at '1.5'"),
        ("0-1;2", "cannot be read at '0-1;2'"),
        ("0-1,2\n", r"cannot be read at '2\\n'"),
        # Digits to int(), but not ours.
        ("0-\u0662", "cannot be read at"),
        ("0-" + "9" * 5000, "cannot be read at"),
        ("9" * 5000, "cannot be read"),
        ("0" * 5000, "names 5000 layers, but the model has 3"),
    ],
)
def test_wrong_ranges_are_named(text, message):
    with pytest.raises(PlanError, match=message):
        parse_plan(text, 3)
