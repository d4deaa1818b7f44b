"""Static fronts: the thresholds by hand, and what is no front."""

import pytest
import torch

from dynadepth.errors import ConfigError, PlanError
from dynadepth.training.static_front import (
    front_bias,
    front_calibration,
    neighbours,
    removed_layers,
)

FRONT = [[1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 1, 0]]


def test_thresholds_are_even_over_one_spread_and_the_rest_follow():
    expected = [[-4.0, 0.0, -4.0], [-1.0, 0.0, -4.0], [-4.0, 0.0, -4.0], [-2.0, 0.0, -4.0]]
    assert torch.equal(front_bias(FRONT, scale=2.0), torch.tensor(expected))


def test_budgets_are_the_fronts_own_depths():
    table = front_calibration(FRONT, front_bias(FRONT, scale=2.0))
    assert table.lambdas == (2.5, 1.5, 0.5)
    assert table.depths == (0.5, 0.75, 1.0)
    assert table.range == (0.5, 1.0)


def test_protected_layers_are_out_of_reach_of_any_penalty_or_router():
    bias = front_bias(FRONT, protect=[0])
    assert bias[0].tolist() == [-1e4, 0.0, -1e4]
    assert torch.equal(bias[1:], front_bias(FRONT)[1:])
    table = front_calibration(FRONT, front_bias(FRONT, protect=[0, 2]))
    assert table.depths == (0.5, 0.75, 1.0)
    assert 1.0 < table.lambdas[0] <= 2.0
    with pytest.raises(
        PlanError, match=r"the static front skips layers \[3\], which are protected"
    ):
        front_bias(FRONT, protect=[3])


def test_the_identity_alone_is_a_front_that_removes_nothing():
    assert removed_layers([[1, 1, 1]]) == []
    table = front_calibration([[1, 1, 1]], front_bias([[1, 1, 1]]))
    assert (table.depths, table.range) == ((1.0,), (1.0, 1.0))


@pytest.mark.parametrize(
    ("front", "message"),
    [
        ([[1, 0, 1]], "starts with a plan that edits layers; expected the identity plan first"),
        ([[1, 1, 1], [0, 0, 1]], r"plan 1 of a static front changes layers \[0, 1\]"),
        ([[1, 1, 1], [1, 1, 1]], r"plan 1 of a static front changes layers \[\]"),
        (
            [[1, 1, 1], [1, 2, 1]],
            r"plan 1 of a static front changes layers \[1\]; expected exactly one layer",
        ),
        ([[1, 1, 1], [0, 1, 1], [1, 0, 1]], r"plan 2 of a static front changes layers \[0, 1\]"),
        ([1, 1, 1], r"a static front is an array of shape \(3,\)"),
        ([], r"a static front is an array of shape \(0,\)"),
    ],
)
def test_what_is_no_front_is_refused(front, message):
    with pytest.raises(PlanError, match=message):
        removed_layers(front)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_must_be_positive_and_finite(scale):
    with pytest.raises(ConfigError, match="expected a positive finite number"):
        front_bias(FRONT, scale=scale)


def test_neighbours_differ_in_one_layer_each():
    assert neighbours([1, 0, 2]).tolist() == [[1, 0, 2], [0, 0, 2], [1, 1, 2], [1, 0, 0]]
    assert neighbours([1, 0, 2]).dtype == "uint8"


def test_a_neighbour_that_would_run_no_layer_is_the_plan_itself():
    assert neighbours([0, 1, 0]).tolist() == [[0, 1, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1]]


@pytest.mark.parametrize("plan", [[1, 3], [0, 0], [0.5, 1], [[1, 1], [1, 1]]])
def test_only_a_plan_has_neighbours(plan):
    with pytest.raises(PlanError):
        neighbours(plan)
