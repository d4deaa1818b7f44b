"""ExitScope: a forward pass in which new tokens may leave before a layer, and settle their later layers in a later one.

In a batch all rows settle together as soon as one of them goes on, so that keys and values of all rows are equally
long; what a row gives out depends on its own states alone. Every token runs every layer once, sooner or later, so the
keys and values are the base model's own.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers.cache_utils import StaticLayer

from dynadepth.caching.depth_cache import DepthCache
from dynadepth.errors import UnsupportedModelError
from dynadepth.execution.executor import PER_ROW, Scope, enter_scope, leave_scope
from dynadepth.execution.layer_call import LayerCall
from dynadepth.execution.owed import OwedPiece, PieceQueue, merge_arguments
from dynadepth.execution.plan_forward import Planner, PlanScope
from dynadepth.models.structure import layer_signature

__all__ = ["ExitHead", "ExitScope", "Exits"]


class ExitHead(Protocol):
    """Decides before one layer which new tokens leave, and what is read of these."""

    layer_idx: int

    def leaves(self, states: torch.Tensor) -> torch.Tensor:
        """Return which rows leave, from their states of shape (rows, hidden). Shape (rows,), bool."""
        ...

    def final(self, states: torch.Tensor) -> torch.Tensor:
        """Return what stands for the states after the last layer. Shape (rows, hidden), as given."""
        ...


@dataclass(frozen=True, slots=True)
class Exits:
    """Where new tokens may leave.

    Args:
        heads: One for each exit layer, ascending.
        window: Most tokens of a row that later layers run for in one call of decoding.
    """

    heads: tuple[ExitHead, ...]
    window: int = 8


class ExitScope(PlanScope):
    """One forward pass of a model whose new tokens may leave early; the arguments are those of `PlanScope`."""

    # Set before the first layer runs, see `_begin`.
    _queue: PieceQueue | None = None

    def run(self, call: LayerCall) -> torch.Tensor:
        """Run a layer for the tokens of this forward and those that settle, or note what it owes."""
        if self._plans is None:
            self._plans = self._begin(call)
            self._begin_exits(call)
        cache = self._cache
        if cache is None or self._queue is None:
            return super().run(call)
        layer_idx, states = call.layer_idx, call.hidden_states
        head = self._heads.get(layer_idx)
        if head is not None and self._left is None:
            states = self._arrive(head, states)
        last = layer_idx == len(self.dispatch) - 1
        if self._left is not None:
            self._left.arguments[layer_idx] = without_cache(call)
            return self._given_out(states[:, -self._num_tokens :]) if last else states
        if self._joined:
            here = OwedPiece(states[:, -self._num_tokens :], self._end, {layer_idx: call.arguments})
            call.arguments = arguments_of([*self._joined, here], call, cache)
        states = call.visit(states, cache=cache.view(layer_idx, 0))
        return self._given_out(states[:, -self._num_tokens :]) if last else states

    def _begin_exits(self, call: LayerCall) -> None:
        cache, exits = self._cache, self._planner.exits
        if cache is None or exits is None or not self._plans_are_identity():
            return
        if cache.owed is None:
            cache.owed = Owed(self._planner, exits)
        self._owed: Owed = cache.owed
        self._queue = self._owed.queue
        self._heads = {head.layer_idx: head for head in exits.heads}
        self._end = cache.get_seq_length() + self._num_tokens
        self._window = exits.window
        self._may_leave = self._num_tokens == 1 and self._end > 1
        self._joined: list[OwedPiece] = []
        self._left: OwedPiece | None = None
        # Which rows have been decided early, and what is given out for them.
        self._early = torch.zeros(
            call.hidden_states.shape[0], dtype=torch.bool, device=call.hidden_states.device
        )
        self._any_early = False
        self._final: torch.Tensor | None = None
        self._ask_at(exits)

    def _plans_are_identity(self) -> bool:
        return self._plans is not None and bool((self._plans.plans == 1).all())

    def _ask_at(self, exits: Exits) -> None:
        """Let the layers from the first exit on call `run`, as far as that is needed."""
        first = exits.heads[0].layer_idx
        self.dispatch = [*self.dispatch[:first], *[PER_ROW] * (len(self.dispatch) - first)]

    def _arrive(self, head: ExitHead, states: torch.Tensor) -> torch.Tensor:
        """Let tokens leave before a layer, or take those along that wait there."""
        queue = self._owed.queue
        if self._may_leave and self._leave(head, states):
            here = OwedPiece(states[:, -1:], self._end)
            first = 0
            for piece in self._joined:
                piece.states = states[:, first : first + piece.num_tokens]
                first += piece.num_tokens
            queue.add(head.layer_idx, [*self._joined, here])
            self._left, self._joined = here, []
            return states
        waiting = queue.take(head.layer_idx)
        self._joined = [*waiting, *self._joined]
        return (
            torch.cat([*(piece.states for piece in waiting), states], dim=1) if waiting else states
        )

    def _leave(self, head: ExitHead, states: torch.Tensor) -> bool:
        """Ask a head about the rows that have not left; say whether no layer after it need run now."""
        here = states[:, -1]
        leaving = head.leaves(here) & ~self._early
        if bool(leaving.any()):
            final = head.final(here)
            known = final if self._final is None else self._final
            self._final = torch.where(leaving[:, None], final, known)
            self._early = self._early | leaving
            self._any_early = True
        tokens = len(self._owed) + sum(piece.num_tokens for piece in self._joined) + 1
        return self._any_early and tokens < self._window and bool(self._early.all())

    def _given_out(self, states: torch.Tensor) -> torch.Tensor:
        if self._final is None:
            return states
        return torch.where(self._early[:, None, None], self._final[:, None], states)


class Owed:
    """What the rows of one cache owe, and how it is settled.

    Args:
        planner: Whose layers they are.
        exits: Where tokens leave.
    """

    def __init__(self, planner: Planner, exits: Exits) -> None:
        # A copy of the cache settles with the same layers.
        self._planner = weakref.ref(planner)
        self.queue = PieceQueue([head.layer_idx for head in exits.heads])

    def __len__(self) -> int:
        return len(self.queue)

    def clear(self) -> None:
        """Forget them, with the states of the cache."""
        self.queue.clear()

    def settle(self, cache: DepthCache) -> None:
        """Run the owed tokens through the layers that they owe.

        Args:
            cache: The cache that they belong to.

        Raises:
            UnsupportedModelError: The model is gone or no longer wrapped.
        """
        planner = self._planner()
        stack = None if planner is None else planner.attachment.stack
        if planner is None or stack is None:
            raise UnsupportedModelError(
                f"the cache holds {len(self)} tokens that left early, and the model that it belongs to is gone or no "
                "longer wrapped; call cache.settle() before unwrap_model(model)"
            )
        cache.in_forward = True
        scope = _SettleScope(planner, cache)
        enter_scope(scope)
        try:
            with torch.no_grad():
                self._run(planner.attachment.layers(), cache)
        finally:
            leave_scope(planner)
        cache.in_forward = False

    def _run(self, layers: Sequence[nn.Module], cache: DepthCache) -> None:
        pieces: list[OwedPiece] = []
        states: torch.Tensor | None = None
        for layer_idx in range(min(self.queue.by_exit), len(layers)):
            waiting = self.queue.take(layer_idx)
            pieces = [*waiting, *pieces]
            parts = [piece.states for piece in waiting] + ([] if states is None else [states])
            if not parts:
                continue
            states = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            layer = layers[layer_idx]
            signature = layer_signature(type(layer).forward)
            arguments = merged_arguments(pieces, layer_idx, cache, signature.mask_name)
            if signature.cache_name is not None:
                arguments[signature.cache_name] = cache
            output = layer(states, **arguments)
            states = output[0] if isinstance(output, (tuple, list)) else output


class _SettleScope:
    """Lets layers run for owed tokens, outside a forward of their model."""

    def __init__(self, owner: Planner, cache: DepthCache) -> None:
        self.owner: object = owner
        self.outer: Scope | None = None
        self.dispatch: Sequence[Any] = cache.first_views

    def run(self, call: LayerCall) -> torch.Tensor:
        """Run a layer that was not given its cache by name."""
        return call.visit(call.hidden_states, cache=self.dispatch[call.layer_idx])


def without_cache(call: LayerCall) -> dict[str, Any]:
    """Return what a layer was given besides its states and its cache, which would keep itself alive."""
    name = call.signature.cache_name
    return {key: value for key, value in call.arguments.items() if key != name}


def arguments_of(pieces: Sequence[OwedPiece], call: LayerCall, cache: DepthCache) -> dict[str, Any]:
    """Return what the layer of a call is given for several pieces."""
    return merged_arguments(pieces, call.layer_idx, cache, call.signature.mask_name)


def merged_arguments(
    pieces: Sequence[OwedPiece],
    layer_idx: int,
    cache: DepthCache,
    mask_name: str,
) -> dict[str, Any]:
    """Return what a layer is given for the tokens of several pieces, on top of what its cache holds.

    Args:
        pieces: Tokens that follow each other, oldest first.
        layer_idx: The layer.
        cache: Where its keys and values are.
        mask_name: Its parameter for the mask.
    """
    slot, counted = cache.slots.get((layer_idx, 0)), cache.layers[layer_idx]
    new, end = sum(piece.num_tokens for piece in pieces), pieces[-1].end
    if isinstance(slot, StaticLayer):
        num_keys, first_key = slot.max_cache_len, 0
    else:
        held = (
            0 if slot is None or slot.keys is None or not slot.keys.numel() else slot.keys.shape[-2]
        )
        num_keys = held + new
        if getattr(slot, "record_past", False):
            num_keys = min(num_keys, counted.sliding_window - 1 + new)
        first_key = end - num_keys
    return merge_arguments(
        pieces,
        layer_idx,
        mask_name=mask_name,
        num_keys=num_keys,
        first_key=first_key,
        window=counted.sliding_window if getattr(counted, "is_sliding", False) else None,
    )
