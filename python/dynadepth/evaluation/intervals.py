"""Means and paired differences over prompts, with bootstrap intervals."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "RESAMPLES",
    "Interval",
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
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    rows = max(1, _BLOCK // array.size)
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        drawn = rng.integers(0, array.size, (stop - start, array.size))
        means[start:stop] = array[drawn].mean(axis=1)
    tail = (1.0 - _LEVEL) / 2
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Interval(mean=float(array.mean()), low=float(low), high=float(high), n=array.size)


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
