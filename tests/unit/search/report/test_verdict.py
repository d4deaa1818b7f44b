"""The verdict: one sentence, whose words follow from the paired interval of the headline metric."""

from collections.abc import Sequence
from typing import Any

import pytest

from dynadepth_search.report.verdict import verdict
from tests.tiny_evaluation import made_up

BETTER = {"mean": 0.076, "low": 0.058, "high": 0.094, "n": 2550}
NO_BETTER = {"mean": 0.104, "low": -0.062, "high": 0.271, "n": 24}
WORSE = {"mean": -0.031, "low": -0.052, "high": -0.01, "n": 300}


def _policy(
    budget: float,
    difference: dict[str, Any] | None,
    *,
    mean: float = 0.853,
    metric: str = "agreement",
    plans: int = 5,
) -> dict[str, Any]:
    return {
        "name": f"menu {budget:.2f}",
        "kind": "routed",
        "budget": budget,
        "depth": budget + 0.001,
        "n": 24 if difference is None else difference["n"],
        "distinct_plans": plans,
        "metrics": {metric: {"mean": mean}},
        "against_static": None if difference is None else {metric: difference},
    }


def _say(
    policies: Sequence[dict[str, Any]], *, kind: str = "menu", headline: str = "agreement"
) -> str:
    base = {"kind": "base", "metrics": {headline: {"mean": 1.0 if kind == "menu" else 0.595}}}
    return verdict({"headline": headline, "routers": {"kind": kind}, "policies": [base, *policies]})


@pytest.mark.parametrize(
    ("difference", "words", "figures"),
    [
        (BETTER, "better", "77.7 %, a difference of +7.6 [+5.8, +9.4] points (paired 95 % interval, n = 2550)"),
        (NO_BETTER, "no better", "74.9 %, a difference of +10.4 [-6.2, +27.1] points (paired 95 % interval, n = 24)"),
        (WORSE, "worse", "88.4 %, a difference of -3.1 [-5.2, -1.0] points (paired 95 % interval, n = 300)"),
    ],
)  # fmt: skip
def test_the_words_follow_from_the_interval(
    difference: dict[str, Any], words: str, figures: str
) -> None:
    assert _say([_policy(0.9, difference)]) == (
        f"At depth 0.901 (budget 0.90) the menu is {words} than the best static mixture of the same depth: "
        f"it keeps 85.3 % of the base model's answers against {figures}."
    )


@pytest.mark.parametrize("low", [0.0, 1e-13, -1e-13])
def test_an_interval_that_reaches_zero_is_no_gain(low: float) -> None:
    difference = {"mean": 0.05, "low": low, "high": 0.1, "n": 40}
    assert "the menu is no better than the best static mixture" in _say([_policy(0.9, difference)])
    negated = {"mean": -0.05, "low": -0.1, "high": -low, "n": 40}
    assert "the menu is no better than the best static mixture" in _say([_policy(0.9, negated)])


def test_every_budget_is_counted() -> None:
    policies = [
        _policy(0.95, BETTER),
        _policy(0.9, NO_BETTER),
        _policy(0.85, WORSE),
        _policy(0.8, BETTER),
        _policy(0.7, None),
    ]
    said = _say(policies)
    assert said.startswith("At depth 0.901 (budget 0.90) the menu is no better than")
    assert said.endswith(
        "; of the 5 budgets it is better at 2 (0.95 and 0.80), no better at 1 (0.90), worse at 1 (0.85) "
        "and without such a mixture at 1 (0.70)."
    )
    alike = _say([_policy(budget, BETTER) for budget in (0.9, 0.8)])
    assert alike.endswith("; of the 2 budgets it is better at 2 (0.90 and 0.80).")


def test_no_result_chooses_the_budget_that_is_shown() -> None:
    for first, second in ((BETTER, WORSE), (WORSE, BETTER)):
        assert "At depth 0.881" in _say([_policy(0.95, first), _policy(0.88, second)])
        # Equally far from 0.9, in spite of rounding: the lower one.
        assert "At depth 0.851" in _say([_policy(0.95, first), _policy(0.85, second)])
        assert "At depth 0.851" in _say([_policy(0.85, first), _policy(0.95, second)])


def test_a_budget_that_can_be_compared_is_shown_first() -> None:
    said = _say([_policy(0.9, None), _policy(0.6, BETTER)])
    assert said.startswith("At depth 0.601 (budget 0.60) the menu is better than")
    assert _say([_policy(0.9, None), _policy(0.6, None)]) == (
        "At depth 0.901 (budget 0.90) the menu cannot be compared: no static mixture has that depth; it keeps "
        "85.3 % of the base model's answers (n = 24)."
    )


def test_one_plan_for_all_prompts_is_said_so() -> None:
    said = _say([_policy(0.9, BETTER, plans=1)])
    assert "the menu, with one plan for all prompts, is better than the best static mixture" in said
    assert "one plan" not in _say([_policy(0.9, BETTER)])


@pytest.mark.parametrize(
    ("metric", "mean", "figures"),
    [
        ("reward", -0.7, "graded reward is -0.7000 against -0.7760 (base model: 0.5950)"),
        ("preserve", -0.1, "fidelity is -0.1000 against -0.1760 (base model: 0.5950)"),
        ("accuracy", 0.6, "accuracy is 60.0 % against 52.4 % (base model: 59.5 %)"),
    ],
)
def test_other_metrics_are_given_beside_the_base_models(
    metric: str, mean: float, figures: str
) -> None:
    policy = _policy(0.9, BETTER, mean=mean, metric=metric)
    shares = metric == "accuracy"
    gain = "+7.6 [+5.8, +9.4] points" if shares else "+0.0760 [+0.0580, +0.0940]"
    assert _say([policy], kind="routers", headline=metric) == (
        "At depth 0.901 (budget 0.90) the router policy is better than the best static mixture of the same depth: "
        f"its mean {figures}, a difference of {gain} (paired 95 % interval, n = 2550)."
    )


def test_an_oracle_and_other_policies_have_no_part_in_it() -> None:
    evaluation = made_up(preset="twin")
    said = verdict(evaluation)
    for policy in evaluation["policies"]:
        if policy["kind"] in ("oracle", "random", "shortgpt", "preset", "static"):
            policy["metrics"]["agreement"]["mean"] = 0.123
            policy["against_static"] = {"agreement": BETTER}
    assert verdict(evaluation) == said
    assert said.count(". ") == 0
    assert said.endswith(".")
