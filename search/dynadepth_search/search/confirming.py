"""The confirmation of labels: a prompt's best plans are scored again, on variants of the prompt.

The best of many plans owes its reward partly to what is peculiar to the one form of the prompt that it was searched on.
A variant asks the same in a form that the search did not see:

- choices under letters: the same choices in other orders, so that a plan that merely prefers a letter does not pass;
- other choices, and completions with the objective `reward`: the prompt in a second wording. The order of choices that
  the prompt does not list changes nothing;
- prompts without choices with the objective `preserve`: the places after each token of the base model's own
  continuation, which the plan will have to serve too. If the base model says nothing (it ends the text at once), the
  prompt in a second wording.

Where a task has solutions and the objective is `reward`, all of this is a screen: the best plans and the identity then
answer the prompt and its variants greedily, and what they answer is compared with the solution.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import numpy.typing as npt

from dynadepth.errors import TaskError
from dynadepth.models.encoding import end_tokens
from dynadepth.plans import Plans, plan_text
from dynadepth.tree_search.forest import Evaluated
from dynadepth_search.data.solutions import check_solutions
from dynadepth_search.data.tasks import Example
from dynadepth_search.data.variants import continued, in_other_orders, in_other_words
from dynadepth_search.scoring.generating import continue_prompts, judge_answers
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.search.per_prompt_spec import PromptSearchSpec
from dynadepth_search.storage.choice import Candidate, Choice, best_plans, choose_label
from dynadepth_search.storage.label_manifest import answers_are_generated

__all__ = ["Confirmation"]

Rewards = Callable[
    [Sequence[Example], Plans, npt.NDArray[np.uint32]],
    npt.NDArray[np.float64],
]


class Confirmation:
    """Chooses the labels of prompts whose search has finished.

    Args:
        scorer: Scores the prompts of the search.
        kind: The kind of the task, see `Task`.
        spec: Settings of the search.
    """

    def __init__(self, scorer: Scorer, kind: str, spec: PromptSearchSpec) -> None:
        self._scorer, self._spec = scorer, spec
        self._lettered = kind == "choices" and scorer.scoring == "letter"
        self._own_text = kind != "choices" and spec.objective == "preserve"
        self._generates = answers_are_generated(kind, spec.objective, spec.confirm)
        self._ends = end_tokens(scorer.model)
        self.evaluations = 0

    def check(self, examples: Sequence[Example]) -> None:
        """Check that the variants of all prompts can be scored, before any work is done.

        Raises:
            SearchError: Answers are to be generated, and this is not the main thread, where they can be compared.
            TaskError: A variant cannot be encoded, or is longer than the model supports, or a solution has no value.
        """
        if not self._spec.confirm:
            return
        if self._generates:
            check_solutions(examples)
        # Tokens that the model has not chosen yet count like any others.
        unknown = (0,) * self._spec.own_tokens
        for example in examples:
            variants = self._reworded(example)
            if self._own_text:
                variants = (*variants, continued(example, unknown))
            try:
                self._scorer.check(variants)
            except TaskError as error:
                raise TaskError(
                    f"{error} (this is a variant of the prompt, which confirms its label; confirm=0, or --confirm 0, "
                    "confirms none)"
                ) from error

    def choose(
        self,
        examples: Sequence[Example],
        evaluated: Sequence[Evaluated],
        depth_penalty: float,
        rewards: Rewards,
    ) -> list[Choice]:
        """Choose the labels of some prompts; their best plans share sweeps.

        Args:
            examples: The prompts.
            evaluated: The evaluated plans of each.
            depth_penalty: Lambda of the labels' value.
            rewards: Scores N plans: given examples, plans, shape (N, layers), and the index of the example of each
                plan, shape (N,), it returns their rewards, shape (N,).

        Returns:
            The choices, in the order of the prompts.
        """
        best = [best_plans(each, depth_penalty, max(1, self._spec.confirm)) for each in evaluated]
        confirmed = [row for row, known in enumerate(best) if self._spec.confirm and len(known) > 1]
        variants = dict(
            zip(confirmed, self._variants([examples[row] for row in confirmed]), strict=True)
        )
        pairs = [(row, variant) for row in confirmed for variant in variants[row]]
        scored: dict[int, list[npt.NDArray[np.float64]]] = {row: [] for row in confirmed}
        if pairs:
            counts = [len(best[row]) for row, _ in pairs]
            plans = np.concatenate([evaluated[row].plans[best[row]] for row, _ in pairs])
            tree = np.repeat(np.arange(len(pairs), dtype=np.uint32), counts)
            found = rewards([variant for _, variant in pairs], plans, tree)
            self.evaluations += len(found)
            parts = np.split(found, np.cumsum(counts)[:-1])
            for (row, _), part in zip(pairs, parts, strict=True):
                scored[row].append(part)
        candidates = [
            _candidates(each, known, scored.get(row, []), depth_penalty)
            for row, (each, known) in enumerate(zip(evaluated, best, strict=True))
        ]
        if self._generates and confirmed:
            forms = [(examples[row], *variants[row]) for row in confirmed]
            tried = [evaluated[row].plans[best[row]] for row in confirmed]
            for row, judged in zip(confirmed, self._judged(forms, tried), strict=True):
                candidates[row] = tuple(
                    replace(item, answers=answers, right=right)
                    for item, (answers, right) in zip(candidates[row], judged, strict=True)
                )
        return [
            Choice(
                known[0],
                choose_label(known, margin=self._spec.margin),
                known if row in scored else (),
            )
            for row, known in enumerate(candidates)
        ]

    def _judged(
        self, forms: Sequence[tuple[Example, ...]], plans: Sequence[Plans]
    ) -> list[list[tuple[tuple[str, ...], tuple[bool, ...]]]]:
        """Return, for each prompt and each of its plans, the answers to the prompt's forms, and which are right."""
        counts = [len(each) for each in forms]
        starts = np.cumsum([0, *counts])
        index = [
            np.tile(np.arange(start, start + count), len(tried))
            for start, count, tried in zip(starts, counts, plans, strict=False)
        ]
        asked = [
            np.repeat(tried, count, axis=0) for count, tried in zip(counts, plans, strict=True)
        ]
        answers, right = judge_answers(
            self._scorer,
            [form for each in forms for form in each],
            np.concatenate(asked),
            np.concatenate(index),
            new_tokens=self._spec.new_tokens,
        )
        self.evaluations += len(answers)
        said, known = iter(answers), iter(right)
        return [
            [(tuple(islice(said, count)), tuple(islice(known, count))) for _ in tried]
            for count, tried in zip(counts, plans, strict=True)
        ]

    def _variants(self, examples: Sequence[Example]) -> list[tuple[Example, ...]]:
        if not self._own_text or not examples:
            return [self._reworded(example) for example in examples]
        self.evaluations += len(examples)
        prompts = [self._scorer.encode(example).prompt_ids for example in examples]
        texts = continue_prompts(self._scorer.model, prompts, new_tokens=self._spec.own_tokens)
        variants = []
        for example, text in zip(examples, texts, strict=True):
            tokens = tuple(
                token for token in text.ids[text.prompt :].tolist() if token not in self._ends
            )
            variants.append((continued(example, tokens),) if tokens else self._reworded(example))
        return variants

    def _reworded(self, example: Example) -> tuple[Example, ...]:
        """Return the variants that need no model."""
        if self._lettered:
            return in_other_orders(example, self._spec.variants)
        # Without its completion, it is read after the prompt.
        alone = replace(example, completion=None) if self._own_text else example
        return (in_other_words(alone, self._spec.wording),)


def _candidates(
    evaluated: Evaluated,
    best: npt.NDArray[np.int64],
    scored: Sequence[npt.NDArray[np.float64]],
    depth_penalty: float,
) -> tuple[Candidate, ...]:
    return tuple(
        Candidate(
            plan_text(evaluated.plans[index]),
            float(evaluated.rewards[index]),
            tuple(float(part[place]) for part in scored),
            depth_penalty * float(evaluated.depths[index]),
        )
        for place, index in enumerate(best.tolist())
    )
