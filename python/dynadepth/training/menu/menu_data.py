"""The data that a menu's heads are trained on, and the recipes for training them."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynadepth.errors import ConfigError
from dynadepth.evaluation.folds import draw_folds
from dynadepth.plans import Plans, plan_depth, prefix_numbers

__all__ = ["FOLDS", "MenuData", "MenuRecipe", "MenuTrial"]

FOLDS = 5

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class MenuData:
    """What heads are trained on: N prompts under K plans.

    Args:
        plans: The plans, the identity first. Shape (K, num_layers), uint8.
        views: For each layer, the views that a head reads of each prompt under each distinct prefix of the plans,
            prefixes numbered in the order in which they first occur. Shape (N, prefixes, views, hidden), floating.
        agreement: 1 where a plan keeps the base model's answer. Shape (N, K).
        total_variation: Total variation distance between the answers of the base model and under each plan, 0 to 1.
            Shape (N, K).
        reward: Probability of the right answer; None if the prompts have none. Shape (N, K).
        groups: Names of the prompts; rows with the same name share a fold. None: all prompts are distinct.

    Raises:
        ConfigError: Shapes do not fit together, values are not finite, or there are fewer than 20 distinct prompts.
    """

    plans: Plans
    views: Mapping[int, Tensor]
    agreement: Floats
    total_variation: Floats
    reward: Floats | None = None
    groups: Sequence[str] | None = None

    def __post_init__(self) -> None:
        shape = (len(self.agreement), len(self.plans))
        if len(self.names) != shape[0]:
            raise ConfigError(
                f"groups has {len(self.names)} entries for {shape[0]} prompts; expected one for each"
            )
        different = len(set(self.names))
        if different < 4 * FOLDS:
            raise ConfigError(
                f"{different} different prompts cannot train and cross-validate a menu; score {4 * FOLDS} or more"
            )
        for name in ("agreement", "total_variation", "reward"):
            values = getattr(self, name)
            if values is not None and (values.shape != shape or not np.isfinite(values).all()):
                raise ConfigError(
                    f"{name} has shape {values.shape} or values that are not finite; expected finite numbers of shape "
                    f"{shape}"
                )
        for layer, views in self.views.items():
            if len(views) != shape[0] or not bool(torch.isfinite(views).all()):
                raise ConfigError(
                    f"the states of layer {layer} are of {len(views)} prompts or not finite; expected finite states of "
                    f"{shape[0]} prompts"
                )

    @property
    def names(self) -> Sequence[Hashable]:
        """What identifies each prompt. Length N."""
        return range(len(self.agreement)) if self.groups is None else self.groups

    @property
    def depths(self) -> Floats:
        """Depth of each plan. Shape (K,)."""
        return plan_depth(self.plans)

    def targets(self) -> dict[str, Floats]:
        """Return the targets by name, all between 0 and 1 with 1 best.

        Returns:
            `agreement`; `closeness`, which is 1 - total variation distance, with the total variation distance half the
            sum of the absolute differences of the probabilities; and `reward` if there are right answers. Shape (N, K)
            each, float64.
        """
        found = {"agreement": self.agreement, "closeness": 1.0 - self.total_variation}
        if self.reward is not None:
            found["reward"] = self.reward
        return found

    def prefixes(self, layer_idx: int) -> Indices:
        """Return the index of each plan's prefix before a layer. Shape (K,), int64."""
        return prefix_numbers(self.plans, layer_idx)

    def folds(self, seed: int, count: int = FOLDS) -> Indices:
        """Return the fold of each prompt, of `count` folds or as many as there are names. Shape (N,), int64."""
        return draw_folds(self.names, count, np.random.default_rng(seed))


@dataclass(frozen=True, slots=True, kw_only=True)
class MenuRecipe:
    """How a menu's heads are trained.

    Args:
        layers: The layers where they read, ascending; with two or more, the menu decides in steps.
        num_windows: Number of windows that they read in addition to the last token's state.
        rank: Number of principal components that are kept.
        ridge: Penalty on the squared weights of the components.
        weights: Share of each target in the blend whose deviations from its mean are learned; they sum to 1. The
            deviations are added to the plans' means of the quantity that is maximised.
        factors: Number of directions in which the plans' scores may deviate together; 0: as many as there are plans.
        shrinkage: How far a prompt's scores may deviate from the plans' means, 0 to 1.
        inner: Hidden units of a perceptron; 0: a linear head.
    """

    layers: tuple[int, ...]
    num_windows: int
    rank: int
    ridge: float
    weights: tuple[tuple[str, float], ...]
    factors: int = 0
    shrinkage: float = 1.0
    inner: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as values that JSON can hold."""
        return {
            "layers": list(self.layers),
            "num_windows": self.num_windows,
            "rank": self.rank,
            "ridge": self.ridge,
            "weights": dict(self.weights),
            "factors": self.factors,
            "shrinkage": self.shrinkage,
            "inner": self.inner,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MenuTrial:
    """A recipe and what it gained in cross-validation.

    Args:
        recipe: The recipe.
        gain: Mean gain over the static mixture of equal depth, over prompts and depths.
        standard_error: Standard error of that mean.
    """

    recipe: MenuRecipe
    gain: float
    standard_error: float

    def to_dict(self) -> dict[str, Any]:
        """Return the trial as values that JSON can hold."""
        return {
            **self.recipe.to_dict(),
            "gain": self.gain,
            "standard_error": self.standard_error,
        }
