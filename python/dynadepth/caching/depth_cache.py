"""DepthCache: key and value states with one slot for each visit of a decoder layer.

A slot holds only the rows whose plan makes the visit. Which rows these are follows from the plans, which are kept on
the cache, so beams, several turns and two users of one model never mix. Tokens are counted for each layer whether it
runs or not, so masks and positions never depend on a slot that may be empty. Dynamic and static caches are adopted;
each slot is then of the kind that the cache had for its layer.
"""

import weakref
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from dynadepth.caching.cache_layers import (
    LengthLayer,
    Slot,
    advance_all,
    crop_slot,
    length_layer_of,
    select_rows,
)
from dynadepth.caching.row_plans import RowPlans
from dynadepth.errors import PlanError, UnsupportedModelError

__all__ = ["DepthCache", "VisitView", "adopt_cache"]


class VisitView(Cache):
    """What a decoder layer sees as its cache during one visit: its own slot, whatever index it asks for."""

    def __init__(self, cache: "DepthCache", layer_idx: int, visit: int) -> None:
        # The base class would make layers of its own. The caller of the forward holds the cache; a scope that an
        # interrupt left behind holds views, which must not keep the states alive.
        self._cache, self._key = weakref.ref(cache), (layer_idx, visit)

    def __reduce__(self) -> tuple[Any, ...]:
        # In a copy of the cache, the views belong to the copy.
        return VisitView, (self._cache(), *self._key)

    @property
    def layers(self) -> list[Any]:
        """The cache's own layers, which count its tokens."""
        return self._held().layers

    def _held(self) -> "DepthCache":
        cache = self._cache()
        if cache is None:
            raise UnsupportedModelError(
                "the cache of this forward is gone; keep the cache for as long as the model runs with it"
            )
        return cache

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,  # noqa: ARG002 - the view knows its slot
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states to the slot of this visit and return all of its states.

        Args:
            key_states: Keys of the new tokens. Shape (rows that make the visit, heads, tokens, head width).
            value_states: Values of the new tokens, of the same shape.
            layer_idx: Ignored: the view knows its slot.
            *args: Passed on to the slot.
            **kwargs: Passed on to the slot.

        Returns:
            The keys and the values of all tokens of the slot.
        """
        cache = self._held()
        slot = cache.slots.get(self._key)
        if slot is None:
            slot = cache.slots[self._key] = cache.layers[self._key[0]].make_slot()
        keys, values = slot.update(key_states, value_states, *args, **kwargs)
        return keys, values


class DepthCache(Cache):
    """A cache with one slot for each visit, and the plans of its rows.

    `adopt_cache` makes it from an empty cache, and it remains an instance of that cache's class. `layers` counts
    tokens; `slots` holds the states.

    Attributes:
        slots: Key and value states by (layer_idx, visit); only visits that some row makes have one. Each holds
            states of shape (rows that make the visit, heads, tokens, head width).
        row_plans: The plans of the rows, fixed at prefill.
        first_views: What each layer sees as its cache in its first visit.
        in_forward: Whether a forward has begun to write and has not completed.
        owed: The tokens that left early and what settles them; None: none ever left.
    """

    layers: list[Any]
    slots: dict[tuple[int, int], Slot]
    row_plans: RowPlans | None
    first_views: list[VisitView]
    in_forward: bool
    owed: Any

    def settle(self) -> None:
        """Run the layers that tokens owe which left early, so that all states are there.

        Raises:
            UnsupportedModelError: The model is no longer wrapped.
        """
        if self.owed is not None and len(self.owed):
            self.owed.settle(self)

    def check_ready(self, num_tokens: int) -> None:  # noqa: ARG002 - static caches check it
        """Refuse a forward that could not be exact, before it writes anything.

        A first forward that did not come to its end leaves nothing that counts: it is forgotten, with its plans.

        Args:
            num_tokens: New tokens of each row.

        Raises:
            UnsupportedModelError: The previous forward raised an exception, or a static cache is too short.
        """
        if self.in_forward and not any(layer.get_seq_length() for layer in self.layers):
            self.reset()
        if self.in_forward:
            raise UnsupportedModelError(
                "the last forward on this cache did not complete, so some layers hold more tokens than others; "
                "begin with a new cache, or call cache.reset() and give the whole prompt again"
            )

    def view(self, layer_idx: int, visit: int) -> VisitView:
        """Return the view that the layer sees as its cache in this visit."""
        return self.first_views[layer_idx] if visit == 0 else VisitView(self, layer_idx, visit)

    def advance(self, num_tokens: int) -> None:
        """Record a completed forward: count its tokens in every layer, whether it ran or not."""
        advance_all(self.layers, num_tokens)
        self.in_forward = False

    def states(
        self, layer_idx: int, visit: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]] | None:
        """Return the key and value states of one visit, and the rows that they belong to.

        Args:
            layer_idx: Which decoder layer.
            visit: 0 for its first execution, 1 for its repeat.

        Returns:
            Keys and values, shape (rows that make the visit, heads, tokens, head width) each, and the indices of these
            rows in the batch, ascending; None if no row makes the visit.

        Raises:
            PlanError: There is no such layer or visit.
        """
        if not 0 <= layer_idx < len(self.layers) or visit not in (0, 1):
            raise PlanError(
                f"the cache was asked for visit {visit} of layer {layer_idx}; expected visit 0 or 1 of a layer from 0 "
                f"to {len(self.layers) - 1}"
            )
        self.settle()
        slot, plans = self.slots.get((layer_idx, visit)), self.row_plans
        if slot is None or slot.keys is None or plans is None:
            return None
        return slot.keys, slot.values, plans.rows(layer_idx, visit)

    @property
    def state_bytes(self) -> int:
        """Bytes of the key and value states that are held now."""
        # Another thread may be running this cache's model.
        return sum(
            tensor.nbytes
            for slot in list(self.slots.values())
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
        """Forget all states and the plans: the next prompt gets new plans."""
        super().reset()
        self.slots.clear()
        self.row_plans = None
        self.in_forward = False
        if self.owed is not None:
            self.owed.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens of every slot.

        Args:
            tokens_to_remove: Minus the number of tokens, the sign that transformers uses.

        Raises:
            ValueError: The number is positive.
            UnsupportedModelError: A sliding window no longer has the states that would enter it again.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes minus the number of tokens to drop, not {tokens_to_remove}"
            )
        for length_layer in self.layers:
            length_layer.check_crop(tokens_to_remove)
        self.settle()
        removed = [
            min(-tokens_to_remove, length_layer.get_seq_length()) for length_layer in self.layers
        ]
        for (layer_idx, _), slot in self.slots.items():
            crop_slot(slot, removed[layer_idx])
        for length_layer, num_tokens in zip(self.layers, removed, strict=True):
            length_layer.crop(-num_tokens)

    def activate_past_recording(self) -> None:
        """Make sliding windows keep the states that a later `crop` may need."""
        super().activate_past_recording()
        for slot in self.slots.values():
            if isinstance(slot, DynamicSlidingWindowLayer):
                slot.activate_past_recording()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row r continue row `beam_idx[r]`. Shape (rows,), int64."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times in place."""
        if self.row_plans is not None:
            rows = torch.arange(self.row_plans.num_rows).repeat_interleave(repeats)
            self.batch_select_indices(rows)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order; a row may be named twice. Shape (rows,), integer or boolean."""
        plans = self.row_plans
        if plans is None:
            return
        self.settle()
        if self.owed is not None:
            self.owed.forget_rows()
        indices = torch.as_tensor(indices)
        if indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(-1)
        if plans.is_uniform:
            # Every slot holds every row, so the indices need not be copied to the host.
            for slot in self.slots.values():
                select_rows(slot, indices)
            self.row_plans = plans.select([0] * indices.numel())
            return
        chosen = indices.tolist()
        for (layer_idx, visit), slot in self.slots.items():
            position = {row: place for place, row in enumerate(plans.rows(layer_idx, visit))}
            select_rows(
                slot,
                torch.tensor(
                    [position[row] for row in chosen if row in position], dtype=torch.long
                ),
            )
        self.row_plans = plans.select(chosen)


class _DynamicDepthCache(DepthCache, DynamicCache):
    """What a `DynamicCache` becomes."""


class _StaticDepthCache(DepthCache, StaticCache):
    """What a `StaticCache` becomes."""

    def check_ready(self, num_tokens: int) -> None:
        super().check_ready(num_tokens)
        for length_layer in self.layers:
            length_layer.check_room(num_tokens)


# For each cache class, the class that it becomes and the layer classes that it may have. Exact classes only: a subclass
# may keep its states in another way.
_ADOPTED: dict[type, tuple[type[DepthCache], tuple[type, ...]]] = {
    DynamicCache: (_DynamicDepthCache, (DynamicLayer, DynamicSlidingWindowLayer)),
    StaticCache: (_StaticDepthCache, (StaticLayer, StaticSlidingWindowLayer)),
}


def adopt_cache(cache: Any, num_layers: int) -> DepthCache:
    """Turn an empty cache into a `DepthCache` in place, so that existing references to it stay valid.

    Args:
        cache: A `DynamicCache` or `StaticCache` that `generate`, the model or the user made; a `DepthCache` is returned
            as it is.
        num_layers: Decoder layers of the model.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: The cache is of another kind, is offloaded to the host, already holds states of the
            unwrapped model, or is static and made for another number of layers.
    """
    if isinstance(cache, DepthCache):
        return cache
    becomes, layer_classes = _ADOPTED.get(type(cache), (None, ()))
    if becomes is None or getattr(cache, "offloading", False):
        offloaded = " with offloading" if getattr(cache, "offloading", False) else ""
        raise UnsupportedModelError(
            f"the cache is a {type(cache).__name__}{offloaded}; a wrapped model runs with a DynamicCache (the "
            "default of generate), a StaticCache (cache_implementation='static') or use_cache=False"
        )
    if cache.get_seq_length() > 0:
        raise UnsupportedModelError(
            f"the cache already holds {int(cache.get_seq_length())} tokens of the unwrapped model; "
            "begin with an empty cache"
        )
    strange = next((layer for layer in cache.layers if type(layer) not in layer_classes), None)
    if strange is not None:
        raise UnsupportedModelError(
            f"the cache has a layer of class {type(strange).__name__}; supported are "
            f"{', '.join(cls.__name__ for cls in layer_classes)}"
        )
    if becomes is _StaticDepthCache and len(cache.layers) != num_layers:
        raise UnsupportedModelError(
            f"the static cache was made for {len(cache.layers)} layers, but the model has {num_layers}; "
            "make it with config=model.config"
        )
    length_layers = [length_layer_of(layer) for layer in cache.layers]
    # A dynamic cache made without a config starts with no layers and grows full-attention ones.
    length_layers.extend(LengthLayer() for _ in range(num_layers - len(length_layers)))
    cache.__class__ = becomes
    cache.layers = length_layers
    cache.layer_class_to_replicate = None
    cache.slots = {}
    cache.row_plans = None
    cache.first_views = [VisitView(cache, layer_idx, 0) for layer_idx in range(num_layers)]
    cache.in_forward = False
    cache.owed = None
    adopted: DepthCache = cache
    return adopted
