"""What exits make of held-out prompts that are answered with one token each, beside static plans of equal depth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dynadepth.checkpoints.trained_exits import TrainedExits
from dynadepth.checkpoints.trained_policy import TrainedPolicy
from dynadepth.errors import BudgetError
from dynadepth.evaluation.intervals import mean_interval
from dynadepth.plans import plan_depth, plan_text
from dynadepth_search.data.encoding import EncodedExample
from dynadepth_search.data.tasks import Example
from dynadepth_search.exits.judging.opponents import Pool, static_shares
from dynadepth_search.progress import Progress
from dynadepth_search.scoring.runtime_checks import planned, wrapped
from dynadepth_search.scoring.scorer import Scorer

__all__ = ["Answers", "answer_with_exits", "judge_answers"]

_BATCH = 16


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """The answers to N prompts.

    Attributes:
        depth: Share of the layers that each prompt ran. Shape (N,), float64.
        answer: The best choice, or without choices the best token. Shape (N,), int64.
    """

    depth: npt.NDArray[np.float64]
    answer: npt.NDArray[np.int64]


def judge_answers(
    model: Any,
    scorer: Scorer,
    examples: Sequence[Example],
    exits: TrainedExits,
    promises: Mapping[str, Mapping[str, Any]],
    *,
    pool: Pool | None,
    against: Mapping[str, TrainedPolicy],
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Return what each promise makes of prompts that are answered with one token.

    Args:
        model: The unwrapped base model; it is unwrapped again afterwards.
        scorer: Scores the prompts under static plans, with the shortcuts that these have.
        examples: The held-out prompts. If they have choices, these are compared, otherwise all tokens.
        exits: The trained exits of this model.
        promises: By name, what `wrap_model` is given.
        pool: As for `evaluate_exits`.
        against: As for `evaluate_exits`.
        progress: Called with the stage, the number of finished steps and of all.

    Returns:
        By name: `depth` and `kept`, the share of answers that are the base model's, as means with intervals; `static`,
        and `gain`, the paired difference from it; `against`, what the other policies have at this depth; or `refused`,
        why the promise cannot be made. Empty if the exits know nothing of such prompts, or a choice has several tokens.
    """
    if exits.answers is None or any(_several_tokens(scorer.encode(each)) for each in examples):
        return {}
    base = scorer.base(examples).answer
    static = None if pool is None else _Static(scorer, examples, pool)
    found: dict[str, dict[str, Any]] = {}
    for number, (name, promise) in enumerate(promises.items()):
        progress("answering prompts", number, len(promises))
        try:
            exits.prompt_exits(**promise)
        except BudgetError as error:
            found[name] = {"refused": str(error)}
            continue
        with wrapped(model, routers=exits, **promise) as inner:
            answers = answer_with_exits(inner, scorer, examples)
        kept = (answers.answer == base).astype(np.float64)
        mixed = None if static is None else static.mixture(float(answers.depth.mean()))
        found[name] = {
            "depth": mean_interval(answers.depth).to_dict(),
            "kept": mean_interval(kept).to_dict(),
            "static": None
            if mixed is None
            else {"plans": mixed[1], "kept": float(mixed[0].mean())},
            "gain": None if mixed is None else mean_interval(kept - mixed[0]).to_dict(),
            "against": {
                other: _planned(model, scorer, examples, policy, float(answers.depth.mean()))
                for other, policy in against.items()
            },
        }
    progress("answering prompts", len(promises), len(promises))
    return found


def answer_with_exits(model: Any, scorer: Scorer, examples: Sequence[Example]) -> Answers:
    """Let a model with exits answer prompts.

    Args:
        model: The wrapped model.
        scorer: Encodes the prompts, left-padded.
        examples: The prompts; choices have one token each.
    """
    depth, answer = np.empty(len(examples)), np.empty(len(examples), dtype=np.int64)
    for rows, input_ids, attention_mask in scorer.prompt_batches(examples, _BATCH):
        given = model.dynadepth.answer_prompts(input_ids, attention_mask)
        depth[rows] = given.layers_run / scorer.num_layers
        for row, logits in zip(rows, given.logits, strict=True):
            answer[row] = _answer(scorer.encode(examples[row]), logits)
    return Answers(depth, answer)


def _several_tokens(encoded: EncodedExample) -> bool:
    """Say whether there are choices of several tokens, which one reading does not tell apart."""
    return encoded.num_answers > 1 and len(encoded.entry_token) > encoded.num_answers


def _answer(encoded: EncodedExample, logits: torch.Tensor) -> int:
    if encoded.num_answers < 2:
        return int(logits.argmax())
    tokens = torch.from_numpy(encoded.entry_token).to(logits.device)
    scores = logits.double().log_softmax(dim=-1)[tokens].cpu().numpy() / encoded.divisors
    return int(scores.argmax())


def _planned(
    model: Any, scorer: Scorer, examples: Sequence[Example], policy: TrainedPolicy, depth: float
) -> dict[str, Any] | None:
    """Return what a policy that plans prompts keeps at a mean depth; None if it cannot have it."""
    lowest, highest = policy.calibration.range
    if not lowest <= depth <= highest:
        return None
    with wrapped(model, routers=policy, budget=depth) as inner:
        plans = planned(inner, scorer, examples)
    own = Scorer(
        model,
        scorer.tokenizer,
        scoring=scorer.scoring,
        chat=scorer.chat,
        shortcuts=policy.shortcuts,
    )
    outcomes = own.outcomes(examples, plans, np.arange(len(examples)))
    return {
        "depth": mean_interval(plan_depth(plans)).to_dict(),
        "kept": mean_interval(outcomes.agrees.astype(np.float64)).to_dict(),
    }


class _Static:
    """Static plans on the same prompts, each scored once."""

    def __init__(
        self,
        scorer: Scorer,
        examples: Sequence[Example],
        pool: Pool,
    ) -> None:
        self._scorer, self._examples = scorer, examples
        self._pool = pool
        self._kept: dict[int, npt.NDArray[np.float64]] = {}

    def mixture(self, depth: float) -> tuple[npt.NDArray[np.float64], list[str]] | None:
        """Return what the best mixture of a mean depth keeps, and its plans; None if no plan is as shallow."""
        shares = static_shares(self._pool, depth)
        if shares is None:
            return None
        kept = np.zeros(len(self._examples))
        for index, share in shares.items():
            kept += share * self._of(index)
        return kept, [plan_text(self._pool[0][index]) for index in shares]

    def _of(self, index: int) -> npt.NDArray[np.float64]:
        if index not in self._kept:
            count = len(self._examples)
            plans = np.tile(self._pool[0][index], (count, 1))
            outcomes = self._scorer.outcomes(self._examples, plans, np.arange(count))
            self._kept[index] = outcomes.agrees.astype(np.float64)
        return self._kept[index]
