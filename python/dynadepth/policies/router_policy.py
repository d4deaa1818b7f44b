"""The policy that has one router for each layer, which decides during the prefill."""

import math

import torch
from torch import Tensor

from dynadepth.errors import ConfigError
from dynadepth.plans import NUM_ACTIONS, Plans
from dynadepth.policies.base import LayerwisePolicy, actions_of, nan_states_error
from dynadepth.policies.pooling import Pooling
from dynadepth.policies.prompt_batch import PromptBatch
from dynadepth.policies.router_heads import RouterHeads

__all__ = [
    "RouterPolicy",
]

_UNDECIDED = 255


class RouterPolicy(LayerwisePolicy):
    """Decides each layer by its own router, during the prefill.

    The action of layer l for prompt x is argmax over a of `bias[l, a] + shrinkage * h_l(x)_a - penalty * a`, ties to
    the lowest action. With shrinkage 0 it reads no states and has one plan for all prompts; layers whose router is
    constant are not read either. The weights are moved to the device of the states; each decision takes one transfer
    to the host.

    Args:
        heads: The trained routers h.
        bias: The static part b. Shape (num_layers, 3), float32; None means zeros.
        shrinkage: s, how far prompts may deviate from the static part; 0 to 1.
        penalty: lambda, the price of a visit, in logits; any finite number.

    Raises:
        ConfigError: The bias has another shape, or a number is not finite or out of range.
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
        """Return the actions of one layer by the formula above.

        Args:
            layer_idx: One of `decision_layers`.
            hidden_states: States entering that layer. Shape (batch, tokens, hidden), model dtype, any device.
            prompts: The prompts of the batch, with their plans as decided so far.

        Returns:
            Actions, on the host. Shape (batch,), uint8.

        Raises:
            ConfigError: The states hold NaN at a prompt's token.
        """
        heads, bias = self._moved_to(hidden_states.device)
        # Under a caller's autocast the products would be in half precision and near-ties would flip.
        with torch.autocast(hidden_states.device.type, enabled=False):
            config = heads.config
            pooling = prompts.notes.get(config)
            if pooling is None:
                pooling = Pooling.of(prompts.mask, config.num_windows, last_token=config.last_token)
                if bool(prompts.mask.all()):
                    pooling = pooling.unpadded()
                prompts.notes[config] = pooling
            logits = heads.logits(layer_idx, pooling(hidden_states))
            actions = actions_of(bias[layer_idx] + self.shrinkage * logits, self.penalty)
            # One transfer for both; argmax alone would turn NaN into SKIP.
            actions = actions.masked_fill(logits.isnan().any(dim=-1), _UNDECIDED)
        host: Plans = actions.to(torch.uint8).cpu().numpy()
        if (host == _UNDECIDED).any():
            raise nan_states_error(layer_idx)
        return host

    def _moved_to(self, device: torch.device) -> tuple[RouterHeads, Tensor]:
        if device not in self._on_device:
            self._on_device[device] = (self.heads.to(device), self.bias.to(device))
        return self._on_device[device]
