"""The comparison of routed policies with baselines of the same depth that do not see the prompt.

It collects the sets of plans that have to be scored, and turns their outcomes into runs.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dynadepth.errors import BudgetError, ConfigError
from dynadepth.evaluation.mixtures import Mixture, bracket_depth, concave_hull, mix_to_depth
from dynadepth.plans import Plans, identity_plan, plan_depth, plan_text
from dynadepth_search.evaluation.baselines import random_plans, removal_plans
from dynadepth_search.evaluation.metrics import PolicyRun, mix_runs, oracle_run, show_budget
from dynadepth_search.evaluation.outcome_cache import Table

__all__ = ["ComparedRun", "Comparison", "Front", "PlannedPolicy", "check_preset_names"]

Floats = npt.NDArray[np.float64]

# The names of rows of a comparison that are not presets.
_TAKEN = (
    "routed",
    "base",
    "static",
    "static mixture",
    "plain",
    "plain static",
    "front",
    "shortgpt",
    "random",
    "oracle",
)


def check_preset_names(names: Iterable[str]) -> None:
    """Refuse presets that have the name of something else in a comparison.

    Args:
        names: The names of the presets.

    Raises:
        ConfigError: A name is taken.
    """
    for name in names:
        if name.casefold() in _TAKEN:
            raise ConfigError(
                f"routers to compare are named {name!r}, which names something else in the comparison "
                f"({', '.join(_TAKEN)}); rename their folder"
            )


@dataclass(frozen=True, slots=True)
class Front:
    """Static plans and their quality on the training prompts.

    Args:
        plans: The plans. Shape (plans, num_layers), uint8.
        quality: Mean reward of each plan on the training prompts. Shape (plans,), float64.
    """

    plans: Plans
    quality: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedPolicy:
    """A policy that looks at the prompt.

    Args:
        name: Its name in tables.
        kind: `routed` for the policy under test, `preset` for one that it is compared with.
        budget: Mean depth asked for.
        plans: The plans it made. Shape (prompts, num_layers), uint8.
    """

    name: str
    kind: Literal["routed", "preset"]
    budget: float
    plans: Plans

    @property
    def mean_depth(self) -> float:
        """Mean over prompts, each counting once."""
        return float(plan_depth(self.plans).mean())


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """A run, and the static mixture of its mean depth if it is compared with one."""

    run: PolicyRun
    static: PolicyRun | None = None


@dataclass(slots=True, kw_only=True)
class Comparison:
    """The policies that are evaluated on the same prompts.

    Args:
        policies: Policies that look at the prompt.
        front: Static plans found on training prompts.
        influence: ShortGPT's block influence of each layer. Shape (num_layers,), float64.
        num_prompts: Number of held-out prompts.
        random_draws: Number of draws of random plans for each routed policy.
        seed: Seed of the draws.

    Attributes:
        sets: Plans to be scored, by name. Shape (prompts, num_layers) each, uint8.

    Raises:
        ConfigError: Two policies have the same name, or a policy has the name of a baseline.
    """

    policies: Sequence[PlannedPolicy]
    front: Front
    influence: Floats
    num_prompts: int
    random_draws: int
    seed: int
    sets: dict[str, Plans] = field(init=False, default_factory=dict)
    _hull: list[int] = field(init=False, default_factory=list)
    _removed: Plans = field(init=False)

    def __post_init__(self) -> None:
        self._removed = removal_plans(self.influence)
        self._add_static("base", identity_plan(len(self.influence)))
        self._add_front()
        for policy in self.policies:
            if policy.name in self.sets:
                raise ConfigError(
                    f"two policies of the comparison are named {policy.name!r}; give each its own name"
                )
            self.sets[policy.name] = policy.plans
            depth = policy.mean_depth
            if policy.kind != "routed":
                continue
            if (removal := self._removal(depth)) is not None:
                for index in (removal.low, removal.high):
                    self._add_static(f"shortgpt {index}", self._removed[index])
            for draw, name in enumerate(self._draws(policy)):
                self.sets[name] = random_plans(
                    len(self.influence), self.num_prompts, depth, seed=self.seed * 1009 + draw
                )

    def mixture(self, depth: float) -> Mixture | None:
        """Return the best mixture of static plans of a mean depth; None if none reaches it."""
        try:
            return mix_to_depth(plan_depth(self.front.plans), self.front.quality, depth)
        except BudgetError:
            return None

    def compared(self, table: Table, headline: str) -> Iterator[ComparedRun]:
        """Return every run with its static mixture; runs of one budget are adjacent.

        Args:
            table: Outcomes of `sets`.
            headline: The metric that the oracle maximises.
        """
        yield ComparedRun(self._run(table, "base", "base"))
        for policy in self.policies:
            depth, budget = policy.mean_depth, policy.budget
            run = self._run(table, policy.name, policy.kind, budget)
            mixture = self.mixture(depth)
            static = None
            if mixture is not None:
                static = mix_runs(
                    f"static mixture {show_budget(budget)}",
                    "static",
                    mixture,
                    self.front.plans,
                    self._static_metrics(table, "front", len(self.front.plans)),
                    budget,
                )
            yield ComparedRun(run, static)
            if policy.kind != "routed":
                continue
            if static is not None:
                yield ComparedRun(static)
            if (removal := self._removal(depth)) is not None:
                shortgpt = mix_runs(
                    f"ShortGPT {show_budget(budget)}",
                    "shortgpt",
                    removal,
                    self._removed,
                    self._static_metrics(table, "shortgpt", len(self._removed)),
                    budget,
                )
                yield ComparedRun(shortgpt, static)
            if draws := self._draws(policy):
                yield ComparedRun(self._random_run(table, draws, budget), static)
            names = list(self.sets)
            stack = np.stack([self.sets[name] for name in names])
            yield ComparedRun(
                oracle_run(
                    f"oracle {show_budget(budget)}",
                    headline,
                    depth,
                    stack,
                    plan_depth(stack),
                    {
                        metric: values[[table.rows[name] for name in names]]
                        for metric, values in table.values.items()
                    },
                    budget,
                )
            )

    def front_metrics(self, table: Table) -> list[dict[str, Any]]:
        """Return depth and quality of the static plans that mixtures consist of, by ascending depth."""
        return [
            {
                "plan": plan_text(self.front.plans[index]),
                "depth": float(plan_depth(self.front.plans[index])),
                "train_quality": float(self.front.quality[index]),
                "metrics": {
                    metric: float(values.mean())
                    for metric, values in table.of(f"front {index}").items()
                },
            }
            for index in self._hull
        ]

    def _add_static(self, name: str, plan: Plans) -> None:
        self.sets[name] = np.tile(plan, (self.num_prompts, 1))

    def _add_front(self) -> None:
        """Add the plans that the mixtures of the policies' depths consist of, and all deeper ones up to the base."""
        depths = plan_depth(self.front.plans)
        hull = concave_hull(depths, self.front.quality)
        lowest = min((policy.mean_depth for policy in self.policies), default=1.0)
        # Start at the deepest vertex at or below the lowest depth, or at the first one if there is none.
        first = max(0, int(np.searchsorted(depths[hull], lowest + 1e-9, side="right")) - 1)
        self._hull = hull[first:].tolist()
        for index in self._hull:
            self._add_static(f"front {index}", self.front.plans[index])

    def _removal(self, depth: float) -> Mixture | None:
        depths = plan_depth(self._removed)
        try:
            return bracket_depth(depths, depth, np.argsort(depths))
        except BudgetError:
            return None

    def _draws(self, policy: PlannedPolicy) -> list[str]:
        """Name the sets of random plans of a policy's depth; none if that takes repeats."""
        if policy.mean_depth > 1.0:
            return []
        return [
            f"random {show_budget(policy.budget)} draw {draw}" for draw in range(self.random_draws)
        ]

    def _run(
        self,
        table: Table,
        name: str,
        kind: Literal["base", "routed", "preset"],
        budget: float | None = None,
    ) -> PolicyRun:
        plans = self.sets[name]
        return PolicyRun(
            name=name,
            kind=kind,
            depth=plan_depth(plans),
            metrics=table.of(name),
            plans=plans,
            budget=budget,
        )

    def _random_run(self, table: Table, draws: Sequence[str], budget: float) -> PolicyRun:
        """Return the mean of several draws for each prompt."""
        outcomes = [table.of(name) for name in draws]
        plans = [self.sets[name] for name in draws]
        return PolicyRun(
            name=f"random {show_budget(budget)}",
            kind="random",
            depth=np.mean([plan_depth(each) for each in plans], axis=0),
            metrics={
                metric: np.mean([each[metric] for each in outcomes], axis=0)
                for metric in outcomes[0]
            },
            plans=np.concatenate(plans),
            budget=budget,
        )

    def _static_metrics(self, table: Table, prefix: str, count: int) -> Mapping[str, Floats]:
        """Return outcomes by index of the static plan; NaN for those that were not scored."""
        return {
            metric: np.stack(
                [
                    values[table.rows[name]]
                    if (name := f"{prefix} {index}") in table.rows
                    else np.full(self.num_prompts, np.nan)
                    for index in range(count)
                ]
            )
            for metric, values in table.values.items()
        }
