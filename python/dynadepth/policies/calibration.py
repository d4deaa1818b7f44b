"""Budgets: which penalty on running a layer gives which mean depth.

A policy is controlled by one number, the penalty lambda of `argmax_a logits(a) - lambda * a`; a user
asks for a mean depth over prompts. A calibration is the measured table that relates the two.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from numbers import Real
from typing import Any

import numpy as np

from dynadepth.config import check_fields, config_from_dict, config_to_dict
from dynadepth.errors import BudgetError, ConfigError

__all__ = ["Calibration", "PenaltyMix", "calibrate"]

# Lambdas count as equal if they differ by less than this, relative to the larger one or to a thousandth.
_LAMBDA_TOLERANCE = 1e-4
# Logits are of order 1 to 100; a policy that a penalty of this size does not change is never changed.
_LARGEST_LAMBDA = 4.0**8


@dataclass(frozen=True, slots=True)
class PenaltyMix:
    """Two neighbouring penalties, of which each prompt is given one.

    Args:
        shallow: The larger penalty, which gives the lower mean depth.
        deep: The smaller penalty.
        share: Prompts whose number in [0, 1) (see `prompt_mix`) is below this take `deep`, the others `shallow`.
    """

    shallow: float
    deep: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The measured table from penalty to mean depth.

    Attributes:
        lambdas: Penalties, descending.
        depths: Mean depth of the calibration prompts under each penalty, ascending.
        lowest: Smallest budget accepted.
        highest: Largest budget accepted.
    """

    lambdas: tuple[float, ...]
    depths: tuple[float, ...]
    lowest: float
    highest: float

    def __post_init__(self) -> None:
        check_fields(self)
        lambdas, depths = self.lambdas, self.depths
        if not depths or len(lambdas) != len(depths):
            raise ConfigError(
                f"a calibration has {len(lambdas)} lambdas and {len(depths)} depths; expected "
                "as many of one as of the other, at least one"
            )
        rising = all(a < b for a, b in pairwise(depths))
        if not rising or not all(a > b for a, b in pairwise(lambdas)):
            raise ConfigError(
                "a calibration's depths must rise and its lambdas fall from entry to entry, given "
                f"depths {list(depths)} and lambdas {list(lambdas)}; calibrate again"
            )
        if not depths[0] <= self.lowest <= self.highest <= depths[-1]:
            raise ConfigError(
                f"a calibration accepts budgets from {self.lowest} to {self.highest}; expected "
                f"a range within its depths {depths[0]} to {depths[-1]}"
            )

    @property
    def range(self) -> tuple[float, float]:
        """The budgets accepted, both ends included."""
        return self.lowest, self.highest

    def penalty_for(self, budget: Any) -> float:
        """Return the penalty whose measured mean depth is nearest to a budget.

        The nearest entry is chosen in float32 and ties go to the lower depth, so that every runtime
        of the exported graph chooses the same entry.

        Args:
            budget: Mean depth over prompts, as a fraction of the layers (1.0 is the base model's).

        Returns:
            The penalty lambda.

        Raises:
            BudgetError: The budget is not a number or lies outside the calibrated range.
        """
        return self.lambdas[self._entry(budget)]

    def mix_for(self, budget: Any) -> PenaltyMix:
        """Return the two penalties, and their shares of the prompts, whose mean depth is the budget.

        The shares are computed in float32, as in the exported graph.

        Args:
            budget: As in `penalty_for`.

        Returns:
            Neighbouring entries of the table; at the lowest depth, the same penalty twice.

        Raises:
            BudgetError: As in `penalty_for`.

        Example:
            >>> table = Calibration(lambdas=(2.0, 1.0), depths=(0.5, 1.0), lowest=0.5, highest=1.0)
            >>> table.mix_for(0.75)
            PenaltyMix(shallow=2.0, deep=1.0, share=0.5)
        """
        number = np.float32(self._checked(budget))
        depths = np.asarray(self.depths, dtype=np.float32)
        after = min(int((depths < number).sum()), len(depths) - 1)
        before = max(after - 1, 0)
        gap = depths[after] - depths[before]
        share = float((number - depths[before]) / gap) if gap > 0 else 1.0
        return PenaltyMix(self.lambdas[before], self.lambdas[after], share)

    def steady(self, spread_at: Callable[[float], float], most: float) -> "Calibration":
        """Return the table without the entries whose depth is unreliable; depths between the others are mixed.

        Where many prompts change plans at nearly the same penalty, the depth measured there says little about other
        prompts: slightly to one side all of them have changed, to the other none. Mixing the penalties on either side
        gives the depths in between.

        Args:
            spread_at: Returns the standard deviation of the mean depth under a penalty.
            most: Largest standard deviation that is accepted.

        Returns:
            A table of the same range; both ends are kept.
        """
        last = len(self.lambdas) - 1
        kept = [
            entry
            for entry, penalty in enumerate(self.lambdas)
            if entry in (0, last) or spread_at(penalty) <= most
        ]
        return replace(
            self,
            lambdas=tuple(self.lambdas[entry] for entry in kept),
            depths=tuple(self.depths[entry] for entry in kept),
        )

    def depth_for(self, budget: Any) -> float:
        """Return the mean depth that the calibration prompts had under `penalty_for(budget)`.

        Args:
            budget: As in `penalty_for`.

        Returns:
            A mean depth; it differs from the budget by at most half the gap between two entries.

        Raises:
            BudgetError: As in `penalty_for`.
        """
        return self.depths[self._entry(budget)]

    def to_dict(self) -> dict[str, Any]:
        """Return the table as values that JSON can hold."""
        return config_to_dict(self)

    @classmethod
    def from_dict(cls, content: Any) -> "Calibration":
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: A key is missing or unknown, or the values do not form a calibration.
        """
        return config_from_dict(cls, content)

    def _entry(self, budget: Any) -> int:
        number = self._checked(budget)
        distances = np.abs(np.asarray(self.depths, dtype=np.float32) - np.float32(number))
        return int(np.argmin(distances))

    def _checked(self, budget: Any) -> float:
        # Compared and printed in float32, as the exported graph compares, so that the ends named here are
        # budgets that both accept.
        lowest, highest = np.float32(self.lowest), np.float32(self.highest)
        wanted = (
            f"expected a mean depth within the calibrated range, {lowest!s} to {highest!s} "
            "(1.0 is the base model's)"
        )
        if isinstance(budget, bool | np.bool_) or not isinstance(budget, Real):
            raise BudgetError(
                f"budget {budget!r} is a {type(budget).__name__}, not a number; {wanted}"
            )
        number = float(budget)
        if not lowest <= np.float32(number) <= highest:
            raise BudgetError(
                f"budget {number:g} is out of reach; {wanted}, or calibrate again for a wider range"
            )
        return number


def calibrate(
    mean_depth_at: Callable[[float], float],
    *,
    lowest: float,
    highest: float = 1.0,
    resolution: float = 0.005,
    max_evaluations: int = 64,
) -> Calibration:
    """Measure which penalties give the mean depths from `lowest` to `highest`.

    Calls of `mean_depth_at` are expensive (one pass over the calibration prompts), so none is repeated,
    and the interval with the widest gap in depth is always bisected next: fewer evaluations give a
    coarser table that is just as correct. With a policy that reads hidden states, depth may not always
    fall as lambda grows; entries that break the order are left out.

    Args:
        mean_depth_at: Returns the mean depth over the calibration prompts under a penalty, a step function
            that falls as the penalty grows.
        lowest: Smallest budget wanted, as a fraction of the number of layers.
        highest: Largest budget wanted, in the same unit.
        resolution: Gaps in depth up to this size are not bisected.
        max_evaluations: Maximum number of calls of `mean_depth_at`.

    Returns:
        The table, from the last entry at or below `lowest` to the first at or above `highest`; it
        accepts those of the wanted budgets that the policy can reach.

    Raises:
        ConfigError: An argument is out of range, `mean_depth_at` returned a number that is not finite, or
            the policy reaches no depth between `lowest` and `highest`.
    """
    if not 0.0 < lowest <= highest <= 2.0 or not resolution > 0.0 or max_evaluations < 3:
        raise ConfigError(
            f"cannot calibrate from {lowest} to {highest} by steps of {resolution} in "
            f"{max_evaluations} evaluations; expected 0 < lowest <= highest <= 2, resolution > 0, max_evaluations >= 3"
        )
    known: dict[float, float] = {}

    def measure(penalty: float) -> None:
        depth = float(mean_depth_at(penalty))
        if not math.isfinite(depth):
            raise ConfigError(
                f"the mean depth at lambda {penalty} is {depth}; expected a finite number"
            )
        known[penalty] = depth

    _bracket(measure, known, lowest, highest, max_evaluations)
    while len(known) < max_evaluations:
        middle = _next_penalty(known, lowest, highest, resolution)
        if middle is None:
            break
        measure(middle)
    return _table(known, lowest, highest)


def _bracket(
    measure: Callable[[float], None],
    known: Mapping[float, float],
    lowest: float,
    highest: float,
    max_evaluations: int,
) -> None:
    """Measure penalties of growing size until depths on both sides of the wanted range are known."""
    measure(0.0)
    for sign, end in ((1.0, lowest), (-1.0, highest)):
        penalty = 1.0
        while not any(sign * (depth - end) <= 0.0 for depth in known.values()):
            if penalty > _LARGEST_LAMBDA or len(known) >= max_evaluations:
                break
            measure(sign * penalty)
            penalty *= 4.0


def _next_penalty(
    known: Mapping[float, float], lowest: float, highest: float, resolution: float
) -> float | None:
    """Return the middle of the interval with the widest gap in depth inside the wanted range."""
    gaps = []
    for left, right in pairwise(sorted(known)):
        high, low = max(known[left], known[right]), min(known[left], known[right])
        close = right - left <= _LAMBDA_TOLERANCE * max(1e-3, abs(left), abs(right))
        # An interval that ends where the range begins holds no wanted depth.
        wanted = low < highest and high > lowest
        if wanted and not close and high - low >= resolution:
            inside = min(high, highest) - max(low, lowest)
            # Of gaps that are equal up to rounding, the one over more penalties is more likely to hide a step.
            gap = round(inside, 6), round(high - low, 6), right - left
            gaps.append((gap, (left + right) / 2.0))
    return max(gaps)[1] if gaps else None


def _table(known: Mapping[float, float], lowest: float, highest: float) -> Calibration:
    chain = _falling_chain(sorted(known.items()))[::-1]
    depths = [depth for _, depth in chain]
    first = max((i for i, depth in enumerate(depths) if depth <= lowest), default=0)
    last = min((i for i, depth in enumerate(depths) if depth >= highest), default=len(depths) - 1)
    if depths[-1] < lowest or depths[0] > highest:
        raise ConfigError(
            f"the policy reaches mean depths from {depths[0]:.4g} to {depths[-1]:.4g}, none of the "
            f"wanted {lowest:.4g} to {highest:.4g}; ask for a range that it reaches"
        )
    return Calibration(
        lambdas=tuple(penalty for penalty, _ in chain[first : last + 1]),
        depths=tuple(depths[first : last + 1]),
        lowest=max(lowest, depths[first]),
        highest=min(highest, depths[last]),
    )


def _falling_chain(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the longest run of points, in their order, whose depths strictly fall."""
    # Each step is represented by its middle point, away from the jumps at both ends.
    steps = [list(group) for _, group in groupby(points, key=lambda point: point[1])]
    points = [step[len(step) // 2] for step in steps]
    lengths: list[int] = []
    before: list[int] = []
    for i, (_, depth) in enumerate(points):
        longest, link = 1, -1
        for j in range(i):
            if points[j][1] > depth and lengths[j] + 1 > longest:
                longest, link = lengths[j] + 1, j
        lengths.append(longest)
        before.append(link)
    at = int(np.argmax(lengths))
    chain = []
    while at >= 0:
        chain.append(points[at])
        at = before[at]
    return chain[::-1]
