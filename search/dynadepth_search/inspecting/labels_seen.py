"""What labels hold: depth saved, gains before and after confirmation, luck, edits by layer, who got which plan."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dynadepth.evaluation.intervals import paired_difference
from dynadepth.plans import plan_depth, plan_text
from dynadepth_search.evaluation.metrics import action_shares, show_interval, side_of_zero
from dynadepth_search.evaluation.notes import one_line, plan_map
from dynadepth_search.inspecting.edit_maps import edit_shares_map, plan_map_picture
from dynadepth_search.inspecting.inspection import (
    Inspection,
    Picture,
    Table,
    edits_text,
    share_text,
)
from dynadepth_search.search.null_files import REPORT, check_control_of, luck_text, read_null
from dynadepth_search.storage.choice import Candidate
from dynadepth_search.storage.labels import Labels, read_labels

__all__ = ["inspect_labels", "label_figures", "plans_table"]

_Floats = npt.NDArray[np.float64]

_HARDEST = 20
# Layers that a terminal shows, the most edited ones.
_LAYERS = 12
_HOW_TO_READ_GAINS = """
A gain is the value (reward - lambda x depth) of a plan less that of the identity plan, averaged over the prompts, with
its paired 95 % interval. A raw label is the best of many plans on the prompt itself, so its gain there flatters it; on
variants of the prompt, which the search did not see, it does not. Confirmed labels were chosen with the variants, and
are the identity unless every variant puts them above it, so their gains flatter them on both.
"""
_HOW_TO_READ_HARDEST = """
The gain is that of the best evaluated plan other than the identity, raw, over the identity; the prompts whose best edit
gains least come first.
"""


def inspect_labels(folder: Path, control: Path | None = None) -> Inspection:
    """Inspect labels, finished or not.

    Args:
        folder: The folder that a search wrote.
        control: The folder of a null control of these labels; None: none is shown.

    Raises:
        FileNotFoundError: There are no labels, or no control.
        LabelError: They are damaged, hold no prompt yet, or the control is one of other labels.
    """
    labels = read_labels(folder, accept_partial=True)
    is_control = (folder / REPORT).is_file()
    found = None
    if control is not None:
        check_control_of(labels.manifest, control, f"the labels in {folder}")
        found = read_null(control)
    elif is_control:
        found = read_null(folder)
    figures = {**label_figures(labels), "answers_shuffled": is_control, "null": found}
    return Inspection(
        kind="null control" if is_control else "labels",
        title=f"{'null control' if is_control else 'labels'} of {labels.manifest.task['name']}",
        said=_said(figures),
        figures=figures,
        parts=_parts(figures),
        facts=_facts(labels),
    )


def label_figures(labels: Labels) -> dict[str, Any]:
    """Return the figures of labels, as values that JSON can hold.

    Args:
        labels: The labels.
    """
    manifest = labels.manifest
    kinds = {"raw": labels.raw_plans, "confirmed": labels.plans}
    identity = labels.base_rewards - manifest.depth_penalty
    own = {"raw": labels.raw_values, "confirmed": labels.values}
    variants = _variant_values(labels) if manifest.confirm else None
    return {
        "prompts": len(labels),
        "prompts_of_task": int(manifest.task["prompts"]),
        "num_layers": manifest.num_layers,
        "objective": manifest.objective,
        "depth_penalty": manifest.depth_penalty,
        "confirm": manifest.confirm,
        "margin": manifest.margin,
        "evaluations_per_label": labels.evaluations,
        "confirmations_per_label": labels.confirmations,
        "kept_rate": labels.kept_rate,
        "depth": {name: float(plan_depth(plans).mean()) for name, plans in kinds.items()},
        "identity_rate": {
            name: float((plans == 1).all(axis=1).mean()) for name, plans in kinds.items()
        },
        "gain": {
            name: {
                "on_prompts": paired_difference(own[name], identity).to_dict(),
                "on_variants": None
                if variants is None
                else paired_difference(variants[name], variants["identity"]).to_dict(),
            }
            for name in kinds
        },
        "layers": {name: action_shares(plans) for name, plans in kinds.items()},
        "plans": plan_map(labels.plans, labels.examples),
        "hardest": _hardest(labels),
    }


def _variant_values(labels: Labels) -> dict[str, _Floats]:
    """Return the mean value of each prompt's raw label, label and identity plan on its variants; 0 without variants.

    A prompt has no variants where the search evaluated the identity alone: then all three are this plan.
    """
    one = "1" * labels.manifest.num_layers
    wanted = {
        "raw": [plan_text(plan) for plan in labels.raw_plans],
        "confirmed": [plan_text(plan) for plan in labels.plans],
        "identity": [one] * len(labels),
    }
    known = [{item.plan: item for item in items} for items in labels.candidates]
    return {
        name: np.array(
            [
                _on_variants(items[plan]) if items else 0.0
                for items, plan in zip(known, plans, strict=True)
            ]
        )
        for name, plans in wanted.items()
    }


def _on_variants(candidate: Candidate) -> float:
    return float(np.mean(candidate.variant_rewards)) - candidate.price


def _hardest(labels: Labels) -> list[dict[str, Any]]:
    """Return the prompts whose best evaluated edit gains least; ties go to the deeper label, then to the first."""
    found: list[dict[str, Any]] = []
    for row, (example, tried) in enumerate(zip(labels.examples, labels.evaluated, strict=True)):
        values = tried.rewards - labels.manifest.depth_penalty * tried.depths
        others = np.flatnonzero((tried.plans != 1).any(axis=1))
        if not len(others):
            continue
        best = others[int(values[others].argmax())]
        identity = labels.base_rewards[row] - labels.manifest.depth_penalty
        found.append(
            {
                "prompt": one_line(example.prompt),
                "prompt_id": example.prompt_id,
                "best_edit": plan_text(tried.plans[best]),
                "gain": float(values[best] - identity),
                "label": plan_text(labels.plans[row]),
                "depth": float(labels.depths[row]),
                "evaluations": len(tried),
            }
        )
    return sorted(found, key=lambda item: (item["gain"], -item["depth"]))[:_HARDEST]


def _said(figures: Mapping[str, Any]) -> list[str]:
    count, asked = figures["prompts"], figures["prompts_of_task"]
    of = "" if count == asked else f" of {asked} (the search is unfinished)"
    depth = figures["depth"]["confirmed"]
    change = f"{1 - depth:.1%} saved" if depth <= 1 else f"{depth - 1:.1%} more than the base model"
    said = [
        f"Labels of {count} prompts{of}: mean depth {depth:.3f}, {change}; "
        f"{figures['identity_rate']['confirmed']:.0%} are the identity plan. {_gain_said(figures['gain'])}",
        "A label is chosen by its outcomes, as an oracle chooses; what a policy makes of labels, `dynadepth eval` "
        "says.",
    ]
    if figures["answers_shuffled"]:
        said.insert(
            0,
            "These are the labels of a null control: the answers were shuffled between the prompts, so their gains are "
            "those that luck finds.",
        )
    if figures["null"] is not None:
        said += [
            f"Null control, {kind} labels: {luck_text(figures['null'], kind)}."
            for kind in ("raw", "confirmed")
        ]
    elif figures["objective"] == "reward":
        said.append(
            "How many fixes are luck is not known: `dynadepth search null` finds out, and `--null` shows it here."
        )
    return said


def _gain_said(gains: Mapping[str, Any]) -> str:
    """Say what the search found by what chose no plan, if there is that: raw labels on variants."""
    raw, confirmed = (gains[name]["on_variants"] for name in ("raw", "confirmed"))
    gain = gains["raw"]["on_prompts"] if raw is None else raw
    words = {1: "gain over", 0: "show no gain over", -1: "lose against"}[side_of_zero(gain)]
    interval = (
        f"{show_interval('reward', gain)} (mean value, paired 95 % interval, n = {gain['n']})"
    )
    if raw is None:
        return (
            f"On the prompts themselves, which chose them, they {words} the identity plan: {interval}. None was "
            "confirmed on variants."
        )
    return (
        f"On variants of the prompts, which the search did not see, the plans that it found (raw labels) {words} the "
        f"identity plan: {interval}. The confirmed labels were chosen with the variants, so what they gain there, "
        f"{show_interval('reward', confirmed)}, flatters them."
    )


def _parts(figures: Mapping[str, Any]) -> list[Table | Picture]:
    shown = figures["plans"]["rows"]
    return [
        _summary(figures),
        _gains(figures),
        Picture(
            title="Edits by layer",
            svg=edit_shares_map(_named(figures["layers"])),
            note="Shares of the labels: pale before confirmation, full after it.",
        ),
        _layers(figures),
        Picture(
            title="Plans that most prompts got",
            svg=plan_map_picture(
                [row["plan"] for row in shown],
                [f"{share_text(row['share'])} at {row['depth']:.3f}" for row in shown],
                "what the most frequent labels do to each layer",
            ),
            note="One row for each label: its share of the prompts, and its depth.",
        ),
        plans_table("Who gets which plan", figures["plans"]),
        Table(
            title="Hardest prompts",
            head=["gain", "best edit", "label's depth", "prompt"],
            rows=[
                [
                    f"{row['gain']:+.4f}",
                    edits_text(row["best_edit"]),
                    f"{row['depth']:.3f}",
                    row["prompt"],
                ]
                for row in figures["hardest"]
            ],
            note=_HOW_TO_READ_HARDEST,
            texts=(3,),
            shown=5,
        ),
    ]


def _named(layers: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name} labels": shares for name, shares in layers.items()}


def _summary(figures: Mapping[str, Any]) -> Table:
    rows = [
        ["prompts", f"{figures['prompts']} of {figures['prompts_of_task']}"],
        ["objective", figures["objective"]],
        ["lambda (what a depth of 1 costs)", f"{figures['depth_penalty']:.4g}"],
        ["evaluations per label", f"{figures['evaluations_per_label']:.1f}"],
        ["confirmations per label", f"{figures['confirmations_per_label']:.1f}"],
        ["confirmed as found", f"{figures['kept_rate']:.0%}"],
        ["different labels", str(figures["plans"]["different_plans"])],
    ]
    return Table(title="Search", head=["figure", "value"], rows=rows)


def _gains(figures: Mapping[str, Any]) -> Table:
    rows = []
    for name, gain in figures["gain"].items():
        variants = gain["on_variants"]
        rows.append(
            [
                f"{name} labels",
                f"{figures['depth'][name]:.3f}",
                f"{figures['identity_rate'][name]:.0%}",
                show_interval("reward", gain["on_prompts"]),
                "not confirmed" if variants is None else show_interval("reward", variants),
            ]
        )
    head = ["", "depth", "identity", "gain on prompts [95 %]", "gain on variants [95 %]"]
    return Table(title="Gain over the identity plan", head=head, rows=rows, note=_HOW_TO_READ_GAINS)


def _layers(figures: Mapping[str, Any]) -> Table:
    raw, confirmed = figures["layers"]["raw"], figures["layers"]["confirmed"]
    edited = [
        (1 - confirmed[layer][1], 1 - raw[layer][1], layer)
        for layer in range(figures["num_layers"])
        if raw[layer][1] < 1 or confirmed[layer][1] < 1
    ]
    rows = [
        [
            str(layer),
            *(
                share_text(shares[layer][action])
                for action in (0, 2)
                for shares in (raw, confirmed)
            ),
        ]
        for *_, layer in sorted(edited, key=lambda item: (-item[0], -item[1], item[2]))
    ]
    return Table(
        title="Layers that labels edit",
        head=["layer", "skip, raw", "skip", "repeat, raw", "repeat"],
        rows=rows,
        note="Shares of the labels that skip or repeat the layer; layers that are edited most come first.",
        shown=_LAYERS,
    )


def plans_table(title: str, mapped: Mapping[str, Any]) -> Table:
    """Return who gets which plan.

    Args:
        title: What the table is called.
        mapped: What `plan_map` returned.
    """
    rows: Sequence[Mapping[str, Any]] = mapped["rows"]
    return Table(
        title=title,
        head=["plan", "depth", "prompts", "such as"],
        rows=[
            [
                edits_text(row["plan"]),
                f"{row['depth']:.3f}",
                share_text(row["share"]),
                " | ".join(row["examples"]),
            ]
            for row in rows
        ],
        note=f"{mapped['different_plans']} different plans; those that most prompts got.",
        texts=(3,),
        shown=6,
    )


def _facts(labels: Labels) -> dict[str, Any]:
    manifest = labels.manifest
    plain = {
        name: value
        for name, value in manifest.search.items()
        if isinstance(value, str | int | float)
    }
    task = {name: value for name, value in manifest.task.items() if isinstance(value, str | int)}
    made = {"dtype": manifest.dtype, "shortcuts": manifest.shortcuts or "none"}
    return {
        "task": task,
        "search": {**plain, **manifest.search["config"]},
        "base model": {**manifest.base_model.get("architecture", {}), **made},
        "versions": manifest.versions,
    }
