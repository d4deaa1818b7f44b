"""DynadepthLM: a wrapped model for lm-evaluation-harness, which plans every request from its context alone.

The harness scores context and continuation in one row, padded on the right and without a mask. A policy that read such
a row would see the answer and the padding. So contexts are planned first, each once, and rows run under these plans.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM

from dynadepth.checkpoints.trained_exits import TrainedExits
from dynadepth.checkpoints.trained_policy import TrainedPolicy
from dynadepth.errors import ConfigError
from dynadepth.models.compute import PlanCost
from dynadepth.models.structure import layer_stack
from dynadepth.plans import Plans, identity_plan, plan_depth
from dynadepth.wrapping.controller import Controller
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from dynadepth_search.evaluation.costs import head_multiply_adds, plan_cost
from dynadepth_search.scoring.batching import batches_of, pad_left

__all__ = ["DynadepthLM"]

# What the harness scores: its name, and the tokens of context and continuation.
_Request = tuple[Any, list[int], list[int]]
_Tokens = tuple[int, ...]
_PLANNED_AT_ONCE = 16


class DynadepthLM(HFLM):
    """The harness' own `hf` model, wrapped.

    Args:
        pretrained: As for `hf`: a folder or hub id, or a loaded model.
        budget: As for `wrap_model`; one of budget, fidelity and plan is needed.
        fidelity: As for `wrap_model`. It is about decoded tokens: likelihoods are the base model's own.
        plan: As for `wrap_model`; on a command line, ranges are separated by `+`, as in `0-11+14-27`.
        routers: As for `wrap_model`.
        shortcuts: As for `wrap_model`.
        max_depth: As for `wrap_model`.
        **others: All else that `hf` takes.

    Raises:
        ConfigError: Not exactly one of budget, fidelity and plan; or as for `wrap_model`.
        BudgetError, CheckpointError, PlanError, ShortcutError, UnsupportedModelError: As for `wrap_model`.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        budget: float | None = None,
        fidelity: float | None = None,
        plan: Any = None,
        routers: Any = None,
        shortcuts: Any = None,
        max_depth: float | None = None,
        **others: Any,
    ) -> None:
        super().__init__(pretrained=pretrained, **others)
        given_plan = plan.replace("+", ",") if isinstance(plan, str) else plan
        if isinstance(plan, int):
            # What the harness made of digits.
            given_plan = str(plan).zfill(layer_stack(self._inner).num_layers)
        asked = {
            "budget": budget,
            "fidelity": fidelity,
            "plan": given_plan,
            "routers": routers,
            "shortcuts": shortcuts,
            "max_depth": max_depth,
        }
        self._asked = {name: value for name, value in asked.items() if value is not None}
        if sum(name in self._asked for name in ("budget", "fidelity", "plan")) != 1:
            raise ConfigError(
                f"the harness was given {', '.join(self._asked) or 'nothing'} for dynadepth; expected exactly one of "
                "budget, fidelity and plan, as in --model_args pretrained=my-model,budget=0.9"
            )
        wrap_model(self._model, **self._asked)
        try:
            controller = self._controller
            trained = controller.trained
            self._heads = 0.0
            if isinstance(trained, TrainedPolicy) and not isinstance(trained, TrainedExits):
                self._heads = head_multiply_adds({"routers": trained})
            self._cost: PlanCost = plan_cost(self._inner, controller.shortcuts)
        except BaseException:
            unwrap_model(self._model)
            raise
        # The plans of all contexts so far and the tokens of each, and the plans of those that are being scored.
        self._plans: list[Plans] = []
        self._lengths: list[int] = []
        self._scored: dict[_Tokens, Plans] = {}

    @property
    def _inner(self) -> Any:
        """The model without what PEFT puts around it."""
        base = getattr(self._model, "get_base_model", None)
        return self._model if base is None else base()

    @property
    def _controller(self) -> Controller:
        return cast("Controller", self._inner.dynadepth)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[_Request],
        *,
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Score continuations under the plans of their contexts; the batches are the harness' own.

        Args:
            requests: As for `hf`.
            disable_tqdm: As for `hf`.
            override_bs: As for `hf`.
        """
        plans = self._plan({tuple(context) for _, context, _ in requests})
        rows: dict[_Tokens, _Tokens] = {}
        together: list[int] = []
        alone: list[int] = []
        for number, (_, context, continuation) in enumerate(requests):
            row = self._row(context, continuation)
            # One row of tokens with two contexts has two plans: who comes second is scored by itself.
            known = rows.setdefault(row, tuple(context))
            (together if known == tuple(context) else alone).append(number)
        scores: dict[int, tuple[float, bool]] = {}
        for numbers in (together, *([number] for number in alone)):
            chosen = [requests[number] for number in numbers]
            if not chosen:
                continue
            batch = override_bs if numbers is together else 1
            with self._scoring(chosen, plans):
                found = super()._loglikelihood_tokens(
                    chosen, disable_tqdm=disable_tqdm, override_bs=batch
                )
            scores |= dict(zip(numbers, found, strict=True))
        return [scores[number] for number in range(len(requests))]

    def _row(self, context: list[int], continuation: list[int]) -> _Tokens:
        """Return what the harness runs of a request: cut on the left, without the last token."""
        return _unpadded((context + continuation)[-(self.max_length + 1) :][:-1])

    @contextmanager
    def _scoring(self, requests: Sequence[_Request], plans: dict[_Tokens, Plans]) -> Iterator[None]:
        self._scored = {
            self._row(context, continuation): plans[tuple(context)]
            for _, context, continuation in requests
        }
        try:
            yield
        finally:
            self._scored = {}

    def _model_call(self, inps: torch.Tensor, **others: Any) -> torch.Tensor:
        """Run rows of context and continuation, each under its context's plan.

        Args:
            inps: Token ids, padded on the right. Shape (rows, tokens), int64.
            **others: As for `hf`.
        """
        # What the harness tries batch sizes with is no request, and costs the most.
        every = identity_plan(self._controller.num_layers)
        plans = [self._scored.get(_unpadded(row), every) for row in inps.tolist()]
        with self._controller.plans(np.stack(plans)):
            return cast("torch.Tensor", super()._model_call(inps, **others))

    def _plan(self, contexts: set[_Tokens]) -> dict[_Tokens, Plans]:
        """Return the plan of each context, from its own tokens."""
        ordered = sorted(contexts, key=lambda tokens: (len(tokens), tokens))
        cut = [np.array(tokens[-self.max_length :], dtype=np.int64) for tokens in ordered]
        found: dict[_Tokens, Plans] = {}
        for rows in batches_of([len(tokens) for tokens in cut], _PLANNED_AT_ONCE):
            ids, mask = pad_left((cut[row] for row in rows), self.device)
            plans = self._controller.plan_prompts(ids, mask)
            self._note(plans, [len(cut[row]) for row in rows])
            found |= {ordered[row]: plan for row, plan in zip(rows, plans, strict=True)}
        return found

    def _note(self, plans: Plans, lengths: Sequence[int]) -> None:
        self._plans += list(plans)
        self._lengths += lengths

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **others: Any
    ) -> torch.Tensor:
        """Generate from contexts, and note their plans; see `hf`.

        Args:
            context: Token ids, padded on the left. Shape (rows, tokens), int64.
            max_length: The most tokens of a row.
            stop: What ends a row.
            **others: As for `hf`.
        """
        found = super()._model_generate(context, max_length, stop, **others)
        mask, plans = others.get("attention_mask"), self._controller.last_plans
        lengths = [context.shape[1]] * len(context) if mask is None else mask.sum(dim=1).tolist()
        if plans is not None:
            self._note(plans, lengths)
        return cast("torch.Tensor", found)

    def get_model_info(self) -> dict[str, Any]:
        """Return what `hf` says of its model, and under `dynadepth` what was asked for and what came of it.

        That is `prompts` (each context once for each task's requests), their mean `depth` and `compute`, the share with
        the `identity` plan; with exits, `passes` of new tokens and the `fidelity` that audits measured.
        """
        said: dict[str, Any] = {
            "asked": {name: str(value) for name, value in self._asked.items()},
            "prompts": len(self._plans),
        }
        if self._plans:
            plans = np.stack(self._plans)
            heads = self._heads / max(1.0, float(np.mean(self._lengths)))
            said |= {
                "depth": float(plan_depth(plans).mean()),
                "compute": float(self._cost.compute(plans, heads).mean()),
                "identity": float((plans == 1).all(axis=1).mean()),
            }
        if self._controller.exits is not None:
            totals = self._controller.exit_totals
            said |= {"passes": totals.passes, "fidelity": totals.fidelity}
        return {**super().get_model_info(), "dynadepth": said}


def _unpadded(row: Sequence[int]) -> _Tokens:
    """Return a row without the zeros at its end, with which the harness pads."""
    end = len(row)
    while end and row[end - 1] == 0:
        end -= 1
    return tuple(row[:end])
