"""The interface of policies, which turn a prompt into a plan, and what all kinds of them share.

The controller drives a policy; it enforces protected layers, the limit on depth, and that at least one layer runs.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynadepth.errors import ConfigError, PlanError
from dynadepth.plans import EXECUTE, NUM_ACTIONS, Plans, check_plans
from dynadepth.policies.prompt_batch import PromptBatch

__all__ = [
    "LayerwisePolicy",
    "Policy",
    "StaticPolicy",
    "actions_of",
    "check_open",
    "decision_step",
    "nan_states_error",
]


class Policy(ABC):
    """Turns a prompt into a plan, layer by layer or at once.

    A policy keeps no state about a prompt: one instance serves all batches, and a deep copy decides in the same way.

    Attributes:
        num_layers: Number of decoder layers of the model that it is for.
        decision_layers: Layers whose entering states it reads, ascending; empty if it reads none.
    """

    num_layers: int
    decision_layers: tuple[int, ...]

    @abstractmethod
    def initial_plans(self, num_rows: int) -> Plans:
        """Return the plans in force before anything is decided.

        Args:
            num_rows: Rows of the batch.

        Returns:
            The plans, as a new array. Shape (num_rows, num_layers), uint8.
        """

    def known_plans(self) -> Plans | None:
        """Return the plans among which it chooses, if these are known. Shape (K, num_layers), uint8."""
        return None

    @abstractmethod
    def decide(self, layer_idx: int, hidden_states: Tensor, prompts: PromptBatch) -> Plans:
        """Decide the actions of a layer, and possibly of layers right after it.

        Args:
            layer_idx: One of `decision_layers`.
            hidden_states: States entering that layer. Shape (batch, tokens, hidden), model dtype, any device.
            prompts: Which tokens belong to the prompts, and what has been decided before.

        Returns:
            Actions of the layers layer_idx .. layer_idx + k - 1, on the host. Shape (batch, k), uint8.
        """


class StaticPolicy(Policy):
    """One plan for every prompt.

    Args:
        plan: The plan. Shape (num_layers,), whole numbers.

    Raises:
        PlanError: The plan has wrong actions, or runs no layer.

    Example:
        >>> StaticPolicy([1, 0, 1]).initial_plans(2)
        array([[1, 0, 1],
               [1, 0, 1]], dtype=uint8)
    """

    def __init__(self, plan: Any) -> None:
        given = np.asarray(plan)
        if given.ndim != 1:
            raise PlanError(
                f"a static policy was given an array of shape {given.shape}; expected one plan of shape (num_layers,)"
            )
        self.plan = check_plans(given, given.shape[0])[0]
        self.num_layers = int(given.shape[0])
        self.decision_layers = ()

    def initial_plans(self, num_rows: int) -> Plans:
        """Return the plan for each row."""
        return np.tile(self.plan, (num_rows, 1))

    def decide(self, layer_idx: int, hidden_states: Tensor, prompts: PromptBatch) -> Plans:  # noqa: ARG002
        """Raise an error: a static policy has nothing to decide.

        Args:
            layer_idx: Any layer.
            hidden_states: Not read.
            prompts: Not read.

        Raises:
            PlanError: Always.
        """
        raise PlanError(
            f"a static policy was asked to decide layer {layer_idx}; its plan is set by `initial_plans`"
        )


class LayerwisePolicy(Policy):
    """Decides some layers one by one, each from the states that enter it; the actions of the others are fixed.

    Args:
        static_plan: Actions of the layers that are not decided; the other entries are ignored. Shape (num_layers,),
            uint8.
        decision_layers: Layers that are decided, ascending.
    """

    def __init__(self, static_plan: Plans, decision_layers: tuple[int, ...]) -> None:
        self.num_layers = int(static_plan.shape[0])
        self.decision_layers = decision_layers
        self._static_plan = static_plan

    @abstractmethod
    def actions_at(self, layer_idx: int, hidden_states: Tensor, prompts: PromptBatch) -> Plans:
        """Return the actions of one layer.

        Args:
            layer_idx: One of `decision_layers`.
            hidden_states: States entering that layer. Shape (batch, tokens, hidden), model dtype, any device.
            prompts: The prompts of the batch, with their plans as decided so far.

        Returns:
            Actions, on the host. Shape (batch,), uint8.
        """

    def initial_plans(self, num_rows: int) -> Plans:
        """Return the fixed actions, and EXECUTE for the layers that are decided later."""
        plans: Plans = np.tile(self._static_plan, (num_rows, 1))
        plans[:, list(self.decision_layers)] = int(EXECUTE)
        return plans

    def decide(self, layer_idx: int, hidden_states: Tensor, prompts: PromptBatch) -> Plans:
        """Return the actions of one layer and the fixed ones up to the next decision.

        Args:
            layer_idx: One of `decision_layers`.
            hidden_states: States entering that layer. Shape (batch, tokens, hidden), model dtype, any device.
            prompts: The prompts of the batch, with their plans as decided so far.

        Returns:
            Actions, on the host. Shape (batch, layers up to the next of `decision_layers`), uint8.
        """
        end = next((layer for layer in self.decision_layers if layer > layer_idx), self.num_layers)
        decided: Plans = np.tile(self._static_plan[layer_idx:end], (len(hidden_states), 1))
        decided[:, 0] = self.actions_at(layer_idx, hidden_states, prompts)
        return decided


def decision_step(decision_layers: Sequence[int], layer_idx: int) -> int:
    """Return the index of the step of a menu that decides at a layer.

    Raises:
        PlanError: No step decides there.
    """
    if layer_idx not in decision_layers:
        raise PlanError(
            f"a menu was asked to decide layer {layer_idx}; it decides at layers {list(decision_layers)}"
        )
    return decision_layers.index(layer_idx)


def check_open(still_open: npt.NDArray[np.bool_], layer_idx: int) -> None:
    """Refuse to choose for a prompt that can no longer take any plan of a menu.

    Args:
        still_open: Which plans agree with what each prompt has run so far. Shape (batch, K), bool.
        layer_idx: The layer at which to choose.

    Raises:
        PlanError: For some prompt, no plan agrees.
    """
    stuck = np.flatnonzero(~still_open.any(axis=1)).tolist()
    if stuck:
        raise PlanError(
            f"no plan of the menu agrees with what row {stuck[0]} of the batch has run before layer {layer_idx}: "
            "`protect` or `max_depth` changed what was chosen there; train the menu again with these layers protected "
            "and without the repeats, or wrap the model without these limits"
        )


def nan_states_error(layer_idx: int) -> ConfigError:
    """Return the error for states from which no router can decide."""
    return ConfigError(
        f"the states entering layer {layer_idx} hold NaN, so no router can decide; run the base model in a "
        "dtype that it does not overflow"
    )


def actions_of(logits: Tensor, penalty: float) -> Tensor:
    """Return argmax over actions a of `logits[..., a] - penalty * a`, ties to the lowest action.

    Args:
        logits: Order SKIP, EXECUTE, REPEAT. Shape (..., 3), float32.
        penalty: The price of a visit, in logits.

    Returns:
        Actions. Shape (...), int64.
    """
    visits = torch.arange(NUM_ACTIONS, device=logits.device, dtype=logits.dtype)
    return (logits - penalty * visits).argmax(dim=-1)
