"""What the rows of a cache owe, and how it is settled: owed tokens run their later layers in one call."""

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers.cache_utils import (
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from dynadepth.caching.cache_layers import Slot
from dynadepth.caching.depth_cache import DepthCache
from dynadepth.errors import UnsupportedModelError
from dynadepth.execution.attachment import Attachment
from dynadepth.execution.context_stack import Context, contexts_of
from dynadepth.execution.executor import Scope, enter_scope, leave_scope, scope_paused
from dynadepth.execution.few_tokens import few_token_products
from dynadepth.execution.layer_call import LayerCall
from dynadepth.execution.plan_forward import Planner
from dynadepth.exits.audit import Audit
from dynadepth.exits.exit_stats import ExitStats
from dynadepth.exits.owed import OwedPiece, PieceQueue, merge_arguments
from dynadepth.models.structure import layer_signature

__all__ = ["Owed", "SettlingPlanner", "generation_of", "merged_arguments", "without_cache"]


class SettlingPlanner(Planner, Protocol):
    """A planner whose tokens settle."""

    exit_stats: ExitStats
    # None: nothing is audited.
    exit_audit: Audit | None
    attachment: Attachment


class Owed:
    """What the rows of one cache owe, and how it is settled.

    Args:
        planner: Whose layers they are.
        exit_layers: The layers before which tokens may leave, ascending.
    """

    def __init__(self, planner: SettlingPlanner, exit_layers: Sequence[int]) -> None:
        # A copy of the cache settles with the same layers.
        self._planner = weakref.ref(planner)
        self.queue = PieceQueue(exit_layers)
        # Rows of a generation that have ended and pad. Shape (rows,), bool.
        self._ended: torch.Tensor | None = None
        # How many layers had run when each token was chosen, by step. Shape (rows,), int64.
        self.steps: list[torch.Tensor] = []
        # Whether no token may leave now, and whether the last layer gives out all tokens that settle, not the newest.
        self.hold = self.verify = False

    def forget_rows(self) -> None:
        """Forget what is known of single rows, since others take their places."""
        self._ended = None
        self.steps.clear()

    def layers_run(self) -> Any:
        """Return for each token that was decoded alone, how many layers had run when it was chosen.

        Returns:
            Shape (rows, tokens), int64, on the host; None if there are none.
        """
        if not self.steps:
            return None
        first = self.steps[0]
        return torch.stack([each.to(first.device) for each in self.steps], dim=1).cpu().numpy()

    def still_writing(self, tokens: torch.Tensor | None, states: torch.Tensor) -> torch.Tensor:
        """Return which rows of a forward have not ended.

        Args:
            tokens: What the model's forward was given.
            states: What enters its first layer. Shape (rows, tokens, hidden).

        Returns:
            Shape (rows,), bool.
        """
        planner, rows = self._planner(), len(states)
        ended = self._ended
        if states.shape[1] > 1 or ended is None or len(ended) != rows:
            if ended is not None and len(ended) != rows:
                self.steps.clear()
            ended = torch.zeros(rows, dtype=torch.bool, device=states.device)
        generation = generation_of(planner)
        # What the prompt ends with ends no row.
        ends = generation.ends if generation is not None and generation.has_begun else ()
        if ends and tokens is not None and tokens.shape == states.shape[:2]:
            last = tokens[:, -1].to(states.device)
            ended = ended | torch.isin(last, torch.tensor(sorted(ends), device=last.device))
        self._ended = ended
        return ~ended

    def note(self, states: torch.Tensor, pieces: Sequence[OwedPiece]) -> None:
        """Let the audit know of tokens that have settled.

        Args:
            states: Theirs after the last layer, oldest first. Shape (rows, tokens or more, hidden).
            pieces: The tokens.
        """
        planner = self._planner()
        audit = None if planner is None else planner.exit_audit
        first = 0
        for piece in pieces if audit is not None else ():
            if audit is not None and piece.counts is not None:
                audit.settled(
                    states[:, first], piece.given, torch.ones_like(piece.counts), piece.counts
                )
            first += piece.num_tokens

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
        with scope_paused(planner):
            enter_scope(_SettleScope(planner, cache))
            try:
                with torch.no_grad():
                    layer_calls = self._run(planner.attachment.layers(), cache)
            finally:
                leave_scope(planner)
        cache.in_forward = False
        planner.exit_stats.settled(layer_calls)

    def _run(self, layers: Sequence[nn.Module], cache: DepthCache) -> int:
        """Return how many layers ran."""
        layer_calls = 0
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
            with few_token_products(layer, states.shape[:2].numel()):
                output = layer(states, **arguments)
            states = output[0] if isinstance(output, (tuple, list)) else output
            layer_calls += 1
        if states is not None:
            self.note(states, pieces)
        return layer_calls


class _SettleScope:
    """Lets layers run for owed tokens, outside a forward of their model."""

    def __init__(self, owner: Planner, cache: DepthCache) -> None:
        self.owner: object = owner
        self.outer: Scope | None = None
        self.dispatch: Sequence[Any] = cache.first_views

    def run(self, call: LayerCall) -> torch.Tensor:
        """Run a layer that was not given its cache by name."""
        return call.visit(call.hidden_states, cache=self.dispatch[call.layer_idx])


def generation_of(planner: object) -> Context | None:
    """Return the `generate` that a forward is part of, if any."""
    return next((context for context in contexts_of(planner) if context.in_generate), None)


def without_cache(call: LayerCall) -> dict[str, Any]:
    """Return what a layer was given besides its states and its cache, which would keep itself alive."""
    name = call.signature.cache_name
    return {key: value for key, value in call.arguments.items() if key != name}


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
    num_keys = _num_keys(slot, new)
    # A static cache begins with the first token, until its window is exceeded.
    first_key = max(0, end - num_keys)
    return merge_arguments(
        pieces,
        layer_idx,
        mask_name=mask_name,
        num_keys=num_keys,
        first_key=first_key,
        window=counted.get_max_length() if counted.is_sliding else None,
    )


def _num_keys(slot: Slot | None, new: int) -> int:
    """Return how many keys a slot gives a layer together with so many new ones."""
    if isinstance(slot, StaticLayer):
        size = int(slot.max_cache_len)
        if not isinstance(slot, StaticSlidingWindowLayer):
            return size
        held = int(slot.cumulative_length_int)
        return size - 1 + new if held >= size else max(size, held + new)
    if slot is None or slot.keys is None or not slot.keys.numel():
        return new
    held = int(slot.keys.shape[-2])
    if isinstance(slot, DynamicSlidingWindowLayer) and slot.record_past:
        held = min(held, int(slot.sliding_window) - 1)
    return held + new
