"""The static front: nested plans for all prompts, traversed as one penalty grows.

The check of a front, the static part b of the policy's logits that reproduces it, and its exact budgets.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynadepth.errors import ConfigError, PlanError
from dynadepth.plans import EXECUTE, NUM_ACTIONS, REPEAT, SKIP, Plans, check_plans, plan_depth
from dynadepth.policies.calibration import Calibration

__all__ = ["front_bias", "front_calibration", "neighbours", "removed_layers"]

# In units of the spread of the routers' logits. A prompt one spread away from the mean moves along the whole front with
# s = 1, along half of it with s = 1/2, and along a quarter with s = 1/4.
_FRONT_SPAN = 1.0
# Beyond the front's last threshold: a layer that no static plan skips is skipped only if the prompt itself asks for it.
_NEVER_SKIPPED = 1.0
# Below EXECUTE: few labels repeat a layer, so a prompt needs strong evidence.
_REPEAT_GAP = 2.0
# A logit that no router can outweigh.
_OUT_OF_REACH = 1e4


def front_bias(front: Any, *, scale: float = 1.0, protect: Iterable[int] = ()) -> Tensor:
    """Return the static part b of the policy's logits, which by itself traverses the static front as the penalty grows.

    The k-th of K layers that the front removes is skipped once lambda reaches `scale k / K`; the layers that it
    never removes follow together, one `scale` after the last. With lambda >= 0 and s = 0 REPEAT is never chosen: it is
    two `scale` below EXECUTE. With s = 0 only the order matters; with s > 0 the spacing determines how far along the
    front a prompt may move.

    Args:
        front: Nested plans: the identity first, each with one more layer skipped than the one before. Shape
            (K + 1, num_layers), uint8.
        scale: Spread over prompts of the routers' centred logits; see `dynadepth.training.shrinkage.logit_scale`.
        protect: Layers that always run once.

    Returns:
        b. Shape (num_layers, 3), float32; 0 for EXECUTE.

    Raises:
        PlanError: The plans do not form such a front, or skip a protected layer.
        ConfigError: The scale is not positive and finite.
    """
    removed = removed_layers(front)
    if not 0.0 < scale < float("inf"):
        raise ConfigError(
            f"the scale of the front's thresholds is {scale}; expected a positive finite number"
        )
    always = sorted(set(protect))
    if set(always) & set(removed):
        raise PlanError(
            f"the static front skips layers {sorted(set(always) & set(removed))}, which are protected; search it "
            "again with them protected"
        )
    bias = torch.zeros(np.asarray(front).shape[1], NUM_ACTIONS, dtype=torch.float64)
    bias[:, REPEAT] = -_REPEAT_GAP * scale
    bias[:, SKIP] = -((_FRONT_SPAN if removed else 0.0) + _NEVER_SKIPPED) * scale
    for step, layer_idx in enumerate(removed, start=1):
        bias[layer_idx, SKIP] = -_FRONT_SPAN * scale * step / len(removed)
    bias[always, SKIP] = bias[always, REPEAT] = -_OUT_OF_REACH
    return bias.to(torch.float32)


def front_calibration(front: Any, bias: Tensor) -> Calibration:
    """Return the exact table of a policy with shrinkage 0: one entry for each plan of the front.

    Args:
        front: As in `front_bias`.
        bias: What `front_bias` returned for it.

    Returns:
        Penalties midway between the thresholds, and the depths of the plans; it accepts the budgets from the shallowest
        plan to the deepest.

    Raises:
        PlanError: The plans do not form a front.
    """
    removed = removed_layers(front)
    depths = plan_depth(front)
    thresholds = [0.0, *(-float(bias[layer_idx, SKIP]) for layer_idx in removed)]
    # Beyond the last plan there may be no further threshold: then any penalty above its threshold will do.
    beyond = thresholds[-1] + 1.0
    never = [
        -float(value) for layer_idx, value in enumerate(bias[:, SKIP]) if layer_idx not in removed
    ]
    thresholds.append(min([beyond, *never]))
    lambdas = [(low + high) / 2 for low, high in pairwise(thresholds)]
    return Calibration(
        lambdas=tuple(lambdas[::-1]),
        depths=tuple(float(depth) for depth in depths[::-1]),
        lowest=float(depths[-1]),
        highest=float(depths[0]),
    )


def neighbours(plan: Any) -> Plans:
    """Return a plan and all plans that differ from it in one layer: skipped if it runs, run once if it is skipped.

    Args:
        plan: Shape (num_layers,), whole numbers.

    Returns:
        The plan first; plan 1 + l differs at layer l. A neighbour that would run no layer is replaced by the plan
        itself. Shape (1 + num_layers, num_layers), uint8.

    Raises:
        PlanError: The argument is not a plan.
    """
    given = np.asarray(plan)
    row = check_plans(given, given.shape[-1], num_rows=1)[0]
    rows: Plans = np.tile(row, (len(row) + 1, 1))
    for layer_idx in range(len(row)):
        rows[1 + layer_idx, layer_idx] = int(SKIP) if row[layer_idx] else int(EXECUTE)
        if not rows[1 + layer_idx].any():
            rows[1 + layer_idx] = row
    return rows


def removed_layers(front: Any) -> list[int]:
    """Check a front and return the layers that it skips, in its order.

    Args:
        front: Nested plans: the identity first, each with one more layer skipped than the one before. Shape
            (plans, num_layers), whole numbers.

    Returns:
        One layer for each plan after the first.

    Raises:
        PlanError: The plans do not form such a front.
    """
    given = np.asarray(front)
    if given.ndim != 2 or given.shape[0] == 0:
        raise PlanError(
            f"a static front is an array of shape {given.shape}; expected plans of shape (plans, num_layers), the "
            "identity plan first"
        )
    rows = check_plans(given, given.shape[1])
    removed: list[int] = []
    if (rows[0] != int(EXECUTE)).any():
        raise PlanError(
            "a static front starts with a plan that edits layers; expected the identity plan first"
        )
    for step, (before, after) in enumerate(pairwise(rows), start=1):
        changed = np.flatnonzero(before != after)
        if len(changed) != 1 or after[changed[0]] != int(SKIP):
            raise PlanError(
                f"plan {step} of a static front changes layers {changed.tolist()}; expected exactly one layer more "
                "skipped than in the plan before"
            )
        removed.append(int(changed[0]))
    return removed
