"""The exit router of a layer: a small MLP on the state that says whether the reading through the lens will do."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from dynadepth.exits.exit_heads import apply_router, unit_size

__all__ = ["router_scores", "train_router"]

_BATCH = 512
_RATE, _DECAY = 2e-3, 0.05
_DROPOUT = 0.1


def train_router(
    states: Tensor, right: Tensor, *, width: int, epochs: int, seed: int, device: torch.device
) -> dict[str, Tensor]:
    """Train a router on whether readings were right.

    Args:
        states: As they enter the exit layer. Shape (n, hidden), any floating dtype.
        right: Whether the reading through the lens is the base model's choice. Shape (n,), bool.
        width: Width of the bottleneck.
        epochs: Passes over the tokens.
        seed: Seed of weights and order.
        device: Where it is trained.

    Returns:
        The router's tensors of `ExitWeights`, on the host.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = states.shape[1]
    mean, square = torch.zeros(hidden), torch.zeros(hidden)
    for part in states.split(4096):
        scaled = unit_size(part)
        mean += scaled.sum(dim=0)
        square += scaled.square().sum(dim=0)
    mean = mean / len(states)
    scale = (square / len(states) - mean.square()).clamp_min(1e-8).rsqrt()
    tensors = {
        "router.mean": mean,
        "router.scale": scale,
        "router.down": torch.randn((hidden, width), generator=generator) / hidden**0.5,
        "router.down_bias": torch.zeros(width),
        "router.up": torch.randn(width, generator=generator) / width**0.5,
        "router.bias": torch.tensor(float(torch.logit(right.float().mean().clamp(0.01, 0.99)))),
    }
    tensors = {name: each.to(device) for name, each in tensors.items()}
    trained = [
        tensors[f"router.{name}"].requires_grad_() for name in ("down", "down_bias", "up", "bias")
    ]
    optimizer = torch.optim.AdamW(trained, lr=_RATE, weight_decay=_DECAY)
    steps = epochs * -(-len(states) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _RATE, total_steps=steps, pct_start=0.1
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for _ in range(epochs):
            for rows in torch.randperm(len(states), generator=generator).split(_BATCH):
                score = apply_router(tensors, states[rows].to(device), dropout=_DROPOUT)
                loss = binary_cross_entropy_with_logits(score, right[rows].to(device).float())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return {name: each.detach().cpu() for name, each in tensors.items()}


def router_scores(tensors: dict[str, Tensor], states: Tensor, device: torch.device) -> Tensor:
    """Return the scores of states.

    Args:
        tensors: The router.
        states: As they enter the exit layer. Shape (n, hidden), any floating dtype.
        device: Where they are computed.

    Returns:
        Shape (n,), float32, on the host.
    """
    on = {name: each.to(device) for name, each in tensors.items()}
    with torch.no_grad():
        return torch.cat([apply_router(on, part.to(device)).cpu() for part in states.split(4096)])
