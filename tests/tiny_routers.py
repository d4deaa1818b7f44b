"""Random routers of any shape, for tests that need no training."""

from typing import Any

import numpy as np
import torch

from dynadepth.checkpoints.trained_policy import Routers
from dynadepth.policies.calibration import Calibration
from dynadepth.policies.prompt_batch import PromptBatch
from dynadepth.policies.router_heads import RouterConfig, RouterHeads

CALIBRATION = Calibration(
    lambdas=(3.0, 1.0, 0.25, -0.5),
    depths=(0.5, 0.7, 0.9, 1.1),
    lowest=0.5,
    highest=1.0,
)


def seen(mask: torch.Tensor, num_layers: int = 4) -> PromptBatch:
    """Return prompts of which nothing has been decided yet."""
    plans = np.ones((len(mask), num_layers), dtype=np.uint8)
    return PromptBatch(mask.bool(), plans)


def random_heads(config: RouterConfig, *, seed: int = 0) -> RouterHeads:
    """Return heads whose logits are of order 1 on states of order 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in RouterHeads.expected_shapes(config).items():
        scale = shape[-2] ** -0.5 if name.endswith("weight") else 1.0
        tensors[name] = torch.randn(shape, generator=generator) * scale
    return RouterHeads.from_state_dict(config, tensors)


def random_routers(
    *,
    num_layers: int = 4,
    hidden_size: int = 32,
    last_token: bool = True,
    num_windows: int = 8,
    seed: int = 0,
    **parts: Any,
) -> Routers:
    """Return routers without a base model, unless `fingerprint` is given."""
    config = RouterConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_windows=num_windows,
        bottleneck=16,
        last_token=last_token,
    )
    generator = torch.Generator().manual_seed(seed + 1)
    settings: dict[str, Any] = {
        "heads": random_heads(config, seed=seed),
        "bias": torch.randn(num_layers, 3, generator=generator),
        "shrinkage": 0.5,
        "calibration": CALIBRATION,
        "fingerprint": {},
    }
    return Routers(**{**settings, **parts})
