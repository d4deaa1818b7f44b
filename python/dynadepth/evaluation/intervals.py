"""Means and paired differences over prompts, with bootstrap intervals."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "RESAMPLES",
    "Interval",
    "interval_of_means",
    "mean_interval",
    "paired_difference",
]

RESAMPLES = 2000


_LEVEL = 0.95


# Memory of one block of resamples: 4 M indices are 32 MB.
_BLOCK = 1 << 22


Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over prompts with its 95 % percentile bootstrap interval.

    Args:
        mean: The mean itself, not the mean of the resamples.
        low: 2.5 % quantile of the resampled means.
        high: 97.5 % quantile of the resampled means.
        n: Number of prompts.
    """

    mean: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float | int]:
        """Return the fields as values that JSON can hold."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "n": self.n}


def _as_prompts(values: Any, name: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(
            f"{name} has shape {array.shape}; expected one number for each prompt, at least one"
        )
    if not np.isfinite(array).all():
        where = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"{name} is {array[where]} at prompt {where}; expected finite numbers")
    return array


def mean_interval(values: Any, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Return a mean over prompts with its 95 % percentile bootstrap interval.

    Args:
        values: One number for each prompt; booleans count as 0 and 1. Shape (prompts,).
        seed: Seed of the resampling. Equal seeds resample the same prompts, so intervals with the same seed
            can be compared.
        resamples: Number of bootstrap samples.

    Returns:
        The mean and its interval.

    Raises:
        ValueError: There are no prompts, or a number is not finite.

    Example:
        >>> mean_interval([0.5, 0.5]).low
        0.5
    """
    array = _as_prompts(values, "values")
    low, high = _tails(_resampled_means([array], seed, resamples)[0])
    return Interval(mean=float(array.mean()), low=low, high=high, n=array.size)


def interval_of_means(
    columns: Sequence[Any],
    function: Callable[..., Floats],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """Return a function of several means over the same prompts with its 95 % percentile bootstrap interval.

    Args:
        columns: Several numbers for each prompt. Each has the shape (prompts,); all are resampled together.
        function: Takes one array of means for each column, shape (resamples,), and returns the function's values, shape
            (resamples,). A value that is undefined (NaN) counts as infinite.
        seed: Seed of the resampling.
        resamples: Number of bootstrap samples.

    Returns:
        The function of the means and its interval; `high` is infinite if more than 2.5 % of the values are.

    Raises:
        ValueError: There are no prompts, the columns differ in length, or a number is not finite.

    Example:
        >>> interval_of_means([[1.0, 0.0], [1.0, 1.0]], lambda part, whole: part / whole).mean
        0.5
    """
    arrays = [_as_prompts(column, f"column {number}") for number, column in enumerate(columns)]
    sizes = sorted({array.size for array in arrays})
    if len(sizes) != 1:
        raise ValueError(f"the columns have {sizes} prompts; expected the same prompts in each")
    with np.errstate(divide="ignore", invalid="ignore"):
        found = function(*_resampled_means(arrays, seed, resamples))
        whole = function(*(np.array([array.mean()]) for array in arrays))
    low, high = _tails(np.where(np.isnan(found), np.inf, found))
    return Interval(mean=float(whole[0]), low=low, high=high, n=sizes[0])


def _resampled_means(arrays: Sequence[Floats], seed: int, resamples: int) -> list[Floats]:
    size = arrays[0].size
    rng = np.random.default_rng(seed)
    means = [np.empty(resamples) for _ in arrays]
    rows = max(1, _BLOCK // size)
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        drawn = rng.integers(0, size, (stop - start, size))
        for mean, array in zip(means, arrays, strict=True):
            mean[start:stop] = array[drawn].mean(axis=1)
    return means


def _tails(values: Floats) -> tuple[float, float]:
    tail = (1.0 - _LEVEL) / 2
    with np.errstate(invalid="ignore"):
        low, high = np.quantile(values, [tail, 1.0 - tail]).tolist()
    # Between two infinite values numpy interpolates to NaN.
    return (math.inf if math.isnan(low) else low), (math.inf if math.isnan(high) else high)


def paired_difference(
    values: Any, reference: Any, *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Return the mean difference on the same prompts with its 95 % percentile bootstrap interval.

    Args:
        values: Outcomes of a policy. Shape (prompts,).
        reference: Outcomes of the policy that it is compared with, on the same prompts. Shape (prompts,).
        seed: Seed of the resampling.
        resamples: Number of bootstrap samples.

    Returns:
        Mean of `values - reference` over the prompts; both are resampled together.

    Raises:
        ValueError: The numbers of prompts differ or are 0, or a number is not finite.

    Example:
        >>> paired_difference([1.0, 3.0], [0.0, 2.0]).mean
        1.0
    """
    first, second = _as_prompts(values, "values"), _as_prompts(reference, "reference")
    if first.shape != second.shape:
        raise ValueError(
            f"values has {first.size} prompts and reference {second.size}; "
            "a paired difference needs the same prompts in the same order"
        )
    return mean_interval(first - second, seed=seed, resamples=resamples)
