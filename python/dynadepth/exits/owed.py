"""Owed layers: tokens that have left a forward early, and the layers that they have not run yet.

A token that leaves before layer e keeps its state there and everything that the later layers were to be given for it.
Settling runs the owed tokens through these layers, in the order of the text and together with a token that goes on, so
that every key and value becomes the base model's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dynadepth.errors import UnsupportedModelError

__all__ = ["OwedPiece", "PieceQueue", "merge_arguments"]

# Arguments that have one entry for each token: the entries of several tokens stand one after the other.
_BY_TOKEN = {"position_embeddings": -2, "position_ids": -1, "cache_position": -1}


@dataclass(slots=True, eq=False)
class OwedPiece:
    """Consecutive tokens of all rows of a batch, which one forward brought.

    Args:
        states: What enters the first layer that they owe. Shape (rows, tokens, hidden).
        end: Tokens of each row up to and with these.
        arguments: What each of the later layers was to be given besides, by its number.
        given: What the last layer gave out for them. Shape (rows, hidden); None for tokens that go on.
        counts: Which rows still wrote, rather than padded. Shape (rows,), bool.
    """

    states: torch.Tensor
    end: int
    arguments: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    given: torch.Tensor | None = None
    counts: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of each row."""
        return int(self.states.shape[1])


class PieceQueue:
    """The tokens that wait before exit layers, oldest first.

    Args:
        exit_layers: The layers before which tokens may leave, ascending.
    """

    def __init__(self, exit_layers: Sequence[int]) -> None:
        self.by_exit: dict[int, list[OwedPiece]] = {layer: [] for layer in exit_layers}

    def __len__(self) -> int:
        return sum(piece.num_tokens for pieces in self.by_exit.values() for piece in pieces)

    def add(self, exit_layer: int, pieces: Sequence[OwedPiece]) -> None:
        """Let tokens wait before a layer, behind those that wait there."""
        self.by_exit[exit_layer].extend(pieces)

    def take(self, layer_idx: int) -> list[OwedPiece]:
        """Return the tokens that wait before a layer; they wait no more."""
        pieces = self.by_exit.get(layer_idx)
        if not pieces:
            return []
        self.by_exit[layer_idx] = []
        return pieces

    def clear(self) -> None:
        """Forget all of them."""
        for pieces in self.by_exit.values():
            pieces.clear()


def merge_arguments(
    pieces: Sequence[OwedPiece],
    layer_idx: int,
    *,
    mask_name: str,
    num_keys: int,
    first_key: int,
    window: int | None,
) -> dict[str, Any]:
    """Return what a layer is given for the tokens of several pieces in one call.

    Args:
        pieces: Tokens that follow each other, oldest first; each knows what it was to be given.
        layer_idx: The layer.
        mask_name: Its parameter for the attention mask.
        num_keys: Keys that it attends to in this call, the new ones included.
        first_key: Tokens of each row before the first of these keys.
        window: Tokens that it attends to at most; None: all.

    Returns:
        The arguments, by parameter name.

    Raises:
        UnsupportedModelError: The mask is neither None nor a tensor by rows, heads, queries and keys.
    """
    given = [piece.arguments[layer_idx] for piece in pieces]
    merged = dict(given[-1])
    for name, dim in _BY_TOKEN.items():
        if merged.get(name) is not None:
            merged[name] = _joined([each[name] for each in given], dim)
    merged[mask_name] = _merged_mask(
        [each.get(mask_name) for each in given],
        pieces,
        num_keys=num_keys,
        first_key=first_key,
        window=window,
    )
    return merged


def _joined(values: Sequence[Any], dim: int) -> Any:
    if isinstance(values[0], (tuple, list)):
        return tuple(_joined(each, dim) for each in zip(*values, strict=True))
    return torch.cat([each.to(values[-1].device) for each in values], dim=dim)


def _merged_mask(
    masks: Sequence[Any],
    pieces: Sequence[OwedPiece],
    *,
    num_keys: int,
    first_key: int,
    window: int | None,
) -> torch.Tensor:
    """Return the mask of all queries over all keys. Shape (rows or 1, heads or 1, queries, keys)."""
    tensors = [mask for mask in masks if mask is not None]
    wrong = next((m for m in tensors if not isinstance(m, torch.Tensor) or m.dim() != 4), None)
    if wrong is not None:
        what = tuple(wrong.shape) if isinstance(wrong, torch.Tensor) else type(wrong).__name__
        raise UnsupportedModelError(
            f"a decoder layer is given the mask {what}, which cannot be put together for tokens that left early; use "
            "attn_implementation='sdpa' or 'eager'"
        )
    states = pieces[-1].states
    like = tensors[-1] if tensors else torch.zeros((1, 1), dtype=torch.bool, device=states.device)
    hidden: Any = False if like.dtype == torch.bool else torch.finfo(like.dtype).min
    seen: Any = True if like.dtype == torch.bool else 0
    lead = [max([int(m.shape[dim]) for m in tensors], default=1) for dim in (0, 1)]
    total = sum(piece.num_tokens for piece in pieces)
    merged = like.new_full((*lead, total, num_keys), hidden)
    first = 0
    for mask, piece in zip(masks, pieces, strict=True):
        rows = slice(first, first + piece.num_tokens)
        if mask is None:
            for place in range(piece.num_tokens):
                # Without a mask, a query attends to all keys up to its own.
                end = piece.end - piece.num_tokens + place + 1
                begin = 0 if window is None else max(0, end - window)
                merged[:, :, first + place, max(0, begin - first_key) : end - first_key] = seen
        else:
            # Columns of a mask end at the last of its own tokens, but those of a static cache.
            whole = mask.shape[-1] > piece.end
            begin = (0 if whole else piece.end - mask.shape[-1]) - first_key
            left = max(0, begin)
            columns = mask[..., left - begin : num_keys - begin]
            merged[:, :, rows, left : left + columns.shape[-1]] = columns
        first += piece.num_tokens
    return merged
