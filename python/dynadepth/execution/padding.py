"""Which tokens of a batch are real, and a check that each row holds one prompt.

Both are read from the arguments of the model's forward, or else from the mask that it made for the layer.
"""

from dataclasses import dataclass
from typing import Any

import torch

from dynadepth.errors import UnsupportedModelError
from dynadepth.execution.layer_call import LayerCall

__all__ = ["SpecialTokens", "real_tokens", "unmarked_padding"]


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Token ids that may pad the end of a row.

    Attributes:
        padding: The id that is used only for padding; None if the model has none.
        doubtful: Ids that may be padding or a row's own last token: 0, with which evaluation harnesses pad, and, if no
            id is used only for padding, those that begin or end texts.
    """

    padding: int | None
    doubtful: tuple[int, ...]

    @classmethod
    def of(cls, config: Any) -> "SpecialTokens":
        """Read them from a model's config."""
        pad = getattr(config, "pad_token_id", None)
        known = (getattr(config, name, None) for name in ("eos_token_id", "bos_token_id"))
        ends = {
            token
            for ids in known
            for token in (ids if isinstance(ids, (list, tuple)) else (ids,))
            if token is not None
        }
        padding = pad if pad is not None and pad not in ends else None
        doubtful = {0} - {padding} if padding is not None else {0, *ends}
        return cls(padding, tuple(sorted(doubtful)))


def unmarked_padding(
    real: torch.Tensor, tokens: torch.Tensor, special: SpecialTokens
) -> torch.Tensor:
    """Return which tokens are real in a batch that has no mask to tell its padding.

    A causal model needs no mask for padding on the right, so evaluation harnesses pass none; a policy that took the
    padding for text would plan a row differently from the same row alone.

    Args:
        real: True for tokens that are not known to be padding. Shape (rows, tokens), bool.
        tokens: Token ids, shape (rows, tokens), integer; embeddings, which do not tell padding, are ignored.
        special: The ids that may be padding.

    Returns:
        `real` without the padding at the end of each row. Shape (rows, tokens), bool.

    Raises:
        UnsupportedModelError: There are several rows, and one ends with a token that may or may not be padding.
    """
    if tokens.is_floating_point():
        return real
    if special.padding is not None:
        padding = tokens == special.padding
        # A row of nothing but padding keeps its tokens, since the policy has to read something.
        trailing = padding.flip(1).long().cumprod(dim=1).flip(1).bool()
        real = real & ~(trailing & ~trailing.all(dim=1, keepdim=True))
    if len(tokens) > 1:
        last = tokens[:, -1:]
        doubtful = torch.tensor(special.doubtful, device=tokens.device)
        found = last[(last == doubtful).any(dim=1)].flatten().tolist()
        if found:
            raise UnsupportedModelError(
                f"no attention_mask was given, and {len(found)} of {len(tokens)} rows end with token {found[0]}, which "
                "may be padding or text; pass attention_mask of shape (rows, tokens), 1 for text and 0 for padding "
                "(all ones if nothing is padded), or say how long the prompts are: with model.dynadepth.prompt(lengths)"
            )
    return real


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
