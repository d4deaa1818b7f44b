"""The verdict of an evaluation: one sentence, whose words follow from the paired intervals alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from dynadepth_search.evaluation.metrics import (
    METRIC_NAMES,
    listed,
    show_budget,
    show_interval,
    show_number,
    side_of_zero,
    unit_of,
)

__all__ = ["distance_from_shown", "verdict"]

# The budget whose figures are given is the one nearest to this, so that no result chooses it.
_SHOWN_BUDGET = 0.9
_WORDS = {1: "better", 0: "no better", -1: "worse"}
_NOT_COMPARED = "without such a mixture"


def verdict(evaluation: Mapping[str, Any]) -> str:
    """Say what the policy under test keeps, against the best static mixture of its depth.

    The figures are those of the budget nearest to 0.9; the other budgets are counted.

    Args:
        evaluation: Content of `evaluation.json`.

    Returns:
        One sentence. It says "better" or "worse" only if the paired 95 % interval of the headline metric does not
        reach zero.
    """
    headline = evaluation["headline"]
    base = evaluation["policies"][0]
    tested = [policy for policy in evaluation["policies"] if policy["kind"] == "routed"]
    compared = [policy for policy in tested if policy["against_static"] is not None]
    policy = min(compared or tested, key=distance_from_shown)
    subject = "the menu" if evaluation["routers"]["kind"] == "menu" else "the router policy"
    if policy["distinct_plans"] == 1:
        subject += ", with one plan for all prompts,"
    where = f"At depth {policy['depth']:.3f} (budget {show_budget(policy['budget'])}) {subject}"
    if not compared:
        return (
            f"{where} cannot be compared: no static mixture has that depth; "
            f"{_kept(policy, base, headline)} (n = {policy['n']})."
        )
    difference = policy["against_static"][headline]
    return (
        f"{where} is {_WORDS[side_of_zero(difference)]} than the best static mixture of the same depth: "
        f"{_kept(policy, base, headline)}, a difference of {show_interval(headline, difference)}"
        f"{' points' if unit_of(headline) else ''} (paired 95 % interval, n = {difference['n']})"
        f"{_at_each_budget(tested, headline)}."
    )


def distance_from_shown(policy: Mapping[str, Any]) -> tuple[float, float]:
    """Return a key that sorts policies by how far their budget is from the one whose figures are given."""
    # Budgets on both sides are equally far in spite of rounding.
    return round(abs(policy["budget"] - _SHOWN_BUDGET), 9), policy["budget"]


def _kept(policy: Mapping[str, Any], base: Mapping[str, Any], metric: str) -> str:
    """Return the policy's figure beside that of the static mixture, if there is one, and the base model's."""
    mean, unit = policy["metrics"][metric]["mean"], unit_of(metric)
    shown = f"{show_number(metric, mean)}{unit}"
    against, mixture = policy["against_static"], ""
    if against is not None:
        # The mixture is the policy's mean less the mean difference.
        mixture = f" against {show_number(metric, mean - against[metric]['mean'])}{unit}"
    if metric == "agreement":
        return f"it keeps {shown} of the base model's answers{mixture}"
    full = show_number(metric, base["metrics"][metric]["mean"])
    return f"its mean {METRIC_NAMES[metric]} is {shown}{mixture} (base model: {full}{unit})"


def _at_each_budget(tested: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Count the budgets by their verdicts; empty for a single budget."""
    if len(tested) == 1:
        return ""
    groups: dict[str, list[str]] = {words: [] for words in (*_WORDS.values(), _NOT_COMPARED)}
    for policy in tested:
        against = policy["against_static"]
        words = _NOT_COMPARED if against is None else _WORDS[side_of_zero(against[metric])]
        groups[words].append(show_budget(policy["budget"]))
    counts = [
        f"{words} at {len(budgets)} ({listed(budgets)})"
        for words, budgets in groups.items()
        if budgets
    ]
    return f"; of the {len(tested)} budgets it is {listed(counts)}"
