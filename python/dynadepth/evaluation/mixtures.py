"""The best quality at a mean depth without looking at the prompt (mixtures of static plans), and oracle choices."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dynadepth.errors import BudgetError
from dynadepth.evaluation.intervals import Floats

__all__ = [
    "Mixture",
    "best_under_depth",
    "bracket_depth",
    "concave_hull",
    "mix_by_kind",
    "mix_to_depth",
    "pareto_front",
]

# Tolerance for the rounding of a mean depth over prompts.
_SLACK = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Two static plans, one of which is drawn at random for each prompt, with fixed probabilities.

    Args:
        low: Index of the shallower plan.
        high: Index of the deeper plan; equal to `low` if a single plan has the wanted depth.
        weight: Probability of `high`, from 0 to 1.
        depth: Mean depth of the mixture, as a fraction of the number of layers.
    """

    low: int
    high: int
    weight: float
    depth: float

    def expected(self, outcomes: Any) -> Floats:
        """Return the expected outcome of each prompt under the mixture.

        The expectation is computed instead of drawing plans, so that a paired difference contains no
        noise from the draw.

        Args:
            outcomes: One row for each plan that `low` and `high` may name. Shape (plans, prompts).

        Returns:
            Expected outcome of each prompt. Shape (prompts,), float64.
        """
        rows = np.asarray(outcomes, dtype=np.float64)
        mixed: Floats = (1.0 - self.weight) * rows[self.low] + self.weight * rows[self.high]
        return mixed


def pareto_front(depths: Any, qualities: Any) -> npt.NDArray[np.int64]:
    """Return the points that no other point beats in depth and quality at once.

    Args:
        depths: Lower is better. Shape (points,).
        qualities: Higher is better. Shape (points,).

    Returns:
        Indices, by ascending depth; of equal points only the one of lowest index. Shape (front,), int64.

    Example:
        >>> pareto_front([1.0, 0.9, 0.8], [2.0, 1.0, 1.5]).tolist()
        [2, 0]
    """
    depth, quality = np.asarray(depths, dtype=np.float64), np.asarray(qualities, dtype=np.float64)
    order = np.lexsort((np.arange(depth.size), -quality, depth))
    front: list[int] = []
    best = -np.inf
    for index in order.tolist():
        if quality[index] > best:
            front.append(index)
            best = quality[index]
    return np.asarray(front, dtype=np.int64)


def concave_hull(depths: Any, qualities: Any) -> npt.NDArray[np.int64]:
    """Return the static plans that the best mixtures consist of.

    Args:
        depths: Depth of each plan, as a fraction of the number of layers. Shape (plans,).
        qualities: Mean quality of each plan on the training prompts. Shape (plans,).

    Returns:
        Indices of the vertices of the upper concave hull, from the shallowest plan to the deepest. Shape
        (vertices,), int64.
    """
    depth, quality = np.asarray(depths, dtype=np.float64), np.asarray(qualities, dtype=np.float64)
    hull: list[int] = []
    for index in np.lexsort((np.arange(depth.size), -quality, depth)).tolist():
        if hull and depth[index] == depth[hull[-1]]:
            continue  # the first plan of a depth has the highest quality
        while len(hull) > 1:
            left, middle = hull[-2], hull[-1]
            rise = (quality[middle] - quality[left]) * (depth[index] - depth[left])
            chord = (quality[index] - quality[left]) * (depth[middle] - depth[left])
            if rise > chord:
                break
            hull.pop()
        hull.append(index)
    return np.asarray(hull, dtype=np.int64)


def mix_to_depth(depths: Any, qualities: Any, depth: float) -> Mixture:
    """Return the best mixture of static plans that has a given mean depth.

    Args:
        depths: Depth of each plan, as a fraction of the number of layers. Shape (plans,).
        qualities: Mean quality of each plan, measured on prompts that are not part of the comparison.
            Shape (plans,).
        depth: Mean depth wanted.

    Returns:
        The two neighbours on the upper concave hull and their probabilities.

    Raises:
        BudgetError: The depth lies outside the depths of the plans.

    Source:
        The baseline of every comparison here: a policy that sees the prompt has to beat the best quality
        that is possible at the same mean depth without seeing it.

    Example:
        >>> mix_to_depth([1.0, 0.8], [0.0, -1.0], 0.9).weight
        0.5
    """
    return bracket_depth(depths, depth, concave_hull(depths, qualities))


def mix_by_kind(depths: Any, qualities: Any, shares: Any, depth: float) -> tuple[Mixture, ...]:
    """Return the best mixture of static plans for each kind of prompts, such that all kinds together have a mean depth.

    Args:
        depths: Depth of each plan, as a fraction of the number of layers. Shape (plans,).
        qualities: Mean quality of each plan on each kind, measured on prompts that are not part of the comparison.
            Shape (kinds, plans).
        shares: Fraction of the prompts that belongs to each kind; the fractions sum to 1. Shape (kinds,).
        depth: Mean depth wanted, over all kinds.

    Returns:
        The mixture of each kind.

    Raises:
        BudgetError: The depth lies outside the depths of the plans.

    Source:
        A fractional knapsack over the concave hulls of the kinds, solved by taking the steepest segments first. A
        policy that beats it tells prompts of the same kind apart, not only the kinds.
    """
    depth_of, quality = (
        np.asarray(depths, dtype=np.float64),
        np.asarray(qualities, dtype=np.float64),
    )
    parts = np.asarray(shares, dtype=np.float64)
    hulls = [concave_hull(depth_of, row) for row in quality]
    # The mean depths that mixtures can have are those between the shallowest and the deepest plan.
    wanted = bracket_depth(depth_of, depth, hulls[0][[0, -1]]).depth
    pieces = []
    for kind, hull in enumerate(hulls):
        slopes = np.diff(quality[kind][hull]) / np.diff(depth_of[hull])
        pieces += [
            (-slope, kind, end) for slope, end in zip(slopes, depth_of[hull][1:], strict=True)
        ]
    reached = np.full(len(hulls), depth_of.min())
    for _, kind, end in sorted(pieces):
        missing = wanted - float(parts @ reached)
        if missing > 0 and parts[kind] > 0:
            # Rounding may swap two slopes of one kind; a vertex that was reached stays reached.
            reached[kind] = max(reached[kind], min(end, reached[kind] + missing / parts[kind]))
    return tuple(
        bracket_depth(depth_of, float(mean), hull)
        for mean, hull in zip(reached, hulls, strict=True)
    )


def bracket_depth(depths: Any, depth: float, among: Any, *, clip: bool = False) -> Mixture:
    """Return the mixture of the two plans that are nearest to a mean depth from below and from above.

    Args:
        depths: Depth of each plan, as a fraction of the number of layers. Shape (plans,).
        depth: Mean depth wanted.
        among: Indices of the plans to choose from, by ascending depth. Shape (taken,).
        clip: For a depth outside their range, take the nearest plan instead of raising an error.

    Returns:
        The two neighbours and their probabilities.

    Raises:
        BudgetError: The depth lies outside the depths of these plans and `clip` is not set, or there are no plans.
    """
    taken = np.asarray(among, dtype=np.int64)
    knots = np.asarray(depths, dtype=np.float64)[taken]
    if not taken.size or not (clip or knots[0] - _SLACK <= depth <= knots[-1] + _SLACK):
        reach = f"from {knots[0]:.4f} to {knots[-1]:.4f}" if taken.size else "of no depth at all"
        raise BudgetError(f"no mixture has mean depth {depth}; the static plans are {reach}")
    wanted = float(np.clip(depth, knots[0], knots[-1]))
    met = np.flatnonzero(np.isclose(knots, wanted, rtol=0.0, atol=_SLACK))
    if met.size:
        one = int(taken[met[0]])
        return Mixture(low=one, high=one, weight=1.0, depth=float(knots[met[0]]))
    right = int(np.searchsorted(knots, wanted))
    low, high = int(taken[right - 1]), int(taken[right])
    weight = float((wanted - knots[right - 1]) / (knots[right] - knots[right - 1]))
    return Mixture(low=low, high=high, weight=weight, depth=wanted)


def best_under_depth(qualities: Any, depths: Any, depth: float) -> npt.NDArray[np.int64]:
    """Choose one plan for each prompt from known outcomes, such that the mean depth keeps a limit.

    This is what an oracle does, not a policy. Each prompt takes the plan with the highest `quality -
    price * depth`; the price is the lowest at which the mean depth keeps the limit.

    Args:
        qualities: Outcome of each plan on each prompt. Shape (plans, prompts).
        depths: Depth of each plan on each prompt. Shape (plans, prompts).
        depth: The limit on the mean depth.

    Returns:
        Index of the chosen plan of each prompt. Shape (prompts,), int64.

    Raises:
        BudgetError: The mean depth of the shallowest plan of every prompt exceeds the limit.
    """
    quality, cost = np.asarray(qualities, dtype=np.float64), np.asarray(depths, dtype=np.float64)
    columns = np.arange(quality.shape[1])

    def choose(price: float) -> npt.NDArray[np.int64]:
        value = quality - price * cost
        # Equal values go to the shallower plan, then to the lower index.
        tied = np.where(value == value.max(axis=0), cost, np.inf)
        return np.asarray(tied.argmin(axis=0), dtype=np.int64)

    shallowest = float(cost.min(axis=0).mean())
    if depth < shallowest - 1e-12:
        raise BudgetError(
            f"no choice has mean depth {depth}; the shallowest plans have {shallowest:.4f}"
        )
    fits = depth + 1e-12
    low, high = 0.0, 1.0
    if cost[choose(low), columns].mean() <= fits:
        return choose(low)
    while cost[choose(high), columns].mean() > fits:
        high *= 2.0
        if high > 1e12:
            return np.asarray(cost.argmin(axis=0), dtype=np.int64)
    for _ in range(60):
        middle = (low + high) / 2
        if cost[choose(middle), columns].mean() <= fits:
            high = middle
        else:
            low = middle
    return choose(high)
