"""ExitScope: a forward pass in which new tokens may leave before a layer, and settle their later layers in a later one.

In a batch all rows settle together as soon as one of them goes on, so that keys and values of all rows are equally
long; what a row gives out depends on its own states alone. Every token runs every layer once, sooner or later, so the
keys and values are the base model's own.
"""

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from dynadepth.caching.depth_cache import DepthCache
from dynadepth.config import plain_number
from dynadepth.errors import ConfigError
from dynadepth.execution.callbacks import VisitEvent
from dynadepth.execution.executor import PER_ROW
from dynadepth.execution.few_tokens import few_token_products
from dynadepth.execution.layer_call import LayerCall
from dynadepth.execution.plan_forward import PlanScope
from dynadepth.exits.dial import Dial
from dynadepth.exits.owed import OwedPiece
from dynadepth.exits.settling import (
    Owed,
    SettlingPlanner,
    generation_of,
    merged_arguments,
    without_cache,
)
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


class ExitPlanner(SettlingPlanner, Protocol):
    """A planner whose new tokens may leave early."""

    exits: Exits | None


class ExitScope(PlanScope):
    """One forward pass of a model whose new tokens may leave early; the arguments are those of `PlanScope`."""

    _planner: ExitPlanner
    # What the cache owes; None before the first layer, and where no token may leave.
    _owed: Owed | None = None

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
            with few_token_products(call.layer, states.shape[:2].numel() if self._joined else 0):
                states = self._visit(call, states, cache)
        if not last:
            return states
        if self._left is None and owed.verify:
            return states
        if self._left is None:
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
        if (generation := generation_of(self._planner)) is not None:
            generation.has_begun = True
        owed = self._owed
        if owed is None or self._is_prefill or (self._num_tokens != 1 and not owed.verify):
            return
        planner = self._planner
        if self._run_before is not None and not owed.verify:
            owed.steps.append(self._run_before)
        planner.exit_stats.step(self._leaving, self._num_writing, self._layer_calls)
        audit = planner.exit_audit
        if audit is None or owed.verify:
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
            cache.owed = Owed(self._planner, [head.layer_idx for head in exits.heads])
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
        self, head: ExitHead, states: torch.Tensor, owed: Owed, cache: DepthCache
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

    def _leave(self, head: ExitHead, states: torch.Tensor, owed: Owed) -> bool:
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

    def _note(self, states: torch.Tensor, owed: Owed) -> None:
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
