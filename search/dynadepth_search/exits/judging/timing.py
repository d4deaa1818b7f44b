"""Time of a new token with late exits, over the base model's own decoding, in turns on the same prompts."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dynadepth.drafting.pace import Pace
from dynadepth.exits.exit_forward import Exits
from dynadepth_search.progress import Progress
from dynadepth_search.scoring.batching import pad_left
from dynadepth_search.scoring.own_text import Text
from dynadepth_search.scoring.runtime_checks import wrapped

__all__ = [
    "Batch",
    "TimeOverBase",
    "Way",
    "base_way",
    "exits_way",
    "long_answers",
    "time_in_turns",
    "times_over_base",
    "wrapped_way",
]

# Prompts of which `times_over_base` takes the time, and how often.
_TIMED, _ROUNDS = 4, 2
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


def long_answers(own: Sequence[Text], new_tokens: int, most: int) -> list[int]:
    """Return prompts, evenly chosen of those with a long answer: at least half the longest, which ends by itself.

    What a model is made to say behind the end of its answer repeats itself, and is nobody's case.

    Args:
        own: The base model's own texts.
        new_tokens: The most tokens of an answer.
        most: The most prompts.
    """
    long = [row for row, text in enumerate(own) if 2 * (len(text.ids) - text.prompt) >= new_tokens]
    return long[:: max(1, len(long) // most)][:most]


def base_way(model: Any, *, new_tokens: int, **more: Any) -> Way:
    """Return the greedy decoding of a model as it is.

    Args:
        model: The model, wrapped or not.
        new_tokens: The most tokens of a continuation.
        **more: What `generate` is given besides.
    """

    def way(batch: Batch) -> tuple[float, int]:
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

    return way


def exits_way(model: Any, exits: Exits, *, new_tokens: int, pace: Pace | None = None) -> Way:
    """Return the greedy decoding of a model with exits on.

    Args:
        model: The unwrapped base model; after each batch it is unwrapped again.
        exits: Where new tokens may leave. What their dial has learnt stays with it.
        new_tokens: The most tokens of a continuation.
        pace: Of lossless decoding, with what it has learnt; None: a new one for each batch.
    """
    return wrapped_way(model, new_tokens=new_tokens, pace=pace, exits=exits)


def wrapped_way(model: Any, *, new_tokens: int, pace: Pace | None = None, **arguments: Any) -> Way:
    """Return the greedy decoding of a model that is wrapped; that it is wrapped takes no time here.

    Args:
        model: The unwrapped base model; after each batch it is unwrapped again.
        new_tokens: The most tokens of a continuation.
        pace: As for `exits_way`.
        **arguments: Of `wrap_model`.
    """

    def way(batch: Batch) -> tuple[float, int]:
        with wrapped(model, **arguments) as inner:
            if pace is not None:
                inner.dynadepth.exit_pace = pace
            return base_way(inner, new_tokens=new_tokens)(batch)

    return way


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


def times_over_base(
    model: Any,
    prompts: Sequence[npt.NDArray[np.int64]],
    own: Sequence[Text],
    ways: Mapping[str, Way],
    *,
    new_tokens: int,
    progress: Progress,
) -> dict[str, TimeOverBase]:
    """Time several ways to decode against the base model's, on a few prompts with long answers, one at a time.

    Args:
        model: The unwrapped base model.
        prompts: Token ids of each prompt.
        own: The base model's own texts, from `base_texts`.
        ways: The ways, by name.
        new_tokens: The most tokens of a continuation.
        progress: Called with the stage, the number of finished rounds and of all.

    Returns:
        The times by name; none if no answer is long enough.
    """
    chosen = long_answers(own, new_tokens, _TIMED)
    if not chosen:
        return {}
    batches = [pad_left([prompts[row]], model.device) for row in chosen]
    base = base_way(model, new_tokens=new_tokens)
    return time_in_turns(base, ways, batches, rounds=_ROUNDS, progress=progress)
