"""Time of a new token with late exits, over the base model's own decoding, in turns on the same prompts."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from dynadepth.drafting.pace import Pace
from dynadepth.exits.exit_forward import Exits
from dynadepth_search.progress import Progress
from dynadepth_search.scoring.own_text import Text
from dynadepth_search.scoring.runtime_checks import wrapped

__all__ = ["Batch", "TimeOverBase", "Way", "decode", "decode_with", "long_answers", "time_in_turns"]

# Token ids and attention mask, left-padded. Shapes (rows, tokens).
Batch = tuple[torch.Tensor, torch.Tensor]
# How to decode a batch: the seconds it took, and the new tokens of its longest row.
Way = Callable[[Batch], tuple[float, int]]


@dataclass(frozen=True, slots=True)
class TimeOverBase:
    """Seconds of a step of new tokens over the base model's.

    Attributes:
        median: Over the turns; in each, the times of all batches are added up.
        low: The lowest of the turns.
        high: The highest of them.
        batches: Batches of a turn.
        milliseconds: Of a step, over all turns.
    """

    median: float
    low: float
    high: float
    batches: int
    milliseconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)


def long_answers(own: Sequence[Text], new_tokens: int) -> list[int]:
    """Return the prompts that the base model gives an answer of at least half the longest length by itself.

    What a model is made to say behind the end of its answer repeats itself, and is nobody's case.

    Args:
        own: The base model's own texts.
        new_tokens: The most tokens of an answer.
    """
    return [row for row, text in enumerate(own) if 2 * (len(text.ids) - text.prompt) >= new_tokens]


def decode(model: Any, batch: Batch, *, new_tokens: int, **more: Any) -> tuple[float, int]:
    """Let a model continue a batch greedily.

    Args:
        model: The model, wrapped or not.
        batch: The prompts.
        new_tokens: The most tokens of a continuation.
        **more: What `generate` is given besides.

    Returns:
        The seconds, and the new tokens of the longest row.
    """
    ids, mask = batch
    begun = time.perf_counter()
    with torch.inference_mode():
        text = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            **more,
        )
    return time.perf_counter() - begun, text.shape[1] - ids.shape[1]


def decode_with(
    model: Any, batch: Batch, exits: Exits, *, new_tokens: int, pace: Pace | None = None
) -> tuple[float, int]:
    """Let a model continue a batch with exits on; as `decode`.

    Args:
        model: The unwrapped base model; it is unwrapped again afterwards.
        batch: The prompts.
        exits: Where new tokens may leave. What their dial has learnt stays with it.
        new_tokens: The most tokens of a continuation.
        pace: Of lossless decoding, with what it has learnt; None: a new one.
    """
    with wrapped(model, exits=exits) as inner:
        if pace is not None:
            inner.dynadepth.exit_pace = pace
        return decode(inner, batch, new_tokens=new_tokens)


def time_in_turns(
    base: Way,
    ways: Mapping[str, Way],
    batches: Sequence[Batch],
    *,
    rounds: int,
    progress: Progress,
) -> dict[str, TimeOverBase]:
    """Time several ways to decode against the base model's.

    Args:
        base: The base model's.
        ways: The others, by name; each runs once before anything is timed.
        batches: The prompts, one turn after the other.
        rounds: How often each way decodes each batch.
        progress: Called with the stage, the number of finished rounds and of all.

    Returns:
        The times by name.
    """
    every = (base, *ways.values())
    for way in every:
        way(batches[0])
    times = np.empty((len(every), rounds, len(batches)))
    for turn in range(rounds):
        progress("timing", turn, rounds)
        for place, batch in enumerate(batches):
            for number, way in enumerate(every):
                seconds, steps = way(batch)
                times[number, turn, place] = seconds / max(1, steps)
    progress("timing", rounds, rounds)
    summed = times.sum(axis=2)
    ratios = summed[1:] / summed[0]
    return {
        name: TimeOverBase(
            median=float(np.median(found)),
            low=float(found.min()),
            high=float(found.max()),
            batches=len(batches),
            milliseconds=1e3 * float(own.mean()),
        )
        for name, found, own in zip(ways, ratios, times[1:], strict=True)
    }
