"""The findings of an evaluation, grouped by the policy that they are about."""

from collections.abc import Mapping
from typing import Any

from dynadepth_search.evaluation.metrics import show_budget

__all__ = ["findings_by_policy", "general_notes"]


def findings_by_policy(evaluation: Mapping[str, Any]) -> tuple[dict[str, list[str]], list[str]]:
    """Group findings by what a policy is called without its budget.

    Args:
        evaluation: Content of `evaluation.json`.

    Returns:
        The findings of each policy, which open with its name and budget; and the findings about no single policy.
    """
    tested = [policy for policy in evaluation["policies"] if policy["kind"] in ("routed", "preset")]
    names = [policy["name"].rsplit(" ", 1)[0] for policy in tested]
    # A policy may have been left out at some budgets, which is a finding about it too.
    budgets = {show_budget(policy["budget"]) for policy in tested}
    openings = {f"{name} {budget} ": name for name in names for budget in budgets}
    groups: dict[str, list[str]] = {name: [] for name in names}
    others = []
    for finding in evaluation["findings"]:
        fitting = [opening for opening in openings if finding.startswith(opening)]
        if fitting:
            groups[openings[max(fitting, key=len)]].append(finding)
        else:
            others.append(finding)
    return groups, others


def general_notes(evaluation: Mapping[str, Any]) -> list[str]:
    """Return the findings that are about no row of the tables.

    Args:
        evaluation: Content of `evaluation.json`.
    """
    rows = tuple(f"{policy['name']} " for policy in evaluation["policies"])
    return [finding for finding in evaluation["findings"] if not finding.startswith(rows)]
