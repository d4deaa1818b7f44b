"""What each token adds to the text of an answer, with the layer before which it left."""

from collections.abc import Sequence
from typing import Any

__all__ = ["token_pieces"]


def token_pieces(
    tokenizer: Any, ids: Sequence[int], layers_run: Sequence[int]
) -> list[tuple[str, int]]:
    """Return the text of an answer in pieces.

    Args:
        tokenizer: Tokenizer of the model.
        ids: Its tokens.
        layers_run: How many layers had run when each was chosen.

    Returns:
        What each token adds to the text, and the layers that had run. A character of several tokens comes whole, with
        the last of them; tokens that add nothing are left out.
    """
    pieces, shown = [], ""
    for end, layers in enumerate(layers_run, start=1):
        text = tokenizer.decode(list(ids[:end]), skip_special_tokens=True)
        # Half of a character: its other tokens are still to come.
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            continue
        if text != shown:
            pieces.append((text[len(shown) :], int(layers)))
        shown = text
    return pieces
