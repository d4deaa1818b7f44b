"""How a label is chosen: from a prompt's evaluated plans, and from what variants of the prompt say of the best ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dynadepth.tree_search.forest import Evaluated

__all__ = ["Candidate", "Choice", "best_plans", "choose_label", "plan_visits"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that may become the label of a prompt.

    Args:
        plan: The plan, one digit for each layer.
        reward: Its reward on the prompt itself.
        variant_rewards: Its rewards on variants of the prompt; empty if it was not scored on any.
        price: What its depth costs, in units of the reward.
        answers: What it answers to the prompt and to each variant; empty if no answers were generated.
        right: Whether each of these answers is right.
    """

    plan: str
    reward: float
    variant_rewards: tuple[float, ...]
    price: float
    answers: tuple[str, ...] = ()
    right: tuple[bool, ...] = ()

    @property
    def raw_value(self) -> float:
        """Its value on the prompt itself."""
        return self.reward - self.price

    @property
    def value(self) -> float:
        """Its confirmed value: mean reward on the prompt and all variants, less the price."""
        return _mean([self.reward, *self.variant_rewards]) - self.price

    def margin_over(self, other: "Candidate") -> float:
        """Return by how much its value exceeds another's on the worst of the variants; on the prompt if there are none.

        Args:
            other: A candidate for the same prompt, scored on the same variants.
        """
        both = zip(
            self.variant_rewards or (self.reward,),
            other.variant_rewards or (other.reward,),
            strict=True,
        )
        return min((own - self.price) - (its - other.price) for own, its in both)

    def keeps(self, other: "Candidate") -> bool:
        """Say whether its answers are right wherever another's are; always if no answers were generated.

        Args:
            other: A candidate for the same prompt, which answered the same variants.
        """
        return all(own >= its for own, its in zip(self.right, other.right, strict=True))

    def fixes(self, other: "Candidate") -> bool:
        """Say whether all of its answers are right, and not all of another's.

        Args:
            other: A candidate for the same prompt, which answered the same variants.
        """
        return bool(self.right) and all(self.right) and not all(other.right)


@dataclass(frozen=True, slots=True)
class Choice:
    """The label of a prompt, and what it was chosen from.

    Args:
        raw: The evaluated plan of highest value on the prompt itself.
        label: The label.
        candidates: The plans that were scored on variants, best first by value on the prompt; empty if none was.
    """

    raw: Candidate
    label: Candidate
    candidates: tuple[Candidate, ...] = ()


def best_plans(evaluated: Evaluated, depth_penalty: float, count: int) -> npt.NDArray[np.int64]:
    """Return the indices of a prompt's plans of highest value, and of the identity plan.

    Args:
        evaluated: Every evaluated plan, the identity among them.
        depth_penalty: Lambda of value = reward - lambda * depth.
        count: Number of plans; the identity is added if it is not one of them.

    Returns:
        Indices, best first; ties go to the lower depth, then to the lower plan.
    """
    values = evaluated.rewards - depth_penalty * evaluated.depths
    order = np.lexsort((*evaluated.plans.T[::-1], evaluated.visits, -values))
    identity = int(np.flatnonzero((evaluated.plans == 1).all(axis=1))[0])
    best = order[:count]
    return best if identity in best else np.append(best, identity)


def choose_label(candidates: Sequence[Candidate], *, margin: float) -> Candidate:
    """Choose the label of a prompt.

    It is the candidate of highest confirmed value; ties go to the lower depth, then to the lower plan. Unless its value
    exceeds that of the identity plan by `margin` on every variant, the label is the identity plan.

    Where answers were generated, being right comes before any value, since no number of log-probabilities is worth an
    answer: a candidate that is wrong where the identity plan is right is none; of the others, those with the most right
    answers remain; and one with all answers right, where the identity plan has not, needs no margin.

    The two questions need different evidence. Which candidate is best is answered by all there is, since the reward on
    the prompt is one more measurement of each. Whether it beats the identity is answered by the variants alone, since
    the best of many plans owes its reward on the prompt partly to luck; and by each of them, since a plan that merely
    prefers one letter wins by far in one order of the choices and loses in the others.

    Args:
        candidates: The candidates, the identity plan among them.
        margin: In units of the reward, 0 or more.
    """
    identity = next(item for item in candidates if not item.plan.strip("1"))
    best = min(
        (item for item in candidates if item.keeps(identity)),
        key=lambda item: (-sum(item.right), -item.value, plan_visits(item.plan), item.plan),
    )
    if best is identity or best.fixes(identity) or best.margin_over(identity) >= margin:
        return best
    return identity


def plan_visits(plan: str) -> int:
    """Return the number of layer executions of a plan, given as digits."""
    return plan.count("1") + 2 * plan.count("2")


def _mean(numbers: Sequence[float]) -> float:
    # Exact sums, so that a file is read alike on every machine; of quotients, since sums could overflow.
    return math.fsum(number / len(numbers) for number in numbers)
