"""Outcomes of plans: scores, correctness, agreement and distances from the model's answers.

Each plan's answers are compared with those of the identity plan.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dynadepth.errors import TaskError
from dynadepth_search.data.tasks import Example
from dynadepth_search.data.variants import ContinuedExample
from dynadepth_search.scoring.batching import Answered
from dynadepth_search.scoring.objectives import Objective

__all__ = ["OutcomeBuilder", "Outcomes"]


@dataclass(frozen=True, slots=True)
class Outcomes:
    """The outcomes of N pairs of example and plan, in the given order.

    Args:
        scores: The score of every choice, or the mean log-probability of the completion's tokens; empty
            for a prompt alone. N arrays, float64.
        reward: `choices`: the right one's log-softmax over the scores. `completion`: the score.
            A prompt alone: NaN. Shape (N,), float64.
        preserve: Minus KL(base, plan) in nats, over the choices, or without choices over the vocabulary
            for the token after the prompt; of a continued prompt, the mean over its places. 0 for the identity plan.
            Shape (N,), float64.
        answer: The best choice, or without choices the best token after the prompt; ties go to the
            lowest index. Shape (N,), int64.
        correct: `choices`: the answer is the right one. `completion`: greedy decoding gives it. A
            prompt alone: same as `agrees`. Shape (N,), bool.
        agrees: Whether the answer is the identity plan's. Shape (N,), bool.
        agreement: 1 where `agrees`, else 0; for a completion, the fraction of its tokens at which the best token is the
            identity plan's. Shape (N,), float64.
        divergence: KL(base, plan) in nats, over the choices, or without choices over the vocabulary; for a completion,
            the mean over its tokens. Shape (N,), float64.
        total_variation: Total variation distance (half the sum of absolute differences of probability), over the
            same. Shape (N,), float64.
        naive_visits: Visits of token rows to layers, if every plan had been run in its own forward.
        executed_visits: Visits of token rows to layers that were actually run.
    """

    scores: list[npt.NDArray[np.float64]]
    reward: npt.NDArray[np.float64]
    preserve: npt.NDArray[np.float64]
    answer: npt.NDArray[np.int64]
    correct: npt.NDArray[np.bool_]
    agrees: npt.NDArray[np.bool_]
    agreement: npt.NDArray[np.float64]
    divergence: npt.NDArray[np.float64]
    total_variation: npt.NDArray[np.float64]
    naive_visits: int
    executed_visits: int

    def of(self, objective: Objective) -> npt.NDArray[np.float64]:
        """Return the rewards of an objective. Shape (N,), float64."""
        return self.reward if objective == "reward" else self.preserve


class OutcomeBuilder:
    """Collects outcomes in the order in which they become known.

    Args:
        count: Number of pairs of example and plan.
    """

    def __init__(self, count: int) -> None:
        self.scores: list[npt.NDArray[np.float64]] = [np.empty(0)] * count
        self.reward = np.full(count, np.nan)
        self.preserve = np.full(count, np.nan)
        self.answer = np.full(count, -1, dtype=np.int64)
        self.correct = np.zeros(count, dtype=np.bool_)
        self.agrees = np.zeros(count, dtype=np.bool_)
        self.agreement = np.full(count, np.nan)
        self.divergence = np.full(count, np.nan)
        self.total_variation = np.full(count, np.nan)
        # The identity plan's answers, and the rows that wait for them, by index of the example.
        self.bases: dict[int, Answered] = {}
        self.waiting: dict[int, npt.NDArray[np.int64]] = {}
        self.naive_visits = 0
        self.executed_visits = 0

    def write(
        self, item: Example, number: int, rows: npt.NDArray[np.int64], given: Answered
    ) -> None:
        """Record the answers of one example.

        Args:
            item: The example.
            number: Its index.
            rows: The row of each answer in the outcomes; -1: it has none. Shape (plans,), int64.
            given: The answers under each plan.
        """
        base = self.bases[number]
        if item.kind == "choices":
            log_probs, base_log_probs = _log_softmax(given.scores), _log_softmax(base.scores)
            divergence = _divergence(base_log_probs, log_probs)[:, None]
            variation = _variation(base_log_probs, log_probs)[:, None]
            answers = given.scores.argmax(axis=1)[:, None]
            base_answers = base.scores.argmax(axis=1)[:, None]
            answer = answers[:, 0]
            reward = log_probs[:, item.answer]
            correct = answer == item.answer
        else:
            divergence, variation = _next_differences(base, given)
            answers, base_answers = given.next_token, base.next_token
            answer = answers[:, 0]
            alone = item.kind == "prompt"
            reward = np.full(len(answer), np.nan) if alone else given.scores[:, 0]
            correct = answer == base_answers[:, 0] if alone else given.greedy
        wanted = np.flatnonzero(rows >= 0)
        to = rows[wanted]
        taken = wanted if len(given.scores) == len(rows) else np.zeros_like(wanted)
        # Subtracted from 0 rather than negated, so that the identity plan's is 0 and not -0.
        searched = divergence if isinstance(item, ContinuedExample) else divergence[:, :1]
        self.preserve[to] = 0.0 - searched.mean(axis=1)[taken]
        self.divergence[to] = divergence.mean(axis=1)[taken]
        self.total_variation[to] = variation.mean(axis=1)[taken]
        self.agreement[to] = (answers == base_answers).mean(axis=1)[taken]
        self.reward[to] = reward[taken]
        self.answer[to] = answer[taken]
        self.correct[to] = correct[taken]
        self.agrees[to] = (answer == base_answers[:, 0])[taken]
        for row, index in zip(to.tolist(), taken.tolist(), strict=True):
            self.scores[row] = given.scores[index]

    def outcomes(self) -> Outcomes:
        """Return the collected outcomes."""
        return Outcomes(
            scores=self.scores,
            reward=self.reward,
            preserve=self.preserve,
            answer=self.answer,
            correct=self.correct,
            agrees=self.agrees,
            agreement=self.agreement,
            divergence=self.divergence,
            total_variation=self.total_variation,
            naive_visits=self.naive_visits,
            executed_visits=self.executed_visits,
        )


def _log_softmax(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = scores - scores.max(axis=1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _divergence(
    base: npt.NDArray[np.float64], given: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return KL(base, given) of log-probabilities of shapes (1, C) and (K, C); never negative by rounding."""
    result: npt.NDArray[np.float64] = np.maximum((np.exp(base) * (base - given)).sum(axis=1), 0.0)
    return result


def _variation(
    base: npt.NDArray[np.float64], given: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the total variation distance of log-probabilities of shapes (1, C) and (K, C)."""
    result: npt.NDArray[np.float64] = np.abs(np.exp(base) - np.exp(given)).sum(axis=1) / 2
    return result


def _next_differences(
    base: Answered, given: Answered
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return KL(base, given) and the total variation distance of next tokens, for each plan and place."""
    if base.next_log_probs is None or given.next_log_probs is None:
        raise TaskError(
            "examples of different kinds were scored in one call; call once for each kind"
        )
    divergence, variation = [], []
    base_probs = base.next_log_probs.exp()
    # One plan at a time, since a completion has a vocabulary for each of its tokens.
    for log_probs in given.next_log_probs.split(1):
        # A token that the base excludes (log-probability minus infinity) contributes nothing.
        terms = torch.where(
            base.next_log_probs.isfinite(), base_probs * (base.next_log_probs - log_probs), 0.0
        )
        divergence.append(terms.sum(dim=-1, dtype=torch.float64).clamp_min(0.0))
        changes = (base_probs - log_probs.exp()).abs()
        variation.append(changes.sum(dim=-1, dtype=torch.float64) / 2)
    return torch.cat(divergence).cpu().numpy(), torch.cat(variation).cpu().numpy()
