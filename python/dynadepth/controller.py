"""The controller of a wrapped model: plans each prompt once and lets the executor run the plan.

The stack's forward pre-hook opens a `PlanScope`; the first layers of the first forward on an empty cache plan the
prompts (the policy sees prompt tokens only); the plans are kept on the cache, or by `generate` if there is none.
`model.dynadepth` is the controller. Knows nothing of files, budgets or how policies are made.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dynadepth.cache import DepthCache, adopt_cache
from dynadepth.errors import PlanError, UnsupportedModelError, WrapError
from dynadepth.executor import (
    LayerCall,
    Scope,
    enter_scope,
    install_executor,
    is_installed,
    leave_scope,
    remove_executor,
)
from dynadepth.families import LayerStack, layer_stack
from dynadepth.plans import EXECUTE, REPEAT, Plans, check_plans
from dynadepth.policies import Policy
from dynadepth.prompts import PromptBatch
from dynadepth.rows import RowPlans
from dynadepth.tokens import real_tokens

__all__ = ["Controller"]

_CONTROLLER = "_dynadepth_controller"


@dataclass(slots=True)
class _Frame:
    """What the caller has said for the forwards inside a `with` block, or inside one `generate`."""

    owner: "Controller"
    plans: Plans | None = None
    prompt_lengths: torch.Tensor | None = None
    prompt_width: int | None = None
    # Plans of a generation without a cache to keep them on.
    row_plans: RowPlans | None = None
    in_generate: bool = False


# Per thread and task, as the executor's scopes.
_FRAMES: ContextVar[tuple[_Frame, ...]] = ContextVar("dynadepth_frames", default=())


class Controller:
    """What `model.dynadepth` is: the policy of a wrapped model, and what it planned.

    Attributes:
        policy: Turns prompts into plans.
        num_layers: Decoder layers of the model.
        protect: Layers that always run once.
        max_visits: Hard limit of visits for each prompt.
        last_plans: The plans of the batch planned last, shape (rows, num_layers), uint8; None before the first. Of
            several threads the last one counts.
    """

    def __init__(
        self,
        num_layers: int,
        policy: Policy,
        *,
        max_depth: float | None = None,
        protect: Iterable[int] = (),
    ) -> None:
        self.num_layers = num_layers
        self.policy = policy
        self.protect = tuple(sorted(set(protect)))
        self.max_visits = (
            2 * num_layers if max_depth is None else math.floor(max_depth * num_layers + 1e-9)
        )
        self.last_plans: Plans | None = None
        self._handles: list[Any] = []

    @contextmanager
    def plans(self, plans: Any) -> Iterator[None]:
        """Run fixed plans in place of the policy's, for the forwards and generations inside the block.

        The block is this thread's: a thread started inside it runs the policy's plans.

        Args:
            plans: One plan for all rows, or one for each row. Shape (num_layers,) or (rows, num_layers), uint8. A batch
                of k times as many rows (beams, return sequences) repeats each plan k times.

        Raises:
            PlanError: A plan is not one of this model, skips a protected layer, or exceeds `max_depth`; or, at the
                forward, the batch is not a multiple of the rows.
        """
        fixed = check_plans(plans, self.num_layers)
        self.check_limits(fixed)
        with self._frame(_Frame(self, plans=fixed)):
            yield

    @contextmanager
    def prompt(self, lengths: Sequence[int] | torch.Tensor) -> Iterator[None]:
        """Say how many tokens of each row are the prompt, for plain forwards of prompt and continuation together.

        Args:
            lengths: Real tokens of the prompt at the start of each row, padding not counted. Shape (rows,), integer.

        Raises:
            PlanError: A length is below 1.
        """
        tensor = torch.as_tensor(lengths, dtype=torch.long).cpu()
        if tensor.dim() != 1 or tensor.numel() == 0 or int(tensor.min()) < 1:
            raise PlanError(
                f"prompt lengths are {tensor.tolist()}; expected one number of at least 1 for each row"
            )
        with self._frame(_Frame(self, prompt_lengths=tensor)):
            yield

    @contextmanager
    def generation(self, prompt_width: int | None) -> Iterator[None]:
        """Mark the forwards inside as one `generate` call: drafts and later tokens are not the prompt.

        Args:
            prompt_width: Columns of the batch that `generate` was given, padding included; None if unknown.
        """
        with self._frame(_Frame(self, prompt_width=prompt_width, in_generate=True)):
            yield

    @contextmanager
    def _frame(self, frame: _Frame) -> Iterator[None]:
        token = _FRAMES.set((*_FRAMES.get(), frame))
        try:
            yield
        finally:
            _FRAMES.reset(token)

    def _frames(self) -> list[_Frame]:
        """Return this controller's frames, innermost first."""
        return [frame for frame in reversed(_FRAMES.get()) if frame.owner is self]

    def check_limits(self, plans: Plans) -> None:
        """Refuse given plans that break the limits the model was wrapped with.

        Raises:
            PlanError: A protected layer does not run once, or a plan has more visits than `max_depth` allows.
        """
        broken = [layer for layer in self.protect if (plans[:, layer] != EXECUTE).any()]
        if broken:
            raise PlanError(
                f"layers {broken} are protected and must have action 1; change the plan or protect"
            )
        visits = int(plans.sum(axis=1, dtype=np.int64).max())
        if visits > self.max_visits:
            raise PlanError(
                f"a plan has {visits} visits (depth {visits / self.num_layers:.3f}); max_depth allows "
                f"{self.max_visits}: give a shorter plan or a larger max_depth"
            )

    def start(self, num_rows: int, cache: DepthCache | None) -> RowPlans:
        """Return the plans of a batch as far as they are known before its first layer."""
        frames = self._frames()
        # Without a cache, only `generate` knows that a longer input is the same prompt again.
        generation = (
            next((frame for frame in frames if frame.in_generate), None) if cache is None else None
        )
        keeper = cache if cache is not None else generation
        known = keeper.row_plans if keeper is not None else None
        if known is None:
            known = self._fresh_plans(num_rows, frames)
        if known.num_rows != num_rows:
            raise PlanError(
                f"the cache holds {known.num_rows} planned rows, but the batch has {num_rows}; "
                "a cache goes on with the sequences it began with"
            )
        if keeper is not None:
            keeper.row_plans = known
        return known

    def _fresh_plans(self, num_rows: int, frames: list[_Frame]) -> RowPlans:
        fixed = next((frame.plans for frame in frames if frame.plans is not None), None)
        if fixed is not None:
            if num_rows % len(fixed):
                raise PlanError(
                    f"{len(fixed)} plans were given for a batch of {num_rows} rows, not a multiple"
                )
            plans = RowPlans(np.repeat(fixed, num_rows // len(fixed), axis=0))
        else:
            given = self.policy.initial_plans(num_rows)
            initial = self._checked(given, (num_rows, self.num_layers), 0)
            initial = self._limit(initial, 0, np.zeros(num_rows, dtype=np.int64))
            reads = self.policy.decision_layers
            plans = RowPlans(initial, num_decided=reads[0] if reads else self.num_layers)
        if plans.num_decided == self.num_layers:
            self.last_plans = plans.plans.copy()
        return plans

    def decide(
        self,
        plans: RowPlans,
        layer_idx: int,
        hidden_states: torch.Tensor,
        prompt_mask: torch.Tensor,
        tokens: torch.Tensor | None,
    ) -> None:
        """Ask the policy for the actions of the layers from `layer_idx` to its next decision.

        Args:
            plans: The plans of the batch; written.
            layer_idx: The layer that the states enter.
            hidden_states: Shape (rows, tokens, hidden).
            prompt_mask: True for the prompt's tokens. Shape (rows, tokens), bool.
            tokens: Token ids or embeddings of the batch, if they are known.
        """
        reads = self.policy.decision_layers
        end = next((layer for layer in reads if layer > layer_idx), self.num_layers)
        prompts = PromptBatch(prompt_mask, plans.plans, tokens)
        with torch.no_grad():
            given = self.policy.decide(layer_idx, hidden_states, prompts)
        actions = self._checked(given, (plans.num_rows, end - layer_idx), layer_idx)
        visits = plans.plans[:, :layer_idx].sum(axis=1, dtype=np.int64)
        plans.decide(layer_idx, self._limit(actions, layer_idx, visits))
        if end == self.num_layers:
            self.last_plans = plans.plans.copy()

    def _checked(self, actions: Any, shape: tuple[int, int], layer_idx: int) -> Plans:
        """Return a policy's actions as a fresh array, refused before the cast to uint8 could change them."""
        array = np.asarray(actions)
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        if array.dtype.kind not in "iu" or array.shape != shape or low < 0 or high > int(REPEAT):
            raise PlanError(
                f"{type(self.policy).__name__} gave {array.dtype} of shape {array.shape} with values from {low} to "
                f"{high} at layer {layer_idx}; expected whole numbers 0, 1 and 2 of shape {shape}"
            )
        checked: Plans = array.astype(np.uint8)
        return checked

    def _limit(
        self, actions: Plans, first: int, visits: np.ndarray[Any, np.dtype[np.int64]]
    ) -> Plans:
        """Apply protection, `max_depth` and "at least one layer runs" to the actions of consecutive layers.

        A repeat is taken away where the rest of the plan, run once, would no longer fit: what later layers would gain
        from it is not known yet.
        """
        visits = visits.copy()
        for column in range(actions.shape[1]):
            layer = first + column
            if layer in self.protect:
                actions[:, column] = EXECUTE
            later = self.num_layers - layer - 1
            too_deep = (actions[:, column] == REPEAT) & (
                visits + int(REPEAT) + later > self.max_visits
            )
            actions[too_deep, column] = EXECUTE
            visits += actions[:, column]
            if later == 0:
                actions[visits == 0, column] = EXECUTE
        return actions

    def prompt_mask(self, scope: "PlanScope", call: LayerCall) -> torch.Tensor:
        """Return which tokens of the batch are the prompt. Shape (rows, tokens), bool."""
        rows, tokens = call.hidden_states.shape[:2]
        mask = real_tokens(call, scope.attention_mask)
        frames = self._frames()
        lengths = next(
            (frame.prompt_lengths for frame in frames if frame.prompt_lengths is not None), None
        )
        generation = next((frame for frame in frames if frame.in_generate), None)
        width = None
        if generation is not None:
            # The width is that of the prompt planned first; the negative prompt of guidance is all its own.
            width, generation.prompt_width = generation.prompt_width, None
        if lengths is not None:
            if lengths.numel() != rows:
                raise PlanError(
                    f"{lengths.numel()} prompt lengths were given for a batch of {rows} rows"
                )
            mask = mask & (mask.long().cumsum(dim=1) <= lengths.to(mask.device).unsqueeze(1))
        elif width is not None and width < tokens:
            mask = mask.clone()
            mask[:, width:] = False
        return mask

    def attach(self, model: nn.Module) -> None:
        """Put executor and hooks on a model; changes nothing if it raises."""
        stack = layer_stack(model)
        install_executor(stack, self)
        stack.stack.__dict__[_CONTROLLER] = self
        self._handles = [
            stack.stack.register_forward_pre_hook(_open_scope, with_kwargs=True),
            stack.stack.register_forward_hook(_close_scope, always_call=True),
        ]

    def detach(self, model: nn.Module) -> None:
        """Take everything that `attach` put on off again."""
        stack = layer_stack(model)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        stack.stack.__dict__.pop(_CONTROLLER, None)
        remove_executor(stack)


class PlanScope:
    """One forward pass of a wrapped model.

    Attributes:
        owner: The controller.
        outer: The scope that was open before, of another model.
        attention_mask: The 2-D mask that the model's forward got, or None. Shape (rows, tokens), integer or bool.
    """

    def __init__(
        self,
        owner: Controller,
        attention_mask: torch.Tensor | None,
        tokens: torch.Tensor | None = None,
    ) -> None:
        self.owner: object = owner
        self.outer: Scope | None = None
        self._controller = owner
        self._tokens = tokens
        self.attention_mask = attention_mask
        self._plans: RowPlans | None = None
        # The same at every layer, so it is made once.
        self._prompt_mask: torch.Tensor | None = None
        self._cache: DepthCache | None = None

    def run(self, call: LayerCall) -> torch.Tensor:
        """Run the visits of one layer for the rows whose plan makes them.

        Raises:
            UnsupportedModelError: States that are not (rows, tokens, hidden), or an unsupported or unusable cache.
            PlanError: The batch does not fit the plans.
        """
        states, layer_idx = call.hidden_states, call.layer_idx
        plans = self._plans
        if plans is None:
            plans = self._plans = self._begin(call)
        if layer_idx >= plans.num_decided:
            if self._prompt_mask is None:
                self._prompt_mask = self._controller.prompt_mask(self, call)
            self._controller.decide(
                plans, layer_idx, states, self._prompt_mask, self._tokens_of(states)
            )
        cache, num_rows = self._cache, plans.num_rows
        for visit in (0, 1):
            rows = plans.rows(layer_idx, visit)
            if not rows:
                break
            view = None if cache is None else cache.view(layer_idx, visit)
            if len(rows) == num_rows:
                states = call.visit(states, cache=view)
            else:
                index = plans.index(layer_idx, visit, states.device)
                run = call.visit(
                    states.index_select(0, index), cache=view, index=index, num_rows=num_rows
                )
                states = states.index_copy(0, index, run)
        if cache is not None:
            cache.advance(layer_idx, states.shape[1])
        return states

    def _tokens_of(self, states: torch.Tensor) -> torch.Tensor | None:
        """Return what the model's forward got as tokens, where it has a number or a vector for every state."""
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
        if call.cache is not None:
            self._cache = adopt_cache(call.cache, self._controller.num_layers)
            self._cache.check_ready(states.shape[1])
        return self._controller.start(states.shape[0], self._cache)


# Hooks find the controller through the module that they sit on: the closure of a deep-copied model would feed the
# original's controller.
def _open_scope(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        mask = None
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    enter_scope(PlanScope(module.__dict__[_CONTROLLER], mask, tokens))


def _close_scope(module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
    leave_scope(module.__dict__[_CONTROLLER])


def controller_of(model: nn.Module) -> Controller:
    """Return the controller of a wrapped model.

    Raises:
        WrapError: The model is not wrapped.
    """
    controller = layer_stack(model).stack.__dict__.get(_CONTROLLER)
    if not isinstance(controller, Controller):
        raise WrapError(
            f"this {type(model).__name__} is not wrapped; call wrap_model(model, ...) first"
        )
    return controller


def is_wrapped(stack: LayerStack) -> bool:
    """Say whether a controller or an executor is on these layers."""
    return _CONTROLLER in stack.stack.__dict__ or is_installed(stack)
