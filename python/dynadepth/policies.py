"""Policies: what turns a prompt into a plan.

Owns the interface that the controller drives and the policies behind it. Knows nothing of hooks, caches or files; the
controller enforces protected layers, the cap on depth and that at least one layer runs.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynadepth.errors import ConfigError, PlanError
from dynadepth.plans import EXECUTE, NUM_ACTIONS, Plans, check_plans
from dynadepth.routers import RouterHeads, pool

__all__ = ["LayerwisePolicy", "Policy", "RouterPolicy", "StaticPolicy", "actions_of", "undecidable"]


_UNDECIDED = 255


class Policy(ABC):
    """What turns a prompt into a plan, layer by layer or at once.

    A policy holds no state of a prompt: one instance serves all batches, and a deep copy of it decides alike.

    Attributes:
        num_layers: Decoder layers of the model it is for.
        decision_layers: Layers whose entering state it reads, ascending; empty if it reads none.
    """

    num_layers: int
    decision_layers: tuple[int, ...]

    @abstractmethod
    def initial_plans(self, num_rows: int) -> Plans:
        """Return the plans in force before anything is decided.

        Args:
            num_rows: Rows of the batch.

        Returns:
            Shape (num_rows, num_layers), uint8, a fresh array.
        """

    @abstractmethod
    def decide(self, layer_idx: int, hidden_states: Tensor, prompt_mask: Tensor) -> Plans:
        """Decide the actions of a layer, and perhaps of layers right after it.

        Args:
            layer_idx: One of `decision_layers`.
            hidden_states: States entering that layer. Shape (batch, tokens, hidden), model dtype, any device.
            prompt_mask: True for the prompt's real tokens. Shape (batch, tokens), bool, same device.

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

    def decide(self, layer_idx: int, hidden_states: Tensor, prompt_mask: Tensor) -> Plans:  # noqa: ARG002
        """Raise: a static policy has nothing to decide.

        Raises:
            PlanError: Always.
        """
        raise PlanError(
            f"a static policy was asked to decide layer {layer_idx}; its plan is set by `initial_plans`"
        )


class LayerwisePolicy(Policy):
    """Decides some layers one by one, each from the states that enter it; the others' actions are fixed.

    Args:
        static_plan: Actions of the layers that no prompt can change; other entries are not used. Shape (num_layers,),
            uint8.
        decision_layers: Layers that are decided, ascending.
    """

    def __init__(self, static_plan: Plans, decision_layers: tuple[int, ...]) -> None:
        self.num_layers = int(static_plan.shape[0])
        self.decision_layers = decision_layers
        self._static_plan = static_plan

    @abstractmethod
    def actions_at(self, layer_idx: int, hidden_states: Tensor, prompt_mask: Tensor) -> Plans:
        """Return the actions of one layer, on the host. Shape (batch,), uint8. Arguments as `decide`."""

    def initial_plans(self, num_rows: int) -> Plans:
        """Return the fixed actions; layers that are decided later run once."""
        plans: Plans = np.tile(self._static_plan, (num_rows, 1))
        plans[:, list(self.decision_layers)] = int(EXECUTE)
        return plans

    def decide(self, layer_idx: int, hidden_states: Tensor, prompt_mask: Tensor) -> Plans:
        """Return the actions of one layer and the fixed ones up to the next decision.

        Shape (batch, layers up to the next of `decision_layers`), uint8.
        """
        end = next((layer for layer in self.decision_layers if layer > layer_idx), self.num_layers)
        decided: Plans = np.tile(self._static_plan[layer_idx:end], (len(hidden_states), 1))
        decided[:, 0] = self.actions_at(layer_idx, hidden_states, prompt_mask)
        return decided


class RouterPolicy(LayerwisePolicy):
    """A router for each layer, decided as the prefill goes.

    The action of layer l for prompt x is argmax over a of `bias[l, a] + shrinkage * h_l(x)_a - penalty * a`, ties to
    the lowest action. With shrinkage 0 it reads no state and has one plan for all prompts; nor is a layer read whose
    router is constant. Follows the states to their
    device; one transfer to the host for each decision.

    Args:
        heads: The trained routers h.
        bias: The static part b. Shape (num_layers, 3), float32; None means zeros.
        shrinkage: s, how far prompts may deviate from the static part; 0 to 1.
        penalty: lambda, the price of a visit in logits; any finite number.

    Raises:
        ConfigError: A bias of another shape, or a number that is not finite or out of range.
    """

    def __init__(
        self,
        heads: RouterHeads,
        bias: Tensor | None = None,
        *,
        shrinkage: float = 1.0,
        penalty: float = 0.0,
    ) -> None:
        shape = (heads.config.num_layers, NUM_ACTIONS)
        bias = torch.zeros(shape) if bias is None else bias.detach().to("cpu", torch.float32)
        if tuple(bias.shape) != shape or not bool(torch.isfinite(bias).all()):
            raise ConfigError(
                f"the bias has shape {tuple(bias.shape)} or values that are not finite; expected finite numbers of "
                f"shape {shape}, one for each layer and action"
            )
        if not 0.0 <= shrinkage <= 1.0:
            raise ConfigError(f"shrinkage is {shrinkage}; expected a number from 0 to 1")
        if not math.isfinite(penalty):
            raise ConfigError(f"penalty is {penalty}; expected a finite number")
        self.heads = heads
        self.bias = bias
        self.shrinkage = float(shrinkage)
        self.penalty = float(penalty)
        constant = bias if shrinkage == 0.0 else bias + shrinkage * heads.constant_logits()
        super().__init__(
            actions_of(constant, self.penalty).to(torch.uint8).numpy(),
            heads.varying_layers() if shrinkage > 0.0 else (),
        )
        self._on_device: dict[torch.device, tuple[RouterHeads, Tensor]] = {
            torch.device("cpu"): (heads, bias)
        }

    @torch.no_grad()
    def actions_at(self, layer_idx: int, hidden_states: Tensor, prompt_mask: Tensor) -> Plans:
        """Return the actions of one layer by the formula above. Shape (batch,), uint8.

        Raises:
            ConfigError: The states hold NaN at a prompt's token.
        """
        heads, bias = self._moved_to(hidden_states.device)
        # Under a caller's autocast the products would be in half precision and near-ties would flip.
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = heads.logits(layer_idx, pool(hidden_states, prompt_mask, heads.config))
            actions = actions_of(bias[layer_idx] + self.shrinkage * logits, self.penalty)
            # One transfer tells both; argmax alone would turn NaN into SKIP.
            actions = actions.masked_fill(logits.isnan().any(dim=-1), _UNDECIDED)
        host: Plans = actions.to(torch.uint8).cpu().numpy()
        if (host == _UNDECIDED).any():
            raise undecidable(layer_idx)
        return host

    def _moved_to(self, device: torch.device) -> tuple[RouterHeads, Tensor]:
        if device not in self._on_device:
            self._on_device[device] = (self.heads.to(device), self.bias.to(device))
        return self._on_device[device]


def undecidable(layer_idx: int) -> ConfigError:
    """Return the error for states from which no router can decide."""
    return ConfigError(
        f"the states entering layer {layer_idx} hold NaN, so no router can decide; run the base model in a "
        "dtype that it does not overflow"
    )


def actions_of(logits: Tensor, penalty: float) -> Tensor:
    """Return argmax over actions a of `logits[..., a] - penalty * a`, ties to the lowest action.

    Args:
        logits: Shape (..., 3), float32.
        penalty: The price of a visit, in logits.

    Returns:
        Shape (...), int64.
    """
    visits = torch.arange(NUM_ACTIONS, device=logits.device, dtype=logits.dtype)
    return (logits - penalty * visits).argmax(dim=-1)
