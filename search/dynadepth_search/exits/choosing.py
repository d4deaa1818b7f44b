"""Which exit layers to have: those with the fewest passes on held-out tokens at one fidelity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

__all__ = ["ExitScores", "choose_layers", "leaving_at", "passes_at", "thresholds_for"]

# What layers are compared at.
_FIDELITY = 0.98
# One layer less must cost more passes than this.
_WORTH = 0.005


@dataclass(frozen=True, slots=True, eq=False)
class ExitScores:
    """What one exit layer says of n tokens.

    Attributes:
        score: The router's. Shape (n,), float32.
        right: Whether the reading through the lens is the base model's choice. Shape (n,), bool.
    """

    score: Tensor
    right: Tensor


def passes_at(
    exits: Mapping[int, ExitScores], threshold: float, num_layers: int
) -> tuple[float, float]:
    """Return passes and fidelity if tokens leave before the first layer whose score reaches a threshold.

    The text is given, so no token depends on the others.

    Args:
        exits: By exit layer.
        threshold: In log-odds.
        num_layers: Decoder layers of the model.
    """
    run, wrong = leaving_at(exits, threshold, num_layers)
    return float(run.mean()) / num_layers, 1.0 - float(wrong.float().mean())


def leaving_at(
    exits: Mapping[int, ExitScores], threshold: float, num_layers: int
) -> tuple[Tensor, Tensor]:
    """Return how many layers each token runs, and whether it is changed, if tokens leave as for `passes_at`.

    Args:
        exits: By exit layer.
        threshold: In log-odds.
        num_layers: Decoder layers of the model.

    Returns:
        Shapes (n,) float32 and (n,) bool.
    """
    some = next(iter(exits.values()))
    run = torch.full(some.right.shape, float(num_layers))
    wrong = torch.zeros_like(some.right)
    for layer in sorted(exits, reverse=True):
        leaves = exits[layer].score >= threshold
        run = torch.where(leaves, float(layer), run)
        wrong = torch.where(leaves, ~exits[layer].right, wrong)
    return run, wrong


def thresholds_for(
    exits: Mapping[int, ExitScores],
    fidelities: Sequence[float],
    num_layers: int,
    *,
    steps: int = 400,
) -> list[float]:
    """Return for each fidelity the lowest threshold at which these tokens keep it; infinite if none does.

    Args:
        exits: By exit layer.
        fidelities: From 0 to 1.
        num_layers: Decoder layers of the model.
        steps: Thresholds that are tried.
    """
    scores = torch.cat([each.score for each in exits.values()]).sort().values
    tried = scores[torch.linspace(0, len(scores) - 1, min(steps, len(scores))).long()].unique()
    kept = [(float(each), passes_at(exits, float(each), num_layers)[1]) for each in tried]
    found = []
    for fidelity in fidelities:
        best = float("inf")
        # From the strictest down, as long as it is kept.
        for threshold, share in reversed(kept):
            if share < fidelity:
                break
            best = threshold
        found.append(best)
    return found


def choose_layers(
    exits: Mapping[int, ExitScores], num_layers: int, *, most: int
) -> tuple[tuple[int, ...], dict[str, float]]:
    """Return the exit layers with the fewest passes; more of them only if that is worth it.

    Args:
        exits: By candidate layer.
        num_layers: Decoder layers of the model.
        most: The most layers.

    Returns:
        The layers, ascending, and the passes of every choice that was tried, by its layers as text.
    """
    tried: dict[str, float] = {}
    chosen: tuple[int, ...] = ()
    fewest = float("inf")
    for count in range(1, min(most, len(exits)) + 1):
        for layers in combinations(sorted(exits), count):
            some = {layer: exits[layer] for layer in layers}
            (threshold,) = thresholds_for(some, [_FIDELITY], num_layers)
            passes = passes_at(some, threshold, num_layers)[0]
            tried[",".join(map(str, layers))] = round(passes, 4)
            if passes < fewest - (_WORTH if len(layers) > len(chosen) and chosen else 0.0):
                chosen, fewest = layers, passes
    return chosen, tried
