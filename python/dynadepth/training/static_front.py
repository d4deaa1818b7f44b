"""The static front: nested plans for all prompts, and how one penalty walks along them.

Owns the check of a front, the static part b of the policy's logits that reproduces it, and its exact budgets. Knows
nothing of routers or of how a front is found.
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

# In spreads of the routers' logits. A prompt one spread away from the mean moves along the whole front with s = 1, half
# of it with s = 1/2, a quarter with s = 1/4: from free choice to the trade of close neighbours.
_FRONT_SPAN = 1.0
# Beyond the front's last threshold: what no static plan skips takes a prompt of its own to go.
_NEVER_SKIPPED = 1.0
# Below EXECUTE: labels that repeat are few, so a prompt needs strong evidence.
_REPEAT_GAP = 2.0
# Logits that no router outweighs.
_OUT_OF_REACH = 1e4


def front_bias(front: Any, *, scale: float = 1.0, protect: Iterable[int] = ()) -> Tensor:
    """Return the static part b of the policy's logits, which alone walks the static front as the penalty grows.

    The k-th of K layers that the front removes is skipped once lambda reaches `scale k / K`; the layers that it
    never removes follow together, one `scale` after its last. With lambda >= 0 and s = 0 REPEAT never wins: it stands
    two `scale` below EXECUTE. Only the order matters while s = 0; the spacing says how far along the front a prompt may
    move when s > 0.

    Args:
        front: Nested plans: the identity first, each with one more layer skipped than the one before. Shape
            (K + 1, num_layers), uint8.
        scale: Spread over prompts of the routers' centred logits; see `dynadepth.training.shrinkage.logit_scale`.
        protect: Layers that always run once.

    Returns:
        b. Shape (num_layers, 3), float32; 0 for EXECUTE.

    Raises:
        PlanError: The plans are no such front, or skip a protected layer.
        ConfigError: A scale that is not positive and finite.
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
        Penalties midway between the thresholds, and the plans' depths; accepts the budgets between the front's ends.

    Raises:
        PlanError: The plans are no front.
    """
    removed = removed_layers(front)
    depths = plan_depth(front)
    thresholds = [0.0, *(-float(bias[layer_idx, SKIP]) for layer_idx in removed)]
    # What lies beyond the last plan may be out of reach: then any penalty behind its threshold will do.
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
    """Return a plan and all that differ from it in one layer, skipped there if it runs and run once if it is skipped.

    Args:
        plan: Shape (num_layers,), whole numbers.

    Returns:
        The plan first; plan 1 + l differs at layer l. One that would run no layer is left as the plan. Shape
        (1 + num_layers, num_layers), uint8.

    Raises:
        PlanError: It is no plan.
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
    """Return the layers that a front skips, in its order, having checked that it is a front.

    Args:
        front: Nested plans: the identity first, each with one more layer skipped than the one before. Shape
            (plans, num_layers), whole numbers.

    Returns:
        One layer for each plan after the first.

    Raises:
        PlanError: The plans are no such front.
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
