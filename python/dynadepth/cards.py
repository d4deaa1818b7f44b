"""The model card of a routers folder. Knows nothing of files."""

from collections.abc import Mapping, Sequence
from typing import Any

from dynadepth.budget import Calibration
from dynadepth.config import RouterConfig

__all__ = ["routers_card"]


def routers_card(
    *,
    base_model: str,
    config: RouterConfig,
    shrinkage: float,
    calibration: Calibration,
    protect: Sequence[int],
    metrics: Mapping[str, Any],
) -> str:
    """Write the README.md of a routers folder.

    Args:
        base_model: Hub id or name of the base model.
        config: Shape of the routers.
        shrinkage: How far prompts may deviate from the static part.
        calibration: From budget to penalty.
        protect: Layers that always run once.
        metrics: What was measured; rows under `table` become a table, plain values a list.

    Returns:
        Markdown with the hub's front matter.
    """
    lowest, highest = calibration.range
    middle = calibration.depths[len(calibration.depths) // 2]
    budget = round(min(max(middle, lowest), highest), 2)
    name = base_model or "a model without a name"
    lines = ["---", "library_name: dynadepth", "tags: [dynamic-depth, layer-skipping]"]
    if "/" in base_model:
        lines.append(f"base_model: {base_model}")
    lines += [
        "---",
        "",
        f"# Depth routers for {name}",
        "",
        f"One router for each of the {config.num_layers} decoder layers says, for every prompt, whether the layer is "
        "skipped, executed or repeated. The weights of the base model do not change.",
        "",
        "```python",
        "from dynadepth import wrap_model",
        "",
        f'model = wrap_model(model, budget={budget}, routers="path/to/this/folder")',
        "```",
        "",
        f"- budgets (mean share of the layers that run): {lowest:.4g} to {highest:.4g}, calibrated in "
        f"{len(calibration.depths)} steps",
        f"- shape: {config.num_windows} windows{' and the last token' if config.last_token else ''}, width "
        f"{config.hidden_size}, bottleneck {config.bottleneck}, preset `{config.preset}`",
        f"- shrinkage: {shrinkage:g} (0: one plan for all prompts, 1: as the routers were trained)",
        f"- protected layers: {', '.join(map(str, protect)) or 'none'}",
    ]
    table = metrics.get("table")
    plain = {
        key: value for key, value in metrics.items() if isinstance(value, str | int | float | bool)
    }
    if table or plain:
        lines += ["", "## Measured", ""]
    lines += [f"- {key}: {_cell(value)}" for key, value in plain.items()]
    if table:
        lines += [""] if plain else []
        lines += _table(table)
    return "\n".join(lines) + "\n"


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
