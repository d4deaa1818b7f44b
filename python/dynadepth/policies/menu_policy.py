"""The policy that gives each prompt one of a few plans."""

import math

import numpy as np
import torch
from torch import Tensor

from dynadepth.errors import ConfigError
from dynadepth.plans import EXECUTE, Plans
from dynadepth.policies.base import Policy, check_open, decision_step, nan_states_error
from dynadepth.policies.calibration import PenaltyMix
from dynadepth.policies.menu import Menu
from dynadepth.policies.prompt_batch import PromptBatch

__all__ = [
    "MenuPolicy",
]


class MenuPolicy(Policy):
    """Gives each prompt one of a few plans: the one whose score minus the price of its depth is highest.

    Rows of a batch that get the same plan run together, and there are few plans. Each prompt is charged one of two
    neighbouring penalties, selected by a number that depends on its tokens alone. So a budget is met exactly on the
    prompts that it was calibrated on, and no prompt's plan depends on its batch. A decision costs one small matrix
    product and one transfer to the host, of the chosen plans.

    Args:
        menu: The plans and the heads that score them.
        penalty: What a depth of 1 costs, in units of the score; one number for all prompts, or two and their shares.

    Raises:
        ConfigError: A penalty is not finite.

    Example:
        >>> from dynadepth.policies.menu import Menu, MenuHead
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
        """Return the layers that all plans of the menu share, and EXECUTE from the first decision on."""
        plans = np.full((num_rows, self.num_layers), int(EXECUTE), dtype=np.uint8)
        first = self.decision_layers[0]
        plans[:, :first] = self.menu.plans[0, :first]
        return plans

    def known_plans(self) -> Plans:
        """Return the plans of the menu."""
        return self.menu.plans

    @torch.no_grad()
    def decide(self, layer_idx: int, hidden_states: Tensor, prompts: PromptBatch) -> Plans:
        """Choose a plan for each prompt and return its actions up to the next decision.

        Args:
            layer_idx: One of `decision_layers`.
            hidden_states: States entering that layer. Shape (batch, tokens, hidden), model dtype, any device.
            prompts: The prompts of the batch, with their plans as decided so far.

        Returns:
            Actions, on the host. Shape (batch, layers up to the next of `decision_layers`), uint8.

        Raises:
            ConfigError: The states have another width than the heads, or hold NaN at a prompt's token; or two penalties
                are mixed and the prompts' tokens are not known.
            PlanError: It does not decide at this layer; or no plan agrees with what a prompt has run, because the
                limits of the wrapped model changed it.
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
            # Known on the host, and small: copying it to the device does not wait.
            still_open = menu.open_plans(step, prompts.plans)
            check_open(still_open, layer_idx)
            closed = torch.from_numpy(~still_open)
            priced = priced.masked_fill(closed.to(priced.device), -math.inf)
        chosen = priced.argmax(dim=-1)
        # One transfer for both; argmax alone would turn NaN into a plan.
        chosen = chosen.masked_fill(scores.isnan().any(dim=-1), -1)
        rows = chosen.cpu().numpy()
        if (rows < 0).any():
            raise nan_states_error(layer_idx)
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
