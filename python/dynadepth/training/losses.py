"""The objectives of router training (labels to imitate, or costs of skips to predict) and the best constant outputs."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from dynadepth.plans import NUM_ACTIONS, Action
from dynadepth.training.train_config import TrainConfig

__all__ = ["Goal", "Imitation", "Regression", "effective_number_weights", "focal_loss"]

_CONSTANT_STEPS = 200


def effective_number_weights(counts: Tensor, beta: float) -> Tensor:
    """Return the weight of each class by its effective number of labels.

    Args:
        counts: Number of labels of each class. Shape (classes,), whole numbers.
        beta: 0 weights all classes equally; towards 1 the weights become inverse frequencies.

    Returns:
        Weights that sum to the number of classes that occur; 0 for one that does not. Shape (classes,), float32.

    Source:
        Cui et al. 2019, "Class-Balanced Loss Based on Effective Number of Samples", equation 4.

    Example:
        >>> effective_number_weights(torch.tensor([5, 5, 0]), 0.999)
        tensor([1., 1., 0.])
    """
    number = counts.to(torch.float64)
    present = number > 0
    effective = (1.0 - beta**number) / (1.0 - beta)
    weights = torch.where(present, 1.0 / effective.clamp(min=1e-12), 0.0)
    return (weights * present.sum() / weights.sum()).to(torch.float32)


def focal_loss(logits: Tensor, actions: Tensor, *, gamma: float, weights: Tensor) -> Tensor:
    """Return the focal loss of each decision.

    Args:
        logits: Shape (..., 3), float32.
        actions: The labels. Shape (...), int64.
        gamma: How strongly easy decisions are down-weighted; 0 gives the weighted cross-entropy.
        weights: Weight of each action. Shape (3,), float32.

    Returns:
        `-w_y (1 - p_y)^gamma log p_y`. Shape (...), float32.

    Source:
        Lin et al. 2017, "Focal Loss for Dense Object Detection", equation 5.
    """
    log_probs = functional.log_softmax(logits, dim=-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    # expm1 keeps the gradient of an almost certain decision finite for gamma below 1.
    miss = (-torch.expm1(log_probs)).clamp(min=1e-12)
    return -weights[actions] * miss**gamma * log_probs


class Goal(Protocol):
    """The objective of router training."""

    def begin(self, used: Any) -> tuple[Tensor, Tensor]:
        """Read the training prompts; return which logits may vary (1 or 0) and the best constant logits.

        Both have shape (num_layers, 3), float32, on the host.
        """

    def losses(self, logits: Tensor, prompts: Any) -> Tensor:
        """Return the loss of each prompt and layer. Shape (prompts, num_layers)."""


class Imitation:
    """The focal loss of labelled actions.

    Args:
        labels: The labelled actions. Shape (prompts, num_layers), int64.
        training: The recipe.

    Source:
        Dr.LLM (arXiv 2510.12773).
    """

    def __init__(self, labels: Tensor, training: TrainConfig) -> None:
        self._labels, self._training = labels, training
        self._weights = torch.ones(NUM_ACTIONS, device=labels.device)

    def begin(self, used: Any) -> tuple[Tensor, Tensor]:
        """See `Goal`."""
        labels, gamma = self._labels[used], self._training.focal_gamma
        counts = torch.bincount(labels.flatten(), minlength=NUM_ACTIONS)
        self._weights = effective_number_weights(counts, self._training.class_balance)
        constant = _best_constant(labels.cpu(), self._weights.cpu(), gamma)
        return _learnable(labels.cpu()), constant

    def losses(self, logits: Tensor, prompts: Any) -> Tensor:
        """See `Goal`."""
        gamma = self._training.focal_gamma
        return focal_loss(logits, self._labels[prompts], gamma=gamma, weights=self._weights)


class Regression:
    """The squared error of SKIP's logit as a prediction of minus the cost of the skip, in units of the costs' spread.

    Args:
        skip_costs: The cost of each skip, in reward. Shape (prompts, num_layers), float32.
    """

    def __init__(self, skip_costs: Tensor) -> None:
        spread = skip_costs.std()
        self._wanted = -skip_costs / torch.where(spread > 0, spread, torch.ones_like(spread))

    def begin(self, used: Any) -> tuple[Tensor, Tensor]:
        """See `Goal`."""
        wanted = self._wanted[used].cpu()
        free, constant = (torch.zeros(wanted.shape[1], NUM_ACTIONS) for _ in range(2))
        free[:, int(Action.SKIP)] = (wanted.std(dim=0) > 0).to(torch.float32)
        constant[:, int(Action.SKIP)] = wanted.mean(dim=0)
        return free, constant

    def losses(self, logits: Tensor, prompts: Any) -> Tensor:
        """See `Goal`."""
        return (logits[..., int(Action.SKIP)] - self._wanted[prompts]).square()


def _learnable(labels: Tensor) -> Tensor:
    """Return 1 where a layer's logit of an action may depend on the prompt. Shape (num_layers, 3), float32.

    An action that never occurs among a layer's labels is only pushed down, and if only one action occurs, so are all
    logits: how such logits depend on the prompt is an accident.
    """
    seen = functional.one_hot(labels, NUM_ACTIONS).sum(dim=0) > 0
    return (seen & (seen.sum(dim=1, keepdim=True) > 1)).to(torch.float32)


def _best_constant(labels: Tensor, weights: Tensor, gamma: float) -> Tensor:
    """Return the constant logits of lowest focal loss for each layer. Shape (num_layers, 3), float32."""
    # Half a label added to each action keeps the optimum finite if an action never occurs.
    share = (functional.one_hot(labels, NUM_ACTIONS).sum(dim=0) + 0.5) / (len(labels) + 1.5)
    actions = torch.arange(NUM_ACTIONS).expand(labels.shape[1], NUM_ACTIONS)
    logits = torch.log(share).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(_CONSTANT_STEPS):
        optimizer.zero_grad(set_to_none=True)
        every = logits.unsqueeze(1).expand(-1, NUM_ACTIONS, -1)
        (share * focal_loss(every, actions, gamma=gamma, weights=weights)).sum().backward()
        optimizer.step()
    return logits.detach()
