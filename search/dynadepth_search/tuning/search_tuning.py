"""The per-prompt search as work to be tuned: its settings, and the share of the achievable gain that it finds."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dynadepth.errors import ConfigError
from dynadepth.evaluation.folds import hold_out
from dynadepth.evaluation.intervals import paired_difference
from dynadepth.files import sha256_bytes
from dynadepth.tree_search.config import SearchConfig
from dynadepth_search.search.per_prompt_spec import PromptSearchSpec
from dynadepth_search.tuning.replay import ReplayTable
from dynadepth_search.tuning.space import Goal, Outcome, Report, Setting, StudyTrial, Value

__all__ = ["SearchTuning"]

Floats = npt.NDArray[np.float64]

# Searches of all prompts with different seeds; each is a step after which a trial may be pruned.
_SEARCHES = 6
_FEWEST = 8


class SearchTuning:
    """The per-prompt search, replayed on a table.

    One half of the prompts is searched by trials; the other half says what the tuned settings are worth. The price of
    depth is fixed by all prompts of a half, so that trials are measured alike. Every plan that is evaluated is paid
    for: the probe's are shared by the prompts of a task.

    Args:
        table: All subsets of skips of some layers.
        evaluations: Plans evaluated for each prompt, its share of the probe included.
        task_prompts: Number of prompts of the task that shares a probe.
        round_size: Plans of a prompt that are chosen before any of them is evaluated. It is not tuned: fewer are better
            for the search, more for the sweep that evaluates them, and a table does not know what a sweep costs.
        seed: Seed of the halves and the searches; the same for all trials, so that they differ by their settings alone.

    Raises:
        ConfigError: There are too few prompts or evaluations, or no plan is better than the base model's.
    """

    kind = "search"

    def __init__(
        self,
        table: ReplayTable,
        *,
        evaluations: int = 24,
        task_prompts: int = 240,
        round_size: int = 4,
        seed: int = 0,
    ) -> None:
        # Trials are compared at equal evaluations, so none stops early.
        self._base = replace(PromptSearchSpec().config, round_size=round_size, stop_at=0.0)
        names = range(len(table)) if table.names is None else table.names
        if len(set(names)) < 2 * _FEWEST or evaluations < 4 or task_prompts < 1:
            raise ConfigError(
                f"{len(set(names))} different prompts, {evaluations} evaluations and a task of {task_prompts} prompts "
                f"were given; expected {2 * _FEWEST}, 4 and 1 or more"
            )
        held = hold_out(names, 0.5, np.random.default_rng(seed))
        self._halves = [table.take(np.flatnonzero(part)) for part in (~held, held)]
        self._penalties = [half.penalty() for half in self._halves]
        self._best = [
            float(half.best_gains(penalty).mean())
            for half, penalty in zip(self._halves, self._penalties, strict=True)
        ]
        if min(self._best) <= 0:
            raise ConfigError(
                "no plan of the table is better than the base model's on a half of the prompts, so there is nothing "
                "to search for; score other layers"
            )
        self._evaluations, self._task_prompts, self._seed = evaluations, task_prompts, seed
        self._probe_edits = 2 * table.num_layers + 1
        self._identity = {
            "plans": sha256_bytes(np.ascontiguousarray(table.plans).tobytes()),
            "values": sha256_bytes(np.ascontiguousarray(table.values).tobytes()),
            "prompts": len(table),
        }

    @property
    def goals(self) -> tuple[Goal, ...]:
        """See `dynadepth_search.tuning.space.Tunable`."""
        return (Goal(f"share of the achievable gain after {self._evaluations} evaluations"),)

    @property
    def asked(self) -> dict[str, Any]:
        """See `dynadepth_search.tuning.space.Tunable`."""
        return {
            "table": self._identity,
            "evaluations": self._evaluations,
            "task_prompts": self._task_prompts,
            "round_size": self._base.round_size,
            "search_seed": self._seed,
        }

    @property
    def settings(self) -> tuple[Setting, ...]:
        """See `dynadepth_search.tuning.space.Tunable`."""
        # The probe leaves three evaluations for each prompt.
        most = (self._evaluations - 3) * self._task_prompts // self._probe_edits
        return (
            Setting(name="exploration", low=0.2, high=20.0, log=True),
            Setting(name="interaction", low=1e-3, high=1.0, log=True),
            Setting(name="noise", low=1e-4, high=1.0, log=True),
            Setting(name="random_child", low=0.0, high=0.5),
            Setting(
                name="probe_trees",
                low=1,
                high=max(self._base.probe_trees, min(most, 64, len(self._halves[0]))),
                whole=True,
                log=True,
            ),
        )

    def default(self) -> dict[str, Value]:
        """Return the settings of `search prompts`."""
        return {setting.name: getattr(self._base, setting.name) for setting in self.settings}

    def config(self, params: Mapping[str, Any]) -> SearchConfig:
        """Return the settings of a search that pays for its probe.

        Args:
            params: A value for each setting.
        """
        config = replace(self._base, **params)
        probe = config.probe_trees * self._probe_edits / self._task_prompts
        return replace(config, max_evaluations=max(1, self._evaluations - round(probe)))

    def evaluate(self, params: Mapping[str, Any], report: Report) -> Outcome | None:
        """See `dynadepth_search.tuning.space.Tunable`."""
        shares: list[float] = []
        for step in range(_SEARCHES):
            gains = self._search(0, params, step)
            shares.append(float(gains.mean()) / self._best[0])
            if step + 1 < _SEARCHES and report(step, float(np.mean(shares))):
                return None
        return Outcome((float(np.mean(shares)),), {"shares": shares})

    def findings(self, trials: Sequence[StudyTrial]) -> dict[str, Any]:
        """See `dynadepth_search.tuning.space.Tunable`."""
        default = next(trial for trial in trials if trial.default)
        best = max(trials, key=lambda trial: (trial.values or (-np.inf,), -trial.number))
        own, tuned = (
            np.mean([self._search(1, each.params, step) for step in range(_SEARCHES)], axis=0)
            / self._best[1]
            for each in (default, best)
        )
        return {
            "comparison": {
                "default": float(own.mean()),
                "tuned": float(tuned.mean()),
                "difference": paired_difference(tuned, own, seed=self._seed).to_dict(),
                "how": (
                    f"On the half of the prompts that no trial saw, {_SEARCHES} searches of each with seeds of their "
                    "own; paired by prompt."
                ),
            },
            "curve": None,
        }

    def _search(self, half: int, params: Mapping[str, Any], step: int) -> Floats:
        table = self._halves[half]
        seed = self._seed + _SEARCHES * half + step
        return table.search(self.config(params), penalty=self._penalties[half], seed=seed)
