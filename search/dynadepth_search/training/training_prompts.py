"""The prompts that routers are trained and calibrated on, and the model that reads them.

Owns the split of validation prompts and the batches. Knows nothing of what is trained.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynadepth.errors import LabelError
from dynadepth.evaluation.folds import hold_out
from dynadepth.plans import Plans, plan_depth
from dynadepth.policies.calibration import Calibration, calibrate
from dynadepth.policies.router_heads import RouterConfig, RouterHeads
from dynadepth.policies.router_policy import RouterPolicy
from dynadepth.training.features import prompt_features
from dynadepth_search.data.tasks import Example
from dynadepth_search.progress import Progress, silent
from dynadepth_search.scoring.objectives import Objective, plan_values
from dynadepth_search.scoring.runtime_checks import planned, wrapped
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.storage.compatibility import chat_form

__all__ = ["BATCH", "TrainingPrompts"]

_VALIDATION = 0.2
_FEWEST_PROMPTS = 16
# Prompts of one forward.
BATCH = 16
# Penalties nearer in depth are not told apart; a budget is met on the validation prompts within half a step, of this
# size or, when the passes run out first, of the coarser ones reached by then.
_RESOLUTION = 0.01
_CALIBRATION_PASSES = 30

_Floats = npt.NDArray[np.float64]


class TrainingPrompts:
    """Prompts of one fit, and the model that reads them.

    Args:
        model: The unwrapped base model.
        tokenizer: Of the base model.
        examples: The prompts.
        task: What the folder that they are from says of their task, see `task_fields`.
        batch_size: Prompts of one forward.
        progress: Called with a stage, how much of it is done, and of how much.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        examples: Sequence[Example],
        task: Mapping[str, Any],
        *,
        batch_size: int = BATCH,
        progress: Progress = silent,
    ) -> None:
        self._model, self._examples = model, examples
        self.texts = [example.prompt.strip() for example in examples]
        self._scorer = Scorer(model, tokenizer, task["scoring"], chat=chat_form(task))
        self.batch_size, self.progress = batch_size, progress

    def split(self, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return training and validation rows, each in their order; equal texts stay together."""
        different = len(set(self.texts))
        if different < _FEWEST_PROMPTS:
            raise LabelError(
                f"{different} prompts cannot train and calibrate routers; give {_FEWEST_PROMPTS} or more different "
                "ones"
            )
        held_out = hold_out(self.texts, _VALIDATION, np.random.default_rng(seed))
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)

    def features(
        self, plans: Plans, rows: npt.NDArray[np.int64], config: RouterConfig, stage: str
    ) -> Tensor:
        """Return what routers read of some prompts under a plan for each."""
        examples = [self._examples[index] for index in rows]
        order = self._by_length(examples)
        found: list[Tensor] = []
        self.progress(stage, 0, len(order))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            input_ids, attention_mask = self._scorer.encode_prompts([examples[i] for i in batch])
            found += prompt_features(
                self._model,
                input_ids,
                attention_mask,
                plans[batch],
                num_windows=config.num_windows,
            )
            self.progress(stage, len(found), len(order))
        return torch.stack([found[i] for i in np.argsort(order)])

    def values(
        self,
        rows: npt.NDArray[np.int64],
        pairs: npt.NDArray[np.int64],
        plans: Plans,
        goal: Objective,
    ) -> _Floats:
        """Return what pairs of prompt and plan are worth, prompts in blocks that share sweeps."""
        values = np.empty(len(pairs))
        examples = [self._examples[index] for index in rows]
        stage = "scoring held-out plans"
        self.progress(stage, 0, len(pairs))
        done = 0
        for start in range(0, len(examples), self.batch_size):
            block = examples[start : start + self.batch_size]
            here = np.flatnonzero((pairs >= start) & (pairs < start + len(block)))
            outcomes = self._scorer.outcomes(block, plans[here], pairs[here] - start)
            values[here] = plan_values(outcomes, goal)
            done += len(here)
            self.progress(stage, done, len(pairs))
        return values

    def calibrate(
        self,
        rows: npt.NDArray[np.int64],
        heads: RouterHeads,
        bias: Tensor,
        shrinkage: float,
        protect: tuple[int, ...],
        lowest: float,
    ) -> Calibration:
        """Measure the mean depth of prompts under penalties, as `wrap_model` runs them."""
        examples = [self._examples[index] for index in rows]
        examples = [examples[i] for i in self._by_length(examples)]
        passes = 0

        def mean_depth_at(penalty: float) -> float:
            nonlocal passes
            passes += 1
            self.progress("calibrating", passes, _CALIBRATION_PASSES)
            policy = RouterPolicy(heads, bias, shrinkage=shrinkage, penalty=penalty)
            with wrapped(self._model, policy=policy, protect=protect) as model:
                plans = planned(model, self._scorer, examples, batch_size=self.batch_size)
            return float(plan_depth(plans).mean())

        table = calibrate(
            mean_depth_at,
            lowest=lowest,
            resolution=_RESOLUTION,
            max_evaluations=_CALIBRATION_PASSES,
        )
        self.progress("calibrating", _CALIBRATION_PASSES, _CALIBRATION_PASSES)
        return table

    def _by_length(self, examples: Sequence[Example]) -> npt.NDArray[np.int64]:
        """Return the order in which batches have little padding."""
        lengths = [len(self._scorer.encode(example).prompt_ids) for example in examples]
        return np.argsort(lengths, kind="stable")
