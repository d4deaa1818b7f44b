"""The two objectives, and the value of a plan under each, computed from metrics."""

from typing import Literal, Protocol, cast, get_args

import numpy as np
import numpy.typing as npt

from dynadepth.config import did_you_mean
from dynadepth.errors import ConfigError, TaskError
from dynadepth_search.data.tasks import Task

__all__ = [
    "Objective",
    "Scored",
    "check_answers",
    "check_objective",
    "plan_values",
    "refuse_solutions",
]

Objective = Literal["reward", "preserve"]


def check_objective(objective: str) -> Objective:
    """Check the name of an objective and return it.

    Raises:
        ConfigError: There is no objective of that name.
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
        TaskError: The objective is the labelled reward, but the task has only prompts.
    """
    if objective == "reward" and task.kind == "prompt":
        raise TaskError(
            f"task {task.name!r} has prompts alone, so there is no labelled reward; use the objective preserve"
        )


def refuse_solutions(task: Task, *, before: str) -> None:
    """Refuse a task whose answers are to be generated, where answers are scored token by token.

    Args:
        task: The task.
        before: What would be done with it, for the message.

    Raises:
        TaskError: The examples have solutions.
    """
    if task.kind == "solution":
        raise TaskError(
            f"task {task.name!r} has solutions, which only generated answers can be compared with, and {before} "
            "generates none (`search prompts` and `search null` do); leave the key `solution` out of the task, so that "
            "its completions are scored token by token"
        )


class Scored(Protocol):
    """Metrics of pairs of prompt and plan, all of one shape; `Outcomes` and a score table provide them."""

    @property
    def agreement(self) -> npt.NDArray[np.float64]:
        """1 where the answer equals the base model's, else 0; for a completion, the fraction of its tokens."""
        ...

    @property
    def total_variation(self) -> npt.NDArray[np.float64]:
        """Total variation distance between the answers of base model and plan, 0 to 1."""
        ...

    @property
    def reward(self) -> npt.NDArray[np.float64]:
        """The graded reward; NaN for prompts alone."""
        ...


def plan_values(scored: Scored, objective: Objective) -> npt.NDArray[np.float64]:
    """Return the values by which plans are chosen, from 0 to 1.

    For `preserve`: 0.75 * agreement + 0.25 * closeness. Agreement is the goal. Closeness, 1 - total variation distance,
    tells plans apart whose agreement is equal on few prompts; the divergence is not used instead, because it depends on
    how certain an answer is rather than on which answer it is. For `reward`: the probability of the right answer.

    Raises:
        ConfigError: The objective needs answers that the prompts do not have.
    """
    if objective == "preserve":
        return 0.75 * scored.agreement + 0.25 * (1.0 - scored.total_variation)
    if np.isnan(scored.reward).any():
        raise ConfigError(
            "objective 'reward' needs prompts with right answers; use objective 'preserve'"
        )
    probability: npt.NDArray[np.float64] = np.exp(np.minimum(scored.reward, 0.0))
    return probability
