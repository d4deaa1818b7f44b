"""What scores of plans buy at which mean depth: choices under a penalty, and the best static mixtures beside them.

Works on arrays. Knows nothing of how scores come about.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dynadepth.evaluation.mixtures import bracket_depth, concave_hull
from dynadepth.plans import Plans, plan_depth, prefix_numbers

__all__ = [
    "at_depths",
    "choose",
    "choose_menu_plans",
    "depth_curve",
    "depth_grid",
    "front_means",
    "standard_error",
    "static_values",
]

# Depths at which recipes are compared, as shares of the way from the lowest plan to the deepest.
_SHARES = (0.2, 0.4, 0.6, 0.8)

# In scores: enough for a range of penalties, too little to matter.
_RAISE = 0.01

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
# Penalties in score per unit of depth; neighbours are mixed, so the grid need not be finer.
_PENALTIES: Floats = np.concatenate([[-100.0, 0.0], np.geomspace(0.02, 200.0, 47)])


def choose_menu_plans(
    scores: Sequence[Floats], plans: Plans, layers: Sequence[int], penalty: float
) -> Indices:
    """Return the plan that a menu gives each prompt under a penalty.

    Args:
        scores: Of each step. Shape (N, K) each.
        plans: Shape (K, num_layers), uint8.
        layers: Where each step reads.
        penalty: Price of a depth of 1.

    Returns:
        Row of `plans` for each prompt. Shape (N,).
    """
    return choose(
        scores, [prefix_numbers(plans, layer) for layer in layers], plan_depth(plans), penalty
    )


def choose(
    scores: Sequence[Floats], numbers: Sequence[Indices], depths: Floats, penalty: float
) -> Indices:
    """Return the plan of each prompt under a penalty, decided step by step.

    Args:
        scores: Of each step. Shape (N, K) each.
        numbers: The prefix of each plan where each step reads. Shape (K,) each.
        depths: Of the plans. Shape (K,).
        penalty: Price of a depth of 1.

    Returns:
        Shape (N,).
    """
    chosen: Indices = (scores[0] - penalty * depths).argmax(axis=1)
    for later, prefix in zip(scores[1:], numbers[1:], strict=True):
        still_open = prefix[None, :] == prefix[chosen][:, None]
        chosen = np.where(still_open, later - penalty * depths, -np.inf).argmax(axis=1)
    return chosen


def depth_curve(
    scores: Sequence[Floats], numbers: Sequence[Indices], depths: Floats
) -> tuple[Floats, Indices]:
    """Return mean depth and choices under every penalty of the grid, depth falling. Shapes (P,) and (P, N)."""
    chosen = np.stack([choose(scores, numbers, depths, penalty) for penalty in _PENALTIES])
    return depths[chosen].mean(axis=1), chosen


def at_depths(curve: tuple[Floats, Indices], values: Floats, wanted: Floats) -> Floats:
    """Return what each prompt gets at given mean depths, neighbouring penalties mixed. Shape (wanted, N)."""
    means, chosen = curve
    # Several steps need not fall everywhere; the running minimum does.
    falling = np.minimum.accumulate(means)
    rows = np.arange(len(values))
    found = np.empty((len(wanted), len(values)))
    for index, depth in enumerate(wanted):
        after = int(np.argmax(falling <= depth + 1e-12)) if (falling <= depth + 1e-12).any() else -1
        if after <= 0:
            found[index] = values[rows, chosen[after]]
            continue
        before = int(np.flatnonzero(means[:after] == falling[after - 1])[-1])
        high, low = means[before], means[after]
        share = 0.0 if high == low else (depth - low) / (high - low)
        found[index] = (1 - share) * values[rows, chosen[after]] + share * values[
            rows, chosen[before]
        ]
    return found


def static_values(values: Floats, depths: Floats, wanted: Floats) -> Floats:
    """Return what each prompt gets from the best static mixture of each depth. Shape (wanted, N)."""
    hull = concave_hull(depths, values.mean(axis=0))
    mixtures = [bracket_depth(depths, float(depth), hull, clip=True) for depth in wanted]
    return np.stack([mixture.expected(values.T) for mixture in mixtures])


def front_means(values: Floats, depths: Floats) -> Floats:
    """Return what plans are worth where prompts cannot be told apart, so that one plan is preferred to a mixture.

    Of the plans of a depth the best one, if it is within one standard error of the best mixture of that depth, is
    raised a little above it: mixing the identity with a far lower plan would spoil some prompts to spare others, for a
    difference that the prompts do not show.

    Args:
        values: What each prompt gets from each plan. Shape (N, K).
        depths: Of the plans. Shape (K,).

    Returns:
        Shape (K,).
    """
    means = values.mean(axis=0)
    knots = depths[concave_hull(depths, means)]
    found: Floats = means.copy()
    for depth in np.unique(depths).tolist():
        right = int(np.searchsorted(knots, depth))
        if right in (0, len(knots)) or depth in knots:
            continue
        plan = int(np.where(depths == depth, means, -np.inf).argmax())
        mixture = static_values(values, depths, depths[[plan]])[0]
        if float((mixture - values[:, plan]).mean()) <= standard_error(mixture - values[:, plan]):
            share = (depth - knots[right - 1]) / (knots[right] - knots[right - 1])
            found[plan] = mixture.mean() + _RAISE * share * (1 - share)
    return found


def standard_error(values: Floats) -> float:
    """Return the standard error of a mean."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def depth_grid(depths: Floats) -> Floats:
    """Return the mean depths at which recipes are compared, rising."""
    low, high = float(depths.min()), min(1.0, float(depths.max()))
    return low + np.array(_SHARES) * (high - low)
