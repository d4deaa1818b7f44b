"""What only the real runtime can show: the plans that a wrapped model makes, its scores and its time.

The model is wrapped with `wrap_model`, as a user does it, run on prompts alone, and unwrapped again.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dynadepth.plans import Plans
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from dynadepth_search.data.encoding import EncodedExample
from dynadepth_search.data.tasks import Example
from dynadepth_search.scoring.batching import pad_left
from dynadepth_search.scoring.scorer import Scorer

__all__ = ["RuntimeCheck", "TimeRatio", "check_runtime", "planned", "time_prefill", "wrapped"]


@dataclass(frozen=True, slots=True)
class RuntimeCheck:
    """How much the wrapped model's own scores differ from those of the sweep.

    Args:
        prompts: Number of prompts checked.
        choices: Number of scores compared; 0 for prompts alone, whose differences are 0 and meaningless.
        mean_difference: Mean absolute difference of a choice's score, in nats.
        max_difference: Largest absolute difference, in nats. Half-precision logits are rounded to
            multiples of 1/16, so a score that sums twenty of them may be off by half a nat.
        plans_differing: Number of prompts whose plan changes when they are planned in another batch.
    """

    prompts: int
    choices: int
    mean_difference: float
    max_difference: float
    plans_differing: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TimeRatio:
    """Wall time of a prefill as a fraction of the base model's on the same prompts, right before or after it.

    Args:
        median: Median ratio over the rounds.
        low: Ratio of the fastest round.
        high: Ratio of the slowest round.
        rounds: Number of rounds; each runs every prompt once with every policy.
        prompts: Number of prompts of a round, which run one at a time.
        milliseconds: Median over the rounds of the mean time of one prompt.
    """

    median: float
    low: float
    high: float
    rounds: int
    prompts: int
    milliseconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)


@contextmanager
def wrapped(model: Any, **arguments: Any) -> Iterator[Any]:
    """Wrap a model for the duration of a block."""
    wrap_model(model, **arguments)
    try:
        yield model
    finally:
        unwrap_model(model)


def planned(
    model: Any, scorer: Scorer, examples: Sequence[Example], *, batch_size: int = 16
) -> Plans:
    """Let a wrapped model plan prompts, as it would for a user.

    Args:
        model: The wrapped model.
        scorer: Encodes the prompts, left-padded.
        examples: The prompts.
        batch_size: Number of prompts of one forward, which are of similar length.

    Returns:
        The plans, in the order of the prompts. Shape (prompts, num_layers), uint8.
    """
    plans = np.empty((len(examples), scorer.num_layers), dtype=np.uint8)
    for rows, input_ids, attention_mask in scorer.prompt_batches(examples, batch_size):
        plans[rows] = model.dynadepth.plan_prompts(input_ids, attention_mask)
    return plans


def check_runtime(
    model: Any, scorer: Scorer, examples: Sequence[Example], plans: Plans, **arguments: Any
) -> RuntimeCheck:
    """Score examples with the wrapped model itself and compare with the sweep.

    Args:
        model: The unwrapped base model; it is unwrapped again afterwards.
        scorer: Scores the same examples with sweeps.
        examples: A few examples with answers.
        plans: What the wrapped model planned for them. Shape (examples, num_layers), uint8.
        **arguments: Arguments of `wrap_model`.

    Returns:
        The differences.
    """
    expected = scorer.outcomes(list(examples), plans, np.arange(len(examples))).scores
    encoded = [scorer.encode(example) for example in examples]
    owner = [index for index, item in enumerate(encoded) for _ in item.rows]
    rows = [row for item in encoded for row in item.rows]
    input_ids, attention_mask = pad_left(rows, model.device)
    lengths = [len(encoded[index].prompt_ids) for index in owner]
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    with wrapped(model, **arguments), torch.inference_mode():
        with model.dynadepth.prompt(lengths):
            model(**inputs, use_cache=False, logits_to_keep=1)
        again: Plans = model.dynadepth.last_plans
        # Scored under the plans that were evaluated: in this batch, a near-tie may be decided
        # differently.
        with model.dynadepth.plans(plans[owner]):
            logits = model(**inputs, use_cache=False).logits
    differences: list[float] = []
    first_row = 0
    for item, scores in zip(encoded, expected, strict=True):
        own = _scores(item, logits[first_row : first_row + len(item.rows)])
        differences += np.abs(own - scores).tolist()
        first_row += len(item.rows)
    return RuntimeCheck(
        prompts=len(examples),
        choices=sum(len(scores) for scores in expected),
        mean_difference=float(np.mean(differences)) if differences else 0.0,
        max_difference=max(differences, default=0.0),
        plans_differing=len(
            {owner[row] for row in np.flatnonzero((again != plans[owner]).any(axis=1))}
        ),
    )


def _scores(item: EncodedExample, logits: torch.Tensor) -> npt.NDArray[np.float64]:
    """Return the score of each answer from the logits of its left-padded rows."""
    if not item.num_answers:
        return np.zeros(0)
    width = logits.shape[1]
    at = [
        logits[row, width - len(item.rows[row]) + place].double().log_softmax(dim=-1)
        for row, place in item.places.tolist()
    ]
    taken = np.array(
        [
            float(at[place][token])
            for place, token in zip(
                item.entry_place.tolist(), item.entry_token.tolist(), strict=True
            )
        ]
    )
    scores: npt.NDArray[np.float64] = np.add.reduceat(taken, item.starts) / item.divisors
    return scores


def time_prefill(
    model: Any,
    scorer: Scorer,
    policies: Mapping[str, tuple[Mapping[str, Any], Sequence[Example]]],
    *,
    rounds: int = 5,
) -> tuple[dict[str, TimeRatio], float]:
    """Time the prefill of prompts, one at a time and with a cache, against the base model.

    In every round the base model runs the same prompts right before a policy or right after it, in turns, so that a
    slowdown of the machine affects both.

    Args:
        model: The unwrapped base model; it is unwrapped again afterwards.
        scorer: Encodes the prompts.
        policies: Arguments of `wrap_model` for each policy, by its name, and the prompts that it is timed on.
        rounds: Number of rounds. Before each measurement one prompt runs that does not count: what a policy or the base
            model sets up at its first prompt is not what a prefill costs.

    Returns:
        The ratio to the base model by name, and the base model's milliseconds for one prompt.
    """
    inputs = {
        name: [scorer.encode_prompts([example]) for example in examples]
        for name, (_, examples) in policies.items()
    }

    def prefill(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, logits_to_keep=1)

    def run(prompts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
        prefill(*prompts[0])
        _wait(model)
        start = time.perf_counter()
        for each in prompts:
            prefill(*each)
        _wait(model)
        return (time.perf_counter() - start) / len(prompts)

    base: dict[str, list[float]] = {name: [] for name in policies}
    taken: dict[str, list[float]] = {name: [] for name in policies}
    with torch.inference_mode():
        for number in range(rounds):
            for name, (arguments, _) in policies.items():
                if number % 2 == 0:
                    base[name].append(run(inputs[name]))
                with wrapped(model, **arguments):
                    taken[name].append(run(inputs[name]))
                if number % 2 == 1:
                    base[name].append(run(inputs[name]))
    ratios = {}
    for name, seconds in taken.items():
        each = np.array(seconds) / np.array(base[name])
        ratios[name] = TimeRatio(
            median=float(np.median(each)),
            low=float(each.min()),
            high=float(each.max()),
            rounds=rounds,
            prompts=len(inputs[name]),
            milliseconds=float(np.median(seconds)) * 1e3,
        )
    return ratios, float(np.median(list(base.values()))) * 1e3


def _wait(model: Any) -> None:
    """Wait until an accelerator has finished its work."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
