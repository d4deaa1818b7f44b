"""What a score table holds: what each plan does to the base model's answers, and which prompts plans disturb most."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dynadepth.evaluation.intervals import mean_interval
from dynadepth.plans import plan_depth, plan_text
from dynadepth_search.evaluation.metrics import show_number
from dynadepth_search.evaluation.notes import one_line
from dynadepth_search.inspecting.edit_maps import plan_map_picture
from dynadepth_search.inspecting.inspection import Inspection, Picture, Table, edits_text
from dynadepth_search.scoring.score_table import ScoreTable, read_scores

__all__ = ["inspect_scores", "score_figures"]

_HARDEST = 20
# Of more plans, those that the oracle takes for most prompts are shown.
_PLANS = 40
_HOW_TO_READ_PLANS = """
Agreement with the base model's answers and divergence from it in nats are means over the prompts, with 95 % intervals.
The last column is an oracle, which saw the answers and is no policy: the share of prompts for which the plan is the
shallowest one that keeps the base model's answer.
"""
_HOW_TO_READ_HARDEST = """
The divergence is the mean over all plans but the identity; so is the share of plans that keep the base model's answer.
The shallowest plan that keeps it is what the oracle takes.
"""


def inspect_scores(folder: Path) -> Inspection:
    """Inspect a score table, finished or not.

    Args:
        folder: The folder that a scoring filled.

    Raises:
        FileNotFoundError: There is no table.
        LabelError: It is damaged, or holds no prompt yet.
    """
    table = read_scores(folder, accept_partial=True)
    figures = score_figures(table)
    asked = table.manifest["asked"]
    shown = figures["by_plan"]
    return Inspection(
        kind="scores",
        title=f"scores of {table.manifest['task_name']}",
        said=_said(figures),
        figures=figures,
        parts=[
            _summary(figures),
            Picture(
                title="What each plan edits",
                svg=plan_map_picture(
                    [row["plan"] for row in shown],
                    [
                        f"{row['depth']:.3f}, {100 * row['agreement']['mean']:.1f} % agree"
                        for row in shown
                    ],
                    "what each plan does to each layer",
                ),
                note="One row for each plan: its depth, and its agreement with the base model.",
            ),
            _plans(figures),
            _hardest_table(figures),
        ],
        facts={
            "task": {key: value for key, value in asked["task"].items() if key != "chat"},
            "base model": {
                "name": table.manifest["base_model"]["name"],
                "dtype": asked["dtype"],
                "shortcuts": table.shortcuts or "none",
            },
            "versions": table.manifest["versions"],
        },
    )


def score_figures(table: ScoreTable) -> dict[str, Any]:
    """Return the figures of a score table, as values that JSON can hold.

    Args:
        table: The table.
    """
    asked = table.manifest["asked"]
    depths = plan_depth(table.plans)
    taken = _oracle(table)
    counts = np.bincount(taken, minlength=len(table.plans))
    # Of those with most prompts, in the order of the table.
    shown = np.sort(np.argsort(-counts, kind="stable")[:_PLANS])
    return {
        "model": table.manifest["base_model"]["name"],
        "prompts": len(table),
        "prompts_of_task": int(asked["task"]["prompts"]),
        "plans": len(table.plans),
        "num_layers": int(table.plans.shape[1]),
        "layers": list(asked["layers"]),
        "num_windows": table.num_windows,
        "graded": table.graded,
        "oracle": {
            "depth": float(depths[taken].mean()),
            "ranked": False,
            "identity_rate": float((taken == 0).mean()),
        },
        "by_plan": [_plan_figures(table, index, counts) for index in shown.tolist()],
        "hardest": _hardest(table, taken),
    }


def _oracle(table: ScoreTable) -> npt.NDArray[np.int64]:
    """Return each prompt's shallowest plan that keeps the answer; ties go to the lower divergence, then the first."""
    visits = table.plans.sum(axis=1, dtype=np.int64)
    # The identity keeps every answer.
    kept = table.agreement >= 1.0
    kept[:, 0] = True
    visits = np.where(kept, visits, visits.max() + 1)
    order = np.lexsort((table.divergence, visits), axis=1)
    return order[:, 0]


def _plan_figures(table: ScoreTable, index: int, counts: npt.NDArray[np.int64]) -> dict[str, Any]:
    metrics = ["agreement", "divergence", *(["correct"] if table.graded else [])]
    return {
        "plan": plan_text(table.plans[index]),
        "depth": float(plan_depth(table.plans[index])),
        **{metric: mean_interval(getattr(table, metric)[:, index]).to_dict() for metric in metrics},
        "oracle_prompts": int(counts[index]),
    }


def _hardest(table: ScoreTable, taken: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
    if len(table.plans) < 2:
        return []
    divergence = table.divergence[:, 1:].mean(axis=1)
    kept = (table.agreement[:, 1:] >= 1.0).mean(axis=1)
    order = np.argsort(-divergence, kind="stable")[:_HARDEST]
    return [
        {
            "prompt": one_line(table.examples[row].prompt),
            "prompt_id": table.examples[row].prompt_id,
            "divergence": float(divergence[row]),
            "kept": float(kept[row]),
            "oracle_plan": plan_text(table.plans[taken[row]]),
        }
        for row in order.tolist()
    ]


def _said(figures: Mapping[str, Any]) -> list[str]:
    count, asked = figures["prompts"], figures["prompts_of_task"]
    of = "" if count == asked else f" of {asked} (the scoring is unfinished)"
    oracle = figures["oracle"]
    return [
        f"{count} prompts{of} under {figures['plans']} plans of {figures['model'] or 'a model'}. An oracle that saw "
        "the answers and takes the shallowest plan that keeps each of them would have mean depth "
        f"{oracle['depth']:.3f}, and the identity plan for {oracle['identity_rate']:.0%} of the prompts; no policy has "
        "what it knows."
    ]


def _summary(figures: Mapping[str, Any]) -> Table:
    windows = figures["num_windows"]
    read = f"the last token and {windows} windows" if windows else "the last token"
    rows = [
        ["prompts", f"{figures['prompts']} of {figures['prompts_of_task']}"],
        ["plans", str(figures["plans"])],
        ["right answers", "known" if figures["graded"] else "none"],
        ["states are kept before layers", ", ".join(map(str, figures["layers"])) or "none"],
        ["of each state", read],
    ]
    return Table(title="Scoring", head=["figure", "value"], rows=rows)


def _plans(figures: Mapping[str, Any]) -> Table:
    rows = []
    for row in figures["by_plan"]:
        cells = [
            edits_text(row["plan"]),
            f"{row['depth']:.3f}",
            _interval(row["agreement"], "agreement"),
            _interval(row["divergence"], "divergence"),
        ]
        if figures["graded"]:
            cells.append(show_number("accuracy", row["correct"]["mean"]))
        rows.append([*cells, f"{row['oracle_prompts'] / figures['prompts']:.0%}"])
    head = ["plan", "depth", "agreement, % [95 %]", "divergence [95 %]"]
    head += ["accuracy, %"] * figures["graded"] + ["oracle's (saw the answers)"]
    hidden = figures["plans"] - len(rows)
    more = f" {hidden} plans that it takes for fewer prompts are not shown." if hidden else ""
    note = " ".join(_HOW_TO_READ_PLANS.split()) + more
    return Table(title="What each plan does", head=head, rows=rows, note=note, shown=16)


def _interval(found: Mapping[str, float], metric: str) -> str:
    if metric == "agreement":
        mean, low, high = (show_number(metric, found[end]) for end in ("mean", "low", "high"))
    else:
        mean, low, high = (f"{found[end] + 0.0:.4f}" for end in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _hardest_table(figures: Mapping[str, Any]) -> Table:
    rows = [
        [
            f"{row['divergence']:.4f}",
            f"{row['kept']:.0%}",
            edits_text(row["oracle_plan"]),
            row["prompt"],
        ]
        for row in figures["hardest"]
    ]
    return Table(
        title="Hardest prompts",
        head=["divergence", "plans that keep it", "oracle's plan (saw the answers)", "prompt"],
        rows=rows,
        note=_HOW_TO_READ_HARDEST,
        texts=(3,),
        shown=5,
    )
