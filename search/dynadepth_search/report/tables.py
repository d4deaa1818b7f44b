"""The figures of an evaluation as rows of text, for terminal, Markdown and report alike.

Owns which figures are shown and to how many digits.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dynadepth_search.evaluation.metrics import listed, show_interval, show_number
from dynadepth_search.report.verdict import distance_from_shown

__all__ = [
    "AGAINST_BASE",
    "AGAINST_STATIC",
    "against_base_table",
    "as_markdown",
    "cost_table",
    "evaluation_tables",
    "in_table_order",
    "outside_summary",
    "quality_table",
    "show_value",
    "summary_table",
]

Row = list[str]

AGAINST_STATIC = "against static [95 %]"
AGAINST_BASE = "against base [95 %]"
# Rows of the summary, the base model's included, and the longest name in it.
_SUMMARY_ROWS = 8
_NAME_WIDTH = 20
# More policies than these are counted, not named.
_NAMED_POLICIES = 3

_SHORT = {
    "reward": "graded reward",
    "preserve": "fidelity (-KL)",
    "agreement": "agreement, %",
    "accuracy": "accuracy, %",
}


def in_table_order(evaluation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the policies as all tables but the summary list them: the oracles, which are none, come last.

    Args:
        evaluation: Content of `evaluation.json`.
    """
    return sorted(evaluation["policies"], key=lambda policy: not policy["ranked"])


def quality_table(evaluation: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Return means, and paired differences from the static mixture of equal depth with 95 % intervals.

    Args:
        evaluation: Content of `evaluation.json`.

    Returns:
        The head and one row for each policy.
    """
    metrics = _metrics(evaluation)
    head = ["policy", "depth"]
    for metric in metrics:
        head += [_SHORT[metric], AGAINST_STATIC]
    rows = []
    for policy in in_table_order(evaluation):
        row = [_name(policy), f"{policy['depth']:.3f}"]
        for metric in metrics:
            against = policy["against_static"]
            row.append(show_number(metric, policy["metrics"][metric]["mean"]))
            row.append("" if against is None else show_interval(metric, against[metric]))
        rows.append(row)
    return head, rows


def against_base_table(evaluation: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Return paired differences from the base model with 95 % intervals.

    Args:
        evaluation: Content of `evaluation.json`.

    Returns:
        The head and one row for each policy but the base.
    """
    metrics = _metrics(evaluation)
    rows = [
        [
            _name(policy),
            *(show_interval(metric, policy["against_base"][metric]) for metric in metrics),
        ]
        for policy in in_table_order(evaluation)
        if policy["kind"] != "base"
    ]
    return [AGAINST_BASE, *(_SHORT[metric] for metric in metrics)], rows


def cost_table(evaluation: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Return what each policy does: depth, compute, plans and measured time.

    Args:
        evaluation: Content of `evaluation.json`.

    Returns:
        The head and one row for each policy.
    """
    rows = []
    for policy in in_table_order(evaluation):
        time = policy["time"]
        rows.append(
            [
                _name(policy),
                str(policy["n"]),
                f"{policy['depth']:.3f}",
                _share(policy.get("compute")),
                f"{policy['identity_rate']:.0%}",
                str(policy["distinct_plans"]),
                "1.00" if policy["kind"] == "base" else _ratio(time),
            ]
        )
    head = ["policy", "n", "depth", "compute", "identity plan", "different plans"]
    head.append("prefill time / base's")
    return head, rows


def summary_table(evaluation: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Return what matters most in at most eight rows: base, policy under test, and others if all have room.

    An oracle is never among them.

    Args:
        evaluation: Content of `evaluation.json`.

    Returns:
        The head, whose titles are broken into lines, and one row for each policy that is shown.
    """
    headline = evaluation["headline"]
    shown = _in_summary(evaluation)
    timed = any(policy["time"] is not None for policy in shown)
    # Agreement is of interest whatever the headline.
    with_agreement = headline != "agreement" and "agreement" in shown[0]["metrics"]
    head = ["policy", "depth", _SHORT[headline].replace(" ", "\n"), "gain over static\n[95 %]"]
    head += ["agreement,\n%"] * with_agreement + ["identity\nplan"]
    head += ["time /\nbase's"] * timed
    rows = []
    for policy in shown:
        against = policy["against_static"]
        row = [_shortened(policy["name"]), f"{policy['depth']:.3f}"]
        row.append(show_number(headline, policy["metrics"][headline]["mean"]))
        row.append("" if against is None else show_interval(headline, against[headline]))
        if with_agreement:
            row.append(show_number("agreement", policy["metrics"]["agreement"]["mean"]))
        row.append(f"{policy['identity_rate']:.0%}")
        if timed:
            time = policy["time"]
            measured = "" if time is None else f"{time['median']:.2f}"
            row.append("1.00" if policy["kind"] == "base" else measured)
        rows.append(row)
    return head, rows


def outside_summary(evaluation: Mapping[str, Any]) -> str:
    """Say what the report shows and the summary has no room for.

    Args:
        evaluation: Content of `evaluation.json`.

    Returns:
        One sentence.
    """
    shown = [policy["name"] for policy in _in_summary(evaluation)]
    hidden = [policy for policy in evaluation["policies"] if policy["name"] not in shown]
    budgets = sum(policy["kind"] == "routed" for policy in hidden)
    others = [policy["name"].rsplit(" ", 1)[0] for policy in hidden if policy["kind"] == "preset"]
    # Folders of routers may have long names, and there may be many.
    names = [_shortened(name) for name in dict.fromkeys(others)]
    if len(names) > _NAMED_POLICIES:
        names = [f"{len(names)} other policies"]
    parts = [f"{budgets} more budget{'s' if budgets > 1 else ''}"] * (budgets > 0)
    parts += [*names, "all metrics", "the static plans", "the oracle", "every finding"]
    return f"The report also has {listed(parts)}."


def _in_summary(evaluation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return base and policy under test; other routers too if all of them have room."""
    policies = evaluation["policies"]
    base, tested, others = (
        [policy for policy in policies if policy["kind"] == kind]
        for kind in ("base", "routed", "preset")
    )
    room = _SUMMARY_ROWS - len(base)
    if len(tested) + len(others) <= room:
        return base + tested + others
    # Of more budgets than there is room for, those around the one of the verdict.
    nearest = [policy["name"] for policy in sorted(tested, key=distance_from_shown)[:room]]
    return base + [policy for policy in tested if policy["name"] in nearest]


def _shortened(name: str) -> str:
    """Cut a long name in its middle: it ends with the budget."""
    if len(name) <= _NAME_WIDTH:
        return name
    end = _NAME_WIDTH // 2 - 3
    return f"{name[: _NAME_WIDTH - end - 3]}...{name[len(name) - end :]}"


def show_value(value: Any) -> str:
    """Write a plain value: floats to four digits, lists with commas, None as what is not known."""
    if value is None:
        return "unknown"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(show_value(part) for part in value)
    return str(value)


def evaluation_tables(evaluation: Mapping[str, Any]) -> list[tuple[Row, list[Row]]]:
    """Return head and rows of all tables, in the order in which they are shown."""
    return [table(evaluation) for table in (quality_table, against_base_table, cost_table)]


def as_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown.

    Args:
        head: Titles of the columns.
        rows: Cells.

    Returns:
        Lines, the last one without a line end.
    """
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _metrics(evaluation: Mapping[str, Any]) -> list[str]:
    """Return the metrics that there are, the headline first."""
    known = evaluation["policies"][0]["metrics"]
    order = [evaluation["headline"], "agreement", "accuracy", "reward", "preserve"]
    return [metric for metric in dict.fromkeys(order) if metric in known]


def _name(policy: Mapping[str, Any]) -> str:
    return policy["name"] if policy["ranked"] else f"{policy['name']} (saw the answers)"


def _share(compute: float | None) -> str:
    return "" if compute is None else f"{compute:.3f}"


def _ratio(time: Mapping[str, float] | None) -> str:
    if time is None:
        return ""
    return f"{time['median']:.2f} ({time['low']:.2f} to {time['high']:.2f})"
