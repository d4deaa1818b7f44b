"""Ways to run a model over a padded batch, whatever its family calls its cache and positions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from dynadepth.caching.depth_cache import DepthCache
from dynadepth.caching.row_plans import RowPlans
from dynadepth.errors import UnsupportedModelError
from dynadepth.execution.attachment import Attachment
from dynadepth.execution.executor import NOTHING, Skipped
from dynadepth.execution.plan_forward import PlanScope
from dynadepth.exits.exit_forward import Exits, ExitScope
from dynadepth.exits.exit_stats import ExitStats
from dynadepth.models.structure import LayerStack, position_arguments, takes
from dynadepth.plans import Plans
from dynadepth.policies.prompt_batch import PromptBatch
from dynadepth.proving.tiny_config import VOCAB_SIZE

__all__ = ["MODES", "Batch", "FixedPlans", "generate", "prompts", "run"]

# In one forward without a cache; a prefill, then single tokens; a prefill, then several tokens at once.
Mode = Literal["uncached", "one token at a time", "three tokens at a time"]
MODES: tuple[Mode, ...] = ("uncached", "one token at a time", "three tokens at a time")
_NEW_TOKENS = 4
_CACHE_NAMES = ("cache", "past_key_values")


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts with more tokens behind them, padded on the left.

    Attributes:
        ids: Token ids. Shape (rows, tokens), int64.
        mask: 1 for real tokens. Shape (rows, tokens), int64.
        prefill: Columns of the prompts.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    prefill: int

    def row(self, index: int, *, padded: bool) -> "Batch":
        """Return one row alone, with its padding or without."""
        begin = 0 if padded else int(self.ids.shape[1] - self.mask[index].sum())
        part = (slice(index, index + 1), slice(begin, None))
        return Batch(self.ids[part], self.mask[part], self.prefill - begin)


def prompts(lengths: list[int], seed: int) -> Batch:
    """Return random prompts of these lengths, each with a few more tokens, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + _NEW_TOKENS
    # The last tokens of the vocabulary stand for images and the like in some families.
    ids = torch.randint(3, VOCAB_SIZE - 8, (len(lengths), width), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        padding = max(lengths) - length
        ids[row, :padding] = 0
        mask[row, :padding] = 0
    return Batch(ids, mask, max(lengths))


def run(model: Any, batch: Batch, mode: Mode) -> torch.Tensor:
    """Return the logits of all columns.

    Args:
        model: The model.
        batch: The tokens.
        mode: How they are given to it.

    Returns:
        Shape (rows, tokens, vocabulary).

    Raises:
        UnsupportedModelError: The model returns no cache, or one of another form.
    """
    positions = position_arguments(model, batch.mask)
    with torch.no_grad():
        if mode == "uncached":
            logits: torch.Tensor = model(
                input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, **positions
            ).logits
            return logits
        cache_name = next((each for each in _CACHE_NAMES if takes(model, each)), None)
        if cache_name is None:
            raise UnsupportedModelError("its forward takes no cache")
        size = 1 if mode == "one token at a time" else 3
        width = batch.ids.shape[1]
        ends = [batch.prefill, *range(batch.prefill + size, width, size), width]
        pieces, begin, cache = [], 0, None
        for end in dict.fromkeys(ends):
            given = {name: each[:, begin:end] for name, each in positions.items()}
            if cache is not None:
                given[cache_name] = cache
            output = model(
                input_ids=batch.ids[:, begin:end],
                attention_mask=batch.mask[:, :end],
                use_cache=True,
                **given,
            )
            cache = getattr(output, cache_name, None)
            if cache is None:
                raise UnsupportedModelError("its forward returns no cache")
            pieces.append(output.logits)
            begin = end
        return torch.cat(pieces, dim=1)


def generate(model: Any, batch: Batch, num_tokens: int) -> tuple[list[list[int]], torch.Tensor]:
    """Continue prompts greedily.

    Args:
        model: The model.
        batch: Of it, the prompts.
        num_tokens: New tokens of each row.

    Returns:
        The new tokens of each row, and the logits of each step, shape (steps, rows, vocabulary), float32.
    """
    output = model.generate(
        batch.ids[:, : batch.prefill],
        attention_mask=batch.mask[:, : batch.prefill],
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[:, batch.prefill :].tolist(), torch.stack(output.logits)


class FixedPlans:
    """A planner with one plan for each row, put on a model for the duration of a block.

    Args:
        model: The model, not wrapped.
        stack: Its layers, proved.
        plans: The plans. Shape (rows, layers), uint8.
        skips: What rows go through in place of each layer that they skip; None: nothing.
        exits: Where new tokens may leave early; None: nowhere.
    """

    def __init__(
        self,
        model: Any,
        stack: LayerStack,
        plans: Plans,
        skips: Sequence[Skipped] | None = None,
        exits: Exits | None = None,
    ) -> None:
        self.num_layers = stack.num_layers
        self.skips = (NOTHING,) * stack.num_layers if skips is None else tuple(skips)
        self.plans = plans
        self.attachment = Attachment()
        self.exits, self.exit_stats = exits, ExitStats(stack.num_layers)
        self.exit_audit = None
        self.scope_class = PlanScope if exits is None else ExitScope
        self._model, self._stack = model, stack

    def __enter__(self) -> "FixedPlans":
        self.attachment.attach(self, self._model, self._stack)
        return self

    def __exit__(self, *_: object) -> None:
        self.attachment.detach(self, self._model)

    def start(self, num_rows: int, cache: DepthCache | None) -> tuple[RowPlans, bool]:
        """Return the plans of the batch; those on the cache if it has been planned."""
        if cache is not None and cache.row_plans is not None:
            return cache.row_plans, False
        plans = RowPlans(np.resize(self.plans, (num_rows, self.num_layers)))
        if cache is not None:
            cache.row_plans = plans
        return plans, True

    def only_plans(self) -> bool:
        """Say no: the forward runs."""
        return False

    def finish(self, plans: RowPlans, *, is_prefill: bool) -> None:
        """Record nothing."""

    def knows_lengths(self) -> bool:
        """Say yes: nothing about the prompts is asked."""
        return True

    def prompt_mask(self, real: torch.Tensor) -> torch.Tensor:
        """Return all real tokens."""
        return real

    def decide(
        self,
        plans: RowPlans,
        layer_idx: int,
        hidden_states: torch.Tensor,
        prompts: PromptBatch,
    ) -> None:
        """Do nothing: every layer is decided from the start.

        Args:
            plans: The plans of the batch.
            layer_idx: The layer that the states enter.
            hidden_states: Shape (rows, tokens, hidden).
            prompts: The prompts of the batch.
        """
