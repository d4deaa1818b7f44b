"""The model card of a routers folder."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from huggingface_hub import ModelCard, ModelCardData

from dynadepth.checkpoints.trained_exits import TrainedExits
from dynadepth.checkpoints.trained_policy import Routers, TrainedMenu, TrainedPolicy
from dynadepth.plans import plan_depth, plan_text

__all__ = ["policy_card"]

_NO_HUB = "path/to/this/folder"


def policy_card(policy: TrainedPolicy) -> str:
    """Write the README.md of a routers folder.

    Args:
        policy: Routers, a menu or exits. Of its `metrics`, the rows under `table` become a table, the texts under
            `drifts` a list, and plain values another list.

    Returns:
        Markdown with the hub's front matter.
    """
    calibration = policy.calibration
    lowest, highest = calibration.range
    middle = calibration.depths[len(calibration.depths) // 2]
    budget = round(min(max(middle, lowest), highest), 2)
    name = policy.base_model or "a model without a name"
    lines = [
        f"# Depth routers for {name}",
        "",
        _purpose(policy),
        "",
        "```python",
        "from dynadepth import wrap_model",
        "",
        f'model = wrap_model(model, {_promise(policy, budget)}, routers="{_NO_HUB}")',
        "```",
        "",
        f"- budgets ({_budget_of(policy)}): {lowest:.4g} to {highest:.4g}, calibrated in "
        f"{len(calibration.depths)} steps",
        *_shape(policy),
        f"- protected layers: {', '.join(map(str, policy.protect)) or 'none'}",
        *_skipped(policy),
        *_trained_on(policy.training),
        "",
        "A budget is a mean over prompts like those it was calibrated on; other prompts may take more or less.",
        *_promises(policy),
    ]
    metrics = policy.metrics
    table, drifts = metrics.get("table"), metrics.get("drifts")
    plain = {
        key: value for key, value in metrics.items() if isinstance(value, str | int | float | bool)
    }
    if table or plain:
        lines += ["", "## Measured", ""]
    lines += [f"- {key}: {_cell(value)}" for key, value in plain.items()]
    if table:
        lines += [""] if plain else []
        lines += _table(table)
    if drifts:
        lines += ["", "## Known drifts", "", *(f"- {text}" for text in drifts)]
    if isinstance(policy, TrainedMenu):
        lines += ["", "## Plans", "", *_plans(policy)]
    text = "\n".join(lines) + "\n"
    return str(ModelCard(f"---\n{_front_matter(policy).to_yaml()}\n---\n\n{text}"))


def _front_matter(policy: TrainedPolicy) -> ModelCardData:
    """Return the metadata that the hub reads; huggingface_hub writes the YAML, so that any name is quoted properly."""
    # A name that is not a hub id would become a broken link on the hub.
    on_hub = "/" in policy.base_model
    relation: dict[str, Any] = {"base_model_relation": "adapter"} if on_hub else {}
    return ModelCardData(
        library_name="dynadepth",
        tags=["dynamic-depth", "layer-skipping"],
        base_model=policy.base_model if on_hub else None,
        **relation,
    )


def _promise(policy: TrainedPolicy, budget: float) -> str:
    """Return what the example asks for."""
    if not isinstance(policy, TrainedExits):
        return f"budget={budget}"
    fidelities = [share for share in policy.promises.likely if share < 1]
    return f"fidelity={max(fidelities, key=lambda share: -abs(share - 0.98), default=0.98):.3f}"


def _budget_of(policy: TrainedPolicy) -> str:
    if isinstance(policy, TrainedExits):
        return "mean passes of new tokens; prompts are read in full"
    return "mean share of the layers that run"


def _promises(policy: TrainedPolicy) -> list[str]:
    """Return what exits kept on held-out prompts, strictest first."""
    if not isinstance(policy, TrainedExits):
        return []
    promises = policy.promises
    rows = [
        {
            "threshold": threshold,
            "passes": passes,
            "fidelity": kept,
            "likely": likely,
            "certain": sure,
        }
        for threshold, passes, kept, likely, sure in zip(
            promises.thresholds[1:],
            promises.passes[1:],
            promises.kept[1:],
            promises.likely[1:],
            promises.certain[1:],
            strict=True,
        )
    ]
    return [
        "",
        "## Promises",
        "",
        f"Text produced with exits on from {promises.prompts} held-out prompts. Fidelity: the share of new tokens that "
        "are the base model's own choice after the same text. Bounds that it is above with 95 %: *likely* by the "
        "spread of the prompts, *certain* for any distribution.",
        "",
        *_table(rows),
    ]


def _purpose(policy: TrainedPolicy) -> str:
    if isinstance(policy, TrainedExits):
        return (
            "New tokens leave before a decoder layer where their reading is sure to be the base model's; their later "
            "layers run with a later token, so keys and values stay the base model's own. The weights of the base "
            "model do not change."
        )
    if isinstance(policy, TrainedMenu):
        return (
            f"For every prompt one of {len(policy.menu.plans)} plans is chosen, which say for each of the "
            f"{policy.num_layers} decoder layers whether it is skipped, executed or repeated. The weights of the base "
            "model do not change."
        )
    return (
        f"One router for each of the {policy.num_layers} decoder layers says, for every prompt, whether the layer is "
        "skipped, executed or repeated. The weights of the base model do not change."
    )


def _shape(policy: TrainedPolicy) -> list[str]:
    if isinstance(policy, TrainedExits):
        return [
            f"- exits before layer {head.layer_idx} of {policy.num_layers} (width {head.hidden_size}, lens of "
            f"{head.tensors['lens.up'].shape[0]}, router of {head.tensors['router.up'].numel()})"
            for head in policy.heads
        ]
    if isinstance(policy, TrainedMenu):
        return [
            f"- decides at layer {head.layer_idx}, from the last prompt token"
            + (f" and {head.num_windows} windows" if head.num_windows else "")
            + f" (width {head.hidden_size}"
            + (f", perceptron of {len(head.inner_bias)}" if head.inner_bias is not None else "")
            + ")"
            for head in policy.menu.heads
        ]
    if isinstance(policy, Routers):
        config = policy.config
        return [
            f"- shape: {config.num_windows} windows{' and the last token' if config.last_token else ''}, width "
            f"{config.hidden_size}, bottleneck {config.bottleneck}, preset `{config.preset}`",
            f"- shrinkage: {policy.shrinkage:g} (0: one plan for all prompts, 1: as the routers were trained)",
        ]
    return []


def _skipped(policy: TrainedPolicy) -> list[str]:
    shortcuts = policy.shortcuts
    if shortcuts is None:
        return []
    return [
        f"- skipped layers: replaced by linear shortcuts of rank {shortcuts.rank} "
        f"({len(shortcuts.mapped_layers)} of {shortcuts.num_layers} layers have one); calibrated with them, so the "
        "policy does not run without"
    ]


def _trained_on(training: Mapping[str, Any]) -> list[str]:
    task, prompts = training.get("task"), training.get("train_prompts")
    if not isinstance(task, Mapping) or not isinstance(prompts, int):
        return []
    return [
        f"- trained on {prompts} prompts of {task.get('name', 'a task')}, objective "
        f"`{training.get('objective', 'unknown')}`"
    ]


def _plans(policy: TrainedMenu) -> list[str]:
    """Return the menu's plans, deepest first, one a line."""
    rows = np.argsort(-policy.menu.depths, kind="stable")
    return [
        f"- `{plan_text(policy.menu.plans[row])}`: depth {float(plan_depth(policy.menu.plans[row])):.3f}"
        for row in rows.tolist()
    ]


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(_cell(row.get(column, '')) for column in columns)} |" for row in rows),
    ]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_cell(part) for part in value) + "]"
    return str(value).replace("|", "\\|")
