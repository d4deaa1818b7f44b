"""Which threshold keeps a promise: what held-out prompts said of each, by either bound, and what is refused."""

import pytest

from dynadepth.errors import BudgetError, ConfigError
from dynadepth.exits.exit_calibration import ExitCalibration
from dynadepth.exits.exit_stats import passes_alone


def table(**changes):
    columns = {
        "thresholds": (6.0, 4.0, 2.0, 0.0),
        "passes": (1.0, 0.9, 0.8, 0.7),
        "kept": (1.0, 0.995, 0.98, 0.95),
        "likely": (1.0, 0.99, 0.97, 0.93),
        "certain": (1.0, 0.97, 0.95, 0.90),
        "prompts": 100,
    }
    return ExitCalibration(**{**columns, **changes})


class TestAPromise:
    @pytest.mark.parametrize(
        ("fidelity", "threshold"), [(0.99, 4.0), (0.97, 2.0), (0.98, 3.0), (0.93, 0.0)]
    )
    def test_begins_where_prompts_say(self, fidelity, threshold):
        assert table().threshold_for(fidelity) == pytest.approx(threshold)

    @pytest.mark.parametrize(("fidelity", "threshold"), [(0.97, 4.0), (0.96, 4.0), (0.95, 2.0)])
    def test_that_must_hold_is_never_between_rows(self, fidelity, threshold):
        assert table().threshold_for(fidelity, certain=True) == threshold

    def test_a_row_counts_only_as_much_as_all_stricter_ones(self):
        odd = table(likely=(1.0, 0.95, 0.97, 0.93))
        with pytest.raises(BudgetError, match=r"to 0\.95"):
            odd.threshold_for(0.96)
        assert odd.threshold_for(0.95) == 2.0

    @pytest.mark.parametrize("fidelity", [0.5, 1.2, "most", None, True, float("nan")])
    def test_outside_of_what_was_measured_is_refused(self, fidelity):
        with pytest.raises(BudgetError, match=r"expected a share from 0\.93"):
            table().threshold_for(fidelity)

    def test_what_prompts_cannot_prove_says_so(self):
        with pytest.raises(BudgetError, match="more held-out prompts than 100"):
            table().threshold_for(0.99, certain=True)


class TestABudget:
    def test_is_a_straight_line_between_rows(self):
        assert table().threshold_at(0.75) == pytest.approx(1.0)
        assert table().threshold_at(0.8) == pytest.approx(2.0)
        assert table().threshold_at(0.95) == pytest.approx(5.0)
        assert table().threshold_at(1.0) == float("inf")

    def test_has_the_passes_as_depths(self):
        budgets = table().budgets()
        assert budgets.range == (0.7, 1.0)
        assert budgets.penalty_for(0.8) == -2.0


class TestATable:
    @pytest.mark.parametrize(
        "changes",
        [
            {"thresholds": (6.0, 2.0, 4.0, 0.0)},
            {"passes": (1.0, 0.9, 0.9, 0.7)},
            {"kept": (1.0,)},
            {"prompts": "many"},
        ],
    )
    def test_that_makes_no_sense_is_refused(self, changes):
        with pytest.raises(ConfigError):
            table(**changes)

    def test_comes_back_from_json(self):
        assert ExitCalibration.from_dict(table().to_dict()) == table()


class TestPassesOfARow:
    @pytest.mark.parametrize(
        ("layers_run", "window", "passes"),
        [
            ([4, 4, 4], 8, 1.0),
            ([1, 1, 1], 8, 0.25),
            # The window is full at every second token.
            ([1, 1, 1, 1], 2, (1 + 4 + 1 + 4) / 16),
            ([1, 2, 4], 8, 7 / 12),
            ([1, 1], 1, 1.0),
            ([], 8, 0.0),
        ],
    )
    def test_a_call_serves_all_that_settle_in_it(self, layers_run, window, passes):
        assert passes_alone(layers_run, 4, window) == pytest.approx(passes)
