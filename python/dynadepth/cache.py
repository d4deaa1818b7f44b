"""DepthCache: key and value states with one slot for each visit of a decoder layer.

A slot holds only the rows whose plan makes the visit, and which rows these are follows from the plans, which live on
the cache: so beams, several turns and two users of one model never mix. Tokens are counted for each layer whether it
runs or not, so masks and positions never depend on a slot that may be empty. Knows nothing of policies.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from dynadepth.errors import UnsupportedModelError
from dynadepth.rows import RowPlans

__all__ = ["DepthCache", "VisitView", "adopt_cache"]


class _TokenCounter(DynamicLayer):
    """Stands for one decoder layer where transformers asks the cache for lengths; holds no states."""

    def __init__(self) -> None:
        super().__init__()
        self.cumulative_length = 0

    def advance(self, num_tokens: int) -> None:
        self.cumulative_length += num_tokens
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def reset(self) -> None:
        self.cumulative_length = 0
        self.is_initialized = False

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise what the states' own layer would, before anything is changed."""

    def crop(self, tokens_to_remove: int) -> None:
        self.cumulative_length = max(self.cumulative_length - abs(tokens_to_remove), 0)

    def make_slot(self) -> DynamicLayer:
        return DynamicLayer()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None: ...

    def batch_repeat_interleave(self, repeats: int) -> None: ...

    def batch_select_indices(self, indices: torch.Tensor) -> None: ...


class _SlidingTokenCounter(_TokenCounter):
    """As `_TokenCounter`, for a layer that attends to a sliding window only."""

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

    def make_slot(self) -> DynamicLayer:
        slot = DynamicSlidingWindowLayer(sliding_window=self.sliding_window)
        slot.record_past = self.record_past
        return slot


class VisitView(Cache):
    """What a decoder layer sees as its cache during one visit: its own slot, whatever index it asks for."""

    def __init__(self, cache: "DepthCache", layer_idx: int, visit: int) -> None:
        # The base class would make its own layers; this is a window on those of `cache`.
        self._cache, self._layer_idx, self._visit = cache, layer_idx, visit

    @property
    def layers(self) -> list[Any]:
        """The token counters of the whole cache."""
        return self._cache.layers

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,  # noqa: ARG002 - the view knows its slot
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states to the slot of this visit and return all of its states."""
        slots, key = self._cache.slots, (self._layer_idx, self._visit)
        slot = slots.get(key)
        if slot is None:
            slot = slots[key] = self._cache.layers[self._layer_idx].make_slot()
        keys, values = slot.update(key_states, value_states, *args, **kwargs)
        return keys, values


class DepthCache(DynamicCache):
    """A `DynamicCache` with one slot for each visit, and the plans of its rows.

    Made by `adopt_cache` from a cache that is still empty. `layers` counts tokens; `slots` holds the states.

    Attributes:
        slots: Key and value states by (layer_idx, visit); only visits that some row makes have one. Each holds
            states of shape (rows that make the visit, heads, tokens, head width).
        row_plans: The plans of the rows, fixed at prefill.
    """

    layers: list[Any]
    slots: dict[tuple[int, int], DynamicLayer]
    row_plans: RowPlans | None

    def view(self, layer_idx: int, visit: int) -> VisitView:
        """Return what the layer sees as its cache in this visit."""
        return VisitView(self, layer_idx, visit)

    def advance(self, layer_idx: int, num_tokens: int) -> None:
        """Count the tokens that have passed a layer, whether it ran or not."""
        self.layers[layer_idx].advance(num_tokens)

    @property
    def state_bytes(self) -> int:
        """Bytes of key and value states held now."""
        return sum(
            tensor.numel() * tensor.element_size()
            for slot in self.slots.values()
            for tensor in (slot.keys, slot.values)
            if tensor is not None
        )

    def update(self, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuse: only a wrapped model can write here.

        Raises:
            UnsupportedModelError: Always.
        """
        raise UnsupportedModelError(
            "this cache holds the states of a wrapped model, one slot for each visit; use it with that model while it "
            "is wrapped, and a new cache elsewhere"
        )

    def reset(self) -> None:
        """Forget all states and the plans: the next prompt is planned anew."""
        super().reset()
        self.slots.clear()
        self.row_plans = None

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens of every slot.

        Args:
            tokens_to_remove: Minus the number of tokens, as transformers has it.

        Raises:
            ValueError: The number is positive.
            UnsupportedModelError: A full sliding window has forgotten the states that would come back.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes minus the number of tokens to drop, not {tokens_to_remove}"
            )
        for counter in self.layers:
            counter.check_crop(tokens_to_remove)
        for slot in self.slots.values():
            slot.crop(tokens_to_remove)
        for counter in self.layers:
            counter.crop(tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Let sliding windows keep the states that a later `crop` may need."""
        super().activate_past_recording()
        for slot in self.slots.values():
            if isinstance(slot, DynamicSlidingWindowLayer):
                slot.activate_past_recording()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let row r continue what row `beam_idx[r]` was. Shape (rows,), int64."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times in place."""
        if self.row_plans is not None:
            rows = torch.arange(self.row_plans.num_rows).repeat_interleave(repeats)
            self.batch_select_indices(rows)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order, rows repeated if named twice. Shape (rows,), integer or boolean."""
        plans = self.row_plans
        if plans is None:
            return
        indices = torch.as_tensor(indices)
        if indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(-1)
        if plans.is_uniform:
            # Every slot holds every row, so the selection need not come to the host.
            for slot in self.slots.values():
                _select(slot, indices)
            self.row_plans = plans.select([0] * indices.numel())
            return
        chosen = indices.tolist()
        for (layer_idx, visit), slot in self.slots.items():
            position = {row: place for place, row in enumerate(plans.rows(layer_idx, visit))}
            _select(
                slot,
                torch.tensor(
                    [position[row] for row in chosen if row in position], dtype=torch.long
                ),
            )
        self.row_plans = plans.select(chosen)


def _select(slot: DynamicLayer, indices: torch.Tensor) -> None:
    if slot.keys is not None and slot.keys.numel():
        slot.keys = slot.keys.index_select(0, indices.to(slot.keys.device))
        slot.values = slot.values.index_select(0, indices.to(slot.values.device))


_SLOT_CLASSES = (DynamicLayer, DynamicSlidingWindowLayer)


def adopt_cache(cache: Any, num_layers: int) -> DepthCache:
    """Turn an empty `DynamicCache` into a `DepthCache`, in place, so that whoever holds it keeps holding it.

    Args:
        cache: A cache that `generate`, the model or the user made; a `DepthCache` is returned as it is.
        num_layers: Decoder layers of the model.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: Another kind of cache, a cache offloaded to the host, or one that holds states of the
            unwrapped model.
    """
    if isinstance(cache, DepthCache):
        return cache
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        offloaded = " with offloading" if getattr(cache, "offloading", False) else ""
        raise UnsupportedModelError(
            f"the cache is a {type(cache).__name__}{offloaded}; a wrapped model runs with a DynamicCache (the "
            "default of generate) or with use_cache=False"
        )
    if cache.get_seq_length() > 0:
        raise UnsupportedModelError(
            f"the cache already holds {cache.get_seq_length()} tokens of the unwrapped model; begin with an empty cache"
        )
    strange = next((layer for layer in cache.layers if type(layer) not in _SLOT_CLASSES), None)
    if strange is not None:
        raise UnsupportedModelError(
            f"the cache has a layer of class {type(strange).__name__}; supported are "
            f"{', '.join(cls.__name__ for cls in _SLOT_CLASSES)}"
        )
    cache.__class__ = DepthCache
    counters: list[_TokenCounter] = []
    for layer in cache.layers:
        if type(layer) is DynamicSlidingWindowLayer:
            counters.append(
                _SlidingTokenCounter(layer.sliding_window, record_past=layer.record_past)
            )
        else:
            counters.append(_TokenCounter())
    # A cache made without a config starts with no layers and grows full-attention ones.
    counters.extend(_TokenCounter() for _ in range(num_layers - len(counters)))
    cache.layers = counters
    cache.layer_class_to_replicate = None
    cache.slots = {}
    cache.row_plans = None
    adopted: DepthCache = cache
    return adopted
