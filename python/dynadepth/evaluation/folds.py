"""Seeded splits of prompts that keep equal prompts together.

Otherwise a prompt that occurs twice could be trained on and evaluated on at once.
"""

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["draw_folds", "draw_parts", "hold_out"]

Indices = npt.NDArray[np.int64]


def draw_folds(names: Sequence[Hashable], count: int, rng: np.random.Generator) -> Indices:
    """Divide prompts into folds with about equally many distinct prompts each.

    Args:
        names: What identifies each prompt, such as its text; rows with the same name share a fold. Length N.
        count: Number of folds.
        rng: Random generator that draws which names share a fold.

    Returns:
        The fold of each prompt, from 0 to `count` - 1. Shape (N,), int64.

    Example:
        >>> folds = draw_folds(["a", "b", "a", "c"], 2, np.random.default_rng(0))
        >>> bool(folds[0] == folds[2])
        True
    """
    numbers = _numbers(names)
    folds: Indices = rng.permutation(numbers.max() + 1)[numbers] % count
    return folds


def hold_out(
    names: Sequence[Hashable], share: float, rng: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Choose a share of the distinct prompts to hold out.

    Args:
        names: As for `draw_folds`. Length N.
        share: Fraction of the distinct names that is held out, 0 to 1.
        rng: Random generator that draws the names.

    Returns:
        True for the rows that are held out. Shape (N,), bool.
    """
    numbers = _numbers(names)
    drawn = rng.permutation(numbers.max() + 1)
    return np.isin(numbers, drawn[: round(share * len(drawn))])


def draw_parts(
    names: Sequence[Hashable], sizes: Sequence[int], rng: np.random.Generator
) -> list[Indices]:
    """Draw disjoint parts of given sizes, such that no two parts share a name.

    All rows of a name go to one part, in a random order of the names. A name whose rows would exceed a part's size goes
    to no part, so a part may be smaller than its given size if names repeat.

    Args:
        names: As for `draw_folds`. Length N.
        sizes: Number of rows wanted in each part.
        rng: Random generator that draws the order of the names.

    Returns:
        The rows of each part, in the order in which their names were drawn. Shape (rows,), int64, at most as many rows
        as the part's size.
    """
    numbers = _numbers(names)
    waiting = iter(rng.permutation(numbers.max() + 1).tolist())
    parts = []
    for size in sizes:
        taken: list[int] = []
        while len(taken) < size:
            name = next(waiting, None)
            if name is None:
                break
            rows = np.flatnonzero(numbers == name).tolist()
            if len(taken) + len(rows) <= size:
                taken += rows
        parts.append(np.array(taken, dtype=np.int64))
    return parts


def _numbers(names: Sequence[Hashable]) -> Indices:
    """Number the distinct names in the order in which they first occur. Shape (N,), int64."""
    number = {name: index for index, name in enumerate(dict.fromkeys(names))}
    return np.array([number[name] for name in names], dtype=np.int64)
