"""The sweep: many plans of many prompts in one ordinary forward of the base model.

Rust plans which distinct states to visit at each layer; here that plan is executed inside one forward call, with the
family's own masks and positions gathered for the rows.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dynadepth._core import SweepPlan, plan_sweep
from dynadepth.errors import PlanError, UnsupportedModelError
from dynadepth.execution.executor import (
    NOTHING,
    PER_ROW,
    OnUnwrapped,
    Scope,
    Skipped,
    enter_scope,
    leave_scope,
)
from dynadepth.execution.layer_call import LayerCall
from dynadepth.models.structure import LayerStack, position_arguments
from dynadepth.plans import check_plans

__all__ = ["StateObserver", "SweepResult", "Sweeper"]


@dataclass(frozen=True, slots=True)
class SweepResult:
    """The logits of a sweep and its cost.

    Attributes:
        logits: Logits at the requested positions. Shape (positions, vocabulary), model dtype and device.
        naive_visits: Visits that one forward for each plan would have made.
        executed_visits: Visits made.
    """

    logits: torch.Tensor
    naive_visits: int
    executed_visits: int


class StateObserver(Protocol):
    """Receives the states that enter some layers during a sweep."""

    @property
    def layers(self) -> Collection[int]:
        """The layers whose entering states it receives."""
        ...

    def observe(
        self, layer_idx: int, states: torch.Tensor, entering: npt.NDArray[np.int64]
    ) -> None:
        """Receive the distinct states that enter a layer.

        Args:
            layer_idx: The layer.
            states: Shape (states, tokens, hidden), model dtype and device.
            entering: For each plan of the sweep, its row of `states`. Shape (plans,), int64.
        """


class Sweeper(OnUnwrapped):
    """Runs sweeps on a model that is not wrapped; a context manager that leaves the model as it found it.

    Args:
        model: A causal language model.
        stack: Its layers, as `dynadepth.proving.proved_stack` returns them.
        skips: What states go through in place of each layer that a plan skips; None: nothing.

    Raises:
        UnsupportedModelError: The model has no output head; on entering: it has not been proved.
        WrapError: On entering: the model is wrapped.

    Source:
        Our own; the published searches run one forward for each plan.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from dynadepth.models.structure import LayerTraits, layer_stack
        >>> shape = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **shape)).eval()
        >>> stack = layer_stack(model).with_traits(LayerTraits())  # for a Llama; of any model: proved_stack(model)
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> plans, score = [[1, 1, 1], [1, 0, 1], [1, 0, 2]], [[0, 2], [1, 2], [2, 2]]
        >>> with Sweeper(model, stack) as sweeper:
        ...     result = sweeper.sweep(tokens, torch.ones_like(tokens), plans, [0, 0, 0], score=torch.tensor(score))
        >>> tuple(result.logits.shape), result.naive_visits, result.executed_visits
        ((3, 32), 8, 5)
    """

    def __init__(
        self, model: Any, stack: LayerStack, skips: Sequence[Skipped] | None = None
    ) -> None:
        super().__init__(stack)
        self._model = model
        self.skips = (NOTHING,) * stack.num_layers if skips is None else tuple(skips)
        self._head = model.get_output_embeddings()
        if not isinstance(self._head, nn.Module):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no output head; load it with AutoModelForCausalLM"
            )

    @property
    def fixed_rows(self) -> bool:
        """Whether the model needs as many rows after its layers as before them."""
        return self._stack.traits is not None and self._stack.traits.fixed_rows

    def sweep(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        plans: Any,
        example: Any,
        *,
        score: torch.Tensor,
        observer: StateObserver | None = None,
    ) -> SweepResult:
        """Run every plan on its prompt, each distinct prefix of visits once.

        Args:
            input_ids: Tokens of the E prompts, padded on the left. Shape (E, tokens), int64.
            attention_mask: 1 for real tokens. Shape (E, tokens).
            plans: The plans to run. Shape (N, num_layers), uint8.
            example: The index of each plan's prompt. Shape (N,), integer.
            score: Pairs (plan, position) to score; the logits at position t predict token t + 1. Shape (positions, 2),
                int64.
            observer: Receives the states that enter some layers; None: nobody does.

        Returns:
            The logits and the cost.

        Raises:
            PlanError: A plan is not one of this model, or a prompt or position does not exist.

        Complexity:
            Time and memory grow with the distinct (prompt, prefix of a plan) pairs, not with N times num_layers.
        """
        num_examples, num_tokens = input_ids.shape
        checked = check_plans(plans, self._stack.num_layers)
        examples = _check_examples(example, len(checked), num_examples)
        _check_score(score, len(checked), num_tokens)
        plan = plan_sweep(checked, examples, num_examples)
        device = input_ids.device
        num_rows = num_examples
        if self.fixed_rows:
            # The rows that are added are the first prompt again; their states are dropped before the first layer.
            num_rows = max(num_examples, len(checked))
            rows = torch.arange(num_rows, device=device)
            rows[num_examples:] = 0
            input_ids, attention_mask = input_ids[rows], attention_mask[rows]
        given = position_arguments(self._model, attention_mask)
        flat = score.to(device)
        handle = self._head.register_forward_pre_hook(_ScoredStates(flat[:, 0], flat[:, 1]))
        scored = score.cpu().numpy()
        scope = _SweepScope(self, plan, num_examples, num_rows, device, observer, scored)
        enter_scope(scope)
        try:
            with torch.inference_mode():
                logits = self._model(
                    input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **given
                ).logits
        finally:
            leave_scope(self)
            handle.remove()
        return SweepResult(logits[0], plan.naive_visits, plan.executed_visits)


class _ScoredStates:
    """Pre-hook that gives the output head the scored states only: in a small model the head is the widest layer."""

    def __init__(self, row: torch.Tensor, position: torch.Tensor) -> None:
        self._row, self._position = row, position

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[torch.Tensor]:
        return (args[0][self._row, self._position].unsqueeze(0),)


class _SweepScope:
    """One sweep: from E prompts before the first layer to N plans after the last."""

    def __init__(
        self,
        owner: Sweeper,
        plan: SweepPlan,
        num_examples: int,
        num_rows: int,
        device: torch.device,
        observer: StateObserver | None,
        score: npt.NDArray[np.int64],
    ) -> None:
        self.owner: object = owner
        self.outer: Scope | None = None
        # Every layer changes the set of distinct states.
        self.dispatch: Sequence[Any] = (PER_ROW,) * plan.num_layers
        self._plan = plan
        self._score = score
        self._num_examples, self._num_rows = num_examples, num_rows
        self._fixed_rows, self._skips = owner.fixed_rows, owner.skips
        self._observer = observer
        # The prompt whose masks and positions each state has.
        self._example = torch.arange(num_examples, device=device)

    def run(self, call: LayerCall) -> torch.Tensor:
        """Visit each distinct state once, some of the results again, and lay the next layer's states end to end."""
        states = call.hidden_states
        if call.layer_idx == 0:
            states = states[: self._num_examples]
        if self._observer is not None and call.layer_idx in self._observer.layers:
            self._observer.observe(call.layer_idx, states, self._plan.entering(call.layer_idx))
        first, second, gather, following = self._plan.layer(call.layer_idx)
        prompts, self._example = self._example, _on(states.device, following)
        last = call.layer_idx == self._plan.num_layers - 1
        rows, order = np.unique(gather, return_inverse=True) if last else (gather, None)
        skipping, executing = np.searchsorted(rows, (len(states), len(states) + len(first)))
        pieces = []
        if skipping:
            past = states.index_select(0, _on(states.device, rows[:skipping]))
            pieces.append(self._skips[call.layer_idx].through(past))
        if len(first):
            wanted = self._wanted(call.layer_idx, states, len(first), len(second))
            visited = _on(states.device, first)
            prompts = prompts[visited]
            # All of the states are not copied, as no one reads them after the layer.
            entering = states if len(first) == len(states) else states.index_select(0, visited)
            once = self._visit(call, entering, prompts, wanted[: len(first)])
            done = rows[skipping:executing] - len(states)
            pieces.append(
                once if len(done) == len(once) else once.index_select(0, _on(once.device, done))
            )
            if len(second):
                again = _on(states.device, second)
                twice = once.index_select(0, again)
                pieces.append(self._visit(call, twice, prompts[again], wanted[len(first) :]))
        found = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if order is None:
            return found
        if self._fixed_rows:
            order = np.pad(order, (0, self._num_rows - len(order)), mode="edge")
        return found.index_select(0, _on(states.device, order))

    def _wanted(
        self, layer_idx: int, states: torch.Tensor, num_first: int, num_second: int
    ) -> npt.NDArray[np.bool_]:
        """Return which tokens of a layer's results are read; if no later layer visits a result, only its scored ones.

        Shape (first and second results, tokens), bool.
        """
        wanted = np.ones((num_first + num_second, states.shape[1]), dtype=np.bool_)
        observed = () if self._observer is None else self._observer.layers
        if layer_idx >= max(observed, default=0):
            wanted[self._plan.settled(layer_idx)] = False
            plan, position = self._score.T
            result = self._plan.leaving(layer_idx)[plan] - len(states)
            made_here = result >= 0
            wanted[result[made_here], position[made_here]] = True
        return wanted

    def _visit(
        self,
        call: LayerCall,
        states: torch.Tensor,
        prompts: torch.Tensor,
        wanted: npt.NDArray[np.bool_],
    ) -> torch.Tensor:
        tokens = None
        # Not every module accepts an empty batch.
        if wanted.any() and not wanted.all():
            tokens = torch.from_numpy(np.flatnonzero(wanted)).to(states.device)
        return call.visit(states, cache=None, index=prompts, num_rows=self._num_rows, wanted=tokens)


def _on(device: torch.device, rows: npt.NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(rows).to(device)


def _check_examples(example: Any, num_plans: int, num_examples: int) -> npt.NDArray[np.uint32]:
    examples = np.asarray(example)
    if examples.shape != (num_plans,) or examples.dtype.kind not in "iu":
        raise PlanError(
            f"example has shape {examples.shape} and type {examples.dtype}; expected one prompt index for each of "
            f"{num_plans} plans"
        )
    if num_plans and not 0 <= int(examples.min()) <= int(examples.max()) < num_examples:
        raise PlanError(
            f"example names prompt {examples.max()} or {examples.min()}, but there are {num_examples}"
        )
    return examples.astype(np.uint32)


def _check_score(score: torch.Tensor, num_plans: int, num_tokens: int) -> None:
    if score.dim() != 2 or score.shape[1] != 2 or score.dtype != torch.long:
        raise PlanError(
            f"score has shape {tuple(score.shape)} and type {score.dtype}; expected (positions, 2), int64"
        )
    if score.numel():
        low, high = score.amin(dim=0).tolist(), score.amax(dim=0).tolist()
        if min(low) < 0 or high[0] >= num_plans or high[1] >= num_tokens:
            raise PlanError(
                f"score ranges from {low} to {high}; expected plans below {num_plans} and positions below {num_tokens}"
            )
