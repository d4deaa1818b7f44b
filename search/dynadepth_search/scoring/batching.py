"""Examples under plans, packed into sweeps of bounded size, and read back as log-probabilities.

The layout of a sweep: which token rows and plan rows are combined, and which places are scored.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dynadepth.execution.sweep import Sweeper
from dynadepth.plans import Plans
from dynadepth_search.data.encoding import EncodedExample
from dynadepth_search.scoring.states import PromptStates, SweptPrompt

__all__ = [
    "Answered",
    "Work",
    "batches_of",
    "cheapest_groups",
    "pack",
    "pad_left",
    "run_sweep",
    "sweep_size",
]

# What suits a processor, measured on two cores with a model of 135M parameters: as many tokens as its caches hold, and
# what a forward costs besides its tokens, which is mostly the reading of the weights.
_CPU_SIZE = (1536, 64)

# Number of rows of logits that are normalised at a time; few enough to stay in the processor's cache.
_LOGIT_ROWS = 64


def sweep_size(device: torch.device, max_tokens: int) -> tuple[int, int]:
    """Return the padded tokens of a sweep that suit a device, and what a sweep costs besides them, in tokens.

    Args:
        device: Where the model is.
        max_tokens: Most tokens of a sweep. Devices other than processors take as many, however much of it is padding.
    """
    return _CPU_SIZE if device.type == "cpu" else (max_tokens, max_tokens)


@dataclass(frozen=True, slots=True)
class Work:
    """Plans of one example.

    Args:
        example: Index of the example, as the caller numbers them.
        encoded: Its token rows.
        plans: The plans. Shape (plans, layers), uint8.
        rows: The caller's row for the outcome of each plan. Shape (plans,), int64.
    """

    example: int
    encoded: EncodedExample
    plans: Plans
    rows: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Answered:
    """The model's answers on one piece of work with K plans.

    Args:
        scores: Summed log-probabilities of each answer's tokens, divided by the example's divisors.
            Shape (K, answers), float64.
        greedy: Whether every scored token is the model's own choice. Shape (K,), bool; empty if it was not read.
        next_token: The model's choice at each place where the vocabulary is compared: after the prompt and, for a
            completion, before each of its other tokens. Ties go to the lowest token. Shape (K, compared), int64; empty
            if it was not read.
        next_log_probs: Log-probabilities there. Shape (K, compared, vocabulary), float32 (float64 if the model is), on
            the model's device; None if they were not read.
    """

    scores: npt.NDArray[np.float64]
    greedy: npt.NDArray[np.bool_]
    next_token: npt.NDArray[np.int64]
    next_log_probs: torch.Tensor | None


def pad_left(
    rows: Iterable[npt.NDArray[np.int64]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token rows as one batch.

    Args:
        rows: Token ids of each row, of any lengths.
        device: The device of the batch.

    Returns:
        Token ids and attention mask. Shape (rows, longest), int64, each.
    """
    listed = list(rows)
    width = max((len(row) for row in listed), default=0)
    ids = np.zeros((len(listed), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(listed):
        ids[index, width - len(row) :] = row
        mask[index, width - len(row) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def batches_of(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return the indices of rows in batches of similar length, the shortest first.

    Args:
        lengths: Number of tokens of each row.
        batch_size: Rows of a batch.
    """
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def pack(
    works: Iterable[Work], *, max_scored: int, max_tokens: int, aim: int, sweep_cost: int
) -> Iterator[list[Work]]:
    """Group work, in the order given, into sweeps.

    Different examples share no visits, so a sweep may end between two of them. Plans of one example share visits, so
    they are split only if the example alone exceeds a bound; a single plan is never split.

    Args:
        works: The work, ideally sorted by length.
        max_scored: Maximum number of scored places of a sweep, counted once for each plan.
        max_tokens: Maximum number of padded tokens of a sweep, counted once for each plan.
        aim: Like `max_tokens`, for sweeps of more than one example.
        sweep_cost: What a sweep costs besides its tokens, see `cheapest_groups`.

    Yields:
        The work of one sweep.
    """
    pieces = [piece for work in works for piece in _within_bounds(work, max_scored, max_tokens)]
    groups = cheapest_groups(
        [len(piece.plans) * len(piece.encoded.rows) for piece in pieces],
        [piece.encoded.longest for piece in pieces],
        [len(piece.plans) * len(piece.encoded.places) for piece in pieces],
        max_scored=max_scored,
        max_tokens=min(aim, max_tokens),
        sweep_cost=sweep_cost,
    )
    for group in groups:
        yield pieces[group]


def _within_bounds(work: Work, max_scored: int, max_tokens: int) -> Iterator[Work]:
    """Yield work in parts that are each within the bounds of a sweep, or are a single plan."""
    encoded = work.encoded
    most = min(
        max_scored // len(encoded.places), max_tokens // (len(encoded.rows) * encoded.longest)
    )
    for start in range(0, len(work.plans), max(1, most)):
        part = slice(start, start + max(1, most))
        yield Work(work.example, encoded, work.plans[part], work.rows[part])


def cheapest_groups(
    rows: Sequence[int],
    widths: Sequence[int],
    places: Sequence[int],
    *,
    max_scored: int,
    max_tokens: int,
    sweep_cost: int,
) -> list[slice]:
    """Part a sequence into runs that share a sweep, so that padded tokens and sweeps cost least together.

    Args:
        rows: Number of rows of each piece.
        widths: Number of tokens of its longest row, to which a sweep pads all of its rows.
        places: Number of its scored places.
        max_scored: Maximum number of scored places of a sweep of more than one piece.
        max_tokens: Maximum number of padded tokens of a sweep of more than one piece.
        sweep_cost: What a sweep costs besides its tokens, in tokens.

    Returns:
        The pieces of each sweep, in their order.
    """
    count = len(rows)
    least, first = [0.0] * (count + 1), [0] * (count + 1)
    for after in range(1, count + 1):
        least[after] = math.inf
        taken = scored = width = 0
        for start in range(after - 1, -1, -1):
            taken, scored = taken + rows[start], scored + places[start]
            width = max(width, widths[start])
            if start < after - 1 and (scored > max_scored or taken * width > max_tokens):
                break
            cost = least[start] + sweep_cost + taken * width
            # Of equal costs, that of fewer sweeps.
            if cost <= least[after]:
                least[after], first[after] = cost, start
    found, after = [], count
    while after:
        found.append(slice(first[after], after))
        after = first[after]
    return found[::-1]


def run_sweep(
    sweeper: Sweeper,
    works: list[Work],
    device: torch.device,
    *,
    next_tokens: bool,
    states: PromptStates | None = None,
) -> tuple[list[Answered], int, int]:
    """Run work in one sweep.

    Args:
        sweeper: The sweeper of the model, already entered.
        works: One group of `pack`.
        device: The device of the model.
        next_tokens: Whether to read the vocabulary too: `greedy`, `next_token` and `next_log_probs`.
        states: Collects the states of the prompts during the sweep; None: nothing is collected.

    Returns:
        One answer for each piece of work; naive visits; executed visits.
    """
    token_rows = [row for work in works for row in work.encoded.rows]
    ids, mask = pad_left(token_rows, device)
    width = ids.shape[1]
    plans: list[Plans] = []
    example: list[npt.NDArray[np.int64]] = []
    score: list[npt.NDArray[np.int64]] = []
    swept: list[SweptPrompt] = []
    first_token_row = first_plan_row = 0
    for work in works:
        encoded, count = work.encoded, len(work.plans)
        num_rows = len(encoded.rows)
        plans.append(np.repeat(work.plans, num_rows, axis=0))
        example.append(np.tile(first_token_row + np.arange(num_rows), count))
        lengths = np.array([len(row) for row in encoded.rows])
        row, offset = encoded.places.T
        pairs = np.empty((count, len(row), 2), dtype=np.int64)
        pairs[..., 0] = first_plan_row + np.arange(count)[:, None] * num_rows + row
        pairs[..., 1] = width - lengths[row] + offset
        score.append(pairs.reshape(-1, 2))
        start = width - int(lengths[0])
        # Every row of an example begins with the prompt, so the first one is used.
        firsts = first_plan_row + np.arange(count) * num_rows
        after = start + len(encoded.prompt_ids)
        swept.append(SweptPrompt(work.example, work.plans, firsts, start, after))
        first_token_row += num_rows
        first_plan_row += count * num_rows
    result = sweeper.sweep(
        ids,
        mask,
        np.concatenate(plans),
        np.concatenate(example).astype(np.int32),
        score=torch.from_numpy(np.concatenate(score)).to(device),
        observer=None if states is None else states.watch(swept),
    )
    answers = _read(works, result.logits, next_tokens=next_tokens)
    return answers, result.naive_visits, result.executed_visits


@torch.inference_mode()
def _read(works: list[Work], logits: torch.Tensor, *, next_tokens: bool) -> list[Answered]:
    places: list[npt.NDArray[np.int64]] = []
    tokens: list[npt.NDArray[np.int64]] = []
    compared: list[npt.NDArray[np.int64]] = []
    first = 0
    for work in works:
        encoded = work.encoded
        starts = first + np.arange(len(work.plans)) * len(encoded.places)
        places.append((starts[:, None] + encoded.entry_place).reshape(-1))
        tokens.append(np.tile(encoded.entry_token, len(work.plans)))
        compared.append((starts[:, None] + _compared_places(encoded)).reshape(-1))
        first += len(work.plans) * len(encoded.places)
    ends = np.concatenate(compared) if next_tokens else np.empty(0, dtype=np.int64)
    table = _Vocabulary(logits, np.concatenate(places), np.concatenate(tokens), ends)
    answers: list[Answered] = []
    entry = end = 0
    for work in works:
        encoded, count = work.encoded, len(work.plans)
        shape = (count, len(encoded.entry_token))
        here = slice(entry, entry + shape[0] * shape[1])
        shown = (count, len(_compared_places(encoded)) if next_tokens else 0)
        after = slice(end, end + shown[0] * shown[1])
        entry, end = here.stop, after.stop
        scores = np.empty((count, 0))
        if encoded.num_answers:
            sums = np.add.reduceat(table.log_probs[here].reshape(shape), encoded.starts, axis=1)
            scores = sums / encoded.divisors
        answers.append(
            Answered(
                scores=scores,
                greedy=np.logical_and.reduce(table.greedy[here].reshape(shape), axis=1)
                if next_tokens
                else table.greedy,
                next_token=table.best[after].reshape(shown),
                next_log_probs=table.next_log_probs[after].unflatten(0, shown)
                if next_tokens
                else None,
            )
        )
    return answers


def _compared_places(encoded: EncodedExample) -> npt.NDArray[np.int64]:
    """Return the places where whole vocabularies are compared, ascending; the first is the end of the prompt."""
    return encoded.entry_place if encoded.num_answers == 1 else np.zeros(1, dtype=np.int64)


class _Vocabulary:
    """Log-probabilities of some tokens at some places, and the model's own choices there.

    A few rows are normalised at a time, so that the vocabulary is held in full precision only once
    for each prompt's end.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        place: npt.NDArray[np.int64],
        token: npt.NDArray[np.int64],
        ends: npt.NDArray[np.int64],
    ) -> None:
        exact = torch.promote_types(logits.dtype, torch.float32)
        device = logits.device
        order = np.argsort(place, kind="stable")
        starts = np.arange(0, len(logits) + _LOGIT_ROWS, _LOGIT_ROWS)
        entry_bounds = np.searchsorted(place[order], starts)
        end_bounds = np.searchsorted(ends, starts)
        sorted_place = torch.from_numpy(place[order]).to(device)
        sorted_token = torch.from_numpy(token[order]).to(device)
        end_place = torch.from_numpy(ends).to(device)
        log_probs, greedy, best, following = [], [], [], []
        for block, rows in enumerate(logits.split(_LOGIT_ROWS)):
            table = torch.log_softmax(rows, dim=-1, dtype=exact)
            entries = slice(*entry_bounds[block : block + 2].tolist())
            at, wanted = sorted_place[entries] - int(starts[block]), sorted_token[entries]
            log_probs.append(table[at, wanted])
            if len(ends):
                choice = rows.argmax(dim=-1)
                greedy.append(choice[at] == wanted)
                last = end_place[slice(*end_bounds[block : block + 2].tolist())] - int(
                    starts[block]
                )
                best.append(choice[last])
                following.append(table[last])
        self.log_probs = np.empty(len(place))
        self.log_probs[order] = torch.cat(log_probs).double().cpu().numpy()
        self.greedy = np.empty(len(place) if len(ends) else 0, dtype=np.bool_)
        self.best = np.empty(0, dtype=np.int64)
        self.next_log_probs = logits.new_empty(0)
        if len(ends):
            self.greedy[order] = torch.cat(greedy).cpu().numpy()
            self.best = torch.cat(best).cpu().numpy()
            self.next_log_probs = torch.cat(following)
