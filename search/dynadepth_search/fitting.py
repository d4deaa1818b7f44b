"""From labels to routers that keep a budget: features, training, shrinkage, calibration, files.

Owns the order of these steps and the split of validation prompts. What each step does is `dynadepth.training`,
`dynadepth.shrinkage` and `dynadepth.budget`; how prompts are scored is `scoring`.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynadepth.budget import Calibration, calibrate
from dynadepth.checkpoint import Routers, base_model_name, save_routers
from dynadepth.config import RouterConfig, TrainConfig
from dynadepth.errors import LabelError
from dynadepth.families import layer_stack
from dynadepth.features import prompt_features
from dynadepth.fingerprint import fingerprint
from dynadepth.folders import ONNX_NAME
from dynadepth.fronts import front_bias, front_calibration, removed_layers
from dynadepth.onnx import export_onnx
from dynadepth.plans import NUM_ACTIONS, Plans, check_plans, plan_depth
from dynadepth.policies import RouterPolicy
from dynadepth.routers import RouterHeads
from dynadepth.shrinkage import ShrinkageChoice, logit_scale, select_shrinkage
from dynadepth.training import centre_heads, logits_of, train_heads
from dynadepth_search.labels import Labels
from dynadepth_search.measuring import planned, wrapped
from dynadepth_search.progress import Progress, silent
from dynadepth_search.scoring import Scorer, check_objective
from dynadepth_search.tasks import Example

__all__ = ["fit_routers", "write_routers"]

_VALIDATION = 0.2
_FEWEST_PROMPTS = 16
_BATCH = 16
# Penalties nearer in depth are not told apart; a budget is met on the validation prompts within half a step, of this
# size or, when the passes run out first, of the coarser ones reached by then.
_RESOLUTION = 0.01
_CALIBRATION_PASSES = 30


def fit_routers(
    model: Any,
    tokenizer: Any,
    labels: Labels,
    front: Any,
    *,
    front_rewards: Any = None,
    preset: str = "dynadepth",
    training: TrainConfig | None = None,
    seed: int = 0,
    batch_size: int = _BATCH,
    progress: Progress = silent,
) -> Routers:
    """Train routers on labels and calibrate their budget.

    A fifth of the different labelled prompts, drawn by the seed, calibrates the budget and takes no part in training
    the routers or choosing how far they may leave the static front. It is not unseen: the front, the probe and the
    labels' depth penalty were found on all labelled prompts. Rows of one prompt text are on one side. The
    routers learn from states under each prompt's own label; how far they may leave the static front is chosen, and
    their logits are centred, on states under the front's middle plan, which betray no label. The preset `drllm` has no
    static part and no choice to make. The budget is measured with the policy as `wrap_model` runs it.

    Args:
        model: The unwrapped base model, the one of the labels; left as it was, also after an error.
        tokenizer: Of the base model.
        labels: Of the training prompts.
        front: Static plans found on them: the identity first, each with one more layer skipped. Shape (plans,
            num_layers), uint8.
        front_rewards: Mean reward of each of these plans on training prompts, see `select_shrinkage`. Shape (plans,).
        preset: `"dynadepth"` or `"drllm"`.
        training: The recipe; None takes the preset's.
        seed: Of the split, the folds and the training.
        batch_size: Prompts of one forward.
        progress: Called with a stage, how much of it is done, and of how much.

    Returns:
        The routers; not yet on disk.

    Raises:
        ConfigError: Unknown preset, or states or rewards that are not finite.
        LabelError: Too few different prompts, or labels or a front of another number of layers.
        PlanError: The front is none, or skips a layer that the search protected.
        WrapError: The model is wrapped.
    """
    stack = layer_stack(model)
    config = RouterConfig.for_preset(
        preset, num_layers=stack.num_layers, hidden_size=stack.hidden_size
    )
    recipe = TrainConfig.for_preset(preset) if training is None else training
    rows, protect = _checked(labels, front, stack.num_layers)
    fitter = _Fitter(model, tokenizer, labels, config, recipe, seed, batch_size, progress)
    forced = fitter.features(labels.plans[fitter.train], "reading states under the labels")
    if preset == "drllm":
        heads = fitter.train_final(forced)
        bias, shrinkage, choice = torch.zeros(stack.num_layers, NUM_ACTIONS), 1.0, None
    else:
        middle = np.tile(rows[len(rows) // 2], (len(fitter.train), 1))
        unforced = fitter.features(middle, "reading states under the static front")
        choice = fitter.choose(forced, unforced, rows, front_rewards, protect)
        heads = centre_heads(fitter.train_final(forced), unforced)
        scale = logit_scale(logits_of(heads, unforced))
        bias, shrinkage = front_bias(rows, scale=scale, protect=protect), choice.shrinkage
    if shrinkage == 0.0:
        calibration = front_calibration(rows, bias)
    else:
        lowest = float(plan_depth(rows[-1]))
        calibration = fitter.calibrate(heads, bias, shrinkage, protect, lowest)
    return Routers(
        heads=heads.to("cpu"),
        bias=bias,
        shrinkage=shrinkage,
        calibration=calibration,
        protect=protect,
        fingerprint=fingerprint(model),
        base_model=base_model_name(model),
        training=fitter.notes(choice),
    )


def write_routers(folder: str | os.PathLike[str], routers: Routers) -> Path:
    """Write a routers folder with its ONNX file.

    Args:
        folder: Where; earlier routers there are replaced whole.
        routers: The routers.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder holds files that are no routers'. Nothing was changed.
        ExportError: The ONNX file cannot be made, or does not do what the routers do; the rest of the folder is whole.
    """
    place = save_routers(folder, routers)
    export_onnx(routers, place / ONNX_NAME)
    return place


class _Fitter:
    """The steps of one fit, over the model and the labels that they share."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        labels: Labels,
        config: RouterConfig,
        recipe: TrainConfig,
        seed: int,
        batch_size: int,
        progress: Progress,
    ) -> None:
        self._texts = [example.prompt.strip() for example in labels.examples]
        self.train, self.validation = _split(self._texts, seed)
        self._model, self._labels, self._config, self._recipe = model, labels, config, recipe
        self._seed, self._batch_size, self._progress = seed, batch_size, progress
        self._objective = check_objective(labels.manifest.objective)
        self._scorer = Scorer(model, tokenizer, labels.manifest.task["scoring"])

    def features(self, plans: Plans, stage: str) -> Tensor:
        """Return what the routers read of the training prompts under a plan for each."""
        examples = self._examples(self.train)
        order = self._by_length(examples)
        found: list[Tensor] = []
        self._progress(stage, 0, len(order))
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            input_ids, attention_mask = self._scorer.encode_prompts([examples[i] for i in batch])
            found += prompt_features(
                self._model,
                input_ids,
                attention_mask,
                plans[batch],
                num_windows=self._config.num_windows,
            )
            self._progress(stage, len(found), len(order))
        return torch.stack([found[i] for i in np.argsort(order)])

    def train_final(self, features: Tensor) -> RouterHeads:
        """Train on all training prompts."""
        return train_heads(
            features,
            self._labels.plans[self.train],
            self._config,
            self._recipe,
            seed=self._seed,
            device=self._model.device,
            progress=lambda done, total: self._progress("training", done, total),
        )

    def choose(
        self,
        forced: Tensor,
        unforced: Tensor,
        front: Plans,
        front_rewards: Any,
        protect: tuple[int, ...],
    ) -> ShrinkageChoice:
        """Choose the shrinkage by cross-validation on the training prompts."""
        return select_shrinkage(
            forced,
            self._labels.plans[self.train],
            front,
            self._rewards,
            config=self._config,
            training=self._recipe,
            seed=self._seed,
            front_rewards=front_rewards,
            unforced=unforced,
            protect=protect,
            groups=[self._texts[index] for index in self.train],
            device=self._model.device,
            progress=lambda done, total: self._progress("cross-validating", done, total),
        )

    def calibrate(
        self,
        heads: RouterHeads,
        bias: Tensor,
        shrinkage: float,
        protect: tuple[int, ...],
        lowest: float,
    ) -> Calibration:
        """Measure the mean depth of the validation prompts under penalties, as `wrap_model` runs them."""
        examples = self._examples(self.validation)
        examples = [examples[i] for i in self._by_length(examples)]
        passes = 0

        def mean_depth_at(penalty: float) -> float:
            nonlocal passes
            passes += 1
            self._progress("calibrating", passes, _CALIBRATION_PASSES)
            policy = RouterPolicy(heads, bias, shrinkage=shrinkage, penalty=penalty)
            with wrapped(self._model, policy=policy, protect=protect) as model:
                plans = planned(model, self._scorer, examples, batch_size=self._batch_size)
            return float(plan_depth(plans).mean())

        table = calibrate(
            mean_depth_at,
            lowest=lowest,
            resolution=_RESOLUTION,
            max_evaluations=_CALIBRATION_PASSES,
        )
        self._progress("calibrating", _CALIBRATION_PASSES, _CALIBRATION_PASSES)
        return table

    def notes(self, choice: ShrinkageChoice | None) -> dict[str, Any]:
        """Return how the routers were trained, as values that JSON knows."""
        manifest = self._labels.manifest
        return {
            "preset": self._config.preset,
            "recipe": self._recipe.to_dict(),
            "optimiser_steps": self._optimiser_steps(),
            "warmup_steps": self._recipe.warmup_steps,
            "seed": self._seed,
            "train_prompts": len(self.train),
            "validation_prompts": len(self.validation),
            "objective": manifest.objective,
            "depth_penalty": manifest.depth_penalty,
            "task": {key: manifest.task[key] for key in ("name", "kind", "scoring", "sha256")},
            "labels": {
                "identity_rate": self._labels.identity_rate,
                "mean_depth": float(self._labels.depths.mean()),
                "evaluations": self._labels.evaluations,
            },
            "shrinkage": None if choice is None else choice.to_dict(),
        }

    def _optimiser_steps(self) -> int:
        """Return the steps of the final training; no more than the warm-up's means that it ended inside."""
        recipe, count = self._recipe, len(self.train)
        used = count - round(recipe.held_out * count)
        return recipe.epochs * math.ceil(used / recipe.batch_size)

    def _rewards(self, prompts: npt.NDArray[np.int64], plans: Plans) -> npt.NDArray[np.float64]:
        """Return the objective's reward of pairs of training prompt and plan, prompts in blocks that share sweeps."""
        rewards = np.empty(len(prompts))
        examples = self._examples(self.train)
        stage = "scoring held-out plans"
        self._progress(stage, 0, len(prompts))
        done = 0
        for start in range(0, len(examples), self._batch_size):
            block = examples[start : start + self._batch_size]
            pairs = np.flatnonzero((prompts >= start) & (prompts < start + len(block)))
            outcomes = self._scorer.outcomes(block, plans[pairs], prompts[pairs] - start)
            rewards[pairs] = outcomes.of(self._objective)
            done += len(pairs)
            self._progress(stage, done, len(prompts))
        return rewards

    def _examples(self, indices: npt.NDArray[np.int64]) -> list[Example]:
        return [self._labels.examples[index] for index in indices]

    def _by_length(self, examples: Sequence[Example]) -> npt.NDArray[np.int64]:
        """Return the order in which batches have little padding."""
        lengths = [len(self._scorer.encode(example).prompt_ids) for example in examples]
        return np.argsort(lengths, kind="stable")


def _checked(labels: Labels, front: Any, num_layers: int) -> tuple[Plans, tuple[int, ...]]:
    if labels.plans.shape[1] != num_layers:
        raise LabelError(
            f"the labels are for {labels.plans.shape[1]} layers, but the model has {num_layers} decoder layers; "
            "give the model that was searched"
        )
    different = len({example.prompt.strip() for example in labels.examples})
    if different < _FEWEST_PROMPTS:
        raise LabelError(
            f"{different} labelled prompts cannot train and calibrate routers; label {_FEWEST_PROMPTS} or more "
            "different ones"
        )
    width = np.asarray(front).shape[-1]
    if width != num_layers:
        raise LabelError(
            f"the static front is for {width} layers, but the model has {num_layers} decoder layers; give the front "
            "that was searched with these labels"
        )
    removed_layers(front)
    protect = tuple(int(layer) for layer in labels.manifest.search["config"].get("protect", ()))
    # Found wrong before an hour of work, not after it.
    front_bias(front, protect=protect)
    return check_plans(front, num_layers), protect


def _split(texts: Sequence[str], seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the training and the validation rows, each in the order of the labels; equal texts stay together."""
    number = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    drawn = np.random.default_rng(seed).permutation(len(number))[: round(_VALIDATION * len(number))]
    held_out = np.isin([number[text] for text in texts], drawn)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
