"""The prompts that routers are trained and calibrated on, in batches that the model reads, and their split."""

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
from dynadepth.shortcuts.maps import Shortcuts
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
# Number of prompts of one forward.
BATCH = 16
# Penalties closer in depth than this are not distinguished. A budget is met on the validation prompts within half a
# step; a step has this size, or is larger if the number of passes is used up first.
_RESOLUTION = 0.01
_CALIBRATION_PASSES = 30

_Floats = npt.NDArray[np.float64]


class TrainingPrompts:
    """Prompts of one fit, and the model that reads them.

    Args:
        model: The unwrapped base model.
        tokenizer: Tokenizer of the base model.
        examples: The prompts.
        task: The fields of their task, as stored in their folder, see `task_fields`.
        shortcuts: What states take in place of layers that a plan skips; None: nothing.
        batch_size: Number of prompts of one forward.
        progress: Called with the stage, the number of finished steps and the number of all steps.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        examples: Sequence[Example],
        task: Mapping[str, Any],
        *,
        shortcuts: Shortcuts | None = None,
        batch_size: int = BATCH,
        progress: Progress = silent,
    ) -> None:
        self._model, self._examples = model, examples
        self.texts = [example.prompt.strip() for example in examples]
        self._shortcuts = shortcuts
        self._scorer = Scorer(
            model, tokenizer, task["scoring"], chat=chat_form(task), shortcuts=shortcuts
        )
        self.batch_size, self.progress = batch_size, progress

    def split(self, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return training and validation rows, each ascending; equal texts are on one side.

        Args:
            seed: Seed of the split.

        Raises:
            LabelError: There are too few distinct prompts.
        """
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
        """Return what routers read of some prompts, each under its own plan.

        Args:
            plans: The plan of each row. Shape (rows, num_layers), uint8.
            rows: Indices of the prompts. Shape (rows,), int64.
            config: Shape of the routers.
            stage: Name of this work for the progress.

        Returns:
            Features as `prompt_features` returns them. Shape (rows, num_layers, num_windows + 1, hidden), float32.
        """
        examples = [self._examples[index] for index in rows]
        found: dict[int, Tensor] = {}
        self.progress(stage, 0, len(examples))
        for batch, input_ids, attention_mask in self._scorer.prompt_batches(
            examples, self.batch_size
        ):
            features = prompt_features(
                self._model,
                input_ids,
                attention_mask,
                plans[batch],
                num_windows=config.num_windows,
                shortcuts=self._shortcuts,
            )
            found.update(zip(batch, features, strict=True))
            self.progress(stage, len(found), len(examples))
        return torch.stack([found[i] for i in range(len(examples))])

    def values(
        self,
        rows: npt.NDArray[np.int64],
        pairs: npt.NDArray[np.int64],
        plans: Plans,
        goal: Objective,
    ) -> _Floats:
        """Return the values of pairs of prompt and plan, scored in blocks of prompts that share sweeps.

        Args:
            rows: Indices of the prompts. Shape (rows,), int64.
            pairs: Index into `rows` of each pair's prompt. Shape (pairs,), int64.
            plans: The plan of each pair. Shape (pairs, num_layers), uint8.
            goal: The objective, see `plan_values`.

        Returns:
            Values, from 0 to 1. Shape (pairs,), float64.
        """
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
        """Measure the mean depth of prompts under penalties, with the policy as `wrap_model` runs it.

        Args:
            rows: Indices of the prompts. Shape (rows,), int64.
            heads: The trained routers.
            bias: The static part b of the policy's logits. Shape (num_layers, 3), float32.
            shrinkage: How far prompts may deviate from the static part, 0 to 1.
            protect: Layers that always run once.
            lowest: Smallest budget to calibrate, as a fraction of the number of layers.

        Returns:
            The table from budget to penalty.
        """
        examples = [self._examples[index] for index in rows]
        passes = 0

        def mean_depth_at(penalty: float) -> float:
            nonlocal passes
            passes += 1
            self.progress("calibrating", passes, _CALIBRATION_PASSES)
            policy = RouterPolicy(heads, bias, shrinkage=shrinkage, penalty=penalty)
            how = {"policy": policy, "protect": protect, "shortcuts": self._shortcuts}
            with wrapped(self._model, **how) as model:
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
