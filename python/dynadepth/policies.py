"""Policies: what turns a prompt into a plan.

Owns the interface that the controller drives and the policies behind it. Knows nothing of hooks, caches or files; the
controller enforces protected layers, the cap on depth and that at least one layer runs.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynadepth.budget import PenaltyMix
from dynadepth.errors import ConfigError, PlanError
from dynadepth.menus import Menu
from dynadepth.plans import EXECUTE, NUM_ACTIONS, Plans, check_plans
from dynadepth.prompts import PromptBatch
from dynadepth.routers import Pooling, RouterHeads

__all__ = [
    "LayerwisePolicy",
    "MenuPolicy",
    "Policy",
    "RouterPolicy",
    "StaticPolicy",
    "actions_of",
    "check_open",
    "decision_step",
    "undecidable",
]


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
    def decide(self, layer_idx: int, hidden_states: Tensor, prompts: PromptBatch) -> Plans:
        """Decide the actions of a layer, and perhaps of layers right after it.

        Args:
            layer_idx: One of `decision_layers`.
            hidden_states: States entering that layer. Shape (batch, tokens, hidden), model dtype, any device.
            prompts: Which tokens are the prompt's, and what has been decided before.

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
    def actions_at(self, layer_idx: int, hidden_states: Tensor, prompts: PromptBatch) -> Plans:
        """Return the actions of one layer, on the host. Shape (batch,), uint8."""

    def initial_plans(self, num_rows: int) -> Plans:
        """Return the fixed actions; layers that are decided later run once."""
        plans: Plans = np.tile(self._static_plan, (num_rows, 1))
        plans[:, list(self.decision_layers)] = int(EXECUTE)
        return plans

    def decide(self, layer_idx: int, hidden_states: Tensor, prompts: PromptBatch) -> Plans:
        """Return the actions of one layer and the fixed ones up to the next decision.

        Shape (batch, layers up to the next of `decision_layers`), uint8.
        """
        end = next((layer for layer in self.decision_layers if layer > layer_idx), self.num_layers)
        decided: Plans = np.tile(self._static_plan[layer_idx:end], (len(hidden_states), 1))
        decided[:, 0] = self.actions_at(layer_idx, hidden_states, prompts)
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
    def actions_at(self, layer_idx: int, hidden_states: Tensor, prompts: PromptBatch) -> Plans:
        """Return the actions of one layer by the formula above. Shape (batch,), uint8.

        Raises:
            ConfigError: The states hold NaN at a prompt's token.
        """
        heads, bias = self._moved_to(hidden_states.device)
        # Under a caller's autocast the products would be in half precision and near-ties would flip.
        with torch.autocast(hidden_states.device.type, enabled=False):
            pooling = prompts.notes.get(heads.config)
            if pooling is None:
                pooling = Pooling.of(prompts.mask, heads.config)
                if bool(prompts.mask.all()):
                    pooling = pooling.unpadded()
                prompts.notes[heads.config] = pooling
            logits = heads.logits(layer_idx, pooling(hidden_states))
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


class MenuPolicy(Policy):
    """Gives each prompt one of a few plans: the one whose score less the price of its depth is highest.

    Rows of a batch that get equal plans run together, and there are few plans. A prompt's own number says which of two
    neighbouring penalties it is charged, so that a budget is met exactly on the prompts it was calibrated on, and no
    prompt's plan depends on its batch. One small product for each head, and one transfer to the host: that of the
    chosen plans.

    Args:
        menu: The plans and the heads that score them.
        penalty: What a depth of 1 costs, in scores; one number for all prompts, or two and their shares.

    Raises:
        ConfigError: A penalty that is not finite.

    Example:
        >>> from dynadepth.menus import Menu, MenuHead
        >>> head = MenuHead(1, 0, torch.zeros(2, 4), torch.tensor([1.0, 0.9]))
        >>> policy = MenuPolicy(Menu(np.array([[1, 1, 1], [1, 1, 0]]), (head,)), 0.5)
        >>> states, mask = torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool)
        >>> policy.decide(1, states, PromptBatch(mask, policy.initial_plans(1)))
        array([[1, 0]], dtype=uint8)
    """

    def __init__(self, menu: Menu, penalty: float | PenaltyMix = 0.0) -> None:
        mix = penalty if isinstance(penalty, PenaltyMix) else PenaltyMix(penalty, penalty, 1.0)
        if not math.isfinite(mix.shallow) or not math.isfinite(mix.deep):
            raise ConfigError(f"the penalty is {penalty}; expected finite numbers")
        self.menu = menu
        self.penalty = mix
        self.num_layers = menu.num_layers
        self.decision_layers = menu.decision_layers
        self._depths = torch.from_numpy(menu.depths).to(torch.float32)
        self._on_device: dict[torch.device, tuple[Menu, Tensor]] = {}

    def initial_plans(self, num_rows: int) -> Plans:
        """Return what all plans of the menu begin with, and EXECUTE from the first decision on."""
        plans = np.full((num_rows, self.num_layers), int(EXECUTE), dtype=np.uint8)
        first = self.decision_layers[0]
        plans[:, :first] = self.menu.plans[0, :first]
        return plans

    @torch.no_grad()
    def decide(self, layer_idx: int, hidden_states: Tensor, prompts: PromptBatch) -> Plans:
        """Choose a plan for each prompt and return it up to the next decision.

        Raises:
            ConfigError: The states have another width than the heads, or hold NaN at a prompt's token; or two penalties
                are mixed and the prompts' tokens are not known.
            PlanError: It does not decide at this layer; or no plan agrees with what a prompt has run, because the
                wrapper's limits changed that.
        """
        if hidden_states.shape[-1] != self.menu.hidden_size:
            raise ConfigError(
                f"layer {layer_idx} has states of width {hidden_states.shape[-1]}; this menu reads width "
                f"{self.menu.hidden_size}"
            )
        step = decision_step(self.decision_layers, layer_idx)
        menu, depths = self._moved_to(hidden_states.device)
        head = menu.heads[step]
        with torch.autocast(hidden_states.device.type, enabled=False):
            scores = head.scores(head.read(hidden_states, prompts.mask))
            priced = scores - self._prices(prompts).unsqueeze(-1) * depths
        if step:
            # Known on the host, and small: it goes to the device without anyone waiting.
            still_open = menu.open_plans(step, prompts.plans)
            check_open(still_open, layer_idx)
            closed = torch.from_numpy(~still_open)
            priced = priced.masked_fill(closed.to(priced.device), -math.inf)
        chosen = priced.argmax(dim=-1)
        # One transfer tells both; argmax alone would turn NaN into a plan.
        chosen = chosen.masked_fill(scores.isnan().any(dim=-1), -1)
        rows = chosen.cpu().numpy()
        if (rows < 0).any():
            raise undecidable(layer_idx)
        end = next((layer for layer in self.decision_layers if layer > layer_idx), self.num_layers)
        decided: Plans = menu.plans[rows, layer_idx:end]
        return decided

    def _prices(self, prompts: PromptBatch) -> Tensor:
        """Return the penalty of each prompt. Shape (batch,) or (1,), float32."""
        mix = self.penalty
        if mix.shallow == mix.deep:
            return torch.full((1,), mix.deep, device=prompts.mask.device)
        numbers = prompts.mix
        deep = torch.full_like(numbers, mix.deep)
        return torch.where(numbers < mix.share, deep, torch.full_like(numbers, mix.shallow))

    def _moved_to(self, device: torch.device) -> tuple[Menu, Tensor]:
        if device not in self._on_device:
            self._on_device[device] = (self.menu.to(device), self._depths.to(device))
        return self._on_device[device]


def decision_step(decision_layers: Sequence[int], layer_idx: int) -> int:
    """Return the number of a menu's step that decides at a layer.

    Raises:
        PlanError: None does.
    """
    if layer_idx not in decision_layers:
        raise PlanError(
            f"a menu was asked to decide layer {layer_idx}; it decides at layers {list(decision_layers)}"
        )
    return decision_layers.index(layer_idx)


def check_open(still_open: npt.NDArray[np.bool_], layer_idx: int) -> None:
    """Refuse to choose for prompts that no plan of a menu is open to any more.

    Args:
        still_open: Which plans agree with what each prompt has run. Shape (batch, K), bool.
        layer_idx: Where the choice is.

    Raises:
        PlanError: None does for some prompt.
    """
    stuck = np.flatnonzero(~still_open.any(axis=1)).tolist()
    if stuck:
        raise PlanError(
            f"no plan of the menu agrees with what row {stuck[0]} of the batch has run before layer {layer_idx}: "
            "`protect` or `max_depth` changed what was chosen there; train the menu again with these layers protected "
            "and without the repeats, or wrap the model without these limits"
        )


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
