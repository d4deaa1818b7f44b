"""Static plans that were found without shortcuts, beside an evaluation that runs with them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynadepth.errors import BudgetError
from dynadepth.evaluation.mixtures import Mixture, mix_to_depth
from dynadepth.plans import Plans, plan_depth
from dynadepth_search.evaluation.comparison import ComparedRun, Front, PlannedPolicy
from dynadepth_search.evaluation.metrics import PolicyRun, mix_runs, show_budget
from dynadepth_search.evaluation.outcome_cache import Table

__all__ = ["PlainStatic", "beside_static"]


class PlainStatic:
    """The mixtures of plain static plans that have the depths of the policies under test.

    Args:
        front: Static plans found on training prompts, a skipped layer leaving nothing behind.
        policies: The policies of the evaluation.
        num_prompts: Number of held-out prompts.

    Attributes:
        sets: Plans to be scored without shortcuts, by name; the base model's is among them. Shape (prompts, num_layers)
            each, uint8.
    """

    def __init__(self, front: Front, policies: Sequence[PlannedPolicy], num_prompts: int) -> None:
        self._front, self._num_prompts = front, num_prompts
        self._mixtures: dict[float, Mixture] = {}
        depths = plan_depth(front.plans)
        for policy in policies:
            if policy.kind != "routed":
                continue
            try:
                mixture = mix_to_depth(depths, front.quality, policy.mean_depth)
            except BudgetError:
                continue
            self._mixtures[policy.budget] = mixture
        used = sorted({row for each in self._mixtures.values() for row in (each.low, each.high)})
        self.sets: dict[str, Plans] = {
            f"plain {row}": np.tile(front.plans[row], (num_prompts, 1)) for row in used
        }

    def runs(self, table: Table) -> dict[float, PolicyRun]:
        """Return the runs, by budget.

        Args:
            table: Outcomes of `sets`.
        """
        metrics: Mapping[str, Any] = {
            metric: np.stack(
                [
                    values[table.rows[name]]
                    if (name := f"plain {row}") in table.rows
                    else np.full(self._num_prompts, np.nan)
                    for row in range(len(self._front.plans))
                ]
            )
            for metric, values in table.values.items()
        }
        return {
            budget: mix_runs(
                f"plain static {show_budget(budget)}",
                "plain",
                mixture,
                self._front.plans,
                metrics,
                budget,
            )
            for budget, mixture in self._mixtures.items()
        }


def beside_static(
    compared: Sequence[ComparedRun], plain: Mapping[float, PolicyRun]
) -> list[ComparedRun]:
    """Put each plain run behind the static mixture of its budget, with which it is compared.

    Args:
        compared: The runs of an evaluation.
        plain: What `PlainStatic.runs` returned.
    """
    found: list[ComparedRun] = []
    for item in compared:
        found.append(item)
        run = None if item.run.budget is None else plain.get(item.run.budget)
        if item.run.kind == "static" and run is not None:
            found.append(ComparedRun(run, item.run))
    return found
