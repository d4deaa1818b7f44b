"""What a policy is told about the prompts in addition to their states.

This includes a number in [0, 1) for each prompt. It depends on the prompt's token ids alone, so that two penalties can
be mixed over prompts without drawing random numbers and independently of the batch.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynadepth.errors import ConfigError
from dynadepth.plans import Plans

__all__ = ["PromptBatch", "prompt_mix"]

# A polynomial of the tokens over a prime field, whose products stay within 63 bits.
_PRIME = 2**31 - 1
_BASE = 1_103_515_245
_SPREAD = 48_271


@dataclass(slots=True, eq=False)
class PromptBatch:
    """The prompts of a batch that is being planned.

    Args:
        mask: True for the prompt's real tokens. Shape (batch, tokens), bool, on the states' device.
        plans: What has been decided so far; layers that are not decided yet hold the policy's initial plans. Shape
            (batch, num_layers), uint8, on the host. Must not be written to.
        tokens: The model's input: token ids (batch, tokens) or embeddings (batch, tokens, hidden); None if
            neither is known.

    Attributes:
        notes: What a policy stores about these prompts between decisions.
    """

    mask: Tensor
    plans: Plans
    tokens: Tensor | None = None
    notes: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    _mix: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def mix(self) -> Tensor:
        """A number in [0, 1) for each prompt, see `prompt_mix`. Shape (batch,), float32, on the states' device.

        Raises:
            ConfigError: The forward received neither token ids nor embeddings in a known form.
        """
        if self._mix is None:
            if self.tokens is None:
                raise ConfigError(
                    "the policy tells prompts apart by their tokens, but this forward got neither input_ids nor "
                    "inputs_embeds by name or in the first place; pass input_ids="
                )
            self._mix = prompt_mix(self.tokens, self.mask)
        return self._mix

    @property
    def last_places(self) -> Tensor:
        """The column of each prompt's last token. Shape (batch,), int64, on the states' device."""
        tokens = self.mask.shape[1]
        return tokens - 1 - self.mask.long().flip(1).argmax(dim=1)


def prompt_mix(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return a number in [0, 1) for each prompt that depends on its real tokens alone.

    With the n real tokens t_0 .. t_{n-1} of a prompt: h = sum over i of (t_i + 1) * 1103515245^(i + 1) modulo 2^31 - 1,
    and the number is (48271 * h modulo 2^31 - 1) / 2^31, cut to 24 bits so that float32 holds it exactly. Padding has
    no effect. Nothing waits for the device.

    Args:
        tokens: Token ids, shape (batch, tokens), integer; or embeddings, shape (batch, tokens, hidden), whose bfloat16
            bits are combined in the same way into one number for each token.
        mask: True for real tokens. Shape (batch, tokens), bool.

    Returns:
        Shape (batch,), float32.

    Example:
        >>> ids = torch.tensor([[5, 6, 7], [0, 6, 7]])
        >>> prompt_mix(ids, torch.tensor([[False, True, True], [False, True, True]])).unique().numel()
        1
    """
    if tokens.is_floating_point():
        bits = tokens.to(torch.bfloat16).view(torch.int16).to(torch.int64) + 2**15
        powers = _powers(bits.shape[-1], bits.device)
        tokens = (bits * powers % _PRIME).sum(dim=-1) % _PRIME
    real = mask.to(torch.bool)
    position = (real.to(torch.int64).cumsum(dim=1) - 1).clamp(min=0)
    powers = _powers(tokens.shape[1], tokens.device)[position]
    terms = (tokens.to(torch.int64) + 1) % _PRIME * powers % _PRIME
    total = terms.masked_fill(real.logical_not(), 0).sum(dim=1) % _PRIME
    return (total * _SPREAD % _PRIME >> 7).to(torch.float32) / 2**24


def _powers(count: int, device: torch.device) -> Tensor:
    powers = np.empty(count, dtype=np.int64)
    power = 1
    for index in range(count):
        # The first power comes first: the zeroth would leave the first token unchanged.
        power = power * _BASE % _PRIME
        powers[index] = power
    return torch.from_numpy(powers).to(device)
