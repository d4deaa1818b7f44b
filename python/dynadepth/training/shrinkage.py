"""The cross-validation that chooses the shrinkage s: how far routers may deviate from the static plans.

It works on cached features; rewards come from a function argument, and the base model is never run here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynadepth.errors import ConfigError
from dynadepth.evaluation.folds import draw_folds
from dynadepth.evaluation.mixtures import bracket_depth, concave_hull
from dynadepth.plans import EXECUTE, Plans, check_plans, plan_depth
from dynadepth.policies.base import actions_of
from dynadepth.policies.router_heads import RouterHeads
from dynadepth.training.router_training import logits_of
from dynadepth.training.static_front import front_bias, removed_layers

__all__ = [
    "SHRINKAGES",
    "ShrinkageChoice",
    "ShrinkageTrial",
    "logit_scale",
    "plans_of",
    "select_shrinkage",
]

SHRINKAGES = (0.25, 0.5, 1.0)
# Where static and routed plans are compared, as fractions of the range of depths.
_COMPARED_AT = (0.25, 0.5, 0.75)
_BISECTIONS = 50

Floats = npt.NDArray[np.float64]
Train = Callable[[npt.NDArray[np.int64], int], RouterHeads]
Evaluate = Callable[[npt.NDArray[np.int64], Plans], Floats]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShrinkageTrial:
    """What one shrinkage gained over the static plans on held-out prompts.

    Args:
        shrinkage: The shrinkage s.
        gain: Mean over prompts of the reward minus that of the static mixture of equal mean depth, averaged over the
            compared depths.
        standard_error: Standard error of `gain` over prompts.
        depths: Mean depth reached at each compared depth.
        gains: Mean gain at each compared depth.
    """

    shrinkage: float
    gain: float
    standard_error: float
    depths: tuple[float, ...]
    gains: tuple[float, ...]

    @property
    def supported(self) -> bool:
        """Whether the gain is more than one standard error."""
        return self.gain > self.standard_error


@dataclass(frozen=True, slots=True, kw_only=True)
class ShrinkageChoice:
    """The shrinkage chosen, and the evidence.

    Args:
        shrinkage: The largest one that is supported, else 0.
        trials: One for each shrinkage tried, ascending.
        prompts: Number of held-out prompts, each counted once.
        evaluations: Number of distinct pairs of prompt and plan that were evaluated.
    """

    shrinkage: float
    trials: tuple[ShrinkageTrial, ...]
    prompts: int
    evaluations: int

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as values that JSON can hold."""
        return {
            "shrinkage": self.shrinkage,
            "prompts": self.prompts,
            "evaluations": self.evaluations,
            "trials": [
                {
                    "shrinkage": trial.shrinkage,
                    "gain": trial.gain,
                    "standard_error": trial.standard_error,
                    "depths": list(trial.depths),
                    "gains": list(trial.gains),
                }
                for trial in self.trials
            ],
        }


def logit_scale(logits: Tensor) -> float:
    """Return the spread over prompts of the difference between the logits of EXECUTE and SKIP.

    Args:
        logits: Logits of the routers for some prompts. Shape (prompts, num_layers, 3).

    Returns:
        Root of the mean variance, over the layers where the difference varies; 1 if there is none.
    """
    lead = logits[..., 1].to(torch.float64) - logits[..., 0].to(torch.float64)
    variance = lead.var(dim=0, correction=0)
    varies = variance > 1e-8
    return float(variance[varies].mean().sqrt()) if bool(varies.any()) else 1.0


def plans_of(logits: Tensor, bias: Tensor, *, shrinkage: float, penalty: float) -> Plans:
    """Return the plans that the routers' logits give, as the policy would if states did not depend on plans.

    Args:
        logits: Logits of the routers. Shape (prompts, num_layers, 3), float32.
        bias: The static part b. Shape (num_layers, 3), float32.
        shrinkage: The shrinkage s.
        penalty: The penalty lambda.

    Returns:
        Plans. Shape (prompts, num_layers), uint8; a plan that would skip every layer runs the last one.
    """
    plans: Plans = actions_of(bias + shrinkage * logits, penalty).to(torch.uint8).cpu().numpy()
    plans[plans.sum(axis=1) == 0, -1] = int(EXECUTE)
    return plans


def select_shrinkage(
    features: Tensor,
    train: Train,
    front: Any,
    evaluate: Evaluate,
    *,
    seed: int,
    front_rewards: Any = None,
    protect: Sequence[int] = (),
    groups: Sequence[str] | None = None,
    folds: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> ShrinkageChoice:
    """Choose how far prompts may deviate from the static front, by cross-validation on the training prompts.

    For each fold, routers are trained on the other prompts; for each s and for three depths inside the front's range
    lambda is set on those other prompts; then every held-out prompt's reward is compared with the expected reward of
    the best static mixture of the same mean depth. The largest s whose gain is more than one standard error is chosen,
    else 0.

    Args:
        features: What the routers read of the prompts, under a plan that does not depend on the labels: states under a
            prompt's own label would reveal which layers it skips. Shape (prompts, num_layers, views, hidden), float32.
        train: Given indices of prompts and a seed, returns routers that learned from these prompts alone.
        front: As in `front_bias`.
        evaluate: Given indices of prompts (pairs, int64) and plans (pairs, num_layers, uint8), all pairs distinct,
            returns their rewards (pairs, float64). Called once.
        seed: Seed of the folds and the training.
        front_rewards: Mean reward of each front plan; the static mixture then consists of plans on their concave hull,
            as in the evaluation. None: it consists of the two neighbouring front plans. Shape (plans,), float64.
        protect: Layers that always run once.
        groups: The group of each prompt, such as its text; prompts of one group share a fold. None: every prompt is a
            group of its own.
        folds: Number of folds.
        progress: Called as `progress(fold, folds)` after each training.

    Returns:
        The choice and its evidence; shrinkage 0 without any evaluation if the front is the identity alone.

    Raises:
        ConfigError: There are fewer groups than twice the folds, or there is not one for each prompt.
        PlanError: The plans do not form a front, or skip a protected layer.
    """
    count = len(features)
    names = [str(index) for index in range(count)] if groups is None else groups
    if len(names) != count:
        raise ConfigError(
            f"groups has {len(names)} entries for {count} prompts; expected one for each"
        )
    different = len(set(names))
    if folds < 2 or different < 2 * folds:
        raise ConfigError(
            f"{different} prompts cannot be cross-validated in {folds} folds; expected 2 folds or more with at "
            f"least two different prompts each"
        )
    num_layers = features.shape[1]
    rows = check_plans(front, num_layers)
    if not removed_layers(rows):
        return ShrinkageChoice(shrinkage=0.0, trials=(), prompts=count, evaluations=0)
    rng = np.random.default_rng(seed)
    fold_of = draw_folds(names, folds, rng)
    pairs = _Pairs(num_layers)
    cells: list[_Cell] = []
    static = rows if front_rewards is None else _on_hull(rows, front_rewards)
    for fold in range(folds):
        held_out, rest = np.flatnonzero(fold_of == fold), np.flatnonzero(fold_of != fold)
        heads = train(rest, int(rng.integers(2**31)))
        logits = logits_of(heads, features)
        logits = logits - logits[rest].mean(dim=0)
        bias = front_bias(rows, scale=logit_scale(logits[rest]), protect=protect).to(logits.device)
        cells += _compare_fold(logits[rest], logits[held_out], bias, held_out, static, pairs)
        if progress is not None:
            progress(fold + 1, folds)
    rewards = pairs.rewards(evaluate)
    trials = tuple(_trial(shrinkage, cells, rewards, count) for shrinkage in SHRINKAGES)
    supported = [trial.shrinkage for trial in trials if trial.supported]
    return ShrinkageChoice(
        shrinkage=max(supported, default=0.0),
        trials=trials,
        prompts=count,
        evaluations=len(rewards),
    )


def _on_hull(front: Plans, front_rewards: Any) -> Plans:
    """Return the plans of the front that the best mixtures consist of, the deepest first."""
    rewards = np.asarray(front_rewards, dtype=np.float64)
    if rewards.shape != (len(front),) or not np.isfinite(rewards).all():
        raise ConfigError(
            f"front_rewards has shape {rewards.shape}; expected one finite number for each of {len(front)} plans"
        )
    chosen: Plans = front[concave_hull(plan_depth(front), rewards)[::-1]]
    return chosen


class _Pairs:
    """Distinct pairs of prompt and plan, so that none is evaluated twice."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._index: dict[tuple[int, bytes], int] = {}

    def add(self, prompts: Any, plans: Plans) -> npt.NDArray[np.int64]:
        """Return the index of each pair in the rewards."""
        keys = [(int(prompt), plan.tobytes()) for prompt, plan in zip(prompts, plans, strict=True)]
        return np.array(
            [self._index.setdefault(key, len(self._index)) for key in keys], dtype=np.int64
        )

    def rewards(self, evaluate: Evaluate) -> Floats:
        prompts = np.array([prompt for prompt, _ in self._index], dtype=np.int64)
        plans = np.frombuffer(b"".join(plan for _, plan in self._index), dtype=np.uint8)
        rewards = np.asarray(
            evaluate(prompts, plans.reshape(-1, self._num_layers).copy()), dtype=np.float64
        )
        if rewards.shape != prompts.shape or not np.isfinite(rewards).all():
            raise ConfigError(
                f"rewards of shape {rewards.shape} came back for {len(prompts)} plans, or some are not finite; "
                "expected one finite number for each"
            )
        return rewards


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cell:
    """One fold's held-out prompts under one shrinkage at one depth, and the static mixture to compare with.

    Indices refer to the rewards of `_Pairs`; all have shape (held-out prompts,).
    """

    shrinkage: float
    depth_idx: int
    prompts: npt.NDArray[np.int64]
    depths: Floats
    routed: npt.NDArray[np.int64]
    deeper: npt.NDArray[np.int64]
    shallower: npt.NDArray[np.int64]
    weight: float = field(default=1.0)

    def gain(self, rewards: Floats) -> Floats:
        static = self.weight * rewards[self.deeper] + (1.0 - self.weight) * rewards[self.shallower]
        gain: Floats = rewards[self.routed] - static
        return gain


def _compare_fold(
    logits: Tensor,
    held_logits: Tensor,
    bias: Tensor,
    prompts: npt.NDArray[np.int64],
    front: Plans,
    pairs: _Pairs,
) -> list[_Cell]:
    """Plan one fold's held-out prompts for every shrinkage and depth, and record what must be evaluated."""
    depths = plan_depth(front)
    rising = np.argsort(depths, kind="stable")
    cells = []
    for shrinkage in SHRINKAGES:
        for depth_idx, share in enumerate(_COMPARED_AT):
            target = float(depths[-1] + share * (depths[0] - depths[-1]))
            penalty = _penalty_at(logits, bias, shrinkage, target)
            plans = plans_of(held_logits, bias, shrinkage=shrinkage, penalty=penalty)
            reached = plan_depth(plans)
            mixture = bracket_depth(depths, float(reached.mean()), rising, clip=True)
            cells.append(
                _Cell(
                    shrinkage=shrinkage,
                    depth_idx=depth_idx,
                    prompts=prompts,
                    depths=reached,
                    routed=pairs.add(prompts, plans),
                    deeper=pairs.add(prompts, np.tile(front[mixture.high], (len(prompts), 1))),
                    shallower=pairs.add(prompts, np.tile(front[mixture.low], (len(prompts), 1))),
                    weight=mixture.weight,
                )
            )
    return cells


def _trial(shrinkage: float, cells: Sequence[_Cell], rewards: Floats, count: int) -> ShrinkageTrial:
    gains = np.zeros((len(_COMPARED_AT), count))
    depths = np.zeros((len(_COMPARED_AT), count))
    for cell in cells:
        if cell.shrinkage == shrinkage:
            gains[cell.depth_idx, cell.prompts] = cell.gain(rewards)
            depths[cell.depth_idx, cell.prompts] = cell.depths
    of_prompt = gains.mean(axis=0)
    return ShrinkageTrial(
        shrinkage=shrinkage,
        gain=float(of_prompt.mean()),
        standard_error=float(of_prompt.std(ddof=1) / np.sqrt(count)),
        depths=tuple(float(depth) for depth in depths.mean(axis=1)),
        gains=tuple(float(gain) for gain in gains.mean(axis=1)),
    )


def _penalty_at(logits: Tensor, bias: Tensor, shrinkage: float, target: float) -> float:
    """Return the penalty whose mean depth is nearest to a target, by bisection of a decreasing step function."""

    def depth(penalty: float) -> float:
        return float(
            plan_depth(plans_of(logits, bias, shrinkage=shrinkage, penalty=penalty)).mean()
        )

    reach = float((bias.abs() + shrinkage * logits.abs()).max()) * 2.0 + 1.0
    low, high = -reach, reach
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if depth(middle) > target else (low, middle)
    return min((low, high), key=lambda penalty: abs(depth(penalty) - target))
