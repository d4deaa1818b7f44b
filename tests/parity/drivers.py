"""Ways to drive a model over a padded batch, and the baked model as the reference of each row."""

from typing import Any, Literal

import numpy as np
import torch
from transformers import DynamicCache

from dynadepth.wrapping.bake import bake

Mode = Literal["full", "steps", "chunks"]
MODES: tuple[Mode, ...] = ("full", "steps", "chunks")


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Number the real tokens of each row from 0."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def drive(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    prefill: int,
    mode: Mode,
    cache: Any = None,
) -> torch.Tensor:
    """Return the logits of all columns, shape (rows, columns, vocabulary), run in the way `mode` names.

    full: no cache. steps: prefill, then one token at a time. chunks: prefill, then three tokens at a time.
    """
    positions = positions_of(mask)
    with torch.no_grad():
        if mode == "full":
            return model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        cache = DynamicCache(config=model.config) if cache is None else cache
        size = 1 if mode == "steps" else 3
        ends = [prefill, *range(prefill + size, ids.shape[1], size), ids.shape[1]]
        logits, begin = [], 0
        for end in ends:
            if end > begin:
                logits.append(
                    model(
                        ids[:, begin:end],
                        attention_mask=mask[:, :end],
                        position_ids=positions[:, begin:end],
                        past_key_values=cache,
                        use_cache=True,
                    ).logits
                )
            begin = end
        return torch.cat(logits, dim=1)


def baked_rows(
    base: Any, plans: np.ndarray, ids: torch.Tensor, mask: torch.Tensor, *, padded: bool
) -> list[torch.Tensor]:
    """Return each row's logits on its real tokens, by the baked model of its plan, alone and uncached.

    padded: keep the row's padding, which is what a sliding window over columns sees with padding on the right.
    """
    rows = []
    for row, plan in enumerate(plans):
        real = mask[row].bool()
        chosen = torch.ones_like(real) if padded else real
        logits = drive(
            bake(base, plan), ids[row : row + 1, chosen], mask[row : row + 1, chosen], 0, "full"
        )[0]
        rows.append(logits[real[chosen]])
    return rows


def mixed_plans(num_layers: int, num_rows: int, seed: int) -> np.ndarray:
    """Return random plans whose rows differ, with skips, repeats and leaders of each mask kind among them."""
    rng = np.random.default_rng(seed)
    plans = rng.integers(0, 3, size=(num_rows, num_layers)).astype(np.uint8)
    plans[0, 0] = 0  # The first layer's slot stays empty.
    plans[1 % num_rows, 1] = 0  # So does the second's: gemma3's first full-attention layer.
    plans[2 % num_rows, 0] = 2
    plans[plans.sum(axis=1) == 0, -1] = 1
    return plans


class Watch:
    """An observer that keeps all it is shown."""

    def __init__(self, layers):
        self.layers = layers
        self.seen = []

    def observe(self, layer_idx, states, entering):
        self.seen.append((layer_idx, states.clone(), entering))
