"""What a routers folder holds: the kind of policy, its calibrated budgets, its decision layers and its plans."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dynadepth.checkpoints.save_load import load_policy
from dynadepth.checkpoints.trained_exits import TrainedExits
from dynadepth.checkpoints.trained_policy import Routers, TrainedMenu, TrainedPolicy
from dynadepth.plans import EXECUTE, plan_depth, plan_text
from dynadepth_search.evaluation.metrics import listed
from dynadepth_search.inspecting.edit_maps import plan_map_picture
from dynadepth_search.inspecting.inspection import Inspection, Picture, Table, edits_text
from dynadepth_search.inspecting.late_exits.heads_seen import inspect_exits

__all__ = ["inspect_routers", "router_figures"]

# Entries of the calibration, and static plans of routers, that are shown.
_BUDGETS = 12


def inspect_routers(folder: Path) -> Inspection:
    """Inspect a routers folder.

    Args:
        folder: The folder that a training wrote.

    Raises:
        CheckpointError: A file is damaged or missing.
        ShortcutError: The shortcuts beside the routers are damaged.
    """
    trained = load_policy(folder)
    if isinstance(trained, TrainedExits):
        return inspect_exits(trained)
    figures = router_figures(trained)
    return Inspection(
        kind="routers",
        title=f"{figures['policy']} of {figures['model'] or 'a model'}",
        said=[_said(figures)],
        figures=figures,
        parts=[_summary(figures), _map(figures), _plans(figures), _calibration(figures)],
        facts=_facts(trained),
    )


def router_figures(trained: TrainedPolicy) -> dict[str, Any]:
    """Return the figures of a trained policy, as values that JSON can hold.

    Args:
        trained: The policy.
    """
    table, shortcuts = trained.calibration, trained.shortcuts
    figures: dict[str, Any] = {
        "policy": trained.kind,
        "model": trained.base_model,
        "revision": trained.revision,
        "num_layers": trained.num_layers,
        "protect": list(trained.protect),
        "lowest_budget": table.lowest,
        "highest_budget": table.highest,
        "calibration": [
            {"penalty": penalty, "depth": depth}
            for penalty, depth in zip(table.lambdas, table.depths, strict=True)
        ],
        "shortcuts": None
        if shortcuts is None
        else {
            "digest": shortcuts.digest,
            "rank": shortcuts.rank,
            "layers": list(shortcuts.mapped_layers),
        },
        "train_prompts": trained.training.get("train_prompts"),
    }
    if isinstance(trained, TrainedMenu):
        heads = trained.menu.heads
        figures["decision_layers"] = [
            {"layer": head.layer_idx, "num_windows": head.num_windows} for head in heads
        ]
        figures["plans"] = [
            {"plan": plan_text(plan), "depth": float(plan_depth(plan))}
            for plan in trained.menu.plans
        ]
    elif isinstance(trained, Routers):
        windows = trained.config.num_windows
        figures["decision_layers"] = [
            {"layer": layer, "num_windows": windows} for layer in range(trained.num_layers)
        ]
        figures["shrinkage"] = trained.shrinkage
        figures["plans"] = _static_plans(trained)
    return figures


def _static_plans(trained: Routers) -> list[dict[str, Any]]:
    """Return the plans of routers' static part at the calibrated budgets, or some of them, deepest first.

    It is the plan of a prompt for which no router says anything; equal ones are named once.
    """
    table, bias = trained.calibration, trained.bias.numpy()
    pairs = list(zip(table.depths, table.lambdas, strict=True))
    accepted = [pair for pair in pairs if table.lowest <= pair[0] <= table.highest] or pairs
    actions = np.arange(bias.shape[1], dtype=bias.dtype)
    found: dict[str, list[float]] = {}
    for depth, penalty in reversed(accepted):
        plan = (bias - np.float32(penalty) * actions).argmax(axis=1).astype(np.uint8)
        plan[list(trained.protect)] = int(EXECUTE)
        found.setdefault(plan_text(plan), []).append(depth)
    plans = [
        {
            "plan": plan,
            "depth": (plan.count("1") + 2 * plan.count("2")) / len(plan),
            "budgets": [min(depths), max(depths)],
        }
        for plan, depths in found.items()
    ]
    return [plans[index] for index in _spread(len(plans))]


def _spread(count: int) -> list[int]:
    """Return the numbers of entries to show: all of them, or some at even distances, both ends among them."""
    if count <= _BUDGETS:
        return list(range(count))
    return np.linspace(0, count - 1, _BUDGETS).round().astype(int).tolist()  # type: ignore[no-any-return]


def _said(figures: Mapping[str, Any]) -> str:
    if figures["policy"] == "menu":
        layers = listed([f"layer {head['layer']}" for head in figures["decision_layers"]])
        what = (
            f"A menu of {len(figures['plans'])} plans, chosen from the states that enter {layers}"
        )
    else:
        what = f"Routers of all {figures['num_layers']} layers, shrinkage {figures['shrinkage']:g}"
    return (
        f"{what}; budgets from {figures['lowest_budget']:.4g} to {figures['highest_budget']:.4g} are calibrated. The "
        "folder holds no prompts: `dynadepth eval` says who gets which plan, and what it is worth."
    )


def _summary(figures: Mapping[str, Any]) -> Table:
    maps = figures["shortcuts"]
    carried = "none"
    if maps is not None:
        carried = f"{maps['digest']}, rank {maps['rank']}, on {len(maps['layers'])} layers"
    heads = figures["decision_layers"]
    decides = (
        "; ".join(
            f"layer {head['layer']}, last token"
            + (f" and {head['num_windows']} windows" if head["num_windows"] else "")
            for head in heads
        )
        if figures["policy"] == "menu"
        else f"every layer, 0 to {figures['num_layers'] - 1}"
    )
    prompts = figures["train_prompts"]
    rows = [
        ["base model", figures["model"] or "without a name"],
        ["revision", figures["revision"] or "unknown"],
        ["kind of policy", figures["policy"]],
        ["decoder layers", str(figures["num_layers"])],
        ["decides at", decides],
        ["protected layers", ", ".join(map(str, figures["protect"])) or "none"],
        ["shortcuts", carried],
        ["budgets", f"{figures['lowest_budget']:.4g} to {figures['highest_budget']:.4g}"],
        ["training prompts", "unknown" if prompts is None else str(prompts)],
    ]
    return Table(title="Policy", head=["figure", "value"], rows=rows)


def _ordered(figures: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted(figures["plans"], key=lambda row: -row["depth"])


def _map(figures: Mapping[str, Any]) -> Picture:
    rows = _ordered(figures)
    menu = figures["policy"] == "menu"
    return Picture(
        title="What each plan edits",
        svg=plan_map_picture(
            [row["plan"] for row in rows],
            [f"{row['depth']:.3f}" for row in rows],
            "what each plan does to each layer",
        ),
        note="One row for each plan of the menu, with its depth." if menu else _STATIC_PART,
    )


_STATIC_PART = (
    "The plans of the static part at the calibrated budgets, with their depths: what a prompt gets for which no router "
    "says otherwise."
)


def _plans(figures: Mapping[str, Any]) -> Table:
    if figures["policy"] == "menu":
        rows = [[edits_text(row["plan"]), f"{row['depth']:.3f}"] for row in _ordered(figures)]
        return Table(title="Plans of the menu", head=["plan", "depth"], rows=rows, shown=16)
    return Table(
        title="Plans of the static part",
        head=["plan", "depth", "at budgets"],
        rows=[
            [
                edits_text(row["plan"]),
                f"{row['depth']:.3f}",
                " to ".join(f"{end:.3f}" for end in dict.fromkeys(row["budgets"])),
            ]
            for row in _ordered(figures)
        ],
        note=_STATIC_PART,
    )


def _calibration(figures: Mapping[str, Any]) -> Table:
    entries = figures["calibration"]
    shown = _spread(len(entries))
    return Table(
        title="Calibrated budgets",
        head=["mean depth", "penalty"],
        rows=[[f"{entries[n]['depth']:.4f}", f"{entries[n]['penalty']:.4g}"] for n in shown],
        note=f"{len(shown)} of {len(entries)} entries of the table from penalty to mean depth.",
    )


def _facts(trained: TrainedPolicy) -> dict[str, Any]:
    plain = (str, int, float)
    groups = {
        "training": trained.training,
        "recipe": trained.training.get("recipe", {}),
        "measured": trained.metrics,
    }
    return {
        name: {key: value for key, value in group.items() if isinstance(value, plain)}
        for name, group in groups.items()
        if isinstance(group, Mapping) and any(isinstance(value, plain) for value in group.values())
    }
