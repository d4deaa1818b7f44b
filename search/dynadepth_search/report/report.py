"""The report of a run: one page that needs nothing but itself, and the same as JSON.

Owns `report.html` and `report.json`. All that they show is in the files of the run.
"""

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dynadepth.errors import ConfigError
from dynadepth.files import write_text_atomic
from dynadepth_search.evaluation.metrics import METRIC_LABELS, show_budget
from dynadepth_search.files.sealed import read_sealed, write_sealed
from dynadepth_search.report.findings import findings_by_policy
from dynadepth_search.report.plots import action_map, learning_plot, pareto_plot
from dynadepth_search.report.tables import (
    AGAINST_STATIC,
    against_base_table,
    as_markdown,
    cost_table,
    evaluation_tables,
    in_table_order,
    quality_table,
    show_value,
)
from dynadepth_search.report.verdict import verdict

__all__ = [
    "REPORT_NAME",
    "card",
    "html_page",
    "html_table",
    "note",
    "read_run",
    "report_html",
    "report_markdown",
    "sections",
    "write_report",
]

REPORT_NAME = "report.html"

_CSS = """
:root { color-scheme: light; }
body { margin: 0; background: #f5f7fa; color: #1f2933; line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { margin: 0; font-size: 1.7rem; }
h2 { margin: 2.5rem 0 .6rem; font-size: 1.2rem; }
h3 { margin: .8rem 0 .2rem; font-size: 1rem; }
h3:first-child { margin-top: 0; }
p { max-width: 48rem; }
ul { margin: 0; padding-left: 1.2rem; font-size: .9rem; }
.verdict { max-width: none; margin: .6rem 0 1rem; font-size: 1.15rem; }
.note { color: #52606d; font-size: .9rem; }
.card { background: #fff; border: 1px solid #e4e7eb; border-radius: .6rem; padding: 1rem 1.25rem;
  overflow-x: auto; }
.card + .card { margin-top: 1rem; }
svg { display: block; width: 100%; height: auto; max-width: 56rem; margin: 0 auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .32rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e7eb; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #cbd2d9; font-weight: 600; white-space: normal; vertical-align: bottom; }
tbody tr:last-child td { border-bottom: 0; }
td.text, th.text { text-align: left; white-space: normal; }
tr.routed td { background: #eaf3fb; font-weight: 600; }
td small { display: block; color: #52606d; font-weight: 400; }
tr.oracle td { color: #697586; font-style: italic; }
tr.first td { border-top: 2px solid #cbd2d9; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: 0; font-size: .9rem; }
dt { color: #52606d; }
dd { margin: 0; overflow-wrap: anywhere; }
pre { margin: 0; white-space: pre-wrap; font-size: .9rem; }
"""


_HOW_TO_READ_THE_PLOT = """
The line joins the static plans, which were chosen on training prompts and are the same for every prompt; mixtures
of two neighbours are the baseline. A bar is the paired 95 % interval of a policy's difference from the static
mixture of its depth, added to that mixture: a bar that does not touch the line shows a difference. The oracle
chooses among the same plans knowing the answers; it is no policy.
"""
_HOW_TO_READ_THE_TABLE = """
Higher is better. Below each figure is its difference from the static mixture of equal mean depth, with the 95 %
interval in brackets. Differences are paired by prompt; intervals are percentiles of 2000 bootstrap samples. The
oracles, which saw the answers, are no policies and stand apart in the last rows.
"""
_HOW_TO_READ_THE_CURVE = """
What the policy gains over the static mixture of equal depth, averaged over four depths, by the number of prompts
that trained it. Cross-validated on these prompts: each is judged by heads that did not learn from it. Bars are
one standard error.
"""


def write_report(
    folder: str | os.PathLike[str],
    evaluation: Mapping[str, Any],
    run: Mapping[str, Any] | None = None,
) -> Path:
    """Write `report.html` and `report.json`.

    Args:
        folder: Where they go.
        evaluation: Content of `evaluation.json`.
        run: What else is known of the run, as sections of plain values: the search, the training,
            the seconds of each step, a generated answer. JSON data.

    Returns:
        The page.
    """
    page = Path(folder) / REPORT_NAME
    write_sealed(Path(folder) / "report.json", {"evaluation": evaluation, "run": run or {}})
    write_text_atomic(page, report_html(evaluation, run))
    return page


def read_run(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what an earlier report in a folder said of its run; empty if there is none.

    Raises:
        ConfigError: `report.json` is damaged.
    """
    path = Path(folder) / "report.json"
    if not path.is_file():
        return {}
    run = read_sealed(path, ConfigError, make_again="evaluate again").get("run")
    return run if isinstance(run, dict) else {}


def report_html(evaluation: Mapping[str, Any], run: Mapping[str, Any] | None = None) -> str:
    """Return the page: no script, and nothing that a browser would have to fetch.

    Args:
        evaluation: Content of `evaluation.json`.
        run: As in `write_report`.

    Returns:
        HTML.
    """
    headline = evaluation["headline"]
    task = evaluation["task"]
    title = f"dynadepth: {evaluation['model'] or 'a model'} on {task['name']}"
    others = [
        metric
        for metric in ("agreement", "reward", "accuracy")
        if metric != headline and metric in evaluation["policies"][0]["metrics"]
    ]
    counts = (
        f"{task['heldout_prompts']} held-out prompts, {task['train_prompts']} training prompts, "
        f"{evaluation['num_layers']} decoder layers. Headline: {METRIC_LABELS[headline]}."
    )
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="verdict">{escape(verdict(evaluation))}</p>',
        card(pareto_plot(evaluation, [headline])),
        note(f"{counts} {_HOW_TO_READ_THE_PLOT.strip()}"),
        "<h2>Quality of each policy</h2>",
        _table(evaluation, *quality_table(evaluation)),
        note(_HOW_TO_READ_THE_TABLE),
        "<h2>Findings</h2>",
        _findings(evaluation),
    ]
    if others:
        parts += ["<h2>Other metrics against depth</h2>", card(pareto_plot(evaluation, others))]
    parts += [
        "<h2>Against the base model</h2>",
        _table(evaluation, *against_base_table(evaluation), skip_base=True),
        "<h2>Depth, plans and time</h2>",
        _table(evaluation, *cost_table(evaluation)),
        note(_timing_note(evaluation)),
    ]
    if evaluation["actions"]:
        parts += ["<h2>What is done to each layer</h2>", card(action_map(evaluation["actions"]))]
    for mapped in evaluation["plan_map"]:
        heading = f"Which prompts got which plan at budget {show_budget(mapped['budget'])}"
        parts += [f"<h2>{escape(heading)}</h2>", _plan_map(mapped)]
    if evaluation.get("learning_curve"):
        parts += [
            "<h2>How many prompts it takes</h2>",
            card(learning_plot(evaluation["learning_curve"])),
            note(_HOW_TO_READ_THE_CURVE),
        ]
    parts += ["<h2>What was run</h2>", *sections({**_facts(evaluation), **(run or {})})]
    return html_page(title, parts)


def html_page(title: str, parts: Sequence[str]) -> str:
    """Return a page that needs nothing but itself, in the style of all reports.

    Args:
        title: Its title, as plain text.
        parts: What it shows, as HTML; empty ones are left out.
    """
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def report_markdown(evaluation: Mapping[str, Any]) -> str:
    """Return the verdict, all tables and all findings in Markdown.

    Args:
        evaluation: Content of `evaluation.json`.

    Returns:
        Lines, the last one without a line end.
    """
    tables = [as_markdown(*table) for table in evaluation_tables(evaluation)]
    findings = "\n".join(f"- {finding}" for finding in evaluation["findings"])
    return "\n\n".join([verdict(evaluation), *tables, findings])


def _findings(evaluation: Mapping[str, Any]) -> str:
    """Return a list of findings for each policy, and last the findings about no single one."""
    groups, others = findings_by_policy(evaluation)
    parts = [
        f"<h3>{escape(title)}</h3><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
        for title, lines in [*groups.items(), ("Notes", others)]
        if lines
    ]
    return card("".join(parts))


def _plan_map(mapped: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(row['plan'])}</code></td><td>{row['depth']:.3f}</td><td>{row['share']:.0%}</td>"
        f'<td class="text">{"<br>".join(escape(text) for text in row["examples"])}</td></tr>'
        for row in mapped["rows"]
    )
    titles = "".join(
        f'<th scope="col">{title}</th>' for title in ("plan", "depth", "prompts", "such as")
    )
    return f'<div class="card"><table><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table></div>'


def _table(
    evaluation: Mapping[str, Any],
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    skip_base: bool = False,
) -> str:
    policies = [p for p in in_table_order(evaluation) if not (skip_base and p["kind"] == "base")]
    lines = []
    # A routed policy opens the rows of its budget; the oracles stand apart below all policies.
    names = {"routed": "routed first", "preset": "first", "oracle": "oracle"}
    before = ""
    for policy, row in zip(policies, rows, strict=True):
        kind = policy["kind"]
        first = " first" if kind == "oracle" != before else ""
        before = kind
        cells = "".join(f"<td>{cell}</td>" for cell in _cells(head, row))
        lines.append(f'<tr class="{names.get(kind, "")}{first}">{cells}</tr>')
    shown = [title for title in head if title != AGAINST_STATIC]
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in shown)
    return (
        f'<div class="card"><table><thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cells(head: Sequence[str], row: Sequence[str]) -> list[str]:
    """Return the cells as HTML, a difference from the static mixture below its figure."""
    cells: list[str] = []
    for title, text in zip(head, row, strict=True):
        if title != AGAINST_STATIC:
            cells.append(escape(text))
        elif text:
            cells[-1] += f"<small>{escape(text)}</small>"
    return cells


def html_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, texts: Sequence[int] = ()
) -> str:
    """Return a table in a frame.

    Args:
        head: Titles of the columns, as plain text.
        rows: Cells, as plain text.
        texts: Columns that hold sentences: they are broken into lines.
    """
    kinds = [' class="text"' if column in texts else "" for column in range(len(head))]
    titles = "".join(
        f'<th scope="col"{kind}>{escape(title)}</th>'
        for kind, title in zip(kinds, head, strict=True)
    )
    lines = "".join(
        f"<tr>{''.join(f'<td{kind}>{escape(cell)}</td>' for kind, cell in zip(kinds, row, strict=True))}</tr>"
        for row in rows
    )
    return card(f"<table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table>")


def card(content: str) -> str:
    """Return HTML in a frame."""
    return f'<div class="card">{content}</div>'


def note(text: str) -> str:
    """Return plain text as a paragraph of small print."""
    return f'<p class="note">{escape(text.strip())}</p>'


def _timing_note(evaluation: Mapping[str, Any]) -> str:
    note = (
        "Depth is the mean share of layers that run. Time is that of a prefill with a cache, one prompt at a "
        "time, median (fastest to slowest) of rounds in which base and policies take turns; the base takes "
        f"{evaluation['base_prefill_milliseconds']:.1f} ms. Random plans are timed by one plan of each depth."
    )
    checks = evaluation["runtime_check"].values()
    if checks:
        worst = max(check["max_difference"] for check in checks)
        mean = sum(check["mean_difference"] for check in checks) / len(checks)
        count = sum(check["choices"] for check in checks)
        changed = sum(check["plans_differing"] for check in checks)
        prompts = sum(check["prompts"] for check in checks)
        # Prompts alone have no answers whose scores could be compared.
        if count:
            note += (
                f" The wrapped model itself scored {count} answers of a sample: its scores differ from "
                f"the sweep's by {mean:.4f} nats on average and {worst:.4f} at most ({evaluation['dtype']})."
            )
        note += f" Of a sample, {changed} of {prompts} plans changed in another batch."
    return note


def _facts(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    task = evaluation["task"]
    return {
        "evaluation": {
            "model": evaluation["model"],
            "task": f"{task['name']} ({task['kind']}, scoring {task['scoring']})",
            "dtype": evaluation["dtype"],
            "task sha256": task["sha256"],
            "seed": evaluation["config"]["seed"],
            "seconds": evaluation["seconds"],
        },
        "policy": {
            **{
                name: value
                for name, value in evaluation["routers"].items()
                if name != "range" and not isinstance(value, Mapping)
            },
            "budgets": " to ".join(f"{end:.4g}" for end in evaluation["routers"]["range"]),
        },
        "versions": evaluation["versions"],
    }


def sections(groups: Mapping[str, Any]) -> list[str]:
    """Show sections of plain values; what is nested deeper is in the JSON file."""
    shown = []
    for name, values in groups.items():
        if isinstance(values, str):
            shown.append(
                f'<div class="card"><p class="note">{escape(name)}</p><pre>{escape(values)}</pre></div>'
            )
            continue
        pairs = "".join(
            f"<dt>{escape(str(key))}</dt><dd>{escape(show_value(value))}</dd>"
            for key, value in values.items()
        )
        shown.append(f'<div class="card"><p class="note">{escape(name)}</p><dl>{pairs}</dl></div>')
    return shown
