"""What plans are judged by: the two objectives, and what a plan is worth under each.

Works on figures. Knows nothing of models or of how figures come about.
"""

from typing import Literal, Protocol, cast, get_args

import numpy as np
import numpy.typing as npt

from dynadepth.config import did_you_mean
from dynadepth.errors import ConfigError, TaskError
from dynadepth_search.data.tasks import Task

__all__ = ["Objective", "Scored", "check_answers", "check_objective", "plan_values"]

Objective = Literal["reward", "preserve"]


def check_objective(objective: str) -> Objective:
    """Return the objective if there is one of that name.

    Raises:
        ConfigError: There is none.
    """
    if objective not in get_args(Objective):
        raise ConfigError(
            f"objective {objective!r} is unknown{did_you_mean(objective, get_args(Objective))}; "
            "expected reward (labelled) or preserve (label-free)"
        )
    return cast("Objective", objective)


def check_answers(task: Task, objective: Objective) -> None:
    """Check that a task has the answers that an objective needs.

    Raises:
        TaskError: The labelled reward is asked for, but there are prompts alone.
    """
    if objective == "reward" and task.kind == "prompt":
        raise TaskError(
            f"task {task.name!r} has prompts alone, so there is no labelled reward; use the objective preserve"
        )


class Scored(Protocol):
    """Figures of pairs of prompt and plan, of any one shape; `Outcomes` and a score table have them."""

    @property
    def agreement(self) -> npt.NDArray[np.float64]:
        """1 where the answer is the base model's."""
        ...

    @property
    def total_variation(self) -> npt.NDArray[np.float64]:
        """Between base and plan."""
        ...

    @property
    def reward(self) -> npt.NDArray[np.float64]:
        """The graded reward; NaN for prompts alone."""
        ...


def plan_values(scored: Scored, objective: Objective) -> npt.NDArray[np.float64]:
    """Return what plans are worth where policies are chosen, from 0 to 1.

    For `preserve` three quarters agreement, which is what is wanted, and one quarter closeness (1 - total variation),
    which tells plans apart that few prompts cannot; the divergence would not do, since it is ruled by how sure an
    answer is and not by which one. For `reward` the probability of the right answer.

    Raises:
        ConfigError: The objective needs answers that the prompts have not.
    """
    if objective == "preserve":
        return 0.75 * scored.agreement + 0.25 * (1.0 - scored.total_variation)
    if np.isnan(scored.reward).any():
        raise ConfigError(
            "objective 'reward' needs prompts with right answers; use objective 'preserve'"
        )
    probability: npt.NDArray[np.float64] = np.exp(np.minimum(scored.reward, 0.0))
    return probability
