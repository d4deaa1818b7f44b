"""The lens of an exit layer: an affine map in closed form, then a bottleneck trained on the base model's readings."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from dynadepth.exits.exit_heads import apply_lens
from dynadepth.shortcuts.fit import fit_shortcut
from dynadepth.shortcuts.moments import Moments
from dynadepth_search.exits.exit_states import ExitStates
from dynadepth_search.progress import Progress

__all__ = ["affine_lens", "read_choices", "train_lens"]

_RIDGE = 1e-3
_BATCH, _READ = 256, 512
_RATE, _DECAY = 1e-3, 0.01
# From states of shape (states, hidden) to logits of shape (states, vocabulary).
Read = Callable[[Tensor], Tensor]


def affine_lens(states: ExitStates, layer_idx: int, *, width: int) -> dict[str, Tensor]:
    """Fit the affine part of a lens: weighted ridge regression of the final state on the state before a layer.

    Args:
        states: Training tokens.
        layer_idx: The exit layer.
        width: Width of the bottleneck, which is there but adds nothing yet.

    Returns:
        The lens' tensors of `ExitWeights`, on the host.
    """
    before = states.before[layer_idx]
    hidden = before.shape[1]
    moments = Moments.zero(hidden)
    for rows in torch.arange(len(before)).split(4096):
        moments.add(before[rows], states.final[rows])
    fitted = fit_shortcut(moments, rank="full", ridge=_RIDGE)
    generator = torch.Generator().manual_seed(0)
    down = torch.randn((hidden, width), generator=generator) / hidden**0.5
    assert fitted.A is not None
    return {
        "lens.weight": fitted.A.float().contiguous(),
        "lens.bias": fitted.b.float(),
        "lens.down": down,
        "lens.down_bias": torch.zeros(width),
        "lens.up": torch.zeros((width, hidden)),
    }


def train_lens(
    tensors: dict[str, Tensor],
    states: ExitStates,
    layer_idx: int,
    read: Read,
    *,
    epochs: int,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> dict[str, Tensor]:
    """Train a lens by the divergence of its reading from the base model's.

    Args:
        tensors: The lens as `affine_lens` returns it.
        states: Training tokens.
        layer_idx: The exit layer.
        read: The model's own norm and head, through which gradients flow.
        epochs: Passes over the tokens.
        seed: Seed of the order.
        device: Where it is trained.
        progress: Called with the stage, the number of finished steps and of all.

    Returns:
        The trained tensors, on the host.

    Source:
        Belrose et al., the tuned lens (arXiv 2303.08112): KL from the model's own reading; our deviation: it begins
        with the regression, and has a bottleneck.
    """
    before, final = states.before[layer_idx], states.final
    parameters = {name: each.to(device).clone().requires_grad_() for name, each in tensors.items()}
    # The regression is near its optimum; the bottleneck begins at nothing.
    slow = [parameters["lens.weight"], parameters["lens.bias"]]
    fast = [parameters[f"lens.{name}"] for name in ("down", "down_bias", "up")]
    optimizer = torch.optim.AdamW(
        [{"params": slow, "lr": _RATE / 5}, {"params": fast, "lr": _RATE}], weight_decay=_DECAY
    )
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(before) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [_RATE / 5, _RATE], total_steps=max(1, steps), pct_start=0.1
    )
    done = 0
    for _ in range(epochs):
        for rows in torch.randperm(len(before), generator=generator).split(_BATCH):
            progress(f"training the lens of layer {layer_idx}", done, steps)
            with torch.no_grad():
                base = log_softmax(read(final[rows].to(device)).float(), dim=-1)
            lens = apply_lens(parameters, before[rows].to(device))
            ours = log_softmax(read(lens.to(final.dtype)).float(), dim=-1)
            loss = (base.exp() * (base - ours)).sum(dim=-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
    progress(f"training the lens of layer {layer_idx}", steps, steps)
    return {name: each.detach().cpu().contiguous() for name, each in parameters.items()}


def read_choices(
    tensors: dict[str, Tensor], before: Tensor, read: Read, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return what an exit would choose at each token, and how far its first choice is before the second.

    Args:
        tensors: The lens.
        before: The states that enter the exit layer. Shape (n, hidden), any floating dtype.
        read: The model's own norm and head.
        device: Where it is read.

    Returns:
        The choices, shape (n,), int64, and the margins of log-probability, shape (n,), float32; on the host.
    """
    on = {name: each.to(device) for name, each in tensors.items()}
    choices, margins = [], []
    with torch.no_grad():
        for part in before.split(_READ):
            lens = apply_lens(on, part.to(device)).to(part.dtype)
            best = read(lens).float().topk(2, dim=-1)
            choices.append(best.indices[:, 0].cpu())
            margins.append((best.values[:, 0] - best.values[:, 1]).cpu())
    return torch.cat(choices), torch.cat(margins)
