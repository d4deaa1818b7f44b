"""An answer whose tokens are coloured by where they left the model."""

from collections.abc import Sequence
from typing import Any

import typer

from dynadepth.models.token_pieces import token_pieces

__all__ = ["coloured", "legend"]

# From the earliest exit to the latest; tokens that went through all layers stay plain.
_COLOURS = ("green", "cyan", "yellow", "magenta")


def coloured(tokenizer: Any, ids: Sequence[int], layers_run: Sequence[int], num_layers: int) -> str:
    """Return the text of an answer, with an escape sequence around each token that left early.

    Args:
        tokenizer: Tokenizer of the model.
        ids: Its tokens.
        layers_run: How many layers had run when each was chosen.
        num_layers: Decoder layers of the model.
    """
    colours = _colours(layers_run, num_layers)
    return "".join(
        typer.style(text, fg=colours.get(layers))
        for text, layers in token_pieces(tokenizer, ids, layers_run)
    )


def legend(layers_run: Sequence[int], num_layers: int) -> str:
    """Return which colour stands for which exit, and how many tokens left there."""
    found = _colours(layers_run, num_layers)
    parts = [
        f"{typer.style(f'{list(layers_run).count(layers)} before layer {layers}', fg=colour)}"
        for layers, colour in found.items()
    ]
    whole = sum(layers >= num_layers for layers in layers_run)
    return ", ".join([*parts, f"{whole} after all {num_layers} layers"])


def _colours(layers_run: Sequence[int], num_layers: int) -> dict[int, str]:
    early = sorted({layers for layers in layers_run if layers < num_layers})
    return {layers: _COLOURS[min(at, len(_COLOURS) - 1)] for at, layers in enumerate(early)}
