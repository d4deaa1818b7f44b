"""What a folder of exits holds: the exit layers, and what each threshold kept and cost on held-out prompts."""

from typing import Any

from dynadepth.checkpoints.trained_exits import TrainedExits
from dynadepth_search.evaluation.metrics import listed
from dynadepth_search.inspecting.inspection import Inspection, Table

__all__ = ["exit_figures", "inspect_exits"]


def inspect_exits(trained: TrainedExits) -> Inspection:
    """Inspect trained exits.

    Args:
        trained: The exits.
    """
    figures = exit_figures(trained)
    layers = listed([f"layer {layer}" for layer in figures["exit_layers"]])
    kept = [row["kept"] for row in figures["promises"]]
    said = (
        f"New tokens may leave before {layers} of {figures['num_layers']}; prompts are read in full. On "
        f"{figures['validation_prompts']} held-out prompts, whose text was produced with exits on, "
        f"{100 * kept[-1]:.1f} to {100 * kept[0]:.1f} % of the new tokens are the base model's own choice."
    )
    return Inspection(
        kind="routers",
        title=f"exits of {figures['model'] or 'a model'}",
        said=[said],
        figures=figures,
        parts=[_summary(figures), _promises(figures), _layers(figures)],
        facts={},
    )


def exit_figures(trained: TrainedExits) -> dict[str, Any]:
    """Return the figures of trained exits, as values that JSON can hold.

    Args:
        trained: The exits.
    """
    promises, training = trained.promises, trained.training
    rows = zip(
        promises.thresholds,
        promises.passes,
        promises.kept,
        promises.likely,
        promises.certain,
        strict=True,
    )
    names = ("threshold", "passes", "kept", "likely", "certain")
    return {
        "policy": trained.kind,
        "model": trained.base_model,
        "num_layers": trained.num_layers,
        "exit_layers": [head.layer_idx for head in trained.heads],
        "window": trained.window,
        # At the first row no token leaves.
        "promises": [dict(zip(names, row, strict=True)) for row in rows][1:],
        "validation_prompts": promises.prompts,
        "train_prompts": training.get("train_prompts"),
        "tokens": training.get("tokens"),
        "passes_of_layers": training.get("passes of layers", {}),
    }


def _summary(figures: dict[str, Any]) -> Table:
    rows = [
        ["base model", figures["model"] or "without a name"],
        ["exit layers", ", ".join(map(str, figures["exit_layers"]))],
        ["most tokens that settle in one call", str(figures["window"])],
        ["training prompts", str(figures["train_prompts"])],
        ["training tokens", str(figures["tokens"])],
        ["held-out prompts", str(figures["validation_prompts"])],
    ]
    return Table(title="Exits", head=["figure", "value"], rows=rows)


def _promises(figures: dict[str, Any]) -> Table:
    return Table(
        title="Promises",
        head=["threshold", "passes", "kept, %", "likely above", "certainly above"],
        rows=[
            [
                f"{row['threshold']:.3f}",
                f"{row['passes']:.3f}",
                *(f"{100 * row[name]:.2f}" for name in ("kept", "likely", "certain")),
            ]
            for row in figures["promises"]
        ],
        note="Passes: layer calls per new token over the layers. Both bounds hold with 95 %: one by the spread of the "
        "prompts, one for any distribution.",
    )


def _layers(figures: dict[str, Any]) -> Table:
    tried = sorted(figures["passes_of_layers"].items(), key=lambda item: item[1])
    return Table(
        title="Exit layers that were tried",
        head=["layers", "passes for 98 % of given text"],
        rows=[[layers, f"{passes:.3f}"] for layers, passes in tried],
        shown=10,
    )
