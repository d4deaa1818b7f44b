"""Random menus of any shape, for tests that need no training."""

from typing import Any

import numpy as np
import torch

from dynadepth.checkpoints.trained_policy import TrainedMenu
from dynadepth.policies.menu import Menu, MenuHead
from dynadepth.policies.prompt_batch import PromptBatch
from tests.tiny_routers import CALIBRATION

# At layer 4 three groups are told apart by what layers 2 and 3 did.
PLANS = np.array(
    [
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0, 1],
        [1, 1, 0, 1, 1, 1],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 2, 0, 1, 0],
        [1, 1, 1, 1, 2, 1],
    ],
    dtype=np.uint8,
)


def random_head(
    layer_idx: int,
    num_windows: int,
    *,
    num_plans: int = len(PLANS),
    hidden_size: int = 48,
    inner: int = 0,
    seed: int = 0,
) -> MenuHead:
    """Return a head whose scores are of order 1 on states of order 1; `inner` units make it a perceptron."""
    generator = torch.Generator().manual_seed(100 * seed + layer_idx)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    width = (num_windows + 1) * hidden_size
    bias = torch.randn(num_plans, generator=generator)
    if not inner:
        return MenuHead(layer_idx, num_windows, weight(num_plans, width), bias)
    inner_bias = torch.randn(inner, generator=generator)
    return MenuHead(
        layer_idx, num_windows, weight(num_plans, inner), bias, weight(inner, width), inner_bias
    )


def random_menu(
    *,
    layers: tuple[int, ...] = (2,),
    windows: tuple[int, ...] = (0,),
    inner: tuple[int, ...] = (0,),
    hidden_size: int = 48,
    plans: Any = PLANS,
    seed: int = 0,
    **parts: Any,
) -> TrainedMenu:
    """Return a menu without a base model; the last number of windows and of inner units serves the later heads too."""
    heads = [
        random_head(
            layer,
            windows[min(step, len(windows) - 1)],
            num_plans=len(plans),
            hidden_size=hidden_size,
            inner=inner[min(step, len(inner) - 1)],
            seed=seed,
        )
        for step, layer in enumerate(layers)
    ]
    settings: dict[str, Any] = {
        "menu": Menu(plans, tuple(heads)),
        "calibration": CALIBRATION,
        "fingerprint": {},
    }
    return TrainedMenu(**{**settings, **parts})


def told(mask: torch.Tensor, plans: Any = None, *, seed: int = 0) -> PromptBatch:
    """Return prompts of random tokens of which `plans`, or nothing yet, have been decided."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 1000, mask.shape, generator=generator)
    if plans is None:
        plans = np.ones((len(mask), PLANS.shape[1]), dtype=np.uint8)
    return PromptBatch(mask.bool(), plans, tokens)
