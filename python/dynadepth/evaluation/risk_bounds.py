"""An upper bound of a mean loss that holds for any number of prompts, whatever their losses are distributed like."""

from typing import Any

import numpy as np

from dynadepth.errors import ConfigError

__all__ = ["mean_loss_bound"]

_STEPS = 40


def mean_loss_bound(losses: Any, *, confidence: float = 0.95) -> float:
    """Return a bound that the mean loss of prompts like these exceeds with a probability of at most 1 - confidence.

    A gambler bets on every prompt that the mean loss is below m, as much as the prompts before advise; if m were the
    mean or less, the stakes would rarely grow 1 / (1 - confidence) times. The bound is the lowest m at which they do.

    Args:
        losses: The loss of each prompt, in an order that does not depend on it. Shape (n,), from 0 to 1.
        confidence: Between 0 and 1.

    Returns:
        The bound, from the mean loss to 1. n prompts without any loss have about log(1 / (1 - confidence)) / n.

    Raises:
        ConfigError: There are no losses, or one is not from 0 to 1.

    Source:
        Waudby-Smith and Ramdas (arXiv 2010.09686), the predictable plug-in bets, as in Bates et al. (arXiv 2101.02703).

    Complexity:
        O(n) for each of 40 steps of bisection.

    Example:
        >>> round(mean_loss_bound([0.0] * 300), 3)
        0.01
    """
    given = np.asarray(losses, dtype=np.float64)
    if given.ndim != 1 or not len(given) or not ((given >= 0) & (given <= 1)).all():
        raise ConfigError(
            f"losses have shape {given.shape} and values from {given.min(initial=0)} to {given.max(initial=0)}; "
            "expected one or more, each from 0 to 1"
        )
    count, goal = len(given), -np.log1p(-confidence)
    number = np.arange(1, count + 1)
    means = (0.5 + np.cumsum(given)) / (number + 1)
    variances = (0.25 + np.cumsum((given - means) ** 2)) / (number + 1)
    before = np.concatenate([[0.25], variances[:-1]])
    bets = np.minimum(1.0, np.sqrt(2 * goal / (count * before)))

    def excluded(mean: float) -> bool:
        # A bet of 1 and a loss of 1 leave the stake `mean`.
        growth = np.log(np.maximum(1.0 - bets * (given - mean), 1e-300))
        return bool(np.cumsum(growth).max() >= goal)

    low, high = float(given.mean()), 1.0
    if not excluded(high):
        return 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if excluded(middle) else (middle, high)
    return high
