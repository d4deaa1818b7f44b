"""Tuning of a menu's training: honest values, the default as `train` has it, and what is trained in the end."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dynadepth.errors import BudgetError, ConfigError, LabelError
from dynadepth.training.menu.fit import choose_plans, fit_menu, fit_recipe
from dynadepth.training.menu.tradeoff import static_values
from dynadepth_search.scoring.score_table import menu_data
from dynadepth_search.tuning.applying import (
    chosen_trial,
    pareto_trials,
    study_summary,
    train_trial,
)
from dynadepth_search.tuning.menu_tuning import MenuTuning, table_identity
from dynadepth_search.tuning.space import StudyTrial
from dynadepth_search.tuning.studies import run_study
from tests.tiny_scores import MENU, made_up_scores

PARAMS = {
    "layers": "3",
    "rank": 8,
    "ridge": 100.0,
    "closeness": 0.5,
    "factors": 0,
    "shrinkage": 1.0,
    "inner": 0,
    "plans": 6,
    "windows": 0,
}
NEVER = lambda step, value: False  # noqa: E731


@pytest.fixture(scope="module")
def table() -> Any:
    return made_up_scores(120)


@pytest.fixture(scope="module")
def tuning(table: Any) -> MenuTuning:
    return MenuTuning(table, at=0.8)


def trial(number: int, *values: float, default: bool = False, **notes: Any) -> StudyTrial:
    return StudyTrial(
        number=number,
        state="complete" if values else "running",
        params={},
        values=values or None,
        default=default,
        notes=notes,
    )


def static(table: Any, depth: float) -> float:
    data = menu_data(table)
    return float(static_values(data.agreement, data.depths, np.array([depth])).mean())


def test_without_shrinkage_to_prompts_a_trial_is_the_static_mixture(
    tuning: MenuTuning, table: Any
) -> None:
    found = tuning.evaluate({**PARAMS, "shrinkage": 0.0}, NEVER)
    assert found.values == pytest.approx([static(table, 0.8)])
    sizes = np.bincount(menu_data(table).folds(0))
    assert np.average(found.notes["folds"], weights=sizes) == pytest.approx(found.values[0])


def test_what_the_states_tell_is_worth_something_and_chance_is_not(
    tuning: MenuTuning, table: Any
) -> None:
    (found,) = tuning.evaluate(PARAMS, NEVER).values
    assert found > static(table, 0.8) + 0.05
    # The same values, of other prompts than the states.
    rng = np.random.default_rng(1)
    shuffled = replace(
        table, views={layer: view[rng.permutation(120)] for layer, view in table.views.items()}
    )
    (chance,) = MenuTuning(shuffled, at=0.8).evaluate(PARAMS, NEVER).values
    assert chance < static(table, 0.8) + 0.05 < found


def test_every_fold_keeps_to_the_depth_whatever_its_menu_is(table: Any) -> None:
    """A quality that is the depth itself shows what is spent: no setting can buy more of it."""
    depths = menu_data(table).depths
    spending = replace(
        table,
        agreement=np.tile(depths, (len(table), 1)),
        total_variation=np.tile(1 - depths, (len(table), 1)),
    )
    tuning = MenuTuning(spending, at=0.8)
    for plans in (2, 3, 6):
        found = tuning.evaluate({**PARAMS, "plans": plans}, NEVER)
        assert found.values == pytest.approx([0.8])
        assert found.notes["folds"] == pytest.approx(5 * [0.8])


def test_a_value_follows_from_the_settings_alone(tuning: MenuTuning, table: Any) -> None:
    wanted = [{**PARAMS, "inner": 32}, PARAMS, {**PARAMS, "layers": "3+4", "plans": 3}]
    first = [tuning.evaluate(params, NEVER).values for params in wanted]
    fresh = MenuTuning(table, at=0.8)
    assert [fresh.evaluate(params, NEVER).values for params in wanted[::-1]] == first[::-1]


def test_the_default_is_what_train_chooses(tuning: MenuTuning, table: Any) -> None:
    default = tuning.default()
    assert set(default) == {setting.name for setting in tuning.settings}
    recipe = fit_menu(menu_data(table)).recipe
    assert tuning.recipe(default) == recipe
    assert default["plans"] == len(MENU)
    assert tuning.plans(default).tolist() == choose_plans(menu_data(table), 6).tolist()


def test_right_answers_are_a_setting_where_there_are_any() -> None:
    tuning = MenuTuning(made_up_scores(60, graded=True), at=0.8, objective="reward")
    assert "answers" in {setting.name for setting in tuning.settings}
    assert tuning.goals[0].name.startswith("probability of the right answer")
    weights = dict(tuning.recipe({**PARAMS, "answers": 0.5, "closeness": 0.25}).weights)
    assert weights == pytest.approx({"agreement": 0.375, "closeness": 0.125, "reward": 0.5})
    assert 0 < tuning.evaluate({**PARAMS, "answers": 0.5}, NEVER).values[0] < 1
    assert tuning.recipe(tuning.default()).to_dict()["layers"]


def test_two_goals_are_the_depth_asked_for_and_the_quality_there(tuning: MenuTuning, table: Any):
    both = MenuTuning(table)
    found = both.evaluate({**PARAMS, "depth": 0.8}, NEVER)
    assert found.values == (0.8, *tuning.evaluate(PARAMS, NEVER).values)
    assert both.qualities(PARAMS, [1.0]).mean() == pytest.approx(1.0)
    assert not both.qualities(PARAMS, [0.4]).any()


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"at": 0.4}, BudgetError, r"the budget is 0\.4; expected from 0\.5"),
        ({"at": 1.0}, BudgetError, "to below 1"),
        ({"at": float("nan")}, BudgetError, "the budget is nan"),
        ({"objective": "agree"}, ConfigError, "'agree' is unknown"),
        ({"objective": "reward"}, ConfigError, "needs prompts with right answers"),
    ],
)
def test_wrong_settings(table: Any, wrong: dict[str, Any], error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        MenuTuning(table, **wrong)


def test_wrong_tables() -> None:
    with pytest.raises(ConfigError, match="no states"):
        MenuTuning(made_up_scores(60, layers=()))
    with pytest.raises(ConfigError, match="keep the states of layer 3"):
        MenuTuning(made_up_scores(60, layers=(4,)))
    with pytest.raises(ConfigError, match="different prompts cannot train"):
        MenuTuning(made_up_scores(22))


class TestChoice:
    def test_the_best_trial_and_ties(self) -> None:
        trials = [trial(0, 0.5), trial(1), trial(2, 0.7), trial(3, 0.7)]
        assert chosen_trial(trials).number == 2
        assert chosen_trial(trials, number=3).number == 3
        for number in (1, 4):
            with pytest.raises(ConfigError, match=f"no complete trial {number}"):
                chosen_trial(trials, number=number)
        with pytest.raises(ConfigError, match="leave --at-depth out"):
            chosen_trial(trials, at_depth=0.9)
        with pytest.raises(ConfigError, match="no complete trial yet"):
            chosen_trial([trial(0)])

    def test_the_front_and_the_trial_nearest_a_depth(self) -> None:
        trials = [trial(0, 0.9, 0.8), trial(1, 0.8, 0.8), trial(2, 0.7, 0.5), trial(3, 1.0, 1.0)]
        assert [each.number for each in pareto_trials(trials)] == [2, 1, 3]
        assert chosen_trial(trials, at_depth=0.93).number == 3
        assert chosen_trial(trials, at_depth=0.9).number == 1
        # In the middle of two, the lower depth.
        assert chosen_trial(trials, at_depth=0.75).number == 2
        with pytest.raises(ConfigError, match="--at-depth"):
            chosen_trial(trials)

    def test_a_summary_before_the_default_has_ended(self, tuning: MenuTuning) -> None:
        found = study_summary(tuning, [trial(0)])
        assert (found["default"], found["best"], found["comparison"]) == (None, None, None)
        assert found["counts"]["running"] == 1


def test_settings_of_a_fold_are_chosen_by_the_others(tuning: MenuTuning) -> None:
    """A trial that is best in all folds but one is taken for that one, though it is bad there."""
    good, bad = PARAMS, {**PARAMS, "shrinkage": 0.0}
    trials = [
        replace(trial(0, 0.5, default=True, folds=5 * [0.5]), params=bad),
        replace(trial(1, 0.5, folds=[0.0, 0.6, 0.6, 0.6, 0.6]), params=good),
    ]
    found = tuning.findings(trials)["comparison"]
    fold = np.arange(5)
    mixed = tuning.qualities(good, [0.8])[0]
    inside = tuning.qualities(bad, [0.8])[0]
    folds = menu_data(made_up_scores(120)).folds(0)
    # Outside fold 0 the second trial is better; outside any other fold too, by 0.6 * 3 / 4 < 0.5.
    expected = np.where(folds == fold[0], mixed, inside)
    assert found["tuned"] == pytest.approx(expected.mean())
    assert found["default"] == pytest.approx(inside.mean())
    assert found["difference"]["n"] == 120


class TestTraining:
    def test_a_trial_trains_the_menu_that_it_was_judged_as(self, table: Any, tmp_path: Any) -> None:
        tuning = MenuTuning(table, at=0.8)
        run_study(tmp_path, tuning, trials=2)
        params = {**PARAMS, "plans": 4}
        chosen = replace(trial(1, 0.9), params=params)
        study = {"asked": {"kind": "menu", **tuning.asked}}
        trained = train_trial(chosen, table, study, folder=tmp_path)
        rows = tuning.plans(params)
        assert 4 <= len(rows) < 6
        assert trained.menu.plans.tolist() == table.plans[rows].tolist()
        assert trained.training["tuned"] == {"trial": 1, "values": [0.9], "params": params}
        assert trained.training["recipe"] == tuning.recipe(params).to_dict()
        low, high = trained.calibration.range
        assert low < 0.8 < high

    def test_another_table_or_kind_is_refused(self, table: Any, tmp_path: Any) -> None:
        tuning = MenuTuning(table, at=0.8)
        study = {"asked": {"kind": "menu", **tuning.asked}}
        with pytest.raises(LabelError, match=r"not those of the study.*scored_prompts"):
            train_trial(trial(0, 0.9), table.take(np.arange(90)), study, folder=tmp_path)
        study["asked"]["kind"] = "search"
        with pytest.raises(ConfigError, match="expected one of `tune menu`"):
            train_trial(trial(0, 0.9), table, study, folder=tmp_path)
        assert table_identity(table)["scored_prompts"] == 120

    def test_a_part_of_the_plans_scores_as_the_whole(self, table: Any) -> None:
        data, columns = menu_data(table), np.array([0, 2, 5])
        recipe = MenuTuning(table).recipe({**PARAMS, "layers": "3+4", "factors": 1})
        whole = fit_recipe(data, recipe)
        part = fit_recipe(data, recipe, columns=columns)
        assert part.menu.plans.tolist() == data.plans[columns].tolist()
        for all_steps, own in zip(whole.scores, part.scores, strict=True):
            assert np.array_equal(all_steps[:, columns], own)
        for all_heads, head in zip(whole.menu.heads, part.menu.heads, strict=True):
            assert all_heads.weight[columns].equal(head.weight)
        assert part.mean_depth(0.0) >= part.mean_depth(100.0) == data.depths[5]

    def test_a_recipe_that_decides_too_late_is_refused(self, table: Any) -> None:
        recipe = MenuTuning(table).recipe({**PARAMS, "layers": "4"})
        with pytest.raises(ConfigError, match="decides at layer 4, but plans differ from layer 3"):
            fit_recipe(menu_data(table), recipe)
