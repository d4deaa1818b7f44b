"""What an evaluation holds: its verdict and short table, what is done to each layer, and who got which plan."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynadepth_search.evaluation.evaluating import read_evaluation
from dynadepth_search.evaluation.metrics import show_budget
from dynadepth_search.inspecting.inspection import Inspection, Table, share_text
from dynadepth_search.inspecting.labels_seen import plans_table
from dynadepth_search.report.findings import general_notes
from dynadepth_search.report.report import read_run, report_html
from dynadepth_search.report.tables import outside_summary, summary_table
from dynadepth_search.report.verdict import distance_from_shown, verdict

__all__ = ["inspect_evaluation"]

_LAYERS = 12


def inspect_evaluation(folder: Path, run: Path) -> Inspection:
    """Inspect an evaluation; its page is the report.

    Args:
        folder: The folder of `evaluation.json`.
        run: The folder of the report; a demo's evaluation lies in a folder of its own.

    Raises:
        ConfigError: `evaluation.json` or `report.json` is damaged, or of another version.
        FileNotFoundError: There is no evaluation.
    """
    content = read_evaluation(folder)
    task = content["task"]
    counts = f"{task['heldout_prompts']} held-out prompts, {task['train_prompts']} training prompts"
    head, rows = summary_table(content)
    parts = [
        Table(title=f"Policies: {counts}", head=head, rows=rows, note=outside_summary(content))
    ]
    if content["actions"]:
        parts.append(_layers(min(content["actions"], key=distance_from_shown)))
    if content["plan_map"]:
        mapped = min(content["plan_map"], key=distance_from_shown)
        budget = show_budget(mapped["budget"])
        parts.append(plans_table(f"Who gets which plan at budget {budget}", mapped))
    return Inspection(
        kind="evaluation",
        title=f"evaluation of {content['model'] or 'a model'} on {task['name']}",
        said=[verdict(content), *general_notes(content)],
        figures={"evaluation": content},
        parts=parts,
        page=report_html(content, read_run(run)),
    )


def _layers(action: Mapping[str, Any]) -> Table:
    """Return the layers that the policy under test edits at one budget, the most edited ones first."""
    edited = [
        (1 - shares[1], layer, shares)
        for layer, shares in enumerate(action["shares"])
        if shares[1] < 1
    ]
    rows = [
        [str(layer), share_text(shares[0]), share_text(shares[2])]
        for _, layer, shares in sorted(edited, key=lambda item: (-item[0], item[1]))
    ]
    return Table(
        title=f"Layers edited at budget {show_budget(action['budget'])}",
        head=["layer", "skip", "repeat"],
        rows=rows,
        note="Shares of the held-out prompts.",
        shown=_LAYERS,
    )
