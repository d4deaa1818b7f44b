"""The parts of a DepthCache: slots that hold the states of visits, and length layers that stand for decoder layers.

A slot is one of transformers' own cache layers. A length layer holds no states: it answers when transformers asks the
cache for the length of its decoder layer, and makes slots of the kind that the cache had for that layer.
"""

from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from dynadepth.errors import UnsupportedModelError

__all__ = ["LengthLayer", "Slot", "advance_all", "crop_slot", "length_layer_of", "select_rows"]

# One of transformers' own cache layers; it holds the states of one visit.
Slot: TypeAlias = DynamicLayer | StaticLayer


def _no_states(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"`{name}` of a cache layer was asked for, but the cache of a wrapped model holds states by visit, each of "
        "some rows; ask cache.states(layer_idx, visit) for them"
    )


class LengthLayer(DynamicLayer):
    """Stands for one decoder layer where transformers asks the cache for lengths; holds no states."""

    def __init__(self) -> None:
        super().__init__()
        self.cumulative_length = 0

    @property
    def keys(self) -> Any:
        """Refuse: each visit has states of its own.

        Raises:
            UnsupportedModelError: Always.
        """
        raise _no_states("keys")

    @keys.setter
    def keys(self, value: object) -> None:
        # The base class begins with None.
        if value is not None:
            raise _no_states("keys")

    @property
    def values(self) -> Any:
        """Refuse: each visit has states of its own.

        Raises:
            UnsupportedModelError: Always.
        """
        raise _no_states("values")

    @values.setter
    def values(self, value: object) -> None:
        if value is not None:
            raise _no_states("values")

    def get_seq_length(self) -> int:
        """Return the number of tokens counted."""
        return self.cumulative_length

    def reset(self) -> None:
        """Set the count back to zero."""
        self.cumulative_length = 0
        self.is_initialized = False

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise what transformers' own cache layer would, before anything is changed."""

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens off the count, which is large enough."""
        self.cumulative_length -= abs(tokens_to_remove)

    def make_slot(self) -> Slot:
        """Return an empty slot of the layer's kind."""
        return DynamicLayer()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Do nothing: a count is the same for every row."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Do nothing: a count is the same for every row."""

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Do nothing: a count is the same for every row."""


class _SlidingLengthLayer(LengthLayer):
    """Like `LengthLayer`, for a layer that attends to a sliding window only."""

    is_sliding = True

    def __init__(self, sliding_window: int, *, record_past: bool) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self.record_past = record_past

    def activate_past_recording(self) -> None:
        self.record_past = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return DynamicSlidingWindowLayer.get_mask_sizes(self, query_length)  # type: ignore[no-any-return]

    def get_max_length(self) -> int:
        return self.sliding_window

    def check_crop(self, tokens_to_remove: int) -> None:
        if self.cumulative_length >= self.sliding_window and not self.record_past:
            raise UnsupportedModelError(
                f"the cache was to drop its last {abs(tokens_to_remove)} tokens, but a sliding window of "
                f"{self.sliding_window} tokens is full and older states are gone; call "
                "cache.activate_past_recording() before the first forward"
            )

    def make_slot(self) -> Slot:
        slot = DynamicSlidingWindowLayer(sliding_window=self.sliding_window)
        slot.record_past = self.record_past
        return slot


class _StaticLengthLayer(LengthLayer):
    """Like `LengthLayer`, for a layer whose states have their full length from the first token on."""

    # This also makes transformers build a mask for every query: without one, a single token would attend to the empty
    # positions after it.
    is_compileable = True

    def __init__(self, max_cache_len: int) -> None:
        super().__init__()
        self.max_cache_len = max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002 - as the base class
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def check_room(self, num_tokens: int) -> None:
        """Raise if the slots have no room for `num_tokens` more tokens, before anything is written."""
        # transformers' own layer would raise an index error, which on a GPU ends the process.
        if self.cumulative_length + num_tokens > self.max_cache_len:
            raise UnsupportedModelError(
                f"the static cache has room for {self.max_cache_len} tokens and holds {self.cumulative_length}; "
                f"{num_tokens} more do not fit: make a StaticCache with a larger max_cache_len"
            )

    def make_slot(self) -> Slot:
        return StaticLayer(self.max_cache_len)


class _StaticSlidingLengthLayer(_StaticLengthLayer):
    """Like `_StaticLengthLayer`, for a layer that attends to a sliding window only; its length is the window's."""

    is_sliding = True

    def __init__(self, max_cache_len: int, *, is_croppable: bool) -> None:
        super().__init__(max_cache_len)
        self.is_croppable = is_croppable

    @property
    def cumulative_length_int(self) -> int:
        """The count, under the name that transformers' own layer has for it."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return StaticSlidingWindowLayer.get_mask_sizes(self, query_length)  # type: ignore[no-any-return]

    def check_room(self, num_tokens: int) -> None:
        """Do nothing: a window always has room, since old tokens leave it."""

    def check_crop(self, tokens_to_remove: int) -> None:
        if self.cumulative_length > self.max_cache_len:
            raise UnsupportedModelError(
                f"the cache was to drop its last {abs(tokens_to_remove)} tokens, but a static sliding window of "
                f"{self.max_cache_len} tokens has been exceeded and older states are gone; use a DynamicCache and call "
                "cache.activate_past_recording() before the first forward"
            )

    def make_slot(self) -> Slot:
        return StaticSlidingWindowLayer(self.max_cache_len, sliding_window=self.max_cache_len)


def advance_all(length_layers: Iterable[LengthLayer], num_tokens: int) -> None:
    """Count tokens that have passed every layer."""
    for length_layer in length_layers:
        length_layer.cumulative_length += num_tokens
        length_layer.is_initialized = True


def crop_slot(slot: Slot, num_tokens: int) -> None:
    """Drop the last `num_tokens` tokens of a slot that holds at least as many."""
    if not isinstance(slot, StaticLayer):
        slot.crop(-num_tokens)
        return
    # Early static layers of transformers have no `crop`. The states stay where they are; later tokens overwrite them.
    slot.cumulative_length.sub_(num_tokens)
    if isinstance(slot, StaticSlidingWindowLayer):
        slot.cumulative_length_int -= num_tokens


def select_rows(slot: Slot, indices: torch.Tensor) -> None:
    """Keep the rows `indices` of a slot, in that order. Shape (rows,), int64."""
    if slot.keys is not None and slot.keys.numel():
        slot.keys = slot.keys.index_select(0, indices.to(slot.keys.device))
        slot.values = slot.values.index_select(0, indices.to(slot.values.device))


def length_layer_of(layer: Any) -> LengthLayer:
    """Return a length layer for a cache layer that is still empty.

    Args:
        layer: One of transformers' full or sliding-window layers, dynamic or static; not changed.
    """
    if type(layer) is DynamicSlidingWindowLayer:
        return _SlidingLengthLayer(layer.sliding_window, record_past=layer.record_past)
    if type(layer) is StaticSlidingWindowLayer:
        return _StaticSlidingLengthLayer(
            layer.max_cache_len, is_croppable=getattr(layer, "is_croppable", False)
        )
    if type(layer) is StaticLayer:
        return _StaticLengthLayer(layer.max_cache_len)
    return LengthLayer()
