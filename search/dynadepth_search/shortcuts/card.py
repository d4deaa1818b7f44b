"""The README.md of a folder of shortcuts."""

from typing import Any

from dynadepth.shortcuts.maps import Shortcuts

__all__ = ["shortcuts_card"]


def shortcuts_card(shortcuts: Shortcuts) -> str:
    """Write what the shortcuts are and what each of them was measured to do.

    Args:
        shortcuts: With the measurements of `dynadepth_search.shortcuts.choosing.choose_maps`.

    Returns:
        Markdown.
    """
    training = shortcuts.training
    lines = [
        f"# Shortcuts for {shortcuts.base_model or 'a model without a name'}",
        "",
        "In place of a decoder layer that is skipped, states go through `h + (h A) B + b`, fitted on the layer's own "
        f"updates. Rank {shortcuts.rank}; {len(shortcuts.mapped_layers)} of {shortcuts.num_layers} layers have a map. "
        "The weights of the base model do not change.",
        "",
        "```python",
        "from dynadepth import wrap_model",
        "",
        'model = wrap_model(model, plan="...", shortcuts="path/to/this/folder")',
        "```",
        "",
        f"- fitted on {training.get('tokens')} tokens of {training.get('prompts')} prompts of "
        f"{training.get('task_name')} and the model's own continuations of them",
        f"- measured on {training.get('heldout_prompts')} other prompts, at every token of the model's own text: "
        "what it costs to skip one layer alone",
        "",
        "| layer | divergence without | with the map | agreement without, % | with the map | variance explained |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['layer']} | {_number(row['divergence_without'])} | "
        f"{_number(row['divergence']) if row['mapped'] else 'no map'} | {100 * row['agreement_without']:.1f} | "
        f"{100 * row['agreement']:.1f} | {row['explained_variance']:.2f} |"
        for row in shortcuts.layers
    ]
    return "\n".join(lines) + "\n"


def _number(value: Any) -> str:
    return "overflows" if value is None else f"{value:.3f}"
