"""What is left of the base model at each depth, by who chooses what is skipped: the table of a demo."""

from collections.abc import Mapping
from typing import Any

from dynadepth_search.evaluation.metrics import show_budget

__all__ = ["depth_table"]

_NAMES = {
    "plain": "plain static",
    "static": "static",
    "routed": "menu",
    "random": "random",
    "oracle": "oracle (saw the answers)",
}


def depth_table(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return agreement and divergence with their 95 % intervals, and time, for each budget and way of choosing.

    Args:
        evaluation: Content of `evaluation.json`.

    Returns:
        The head and the rows.
    """
    with_shortcuts = bool(evaluation["routers"].get("shortcuts"))
    marked = dict.fromkeys(("static", "routed"), " with shortcuts" if with_shortcuts else "")
    budgets = [policy["budget"] for policy in evaluation["policies"] if policy["kind"] == "routed"]
    rows = [
        [
            show_budget(budget),
            name + marked.get(kind, ""),
            f"{policy['depth']:.3f}",
            _interval(policy["metrics"]["agreement"], 100.0, 1),
            _interval(policy["metrics"]["preserve"], -1.0, 3),
            "" if policy["time"] is None else f"{policy['time']['median']:.2f}",
        ]
        for budget in budgets
        for kind, name in _NAMES.items()
        for policy in evaluation["policies"]
        if policy["kind"] == kind and policy["budget"] == budget
    ]
    head = [
        "budget",
        "chosen by",
        "depth",
        "agreement, % [95 %]",
        "divergence [95 %]",
        "time /\nbase's",
    ]
    return head, rows


def _interval(given: Mapping[str, float], factor: float, digits: int) -> str:
    mean, low, high = (
        f"{round(factor * given[key], digits) + 0.0:.{digits}f}" for key in ("mean", "low", "high")
    )
    # A change of sign exchanges the ends.
    ends = (low, high) if factor > 0 else (high, low)
    return f"{mean} [{ends[0]}, {ends[1]}]"
