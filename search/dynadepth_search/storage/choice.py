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
    """

    plan: str
    reward: float
    variant_rewards: tuple[float, ...]
    price: float

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

    The two questions need different evidence. Which candidate is best is answered by all there is, since the reward on
    the prompt is one more measurement of each. Whether it beats the identity is answered by the variants alone, since
    the best of many plans owes its reward on the prompt partly to luck; and by each of them, since a plan that merely
    prefers one letter wins by far in one order of the choices and loses in the others. What was measured of this rule
    and of others is in benches/README.md.

    Args:
        candidates: The candidates, the identity plan among them.
        margin: In units of the reward, 0 or more.
    """
    best = min(candidates, key=lambda item: (-item.value, plan_visits(item.plan), item.plan))
    identity = next(item for item in candidates if not item.plan.strip("1"))
    return best if best is identity or best.margin_over(identity) >= margin else identity


def plan_visits(plan: str) -> int:
    """Return the number of layer executions of a plan, given as digits."""
    return plan.count("1") + 2 * plan.count("2")


def _mean(numbers: Sequence[float]) -> float:
    # Exact sums, so that a file is read alike on every machine; of quotients, since sums could overflow.
    return math.fsum(number / len(numbers) for number in numbers)
