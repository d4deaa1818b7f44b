"""Baselines that do not look at the prompt: random plans, and ShortGPT's order of removal."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dynadepth.errors import BudgetError
from dynadepth.plans import Plans, identity_plan
from dynadepth.shortcuts.maps import Shortcuts
from dynadepth.training.features import block_influence

__all__ = ["mean_influence", "random_plans", "removal_plans"]


def random_plans(num_layers: int, num_prompts: int, depth: float, *, seed: int) -> Plans:
    """Draw plans that skip layers at random and have a given mean depth over prompts.

    Args:
        num_layers: Number of decoder layers.
        num_prompts: Number of plans, one for each prompt.
        depth: Mean depth over the plans, at most 1. It is met to within half a visit of one prompt; the
            plans differ by at most one visit.
        seed: Seed of the draw.

    Returns:
        Plans of actions SKIP and EXECUTE. Shape (num_prompts, num_layers), uint8.

    Raises:
        BudgetError: The depth would need repeats, or plans in which no layer runs.
    """
    total = round(depth * num_layers * num_prompts)
    if not num_prompts <= total <= num_layers * num_prompts:
        raise BudgetError(
            f"random plans that only skip cannot have mean depth {depth}; expected a depth from "
            f"{1 / num_layers:.4f} to 1"
        )
    rng = np.random.default_rng(seed)
    fewest, extra = divmod(total, num_prompts)
    visits = np.full(num_prompts, fewest)
    visits[rng.permutation(num_prompts)[:extra]] += 1
    ranks = rng.permuted(np.tile(np.arange(num_layers), (num_prompts, 1)), axis=1)
    plans: Plans = (ranks < visits[:, None]).astype(np.uint8)
    return plans


def removal_plans(influence: npt.NDArray[np.float64]) -> Plans:
    """Return the static plans that remove the least influential layers one by one.

    Args:
        influence: The influence of each layer. Shape (num_layers,), float64.

    Returns:
        Plans; row k skips the k layers of lowest influence, ties by lowest index, and one layer is left
        in the last row. Shape (num_layers, num_layers), uint8.
    """
    num_layers = influence.shape[0]
    plans = np.tile(identity_plan(num_layers), (num_layers, 1))
    for removed, layer in enumerate(np.argsort(influence, kind="stable")[:-1].tolist(), start=1):
        plans[removed:, layer] = 0
    return plans


def mean_influence(
    model: Any,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    shortcuts: Shortcuts | None = None,
) -> npt.NDArray[np.float64]:
    """Return each layer's block influence, averaged over prompts; with shortcuts, what it does beyond its own.

    Args:
        model: An unwrapped base model; not changed.
        batches: Token ids and attention masks of prompts. Shape (rows, tokens) each, int64.
        shortcuts: What states take in place of a layer that is skipped; None: nothing.

    Returns:
        Influence. Shape (num_layers,), float64.

    Source:
        ShortGPT (arXiv 2403.03853), equation 1.
    """
    weighted = [
        (len(input_ids), block_influence(model, input_ids, attention_mask, shortcuts))
        for input_ids, attention_mask in batches
    ]
    rows = sum(count for count, _ in weighted)
    total = np.sum([count * influence for count, influence in weighted], axis=0)
    return np.asarray(total / rows, dtype=np.float64)
