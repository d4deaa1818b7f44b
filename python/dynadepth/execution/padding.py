"""Which tokens of a batch are real, and a check that each row holds one prompt.

Both are read from the arguments of the model's forward, or else from the mask that it made for the layer.
"""

from typing import Any

import torch

from dynadepth.errors import UnsupportedModelError
from dynadepth.execution.layer_call import LayerCall

__all__ = ["real_tokens"]


def real_tokens(call: LayerCall, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Return which tokens of a prefill are not padding.

    Args:
        call: The call of any decoder layer in that forward.
        attention_mask: The 2-D mask passed to the model's forward, or None. Shape (rows, tokens) or wider.

    Returns:
        Shape (rows, tokens), bool, on the states' device.

    Raises:
        UnsupportedModelError: A row packs several prompts, or the padding cannot be read.
    """
    rows, tokens = call.hidden_states.shape[:2]
    device = call.hidden_states.device
    if attention_mask is not None:
        mask = attention_mask[:, :tokens].to(device=device, dtype=torch.bool)
    else:
        mask = _mask_from_layer(call.attention_mask, rows, tokens, device)
    _check_unpacked(call, mask)
    return mask


def _check_unpacked(call: LayerCall, mask: torch.Tensor) -> None:
    """Refuse rows that hold several prompts: one row has one plan.

    Raises:
        UnsupportedModelError: Positions restart between real tokens, or lengths of packed prompts were given.
    """
    packed = any(
        name.startswith("cu_seq_len") and value is not None
        for name, value in call.arguments.items()
    )
    positions = call.arguments.get("position_ids")
    if isinstance(positions, torch.Tensor) and positions.shape[-1:] == mask.shape[-1:]:
        falls = positions[..., 1:] < positions[..., :-1]
        packed = packed or bool((falls & mask[:, 1:] & mask[:, :-1]).any())
    if packed:
        raise UnsupportedModelError(
            "positions restart within a row, so it packs several prompts, which cannot have plans of their own; "
            "give each prompt its own row of a padded batch"
        )


def _mask_from_layer(mask: Any, rows: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Read from a layer's own prefill mask which tokens are real: each real token attends to itself."""
    if mask is None:
        return torch.ones(rows, tokens, dtype=torch.bool, device=device)
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or mask.shape[-1] < tokens:
        raise UnsupportedModelError(
            f"the model was given no 2-D attention mask, and the padding cannot be read from the "
            f"{type(mask).__name__} that its layers were given; pass attention_mask of shape (batch, tokens)"
        )
    diagonal = mask[:, 0].diagonal(dim1=-2, dim2=-1)[:, :tokens]
    real = (
        diagonal if diagonal.dtype == torch.bool else diagonal > torch.finfo(diagonal.dtype).min / 2
    )
    return real.expand(rows, tokens).to(device)
