"""Routers of all layers that keep a budget: features, training, shrinkage, calibration.

The order of these steps, for routers that learn what a skip costs and for the published ones that imitate labels. The
steps themselves are in `dynadepth.training` and `dynadepth.policies.calibration`.
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

from dynadepth.checkpoints.paths import ONNX_NAME
from dynadepth.checkpoints.save_load import base_model_name, export_policy, save_policy
from dynadepth.checkpoints.trained_policy import Routers, TrainedPolicy
from dynadepth.errors import ConfigError, LabelError
from dynadepth.evaluation.folds import hold_out
from dynadepth.models.fingerprint import fingerprint
from dynadepth.plans import NUM_ACTIONS, Plans, check_plans, plan_depth
from dynadepth.policies.calibration import Calibration
from dynadepth.policies.router_heads import RouterConfig, RouterHeads
from dynadepth.proving.prove import proved_stack
from dynadepth.shortcuts.maps import Shortcuts
from dynadepth.training.router_training import (
    centre_heads,
    logits_of,
    train_heads,
    train_skip_cost_heads,
)
from dynadepth.training.shrinkage import logit_scale, select_shrinkage
from dynadepth.training.static_front import (
    front_bias,
    front_calibration,
    neighbours,
    removed_layers,
)
from dynadepth.training.train_config import TrainConfig
from dynadepth_search.data.splits import prompt_hashes
from dynadepth_search.progress import Progress, silent
from dynadepth_search.scoring.objectives import Objective, check_objective, plan_values
from dynadepth_search.scoring.score_table import ScoreTable
from dynadepth_search.storage.compatibility import check_same_shortcuts
from dynadepth_search.storage.labels import Labels
from dynadepth_search.training.training_prompts import BATCH, TrainingPrompts

__all__ = ["fit_imitation", "fit_routers", "router_plans", "write_routers"]

_Floats = npt.NDArray[np.float64]


def router_plans(front: Any) -> Plans:
    """Return the plans whose scores routers learn from: the front and all neighbours of its middle plan.

    Args:
        front: Nested static plans, the identity first. Shape (plans, num_layers), uint8.

    Returns:
        Plans, all different, the identity first. Shape (K, num_layers), uint8.

    Raises:
        PlanError: The plans do not form a front.
    """
    removed_layers(front)
    rows = np.asarray(front, dtype=np.uint8)
    every = np.concatenate([rows, neighbours(rows[len(rows) // 2])])
    _, first = np.unique(every, axis=0, return_index=True)
    plans: Plans = every[np.sort(first)]
    return plans


def fit_routers(
    model: Any,
    tokenizer: Any,
    table: ScoreTable,
    front: Any,
    *,
    objective: str = "preserve",
    protect: tuple[int, ...] = (),
    training: TrainConfig | None = None,
    shortcuts: Shortcuts | None = None,
    seed: int = 0,
    batch_size: int = BATCH,
    progress: Progress = silent,
) -> Routers:
    """Train routers on a score table and calibrate their budget.

    The router of a layer predicts how much value a prompt loses when the layer is skipped, all else as in the front's
    middle plan, from the states that enter the layer under that plan. A fifth of the distinct prompts, drawn by the
    seed, calibrates the budget; it is not used to train the routers or to choose how far they may deviate from the
    static front. The budget is measured with the policy as `wrap_model` runs it.

    Args:
        model: The unwrapped base model of the table; unwrapped again afterwards, even after an error.
        tokenizer: Tokenizer of the base model.
        table: Prompts under `router_plans(front)`, and possibly other plans.
        front: Static plans: the identity first, each with one more layer skipped. Shape (plans, num_layers), uint8.
        objective: Defines the value of a plan, see `dynadepth_search.scoring.objectives.plan_values`.
        protect: Layers that always run once.
        training: The recipe; None: that of the preset `dynadepth`.
        shortcuts: Those that the table was made with; None: it was made without.
        seed: Seed of the split, the folds and the training.
        batch_size: Number of prompts of one forward.
        progress: Called with the stage, the number of finished steps and the number of all steps.

    Returns:
        The routers; not yet on disk.

    Raises:
        ConfigError: The table lacks a plan or has no answers for the objective, or states are not finite.
        LabelError: There are too few distinct prompts, or the table or the front has another number of layers.
        PlanError: The plans do not form a front, or skip a protected layer.
        ShortcutError: The table was made with other shortcuts.
        WrapError: The model is wrapped.
    """
    stack = proved_stack(model)
    goal = check_objective(objective)
    config = RouterConfig(num_layers=stack.num_layers, hidden_size=stack.hidden_size)
    recipe = TrainConfig.for_preset("dynadepth") if training is None else training
    _check_layers(table.plans.shape[1], front, stack.num_layers)
    check_same_shortcuts(
        table.shortcuts, shortcuts, what="the scores were", advice="give the same (--shortcuts)"
    )
    removed_layers(front)
    rows = check_plans(front, stack.num_layers)
    # Fail before an hour of work, not after it.
    front_bias(rows, protect=protect)
    value = plan_values(table, goal)
    columns = _columns(table.plans, router_plans(rows))
    middle = rows[len(rows) // 2]
    costs = _skip_costs(value, table.plans, middle)
    prompts = TrainingPrompts(
        model,
        tokenizer,
        table.examples,
        table.manifest["asked"]["task"],
        shortcuts=shortcuts,
        batch_size=batch_size,
        progress=progress,
    )
    train, validation = prompts.split(seed)
    texts = [prompts.texts[index] for index in train]
    features = prompts.features(
        np.tile(middle, (len(train), 1)), train, config, "reading states under the static front"
    )

    def learn(indices: npt.NDArray[np.int64], fold_seed: int) -> RouterHeads:
        return train_skip_cost_heads(
            features[indices],
            costs[train[indices]],
            config,
            recipe,
            seed=fold_seed,
            groups=[texts[index] for index in indices],
            device=model.device,
        )

    choice = select_shrinkage(
        features,
        learn,
        rows,
        lambda pairs, plans: prompts.values(train, pairs, plans, goal),
        seed=seed,
        front_rewards=value[train][:, _columns(table.plans, rows)].mean(axis=0),
        protect=protect,
        groups=texts,
        progress=lambda done, total: progress("cross-validating", done, total),
    )
    progress("training", 0, 1)
    heads = centre_heads(learn(np.arange(len(train)), seed), features)
    progress("training", 1, 1)
    scale = logit_scale(logits_of(heads, features))
    bias = front_bias(rows, scale=scale, protect=protect)
    if choice.shrinkage == 0.0:
        calibration = front_calibration(rows, bias)
    else:
        calibration = prompts.calibrate(
            validation, heads, bias, choice.shrinkage, protect, float(plan_depth(rows[-1]))
        )
    task = table.manifest["asked"]["task"]
    notes = _notes(config, recipe, seed, train, validation, texts, goal) | {
        "task": {
            "name": table.manifest["task_name"],
            **{key: task[key] for key in ("kind", "scoring", "sha256")},
        },
        "prompts_of_task": task["prompts"],
        "plans_scored": len(columns),
        "prompt_hashes": prompt_hashes(table.examples),
        "plan_prompt_hashes": list(table.plan_prompt_hashes),
        "shrinkage": choice.to_dict(),
    }
    return _routers(model, heads, bias, choice.shrinkage, calibration, protect, notes, shortcuts)


def fit_imitation(
    model: Any,
    tokenizer: Any,
    labels: Labels,
    *,
    training: TrainConfig | None = None,
    lowest: float = 0.5,
    shortcuts: Shortcuts | None = None,
    seed: int = 0,
    batch_size: int = BATCH,
    progress: Progress = silent,
) -> Routers:
    """Train routers by the published method: they imitate the label of each prompt, from states under that label.

    There is no static part (b = 0) and no shrinkage (s = 1). A fifth of the distinct prompts calibrates the budget.

    Args:
        model: The unwrapped base model of the labels; unwrapped again afterwards, even after an error.
        tokenizer: Tokenizer of the base model.
        labels: Labels of the training prompts.
        training: The recipe; None: the published one.
        lowest: Smallest budget to calibrate, as a fraction of the number of layers.
        shortcuts: Those that the labels were searched with; None: they were searched without.
        seed: Seed of the split and the training.
        batch_size: Number of prompts of one forward.
        progress: Called with the stage, the number of finished steps and the number of all steps.

    Returns:
        The routers; not yet on disk.

    Raises:
        ConfigError: States are not finite, or the routers reach no depth from `lowest` to 1.
        LabelError: There are too few distinct prompts, or the labels have another number of layers.
        ShortcutError: The labels were searched with other shortcuts.
        WrapError: The model is wrapped.

    Source:
        Dr.LLM (arXiv 2510.12773); deviation: the budget is calibrated.
    """
    stack = proved_stack(model)
    config = RouterConfig.for_preset(
        "drllm", num_layers=stack.num_layers, hidden_size=stack.hidden_size
    )
    recipe = TrainConfig.for_preset("drllm") if training is None else training
    _check_layers(labels.plans.shape[1], labels.plans, stack.num_layers)
    manifest = labels.manifest
    check_same_shortcuts(
        manifest.shortcuts, shortcuts, what="the labels were", advice="give the same (--shortcuts)"
    )
    protect = tuple(int(layer) for layer in manifest.search["config"].get("protect", ()))
    prompts = TrainingPrompts(
        model,
        tokenizer,
        labels.examples,
        manifest.task,
        shortcuts=shortcuts,
        batch_size=batch_size,
        progress=progress,
    )
    train, validation = prompts.split(seed)
    texts = [prompts.texts[index] for index in train]
    features = prompts.features(
        labels.plans[train], train, config, "reading states under the labels"
    )
    heads = train_heads(
        features,
        labels.plans[train],
        config,
        recipe,
        seed=seed,
        groups=texts,
        device=model.device,
        progress=lambda done, total: progress("training", done, total),
    )
    bias = torch.zeros(stack.num_layers, NUM_ACTIONS)
    calibration = prompts.calibrate(validation, heads, bias, 1.0, protect, lowest)
    goal = check_objective(manifest.objective)
    notes = _notes(config, recipe, seed, train, validation, texts, goal) | {
        "prompts_of_task": manifest.task["prompts"],
        "depth_penalty": manifest.depth_penalty,
        "prompt_hashes": prompt_hashes(labels.examples),
        # The labels were searched for these very prompts.
        "plan_prompt_hashes": [],
        "task": {key: manifest.task[key] for key in ("name", "kind", "scoring", "sha256")},
        "labels": {
            "identity_rate": labels.identity_rate,
            "mean_depth": float(labels.depths.mean()),
            "evaluations": labels.evaluations,
        },
    }
    return _routers(model, heads, bias, 1.0, calibration, protect, notes, shortcuts)


def write_routers(folder: str | os.PathLike[str], routers: TrainedPolicy) -> Path:
    """Write a routers folder with its ONNX file.

    Args:
        folder: The folder to write; earlier routers in it are replaced.
        routers: The routers or the menu.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder holds other files. Nothing was changed.
        ExportError: The ONNX file cannot be made, or does not decide as the routers do; the rest of the folder is
            complete.
    """
    place = save_policy(folder, routers)
    export_policy(routers, place / ONNX_NAME)
    return place


def _skip_costs(value: _Floats, plans: Plans, middle: Plans) -> _Floats:
    """Return how much value each prompt loses when each layer is skipped, all else as in the middle plan.

    Shape (prompts, layers), float64.
    """
    beside = neighbours(middle)
    columns = _columns(plans, beside)
    changed = value[:, columns[:1]] - value[:, columns[1:]]
    # Where the middle plan skips, its neighbour executes.
    return np.where(middle == 0, -changed, changed)


def _columns(known: Plans, wanted: Plans) -> npt.NDArray[np.int64]:
    """Return the indices of plans among those of a table."""
    place = {plan.tobytes(): column for column, plan in enumerate(known)}
    missing = sum(plan.tobytes() not in place for plan in wanted)
    if missing:
        raise ConfigError(
            f"{missing} of the {len(wanted)} plans that routers learn from are not in the score table; score the "
            "prompts under `router_plans` of this front"
        )
    return np.array([place[plan.tobytes()] for plan in wanted])


def _check_layers(width: int, front: Any, num_layers: int) -> None:
    if width != num_layers or np.asarray(front).shape[-1] != num_layers:
        raise LabelError(
            f"the table is for {width} layers and the plans for {np.asarray(front).shape[-1]}, but the model has "
            f"{num_layers} decoder layers; give the model that was searched"
        )


def _notes(
    config: RouterConfig,
    recipe: TrainConfig,
    seed: int,
    train: npt.NDArray[np.int64],
    validation: npt.NDArray[np.int64],
    texts: Sequence[str],
    goal: Objective,
) -> dict[str, Any]:
    """Return how routers were trained, as values that JSON can hold."""
    # Drawn as in the final training.
    held_out = hold_out(texts, recipe.held_out, np.random.default_rng(seed))
    used = int((~held_out).sum())
    return {
        "preset": config.preset,
        "recipe": recipe.to_dict(),
        # If there are not more steps than in the warm-up, the training ended inside it.
        "optimiser_steps": recipe.epochs * math.ceil(used / recipe.batch_size),
        "warmup_steps": recipe.warmup_steps,
        "seed": seed,
        "train_prompts": len(train),
        "validation_prompts": len(validation),
        "objective": goal,
    }


def _routers(
    model: Any,
    heads: RouterHeads,
    bias: Tensor,
    shrinkage: float,
    calibration: Calibration,
    protect: tuple[int, ...],
    notes: dict[str, Any],
    shortcuts: Shortcuts | None,
) -> Routers:
    return Routers(
        heads=heads.to("cpu"),
        bias=bias,
        shrinkage=shrinkage,
        calibration=calibration,
        protect=protect,
        fingerprint=fingerprint(model),
        base_model=base_model_name(model),
        training=notes,
        shortcuts=shortcuts,
    )
