"""The figures of an evaluation as rows of text: one table, shown by terminal, Markdown and report alike.

Owns which figures are shown and to how many digits. Knows nothing of files or HTML.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dynadepth_search.evaluation.metrics import show_interval, show_number

__all__ = [
    "AGAINST_BASE",
    "AGAINST_STATIC",
    "against_base_table",
    "as_markdown",
    "as_text",
    "cost_table",
    "evaluation_tables",
    "quality_table",
]

Row = list[str]

AGAINST_STATIC = "against static [95 %]"
AGAINST_BASE = "against base [95 %]"

_SHORT = {
    "reward": "graded reward",
    "preserve": "fidelity (-KL)",
    "agreement": "agreement, %",
    "accuracy": "accuracy, %",
}


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
    for policy in evaluation["policies"]:
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
        for policy in evaluation["policies"]
        if policy["kind"] != "base"
    ]
    return [AGAINST_BASE, *(_SHORT[metric] for metric in metrics)], rows


def cost_table(evaluation: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Return what each policy does: depth, plans and measured time.

    Args:
        evaluation: Content of `evaluation.json`.

    Returns:
        The head and one row for each policy.
    """
    rows = []
    for policy in evaluation["policies"]:
        time = policy["time"]
        rows.append(
            [
                _name(policy),
                str(policy["n"]),
                f"{policy['depth']:.3f}",
                f"{policy['identity_rate']:.0%}",
                str(policy["distinct_plans"]),
                "1.00" if policy["kind"] == "base" else _ratio(time),
            ]
        )
    head = ["policy", "n", "depth", "identity plan", "different plans", "prefill time / base's"]
    return head, rows


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


def as_text(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in columns of a fixed-width font.

    Args:
        head: Titles of the columns.
        rows: Cells.

    Returns:
        Lines, the last one without a line end.
    """
    widths = [max(len(line[column]) for line in [head, *rows]) for column in range(len(head))]
    lines = []
    for line in [head, ["-" * width for width in widths], *rows]:
        first = line[0].ljust(widths[0])
        others = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def _metrics(evaluation: Mapping[str, Any]) -> list[str]:
    """Return the metrics that there are, the headline first."""
    known = evaluation["policies"][0]["metrics"]
    order = [evaluation["headline"], "agreement", "accuracy", "reward", "preserve"]
    return [metric for metric in dict.fromkeys(order) if metric in known]


def _name(policy: Mapping[str, Any]) -> str:
    return policy["name"] if policy["ranked"] else f"{policy['name']} (saw the answers)"


def _ratio(time: Mapping[str, float] | None) -> str:
    if time is None:
        return ""
    return f"{time['median']:.2f} ({time['low']:.2f} to {time['high']:.2f})"
