"""Menus: a few plans to choose from, and heads that predict how much of the base model's answer each one keeps.

The plans and weights of a menu, and what its heads read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from dynadepth.errors import ConfigError, PlanError
from dynadepth.plans import Plans, check_plans, plan_depth, plan_text
from dynadepth.policies.pooling import last_token_state, window_means

__all__ = ["Menu", "MenuHead", "score_states"]


@dataclass(frozen=True, slots=True, eq=False)
class MenuHead:
    """Scores the K plans of a menu from the states that enter one layer.

    Linear in what it reads, or a perceptron with one hidden layer. Immutable and without gradients.

    Args:
        layer_idx: The layer whose entering states it reads.
        num_windows: Number W of windows that it reads in addition to the last prompt token's state; 0 for that state
            alone.
        weight: Shape (K, V d), float32, for V = W + 1 concatenated views of width d, the last token's view last; for
            a perceptron (K, inner).
        bias: Shape (K,), float32.
        inner_weight: Hidden layer of a perceptron. Shape (inner, V d), float32; None for a linear head.
        inner_bias: Shape (inner,), float32; None for a linear head.

    Raises:
        ConfigError: The tensors have shapes or dtypes that do not fit together, or are not finite.
    """

    layer_idx: int
    num_windows: int
    weight: Tensor
    bias: Tensor
    inner_weight: Tensor | None = None
    inner_bias: Tensor | None = None

    def __post_init__(self) -> None:
        if self.layer_idx < 0 or self.num_windows < 0:
            raise ConfigError(
                f"a menu head reads layer {self.layer_idx} with {self.num_windows} windows; expected 0 or more of both"
            )
        if (self.inner_weight is None) != (self.inner_bias is None):
            raise ConfigError(
                "a menu head has one of inner_weight and inner_bias; give both or neither"
            )
        for name, tensor in self.tensors().items():
            if tensor.dtype != torch.float32:
                raise ConfigError(
                    f"menu tensor {name!r} is {tensor.dtype}; expected torch.float32: convert it, or train the menu "
                    "again"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise ConfigError(
                    f"menu tensor {name!r} holds values that are not finite; train the menu again"
                )
        read = self.weight if self.inner_weight is None else self.inner_weight
        bound = read.dim() == 2 and self.weight.dim() == 2 and read.shape[1] % self.num_views == 0
        bound = bound and self.bias.shape == self.weight.shape[:1]
        if self.inner_weight is not None and self.inner_bias is not None:
            bound = bound and self.inner_bias.shape == self.inner_weight.shape[:1]
            bound = bound and self.weight.shape[1] == self.inner_weight.shape[0]
        if not bound:
            shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors().items()}
            raise ConfigError(
                f"the tensors of a menu head have shapes {shapes}, which do not belong together for {self.num_views} "
                "views; train the menu again"
            )

    @property
    def num_views(self) -> int:
        """Number of vectors that it reads of a prompt."""
        return self.num_windows + 1

    @property
    def hidden_size(self) -> int:
        """Width d of the states."""
        read = self.weight if self.inner_weight is None else self.inner_weight
        return int(read.shape[1]) // self.num_views

    def read(self, hidden_states: Tensor, prompt_mask: Tensor) -> Tensor:
        """Return the views of a batch that the head reads.

        Args:
            hidden_states: States entering the layer. Shape (batch, tokens, hidden), any floating dtype.
            prompt_mask: True for the prompt's real tokens. Shape (batch, tokens), bool.

        Returns:
            Shape (batch, num_views, hidden), float32.
        """
        last = last_token_state(hidden_states, prompt_mask).unsqueeze(1)
        if not self.num_windows:
            return last
        return torch.cat([window_means(hidden_states, prompt_mask, self.num_windows), last], dim=1)

    def scores(self, views: Tensor) -> Tensor:
        """Return the score of every plan.

        Args:
            views: What `read` returned. Shape (batch, num_views, hidden), float32.

        Returns:
            Shape (batch, K), float32.
        """
        flat = views.flatten(1)
        if self.inner_weight is not None and self.inner_bias is not None:
            flat = functional.gelu(flat @ self.inner_weight.T + self.inner_bias)
        return flat @ self.weight.T + self.bias

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors by name."""
        named = {
            "weight": self.weight,
            "bias": self.bias,
            "inner_weight": self.inner_weight,
            "inner_bias": self.inner_bias,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device | str) -> "MenuHead":
        """Return the same head with its tensors on a device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return MenuHead(self.layer_idx, self.num_windows, **moved)


@torch.no_grad()
def score_states(
    head: MenuHead, views: Tensor, prefixes: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Return the score of every plan from stored states, each plan scored from the states under its own prefix.

    Args:
        head: The head.
        views: Stored views of the states entering its layer under each prefix; the views that the head reads are the
            last ones. Shape (N, prefixes, views, hidden), any floating dtype.
        prefixes: The index of each plan's prefix before that layer. Shape (K,), int64.

    Returns:
        Scores. Shape (N, K), float64.
    """
    scores = np.empty((len(views), len(prefixes)))
    for number in np.unique(prefixes).tolist():
        columns = np.flatnonzero(prefixes == number)
        read = views[:, number, -head.num_views :].to(torch.float32)
        scores[:, columns] = head.scores(read)[:, columns].double().numpy()
    return scores


@dataclass(frozen=True, slots=True, eq=False)
class Menu:
    """K plans and the heads that choose among them, in one step or in several.

    Every head scores all plans; a later head chooses only among those that agree with what has already run.

    Args:
        plans: The plans, all different. Shape (K, num_layers), uint8.
        heads: The heads, by ascending layer. The plans must agree before the layer of the first head.

    Raises:
        ConfigError: There are no heads, they are not in ascending order, or they have another number of plans or width.
        PlanError: A plan is invalid or occurs twice, or plans differ before the first head reads.

    Example:
        >>> head = MenuHead(1, 0, torch.zeros(2, 4), torch.tensor([1.0, 0.9]))
        >>> Menu(np.array([[1, 1, 1], [1, 1, 0]]), (head,)).depths.round(3).tolist()
        [1.0, 0.667]
    """

    plans: Plans
    heads: tuple[MenuHead, ...]

    def __post_init__(self) -> None:
        given = np.asarray(self.plans)
        if given.ndim != 2:
            raise PlanError(
                f"the plans of a menu have shape {given.shape}; expected (plans, num_layers)"
            )
        plans = check_plans(given, given.shape[1])
        object.__setattr__(self, "plans", plans)
        object.__setattr__(self, "heads", tuple(self.heads))
        texts = [plan_text(plan) for plan in plans]
        twice = sorted({text for text in texts if texts.count(text) > 1})
        if twice:
            raise PlanError(f"plan {twice[0]} is on the menu twice; give each plan once")
        layers = [head.layer_idx for head in self.heads]
        if not layers or layers != sorted(set(layers)) or layers[-1] >= self.num_layers:
            raise ConfigError(
                f"the heads of a menu read layers {layers}; expected one or more, ascending, below {self.num_layers}"
            )
        for head in self.heads:
            if head.weight.shape[0] != len(plans) or head.hidden_size != self.hidden_size:
                raise ConfigError(
                    f"the head at layer {head.layer_idx} scores {head.weight.shape[0]} plans from width "
                    f"{head.hidden_size}; expected {len(plans)} plans and width {self.hidden_size}"
                )
        if (plans[:, : layers[0]] != plans[0, : layers[0]]).any():
            raise PlanError(
                f"plans of the menu differ before layer {layers[0]}, where the first head reads; expected plans that "
                "agree up to there"
            )

    @property
    def num_layers(self) -> int:
        """Number of decoder layers of the model that it is for."""
        return int(self.plans.shape[1])

    @property
    def hidden_size(self) -> int:
        """Width of the states that its heads read."""
        return self.heads[0].hidden_size

    @property
    def depths(self) -> npt.NDArray[np.float64]:
        """Depth of each plan. Shape (K,), float64."""
        return plan_depth(self.plans)

    @property
    def decision_layers(self) -> tuple[int, ...]:
        """Layers whose entering states are read, ascending."""
        return tuple(head.layer_idx for head in self.heads)

    def edited_layers(self) -> tuple[int, ...]:
        """Return the layers that some plan skips or repeats, ascending."""
        return tuple(np.flatnonzero((self.plans != 1).any(axis=0)).tolist())

    def open_plans(self, step: int, so_far: Plans) -> npt.NDArray[np.bool_]:
        """Return which plans agree with what has been decided before a step.

        Args:
            step: Index of the head.
            so_far: Plans of the batch, decided up to the head's layer. Shape (batch, num_layers), uint8.

        Returns:
            True for the plans that agree. Shape (batch, K), bool.
        """
        layer = self.heads[step].layer_idx
        same: npt.NDArray[np.bool_] = (self.plans[None, :, :layer] == so_far[:, None, :layer]).all(
            axis=2
        )
        return same

    def state_dict(self) -> dict[str, Tensor]:
        """Return all tensors under the names that a routers file gives them."""
        return {
            f"heads.{step}.{name}": tensor
            for step, head in enumerate(self.heads)
            for name, tensor in head.tensors().items()
        }

    @classmethod
    def from_state_dict(
        cls, plans: Any, shapes: Sequence[tuple[int, int]], tensors: Mapping[str, Tensor]
    ) -> "Menu":
        """Make a menu from what `state_dict` returned.

        Args:
            plans: Its plans. Shape (K, num_layers), whole numbers.
            shapes: Layer and number of windows of each head.
            tensors: Name to tensor, exactly the names of `state_dict`.

        Returns:
            The menu.

        Raises:
            ConfigError: A tensor is missing, unknown or of the wrong shape.
            PlanError: As for `Menu`.
        """
        left = dict(tensors)
        heads = []
        for step, (layer_idx, num_windows) in enumerate(shapes):
            names = ("weight", "bias", "inner_weight", "inner_bias")
            named: dict[str, Any] = {
                name: left.pop(f"heads.{step}.{name}").detach()
                for name in names
                if f"heads.{step}.{name}" in left
            }
            for name in ("weight", "bias"):
                if name not in named:
                    raise ConfigError(
                        f"menu tensor 'heads.{step}.{name}' is missing; copy or save the routers again"
                    )
            heads.append(MenuHead(layer_idx, num_windows, **named))
        if left:
            raise ConfigError(
                f"menu tensor {min(left)!r} is unknown; expected those of {len(shapes)} heads only"
            )
        return cls(plans, tuple(heads))

    def to(self, device: torch.device | str) -> "Menu":
        """Return the same menu with its tensors on a device."""
        return Menu(self.plans, tuple(head.to(device) for head in self.heads))
