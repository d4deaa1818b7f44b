"""ExitScope: a forward pass in which new tokens may leave before a layer, and settle their later layers in a later one.

In a batch all rows settle together as soon as one of them goes on, so that keys and values of all rows are equally
long; what a row gives out depends on its own states alone. Every token runs every layer once, sooner or later, so the
keys and values are the base model's own.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
from dynadepth.config import plain_number
from dynadepth.errors import ConfigError, UnsupportedModelError
from dynadepth.execution.attachment import Attachment
from dynadepth.execution.callbacks import VisitEvent
from dynadepth.execution.context_stack import Context, contexts_of
from dynadepth.execution.executor import (
    PER_ROW,
    Scope,
    enter_scope,
    leave_scope,
    scope_paused,
)
from dynadepth.execution.layer_call import LayerCall
from dynadepth.execution.plan_forward import Planner, PlanScope
from dynadepth.exits.audit import Audit
from dynadepth.exits.dial import Dial
from dynadepth.exits.exit_stats import ExitStats
from dynadepth.exits.owed import OwedPiece, PieceQueue, merge_arguments
from dynadepth.models.structure import layer_signature
from dynadepth.plans import EXECUTE

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
        audit: Share of early tokens whose true reading is looked at when their layers have run, from 0 to 1.
        dial: What audits move; None: nothing.

    Raises:
        ConfigError: There are no heads, two are before one layer, one is before layer 0, they are not ascending, the
            window is no number of tokens, or the share no share.
    """

    heads: tuple[ExitHead, ...]
    window: int = 8
    audit: float = 1.0
    dial: Dial | None = None

    def __post_init__(self) -> None:
        at = [head.layer_idx for head in self.heads]
        if not at or at[0] < 1 or at != sorted(set(at)):
            raise ConfigError(
                f"exits were given heads before layers {at}; expected one or more, each before another layer, "
                "ascending and from layer 1 on"
            )
        window = plain_number(self.window)
        if type(window) is not int or window < 1:
            raise ConfigError(
                f"the window of exits is {self.window!r}; expected a number of tokens of at least 1 (1: no call is "
                "saved)"
            )
        share = plain_number(self.audit)
        if type(share) not in (int, float) or not 0 <= share <= 1:
            raise ConfigError(
                f"audit is {self.audit!r}; expected the share of early tokens that are audited, from 0 to 1"
            )


class ExitPlanner(Planner, Protocol):
    """A planner whose new tokens may leave early."""

    exits: Exits | None
    exit_stats: ExitStats
    # None: nothing is audited.
    exit_audit: Audit | None
    attachment: Attachment


class ExitScope(PlanScope):
    """One forward pass of a model whose new tokens may leave early; the arguments are those of `PlanScope`."""

    _planner: ExitPlanner
    # What the cache owes; None before the first layer, and where no token may leave.
    _owed: "Owed | None" = None

    def run(self, call: LayerCall) -> torch.Tensor:
        """Run a layer for the tokens of this forward and those that settle, or note what it owes.

        Raises:
            UnsupportedModelError: As `PlanScope.run`; or a mask cannot be put together for several tokens.
            PlanError: The batch does not fit the plans.
        """
        if self._plans is None:
            self._plans = self._begin(call)
            self._begin_exits(call.hidden_states)
        cache, owed = self._cache, self._owed
        if cache is None or owed is None:
            return super().run(call)
        layer_idx, states = call.layer_idx, call.hidden_states
        head = self._heads.get(layer_idx)
        if head is not None and self._left is None:
            states = self._arrive(head, states, owed, cache)
        last = layer_idx == self._planner.num_layers - 1
        if self._left is not None:
            self._left.arguments[layer_idx] = without_cache(call)
        else:
            if self._joined:
                current = states[:, -self._num_tokens :]
                here = OwedPiece(current, self._end, {layer_idx: call.arguments})
                pieces = [*self._joined, here]
                call.arguments = merged_arguments(
                    pieces, layer_idx, cache, call.signature.mask_name
                )
            states = self._visit(call, states, cache)
        if not last:
            return states
        if self._left is None and owed.verify:
            return states
        if self._left is None and self._num_tokens == 1 and not self._is_prefill:
            self._note(states, owed)
        return self._given_out(states[:, -self._num_tokens :])

    def _visit(self, call: LayerCall, states: torch.Tensor, cache: DepthCache) -> torch.Tensor:
        event = None
        # Layers that run without asking are counted already; some ask nevertheless.
        self._layer_calls += self.dispatch[call.layer_idx] is PER_ROW
        if self._callbacks is not None:
            event = VisitEvent(call.layer_idx, 0, tuple(range(len(states))), states.shape[1])
            self._callbacks.before(event)
        states = call.visit(states, cache=cache.view(call.layer_idx, 0))
        if self._callbacks is not None and event is not None:
            self._callbacks.after(event)
        return states

    def finish(self) -> None:
        """Record that the forward has completed."""
        super().finish()
        if (generation := _generation_of(self._planner)) is not None:
            generation.has_begun = True
        if self._owed is None or self._is_prefill or self._num_tokens != 1:
            return
        planner = self._planner
        if self._run_before is not None and not self._owed.verify:
            self._owed.steps.append(self._run_before)
        planner.exit_stats.step(self._leaving, self._num_writing, self._layer_calls)
        audit = planner.exit_audit
        if audit is None or self._owed.verify:
            return
        if self._left is None and self._early is None:
            audit.went_on(self._counts)
        if audit.is_due:
            audit.look(partial(planner.attachment.read, planner))

    def _begin_exits(self, states: torch.Tensor) -> None:
        cache, exits, plans = self._cache, self._planner.exits, self._plans
        if exits is None or cache is None or plans is None or self._only_plans:
            return
        if (plans.plans != int(EXECUTE)).any():
            raise ConfigError(
                "new tokens leave early only under the plan of every layer once, and this batch has another; wrap with "
                "exits= alone, and leave plans(...) out"
            )
        if cache.owed is None:
            cache.owed = Owed(self._planner, exits)
        self._owed = cache.owed
        self._heads = {head.layer_idx: head for head in exits.heads}
        self._num_rows = self._num_writing = len(states)
        self._end = cache.get_seq_length() + self._num_tokens
        self._window = exits.window
        self._may_leave = self._num_tokens == 1 and self._end > 1 and not self._states_asked
        held = self._owed.hold or (
            exits.dial is not None and exits.dial.verify and not self._owed.verify
        )
        self._may_leave = self._may_leave and not held
        self._counts = self._owed.still_writing(self._tokens, states)
        self._joined: list[OwedPiece] = []
        self._left: OwedPiece | None = None
        # How many rows each head has let go, and how many layers ran.
        self._leaving: dict[int, int] = {}
        self._layer_calls = 0
        # Rows that have been decided early, and what is given out for them.
        self._early: torch.Tensor | None = None
        self._final: torch.Tensor | None = None
        self._run_before: torch.Tensor | None = None
        if self._may_leave:
            self._run_before = torch.full_like(
                self._counts, self._planner.num_layers, dtype=torch.long
            )
        self.dispatch = [PER_ROW] * self._planner.num_layers
        # The layer that asks has been called already.
        self._run_directly(1, exits.heads[0].layer_idx, cache)

    def _run_directly(self, first: int, end: int, cache: DepthCache) -> None:
        """Let layers run without asking, if nobody watches them."""
        if self._callbacks is None and first < end:
            dispatch = list(self.dispatch)
            dispatch[first:end] = cache.first_views[first:end]
            self.dispatch = dispatch
            self._layer_calls += end - first

    def _arrive(
        self, head: ExitHead, states: torch.Tensor, owed: "Owed", cache: DepthCache
    ) -> torch.Tensor:
        """Let tokens leave before a layer, or take those along that wait there."""
        if self._may_leave and self._leave(head, states, owed):
            here = OwedPiece(states[:, -1:], self._end, given=self._final, counts=self._counts)
            first = 0
            for piece in self._joined:
                piece.states = states[:, first : first + piece.num_tokens]
                first += piece.num_tokens
            owed.queue.add(head.layer_idx, [*self._joined, here])
            self._left, self._joined = here, []
            return states
        waiting = owed.queue.take(head.layer_idx)
        if waiting:
            states = torch.cat([*(piece.states for piece in waiting), states], dim=1)
            self._joined = [*waiting, *self._joined]
        elif not self._joined:
            # The last layer gives out what was decided early.
            end = self._planner.num_layers - (self._early is not None)
            later = (layer for layer in self._heads if layer > head.layer_idx)
            self._run_directly(head.layer_idx + 1, min(later, default=end), cache)
        return states

    def _leave(self, head: ExitHead, states: torch.Tensor, owed: "Owed") -> bool:
        """Ask a head about the rows that have not left; say whether no layer after it need run now."""
        here = states[:, -1]
        # What a row pads with is nobody's choice.
        leaving = head.leaves(here) | ~self._counts.to(here.device)
        if self._early is not None:
            known = self._early.to(leaving.device)
            leaving, early = leaving & ~known, leaving | known
        else:
            early = leaving
        # The one wait for the device.
        writing = self._counts.to(here.device)
        sums = [(leaving & writing).sum(), early.sum(), leaving.sum(), writing.sum()]
        counted, together, count, self._num_writing = torch.stack(sums).tolist()
        if count:
            self._leaving[head.layer_idx] = counted
            if self._run_before is not None:
                self._run_before = self._run_before.to(here.device).masked_fill(
                    leaving, head.layer_idx
                )
            final = head.final(here)
            if self._final is not None:
                final = torch.where(leaving[:, None], final, self._final.to(final))
            self._final, self._early = final, early
        tokens = len(owed) + sum(piece.num_tokens for piece in self._joined) + 1
        return bool(together == self._num_rows and tokens < self._window)

    def _note(self, states: torch.Tensor, owed: "Owed") -> None:
        """Let the audit know of the tokens whose layers have all run now."""
        owed.note(states, self._joined)
        audit = self._planner.exit_audit
        if audit is not None and self._early is not None:
            audit.settled(states[:, -1], self._final, self._early, self._counts)

    def _given_out(self, states: torch.Tensor) -> torch.Tensor:
        if self._final is None or self._early is None:
            return states
        early = self._early.to(states.device)[:, None, None]
        return torch.where(early, self._final.to(states)[:, None], states)


class Owed:
    """What the rows of one cache owe, and how it is settled.

    Args:
        planner: Whose layers they are.
        exits: Where tokens leave.
    """

    def __init__(self, planner: ExitPlanner, exits: Exits) -> None:
        # A copy of the cache settles with the same layers.
        self._planner = weakref.ref(planner)
        self.queue = PieceQueue([head.layer_idx for head in exits.heads])
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
        generation = _generation_of(planner)
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


def _generation_of(planner: object) -> Context | None:
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
