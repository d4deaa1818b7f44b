"""PlanScope: one forward pass of a wrapped model, in which each layer runs the visits of its rows' plans.

Asks a planner (the controller) for the plans and hands the rows of each visit to the executor.
"""

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from dynadepth.caching.depth_cache import DepthCache, adopt_cache
from dynadepth.caching.row_plans import RowPlans
from dynadepth.errors import UnsupportedModelError
from dynadepth.execution.callbacks import VisitCallbacks, VisitEvent
from dynadepth.execution.context_stack import callbacks_of
from dynadepth.execution.executor import NOTHING, PER_ROW, Scope, Skipped
from dynadepth.execution.layer_call import LayerCall
from dynadepth.execution.padding import SpecialTokens, real_tokens, unmarked_padding
from dynadepth.plans import EXECUTE, SKIP
from dynadepth.policies.prompt_batch import PromptBatch

__all__ = ["PlanScope", "Planner"]


class Planner(Protocol):
    """Makes the plans of a forward pass."""

    num_layers: int

    @property
    def skips(self) -> Sequence[Skipped]:
        """What rows go through in place of each layer that they skip."""
        ...

    def start(self, num_rows: int, cache: DepthCache | None) -> tuple[RowPlans, bool]:
        """Return the plans of a batch as far as they are known before its first layer, and whether they are new."""
        ...

    def only_plans(self) -> bool:
        """Say whether this forward is only for the plans, so that nothing runs once they are decided."""
        ...

    def finish(self, plans: RowPlans, *, is_prefill: bool) -> None:
        """Record a forward that has completed."""
        ...

    def knows_lengths(self) -> bool:
        """Say whether the caller has set how many tokens of each row form the prompt."""
        ...

    def prompt_mask(self, real: torch.Tensor) -> torch.Tensor:
        """Return which of the real tokens belong to the prompt. Shape (rows, tokens), bool, like `real`."""
        ...

    def decide(
        self,
        plans: RowPlans,
        layer_idx: int,
        hidden_states: torch.Tensor,
        prompts: PromptBatch,
    ) -> None:
        """Decide the actions of the layers from `layer_idx` to the next decision.

        Args:
            plans: The plans of the batch; the decided actions are written into it.
            layer_idx: The layer that the states enter.
            hidden_states: Shape (rows, tokens, hidden), model dtype and device.
            prompts: The prompts of the batch.
        """
        ...


class PlanScope:
    """One forward pass of a wrapped model.

    Attributes:
        owner: The planner.
        outer: The scope of another model that was open before, or None.
        attention_mask: The 2-D mask passed to the model's forward, or None. Shape (rows, tokens), integer or bool.

    Args:
        owner: The planner.
        attention_mask: As above.
        tokens: The tokens passed to the model's forward: ids (rows, tokens) or embeddings (rows, tokens, hidden).
        config: The model's config.
        mask_given: Whether the model's forward got a mask of any form, which says what is padding.
        router_logits: What the forward was given as `output_router_logits`; None leaves it to the config.
        states_asked: Whether the forward is to return the states or attentions of its layers.
    """

    def __init__(
        self,
        owner: Planner,
        attention_mask: torch.Tensor | None,
        tokens: torch.Tensor | None = None,
        *,
        config: Any = None,
        mask_given: bool = True,
        router_logits: bool | None = None,
        states_asked: bool = False,
    ) -> None:
        self.owner: object = owner
        self.outer: Scope | None = None
        self._planner = owner
        self._tokens = tokens
        self._config, self._mask_given, self._router_logits = config, mask_given, router_logits
        self.attention_mask = attention_mask
        self._states_asked = states_asked
        self._plans: RowPlans | None = None
        # The same at every decision, so it is built once.
        self._prompts: PromptBatch | None = None
        # Until the plans are known, every layer asks.
        self.dispatch: Sequence[Any] = (PER_ROW,) * owner.num_layers
        self._num_tokens = 0
        # The caller of the forward holds its cache. An interrupt (Ctrl-C) runs no hook, so this scope may outlive it.
        self._cache_ref: weakref.ref[DepthCache] | None = None
        self._is_prefill = self._only_plans = False
        self._callbacks: VisitCallbacks | None = None

    def run(self, call: LayerCall) -> torch.Tensor:
        """Run the visits of one layer for the rows whose plan makes them.

        Raises:
            UnsupportedModelError: The states do not have shape (rows, tokens, hidden), or the cache is unsupported or
                unusable.
            PlanError: The batch does not fit the plans.
        """
        states, layer_idx = call.hidden_states, call.layer_idx
        plans = self._plans
        if plans is None:
            plans = self._plans = self._begin(call)
        if layer_idx >= plans.num_decided:
            if self._prompts is None:
                self._prompts = self._read_prompts(call, plans)
            self._planner.decide(plans, layer_idx, states, self._prompts)
            self._look_ahead(plans)
        if self._only_plans and plans.num_decided == self._planner.num_layers:
            self.dispatch = (NOTHING,) * plans.num_decided
            return states
        cache = self._cache
        num_rows, callbacks = plans.num_rows, self._callbacks
        states = self._skip(plans, layer_idx, states)
        for visit in (0, 1):
            rows = plans.rows(layer_idx, visit)
            if not rows:
                break
            event = None
            if callbacks is not None:
                event = VisitEvent(layer_idx, visit, tuple(rows), states.shape[1])
                callbacks.before(event)
            view = None if cache is None else cache.view(layer_idx, visit)
            if len(rows) == num_rows:
                states = call.visit(states, cache=view)
            else:
                # transformers combines these into a tensor that assumes every layer to run for all rows.
                if self._router_logits or (
                    self._router_logits is None
                    and getattr(self._config, "output_router_logits", False)
                ):
                    raise UnsupportedModelError(
                        f"output_router_logits=True needs one plan for all rows, but layer {layer_idx} runs for "
                        f"{len(rows)} of {num_rows}; leave it out (config.output_router_logits), or use one plan"
                    )
                index = plans.index(layer_idx, visit, states.device)
                run = call.visit(
                    states.index_select(0, index), cache=view, index=index, num_rows=num_rows
                )
                states = states.index_copy(0, index, run)
            if callbacks is not None and event is not None:
                callbacks.after(event)
        return states

    def finish(self) -> None:
        """Record that the forward has completed."""
        if self._plans is None or self._only_plans:
            return
        if (cache := self._cache) is not None:
            cache.advance(self._num_tokens)
        self._planner.finish(self._plans, is_prefill=self._is_prefill)

    @property
    def _cache(self) -> DepthCache | None:
        return None if self._cache_ref is None else self._cache_ref()

    def _skip(self, plans: RowPlans, layer_idx: int, states: torch.Tensor) -> torch.Tensor:
        """Take the rows that skip a layer through what is in its place."""
        skipped = self._planner.skips[layer_idx]
        if skipped is NOTHING or not (rows := plans.skipping(layer_idx)):
            return states
        if len(rows) == plans.num_rows:
            return skipped.through(states)
        index = plans.skipping_index(layer_idx, states.device)
        return states.index_copy(0, index, skipped.through(states.index_select(0, index)))

    def _look_ahead(self, plans: RowPlans) -> None:
        """Dispatch layers directly where EXECUTE or SKIP is decided for all rows, if there are no callbacks."""
        if self._callbacks is not None:
            return
        actions = plans.shared_actions()
        cache = self._cache
        views = [None] * len(actions) if cache is None else cache.first_views
        self.dispatch = [
            view if action == EXECUTE else skipped if action == SKIP else PER_ROW
            for view, action, skipped in zip(views, actions, self._planner.skips, strict=True)
        ]

    def _read_prompts(self, call: LayerCall, plans: RowPlans) -> PromptBatch:
        """Find the prompts' tokens."""
        tokens = self._tokens_of(call.hidden_states)
        real = real_tokens(call, self.attention_mask)
        if not self._mask_given and tokens is not None and not self._planner.knows_lengths():
            real = unmarked_padding(real, tokens, SpecialTokens.of(self._config))
        return PromptBatch(self._planner.prompt_mask(real), plans.plans, tokens)

    def _tokens_of(self, states: torch.Tensor) -> torch.Tensor | None:
        """Return the tokens passed to the model's forward, if there is a number or a vector for every state."""
        tokens = self._tokens
        if tokens is None or tokens.shape[:2] != states.shape[:2]:
            return None
        return tokens.to(states.device)

    def _begin(self, call: LayerCall) -> RowPlans:
        states = call.hidden_states
        if states.dim() != 3:
            raise UnsupportedModelError(
                f"the states that enter layer {call.layer_idx} have shape {tuple(states.shape)}; "
                "expected (batch, tokens, hidden)"
            )
        cache = None
        if call.cache is not None:
            cache = adopt_cache(call.cache, self._planner.num_layers)
            cache.check_ready(states.shape[1])
            self._cache_ref = weakref.ref(cache)
        self._only_plans = self._planner.only_plans()
        self._callbacks = None if self._only_plans else callbacks_of(self._planner)
        plans, self._is_prefill = self._planner.start(states.shape[0], cache)
        if cache is not None:
            # From here on the cache has the plans, and soon the states of some layers.
            cache.in_forward = True
        self._num_tokens = states.shape[1]
        self._look_ahead(plans)
        return plans
