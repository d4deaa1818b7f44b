"""Quality against mean depth: choices by scores under a penalty, and the best static mixtures for comparison."""

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

# Depths at which recipes are compared, as fractions of the way from the shallowest plan to the deepest.
_SHARES = (0.2, 0.4, 0.6, 0.8)

# In units of the score: enough to be chosen within a range of penalties, too little to matter otherwise.
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
        scores: The scores of each step. Shape (N, K) each, float64.
        plans: The plans. Shape (K, num_layers), uint8.
        layers: The layer where each step reads.
        penalty: Price of a depth of 1, in units of the score.

    Returns:
        The row of `plans` for each prompt. Shape (N,), int64.
    """
    return choose(
        scores, [prefix_numbers(plans, layer) for layer in layers], plan_depth(plans), penalty
    )


def choose(
    scores: Sequence[Floats], numbers: Sequence[Indices], depths: Floats, penalty: float
) -> Indices:
    """Return the plan of each prompt under a penalty, decided step by step.

    Args:
        scores: The scores of each step. Shape (N, K) each, float64.
        numbers: For each step, the index of each plan's prefix before the step's layer. Shape (K,) each, int64.
        depths: The depth of each plan. Shape (K,), float64.
        penalty: Price of a depth of 1, in units of the score.

    Returns:
        The index of the plan of each prompt. Shape (N,), int64.
    """
    chosen: Indices = (scores[0] - penalty * depths).argmax(axis=1)
    for later, prefix in zip(scores[1:], numbers[1:], strict=True):
        still_open = prefix[None, :] == prefix[chosen][:, None]
        chosen = np.where(still_open, later - penalty * depths, -np.inf).argmax(axis=1)
    return chosen


def depth_curve(
    scores: Sequence[Floats], numbers: Sequence[Indices], depths: Floats
) -> tuple[Floats, Indices]:
    """Return the mean depth and the choices under every penalty of a fixed grid of P penalties.

    Args:
        scores: The scores of each step. Shape (N, K) each, float64.
        numbers: For each step, the index of each plan's prefix before the step's layer. Shape (K,) each, int64.
        depths: The depth of each plan. Shape (K,), float64.

    Returns:
        Mean depths, from the lowest penalty to the highest, shape (P,), float64; and the index of the plan of each
        prompt, shape (P, N), int64.
    """
    chosen = np.stack([choose(scores, numbers, depths, penalty) for penalty in _PENALTIES])
    return depths[chosen].mean(axis=1), chosen


def at_depths(curve: tuple[Floats, Indices], values: Floats, wanted: Floats) -> Floats:
    """Return what each prompt gets at given mean depths, where neighbouring penalties are mixed.

    Args:
        curve: What `depth_curve` returned.
        values: What each prompt gets from each plan. Shape (N, K), float64.
        wanted: The mean depths. Shape (wanted,), float64.

    Returns:
        Expected values. Shape (wanted, N), float64.
    """
    means, chosen = curve
    # With several steps the depth need not fall everywhere; its running minimum does.
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
    """Return what each prompt gets from the best static mixture of each depth.

    Args:
        values: What each prompt gets from each plan. Shape (N, K), float64.
        depths: The depth of each plan. Shape (K,), float64.
        wanted: The mean depths. Shape (wanted,), float64.

    Returns:
        Expected values. Shape (wanted, N), float64.
    """
    hull = concave_hull(depths, values.mean(axis=0))
    mixtures = [bracket_depth(depths, float(depth), hull, clip=True) for depth in wanted]
    return np.stack([mixture.expected(values.T) for mixture in mixtures])


def front_means(values: Floats, depths: Floats) -> Floats:
    """Return the value of each plan where prompts cannot be told apart, such that one plan is preferred to a mixture.

    If the best plan of a depth is within one standard error of the best mixture of that depth, its value is raised
    slightly above the mixture's: mixing the identity with a much shallower plan would spoil some prompts to spare
    others, for a difference that is not significant.

    Args:
        values: What each prompt gets from each plan. Shape (N, K), float64.
        depths: The depth of each plan. Shape (K,), float64.

    Returns:
        The value of each plan. Shape (K,), float64.
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
    """Return the standard error of the mean of some values."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def depth_grid(depths: Floats) -> Floats:
    """Return the mean depths at which recipes are compared, ascending."""
    low, high = float(depths.min()), min(1.0, float(depths.max()))
    return low + np.array(_SHARES) * (high - low)
