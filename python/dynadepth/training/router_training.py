"""Training of routers on cached features: arrays in, weights out.

One batched loop trains the routers of all layers together; the base model is never run here.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynadepth.errors import ConfigError
from dynadepth.evaluation.folds import hold_out
from dynadepth.plans import NUM_ACTIONS, Plans, check_plans
from dynadepth.policies.router_heads import Bottleneck, RouterConfig, RouterHeads, all_logits
from dynadepth.training.losses import Goal, Imitation, Regression
from dynadepth.training.train_config import TrainConfig

__all__ = ["centre_heads", "logits_of", "train_heads", "train_skip_cost_heads"]

# A dimension that varies by less than this fraction of its magnitude is rounding noise of half precision.
_SMALLEST_SPREAD = 1e-3
# How many elements of the features are copied at a time: 16 M are 64 MB.
_BLOCK = 1 << 24


def train_heads(
    features: Tensor,
    actions: Any,
    config: RouterConfig,
    training: TrainConfig,
    *,
    seed: int,
    groups: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RouterHeads:
    """Train the routers of all layers to imitate labels, on cached features.

    The layers share only the order of the prompts: each is trained independently, all of them in one batched
    product. The same seed gives the same weights on the same machine and build.

    Args:
        features: Views of the states entering each layer. Shape (prompts, num_layers, views, hidden), float32; views
            beyond `config.num_views` (the last token's state, for a preset without it) are not read.
        actions: The labelled action of each layer. Shape (prompts, num_layers), whole numbers 0 to 2.
        config: Shape of the routers.
        training: The recipe.
        seed: Seed of the initial weights, the held-out prompts and their order.
        groups: What identifies each prompt, such as its text; equal prompts are held out together. None: all differ.
        device: The device to train on; features on another device are copied batch by batch. None: that of the
            features.
        progress: Called as `progress(epoch, epochs)` after each epoch.

    Returns:
        The routers, without gradients, on that device.

    Raises:
        ConfigError: The features have another shape or dtype or are not finite, there are fewer than two distinct
            prompts, or there is not one group for each.
        PlanError: The actions have another shape or are out of range.
    """
    _check_features(features, config)
    names = _names(features, groups)
    plans = check_plans(actions, config.num_layers, num_rows=len(features))
    place = features.device if device is None else torch.device(device)
    goal = Imitation(torch.from_numpy(plans.astype(np.int64)).to(place), training)
    return _train(
        features, goal, config, training, names=names, seed=seed, place=place, progress=progress
    )


def train_skip_cost_heads(
    features: Tensor,
    skip_costs: Any,
    config: RouterConfig,
    training: TrainConfig,
    *,
    seed: int,
    groups: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RouterHeads:
    """Train the router of each layer to predict how much reward a prompt loses when the layer is skipped.

    The logit of SKIP is minus the predicted cost, in units of the spread of all costs, so that layers are comparable;
    those of EXECUTE and REPEAT are 0. Otherwise as in `train_heads`, but without focal loss and class weights.

    Args:
        features: As in `train_heads`, under the plan whose neighbours were measured.
        skip_costs: The reward that each prompt loses when a layer is skipped. Shape (prompts, num_layers), finite
            numbers.
        config: Shape of the routers.
        training: The recipe.
        seed: As in `train_heads`.
        groups: As in `train_heads`.
        device: As in `train_heads`.
        progress: As in `train_heads`.

    Returns:
        The routers, without gradients, on that device.

    Raises:
        ConfigError: As for `train_heads`, or the costs have another shape or are not finite.
    """
    _check_features(features, config)
    names = _names(features, groups)
    given = np.asarray(skip_costs, dtype=np.float64)
    shape = (len(features), config.num_layers)
    if given.shape != shape or not np.isfinite(given).all():
        raise ConfigError(
            f"skip_costs has shape {given.shape} or numbers that are not finite; expected finite numbers of shape "
            f"{shape}"
        )
    place = features.device if device is None else torch.device(device)
    goal = Regression(torch.from_numpy(given).to(place, torch.float32))
    return _train(
        features, goal, config, training, names=names, seed=seed, place=place, progress=progress
    )


@torch.enable_grad()
def _train(
    features: Tensor,
    goal: Goal,
    config: RouterConfig,
    training: TrainConfig,
    *,
    names: Sequence[Hashable],
    seed: int,
    place: torch.device,
    progress: Callable[[int, int], None] | None,
) -> RouterHeads:
    rng = np.random.default_rng(seed)
    held = hold_out(names, training.held_out, rng)
    held_out, used = np.flatnonzero(held), np.flatnonzero(~held)
    count = len(held_out)

    learnable, constant = goal.begin(used)
    spread = _spread(features, used, config, enabled=training.standardise)
    mean, scale = (tensor.to(place) for tensor in spread)
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    parameters = _initial_parameters(config, generator)
    free = torch.ones(config.num_layers, NUM_ACTIONS)
    if training.held_out > 0:
        free = learnable
        # Training starts at the best constant, so that any epoch that beats it has learned from the features.
        for name in [name for name in parameters if ".second_" in name]:
            parameters[name] = torch.zeros_like(parameters[name])
        parameters["windows.second_bias"] = constant
    for name, tensor in parameters.items():
        parameters[name] = tensor.to(place).requires_grad_()
    free = free.to(place)

    def losses(prompts: Any) -> Tensor:
        """Return each layer's mean loss over some prompts. Shape (num_layers,)."""
        picked = (features[prompts][:, :, : config.num_views].to(place) - mean) * scale
        logits = all_logits(*_parts(parameters, free), config.num_windows, picked)
        return goal.losses(logits, prompts).mean(dim=0)

    tensors = list(parameters.values())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in tensors if p.dim() == 3], "weight_decay": training.weight_decay},
            {"params": [p for p in tensors if p.dim() < 3], "weight_decay": 0.0},
        ],
        lr=training.learning_rate,
    )
    steps = training.epochs * math.ceil(len(used) / training.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _rate(step, steps, training)
    )
    best = _BestEpoch(tensors, config.num_layers)
    for epoch in range(training.epochs):
        if count:
            best.offer(_mean_losses(losses, held_out, training.batch_size))
        shuffled = rng.permutation(used)
        for start in range(0, len(shuffled), training.batch_size):
            optimizer.zero_grad(set_to_none=True)
            losses(np.sort(shuffled[start : start + training.batch_size])).sum().backward()
            optimizer.step()
            schedule.step()
        if progress is not None:
            progress(epoch + 1, training.epochs)
    if count:
        best.offer(_mean_losses(losses, held_out, training.batch_size))
        best.restore()
    windows, last = _parts(_without_scaling(parameters, mean, scale, config), free)
    result = RouterHeads(config, windows, last)
    return centre_heads(result, features) if training.centre else result


@torch.no_grad()
def logits_of(heads: RouterHeads, features: Tensor) -> Tensor:
    """Return the routers' logits for cached features, computed in blocks of prompts to bound memory.

    Args:
        heads: The routers.
        features: As in `train_heads`.

    Returns:
        Logits. Shape (prompts, num_layers, 3), float32, on the features' device.
    """
    block = max(1, _BLOCK // max(1, features[0].numel()))
    device = heads.windows.second_bias.device
    parts = [heads.all_logits(part.to(device)) for part in features.split(block)]
    return torch.cat(parts).to(features.device)


@torch.no_grad()
def centre_heads(heads: RouterHeads, features: Tensor) -> RouterHeads:
    """Subtract from the logits of every layer their mean over some prompts.

    Args:
        heads: The routers.
        features: As in `train_heads`.

    Returns:
        Routers whose logits have mean zero over these prompts for every layer and action: the mean is folded into the
        last bias, so the logits express only how a prompt differs from the others.
    """
    tensors = dict(heads.state_dict())
    mean = logits_of(heads, features).cpu().to(torch.float64).mean(dim=0).to(torch.float32)
    bias = tensors["windows.second_bias"]
    tensors["windows.second_bias"] = bias - mean.to(bias.device)
    return RouterHeads.from_state_dict(heads.config, tensors)


class _BestEpoch:
    """For each layer, the weights of the epoch with the lowest loss on held-out prompts."""

    def __init__(self, tensors: list[Tensor], num_layers: int) -> None:
        self._tensors = tensors
        self._kept = [tensor.detach().clone() for tensor in tensors]
        self._loss = torch.full((num_layers,), math.inf, device=tensors[0].device)

    def offer(self, loss: Tensor) -> None:
        better = loss < self._loss
        self._loss = torch.where(better, loss, self._loss)
        for kept, tensor in zip(self._kept, self._tensors, strict=True):
            kept[better] = tensor.detach()[better]

    def restore(self) -> None:
        with torch.no_grad():
            for kept, tensor in zip(self._kept, self._tensors, strict=True):
                tensor.copy_(kept)


def _check_features(features: Tensor, config: RouterConfig) -> None:
    shape = (config.num_layers, config.num_views, config.hidden_size)
    fits = features.dim() == 4 and features.dtype == torch.float32
    fits = fits and (features.shape[1], features.shape[3]) == (shape[0], shape[2])
    if not fits or features.shape[2] < shape[1]:
        raise ConfigError(
            f"features are {features.dtype} of shape {tuple(features.shape)}; expected torch.float32 of shape "
            f"(prompts, {shape[0]}, {shape[1]} views or more, {shape[2]}) for these routers"
        )
    finite = torch.stack([torch.isfinite(row).all() for row in features])
    if not bool(finite.all()):
        raise ConfigError(
            f"the features of prompt {int((~finite).nonzero()[0])} are not finite; the base model overflows on it: "
            "compute features in a wider dtype, or leave the prompt out"
        )


def _names(features: Tensor, groups: Sequence[str] | None) -> Sequence[Hashable]:
    """Return what identifies each prompt."""
    if groups is not None and len(groups) != len(features):
        raise ConfigError(
            f"groups has {len(groups)} entries for {len(features)} prompts; expected one for each"
        )
    names: Sequence[Hashable] = range(len(features)) if groups is None else groups
    different = len(set(names))
    if different < 2:
        raise ConfigError(
            f"{different} prompts were given to train routers; expected 2 or more that differ"
        )
    return names


def _rate(step: int, steps: int, training: TrainConfig) -> float:
    """Return the fraction of the peak learning rate at a step: linear warm-up, then half a cosine."""
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    done = (step - training.warmup_steps) / max(1, steps - training.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


@torch.no_grad()
def _mean_losses(losses: Callable[[Plans], Tensor], prompts: Any, batch_size: int) -> Tensor:
    parts = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    return torch.stack([losses(part) * len(part) for part in parts]).sum(dim=0) / len(prompts)


def _initial_parameters(config: RouterConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Return weights and biases uniform within 1 / sqrt(inputs), the initialisation of torch's linear layers."""
    parameters = {}
    for name, shape in RouterHeads.expected_shapes(config).items():
        inputs = config.hidden_size if ".first_" in name else config.bottleneck
        uniform = torch.rand(shape, generator=generator) * 2.0 - 1.0
        parameters[name] = uniform / math.sqrt(inputs)
    return parameters


def _spread(
    features: Tensor, prompts: Any, config: RouterConfig, *, enabled: bool
) -> tuple[Tensor, Tensor]:
    """Return mean and inverse spread of each dimension, equal for all windows. Shapes (num_layers, views, hidden)."""
    shape = (config.num_layers, config.num_views, config.hidden_size)
    mean = torch.zeros(shape, device=features.device)
    scale = torch.ones(shape, device=features.device)
    if not enabled:
        return mean, scale
    groups = [slice(0, config.num_windows)]
    if config.last_token:
        groups.append(slice(config.num_windows, config.num_views))
    for layer_idx in range(config.num_layers):
        picked = features[:, layer_idx][prompts].to(torch.float64)
        for group in groups:
            values = picked[:, group].flatten(0, 1)
            size = values.square().mean(dim=0).sqrt()
            spread = values.std(dim=0, correction=0)
            flat = spread <= _SMALLEST_SPREAD * size
            mean[layer_idx, group] = values.mean(dim=0).to(torch.float32)
            scale[layer_idx, group] = torch.where(flat, 0.0, 1.0 / spread).to(torch.float32)
    return mean, scale


def _without_scaling(
    parameters: Mapping[str, Tensor], mean: Tensor, scale: Tensor, config: RouterConfig
) -> dict[str, Tensor]:
    """Return weights that compute on raw features what the given ones compute on scaled features."""
    folded = {name: tensor.detach() for name, tensor in parameters.items()}
    for part, view in (("windows", 0), ("last", config.num_windows)):
        weight = folded.get(f"{part}.first_weight")
        if weight is None:
            continue
        wide = weight.to(torch.float64) * scale[:, view].to(torch.float64).unsqueeze(2)
        shift = torch.einsum("ld,ldh->lh", mean[:, view].to(torch.float64), wide)
        folded[f"{part}.first_weight"] = wide.to(torch.float32)
        folded[f"{part}.first_bias"] = (folded[f"{part}.first_bias"] - shift).to(torch.float32)
    return folded


def _parts(parameters: Mapping[str, Tensor], free: Tensor) -> tuple[Bottleneck, Bottleneck | None]:
    """Return weights made of these tensors, with gradients, whose logits are constant for actions that are not free."""

    def part(prefix: str) -> Bottleneck:
        named = {name.split(".")[1]: t for name, t in parameters.items() if name.startswith(prefix)}
        named["second_weight"] = named["second_weight"] * free.unsqueeze(1)
        return Bottleneck(**named)

    return part("windows."), part("last.") if "last.first_weight" in parameters else None
