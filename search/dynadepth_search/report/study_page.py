"""The report of a study: one page that needs nothing but itself, and the same as JSON."""

import os
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynadepth.files import write_text_atomic
from dynadepth_search.files.sealed import write_sealed
from dynadepth_search.report.report import REPORT_NAME, card, html_page, html_table, note, sections
from dynadepth_search.report.tables import show_value

if TYPE_CHECKING:
    import optuna

__all__ = ["study_html", "study_verdict", "write_study_report"]


def write_study_report(
    folder: str | os.PathLike[str],
    study: "optuna.Study",
    summary: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> Path:
    """Write `report.html` and `report.json` into the folder of a study.

    Args:
        folder: Folder of the study.
        study: The study.
        summary: What `dynadepth_search.tuning.applying.study_summary` returned.
        facts: What else is known of the study: sections of plain values.

    Returns:
        The page.
    """
    page = Path(folder) / REPORT_NAME
    write_sealed(Path(folder) / "report.json", {"study": dict(summary), "facts": dict(facts)})
    write_text_atomic(page, study_html(study, summary, facts))
    return page


def study_verdict(summary: Mapping[str, Any]) -> str:
    """Say in a sentence or two what a study came to.

    Args:
        summary: What `dynadepth_search.tuning.applying.study_summary` returned.
    """
    counts, found = summary["counts"], summary["comparison"]
    ran = f"{counts['complete']} trials" + (
        f" and {counts['pruned']} that were pruned" if counts["pruned"] else ""
    )
    if found is not None:
        gap = found["difference"]
        interval = f"{gap['mean']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]"
        said = (
            "tuned settings are better"
            if gap["low"] > 0
            else "tuned settings are worse"
            if gap["high"] < 0
            else "no difference that the prompts could show"
        )
        return (
            f"{ran}: {said}. {summary['goals'][-1].capitalize()}: default {found['default']:.4f}, tuned "
            f"{found['tuned']:.4f}, difference {interval} on {gap['n']} prompts."
        )
    if summary["front"]:
        return (
            f"{ran}, {len(summary['front'])} of them on the Pareto front. The front was chosen on the prompts "
            "that it is shown on, so it flatters itself."
        )
    return f"{ran}; the trial of the default settings is not complete, so there is nothing to compare with yet."


def study_html(study: "optuna.Study", summary: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        study: The study.
        summary: What `dynadepth_search.tuning.applying.study_summary` returned.
        facts: What else is known of the study: sections of plain values.

    Returns:
        HTML.
    """
    from dynadepth_search.report.study_plots import (
        FEWEST,
        front_plot,
        history_plot,
        importance_plot,
    )

    complete = summary["counts"]["complete"]
    title = f"dynadepth: study of {summary['kind']} settings"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="verdict">{escape(study_verdict(summary))}</p>',
    ]
    if summary["front"]:
        parts += ["<h2>Depth and quality</h2>", card(front_plot(study, summary)), _front(summary)]
    found = summary["comparison"]
    if found is not None:
        parts.append(note(found["how"]))
    if complete:
        parts += ["<h2>History</h2>", card(history_plot(study, summary))]
    bars = importance_plot(study, summary) if complete >= FEWEST else ""
    few = f"{complete} complete trials; importances are shown from {FEWEST} on."
    alike = "The trials came to so much the same that no setting can be said to matter."
    parts += [
        "<h2>Which settings matter</h2>",
        card(bars) if bars else note(few if complete < FEWEST else alike),
    ]
    parts += ["<h2>Settings</h2>", _settings(summary)]
    parts += ["<h2>What was run</h2>", *sections({"trials": summary["counts"], **facts})]
    return html_page(title, parts)


def _settings(summary: Mapping[str, Any]) -> str:
    shown = {"default": summary["default"], "best": summary["best"]}
    columns = {name: trial for name, trial in shown.items() if trial is not None}
    head = [
        "setting",
        "range",
        *(f"{name} (trial {trial['number']})" for name, trial in columns.items()),
    ]
    rows = [
        [
            setting["name"],
            _range(setting),
            *(show_value(trial["params"][setting["name"]]) for trial in columns.values()),
        ]
        for setting in summary["settings"]
    ]
    for index, goal in enumerate(summary["goals"]):
        rows.append([goal, "", *(show_value(trial["values"][index]) for trial in columns.values())])
    return html_table(head, rows)


def _front(summary: Mapping[str, Any]) -> str:
    names = [setting["name"] for setting in summary["settings"] if setting["name"] != "depth"]
    head = ["trial", *summary["goals"], *names]
    rows = [
        [
            f"{trial['number']}{' (default)' if trial['default'] else ''}",
            *(f"{value:.4f}" for value in trial["values"]),
            *(show_value(trial["params"][name]) for name in names),
        ]
        for trial in summary["front"]
    ]
    return html_table(head, rows)


def _range(setting: Mapping[str, Any]) -> str:
    if "choices" in setting:
        return ", ".join(map(str, setting["choices"]))
    return (
        f"{setting['low']:g} to {setting['high']:g}{', by its logarithm' if setting['log'] else ''}"
    )
