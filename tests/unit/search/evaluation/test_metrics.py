"""The words of a finding follow from its interval."""

from typing import Any

import numpy as np
import pytest

from dynadepth.plans import identity_plan
from dynadepth_search.evaluation.metrics import (
    PolicyRun,
    findings,
    policy_metrics,
    show_budget,
    show_interval,
    show_number,
)

N = 60


def _run(name: str, kind: str, reward: Any, plans: Any = None) -> PolicyRun:
    plans = np.tile(identity_plan(4), (N, 1)) if plans is None else plans
    reward = np.broadcast_to(np.asarray(reward, dtype=np.float64), N)
    return PolicyRun(
        name=name,
        kind=kind,  # type: ignore[arg-type]
        depth=plans.mean(axis=1),
        metrics={"reward": reward, "agreement": np.ones(N)},
        plans=plans,
        budget=0.8,
    )


def _say(shift: float, noise: float) -> list[str]:
    rng = np.random.default_rng(0)
    static = _run("static", "static", rng.normal(size=N))
    values = static.metrics["reward"] + shift + noise * rng.normal(size=N)
    routed = _run("routed 0.80", "routed", values)
    base = _run("base", "base", 0.0)
    return findings([policy_metrics(routed, base, static, seed=0)], "reward")


@pytest.mark.parametrize(
    ("shift", "noise", "words"),
    [
        (0.5, 0.2, "beats the static mixture of equal depth in graded reward"),
        (-0.5, 0.2, "is worse than the static mixture of equal depth in graded reward"),
        (0.0, 1.0, "does not beat the static mixture of equal depth in graded reward"),
        (0.1, 2.0, "does not beat the static mixture of equal depth in graded reward"),
    ],
)
def test_the_words_follow_from_the_interval(shift: float, noise: float, words: str) -> None:
    assert words in _say(shift, noise)[0]


def test_two_that_do_the_same_are_no_gain() -> None:
    (finding,) = _say(0.0, 0.0)
    assert finding == (
        "routed 0.80 (mean depth 1.000, n = 60) does not beat the static mixture of equal depth in graded reward "
        "+0.0000 [+0.0000, +0.0000] and agreement +0.0 [+0.0, +0.0] points. It uses one plan, the identity plan for "
        "100% of the prompts. One plan for all prompts is itself static: any difference from the mixture is one "
        "between static plans. It missed its budget by more than 0.02: budget 0.80, measured 1.000."
    )


def test_rounding_is_no_difference() -> None:
    for shift in (1e-13, -1e-13):
        (finding,) = _say(shift, 0.0)
        assert "does not beat the static mixture of equal depth in graded reward" in finding


@pytest.mark.parametrize(
    ("depth", "words"),
    [
        (0.74, "budget 0.80, measured 0.740."),
        (0.83, "budget 0.80, measured 0.830."),
        (0.82, None),
        (0.78, None),
    ],
)
def test_a_budget_that_was_missed_is_said_so(depth: float, words: str | None) -> None:
    figures = policy_metrics(_run("routed", "routed", 0.0), _run("b", "base", 0.0), None, seed=0)
    (finding,) = findings([{**figures, "depth": depth}], "reward")
    assert ("missed its budget" in finding) == (words is not None)
    assert finding.endswith(words or "between static plans.")


def test_budgets_that_differ_are_shown_apart() -> None:
    budgets = (0.8, 0.801, 0.804, 0.85, 1.0, 0.8000001, 0.8000002)
    shown = [show_budget(budget) for budget in budgets]
    assert shown == ["0.80", "0.801", "0.804", "0.85", "1.00", "0.8000001", "0.8000002"]


def test_shares_are_shown_in_points_and_nothing_has_no_sign() -> None:
    interval = {"mean": 0.0123, "low": -0.00001, "high": 0.5}
    assert show_interval("accuracy", interval) == "+1.2 [+0.0, +50.0]"
    assert show_interval("reward", interval) == "+0.0123 [+0.0000, +0.5000]"
    assert show_number("reward", -0.00001) == "0.0000"
    assert (show_number("agreement", 0.876), show_number("preserve", -1.23456)) == (
        "87.6",
        "-1.2346",
    )


def test_only_policies_that_see_the_prompt_are_talked_about() -> None:
    base = _run("base", "base", 0.0)
    rows = [
        policy_metrics(_run(kind, kind, 1.0), base, base, seed=0) for kind in ("oracle", "random")
    ]
    assert findings(rows, "reward") == []


def test_figures_count_plans_and_identities() -> None:
    plans = np.tile(identity_plan(4), (N, 1))
    plans[: N // 4, 0] = 0
    plans[: N // 12, 1] = 2
    figures = policy_metrics(
        _run("routed", "routed", 0.0, plans), _run("b", "base", 1.0), None, seed=0
    )
    assert figures["identity_rate"] == pytest.approx(0.75)
    assert figures["distinct_plans"] == 3
    assert figures["plans"] is None
    assert figures["depth"] == pytest.approx(plans.mean())
    assert figures["against_base"]["reward"] == {"mean": -1.0, "low": -1.0, "high": -1.0, "n": N}
    assert figures["against_static"] is None
    assert figures["ranked"] is True
