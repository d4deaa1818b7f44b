"""A menu's training as work to be tuned: its settings, and what they are worth by cross-validation on a score table.

All that a trial chooses from data, heads and plans alike, it chooses for each fold from the prompts outside it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dynadepth.errors import BudgetError, ConfigError
from dynadepth.evaluation.intervals import paired_difference
from dynadepth.plans import plan_text
from dynadepth.training.menu.cross_validation import MenuCrossValidation
from dynadepth.training.menu.fit import by_depth, fit_menu, plan_order, step_alternatives
from dynadepth.training.menu.menu_data import FOLDS, MenuData, MenuRecipe
from dynadepth.training.menu.tradeoff import at_depths, depth_curve, static_values
from dynadepth_search.progress import Progress, silent
from dynadepth_search.scoring.objectives import check_objective
from dynadepth_search.scoring.score_table import ScoreTable, menu_data
from dynadepth_search.tuning.space import Goal, Outcome, Report, Setting, StudyTrial, Value

__all__ = ["MenuTuning", "table_identity"]

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_QUALITY = {"preserve": "agreement", "reward": "probability of the right answer"}
# Depths at which a report shows the default settings and the static mixture.
_CURVE = 13


def table_identity(table: ScoreTable) -> dict[str, Any]:
    """Return what identifies a score table, as values that JSON can hold."""
    asked = table.manifest["asked"]
    return {
        "base_model": asked["base_model"],
        "task": asked["task"],
        "plans": [plan_text(plan) for plan in table.plans],
        "shortcuts": table.shortcuts,
        "scored_prompts": len(table),
    }


class MenuTuning:
    """The training of a menu on a score table.

    With `at`, the one goal is the quality at that budget. Without, a trial also chooses the depth, and there are two
    goals: low depth and high quality. The quality is the agreement with the base model's answers, or the probability of
    the right answer, of prompts that the trial's menu did not learn from.

    Args:
        table: Prompts under plans, with their states.
        objective: `preserve` or `reward`, see `dynadepth.training.menu.fit.fit_menu`.
        at: The budget, a mean depth; None: all depths.
        seed: Seed of the folds and of perceptrons; the same for all trials, which then differ by their
            settings alone.
        progress: Called with the stage, the number of finished steps and the number of all steps.

    Raises:
        BudgetError: `at` is not between the depth of the shallowest plan and 1.
        ConfigError: There are too few prompts, no states, or no answers for the objective.
    """

    kind = "menu"

    def __init__(
        self,
        table: ScoreTable,
        *,
        objective: str = "preserve",
        at: float | None = None,
        seed: int = 0,
        progress: Progress = silent,
    ) -> None:
        if not table.views:
            raise ConfigError(
                "the score table has no states, so no menu can learn from it; score with --policy menu"
            )
        self._objective, self._seed, self._progress = check_objective(objective), seed, progress
        self._data = data = menu_data(table)
        self._fitter = MenuCrossValidation(data, self._objective, seed)
        self._layers = step_alternatives(data)
        self._lowest = float(data.depths.min())
        if at is not None and not self._lowest <= at < 1:
            raise BudgetError(
                f"the budget is {at}; expected from {self._lowest:.4g}, the depth of the shallowest plan of the table, "
                "to below 1"
            )
        self._at = at
        self._fold = data.folds(seed)
        self._stored = min(views.shape[2] for views in data.views.values()) - 1
        self._identity = table_identity(table)
        self._orders = [self._order(np.flatnonzero(self._fold != fold)) for fold in range(FOLDS)]

    @property
    def goals(self) -> tuple[Goal, ...]:
        """See `dynadepth_search.tuning.space.Tunable`."""
        quality = _QUALITY[self._objective]
        if self._at is not None:
            return (Goal(f"{quality} at mean depth {self._at:.4g}"),)
        return (Goal("mean depth", maximise=False), Goal(quality))

    @property
    def asked(self) -> dict[str, Any]:
        """See `dynadepth_search.tuning.space.Tunable`."""
        return {
            "table": self._identity,
            "objective": self._objective,
            "objective_at": self._at,
            "fold_seed": self._seed,
        }

    @property
    def settings(self) -> tuple[Setting, ...]:
        """See `dynadepth_search.tuning.space.Tunable`."""
        found = [
            Setting(name="layers", choices=tuple(_layers_text(each) for each in self._layers)),
            Setting(name="rank", low=8, high=256, whole=True, log=True),
            Setting(name="ridge", low=10.0, high=1e6, log=True),
            Setting(name="closeness"),
            Setting(name="factors", choices=(0, 1, 2, 4)),
            Setting(name="shrinkage"),
            Setting(name="inner", choices=(0, 32)),
            Setting(name="plans", low=2, high=len(self._data.plans), whole=True),
        ]
        if self._stored:
            found.append(Setting(name="windows", choices=(0, self._stored)))
        if self._data.reward is not None:
            found.append(Setting(name="answers"))
        if self._at is None:
            found.append(Setting(name="depth", low=self._lowest, high=1.0))
        return tuple(found)

    def default(self) -> dict[str, Value]:
        """Return the settings that `train` chooses on this table by its own cross-validation."""
        recipe = fit_menu(
            self._data,
            objective=self._objective,
            seed=self._seed,
            progress=lambda done, total: self._progress("default settings", done, total),
        ).recipe
        weights = dict(recipe.weights)
        answers = weights.get("reward", 0.0)
        found: dict[str, Value] = {
            "layers": _layers_text(recipe.layers),
            "rank": recipe.rank,
            "ridge": recipe.ridge,
            "closeness": weights.get("closeness", 0.0) / (1.0 - answers),
            "factors": recipe.factors,
            "shrinkage": recipe.shrinkage,
            "inner": recipe.inner,
            "plans": len(self._data.plans),
            "windows": recipe.num_windows,
            "answers": answers,
            "depth": (self._lowest + 1.0) / 2,
        }
        return {setting.name: found[setting.name] for setting in self.settings}

    def recipe(self, params: Mapping[str, Any]) -> MenuRecipe:
        """Return how heads are trained under some settings."""
        answers = float(params.get("answers", 0.0))
        closeness = float(params["closeness"])
        shares = {
            "agreement": (1 - answers) * (1 - closeness),
            "closeness": (1 - answers) * closeness,
            "reward": answers,
        }
        return MenuRecipe(
            layers=tuple(int(layer) for layer in params["layers"].split("+")),
            num_windows=int(params.get("windows", 0)),
            rank=int(params["rank"]),
            ridge=float(params["ridge"]),
            weights=tuple((name, share) for name, share in shares.items() if share > 0),
            factors=int(params["factors"]),
            shrinkage=float(params["shrinkage"]),
            inner=int(params["inner"]),
        )

    def plans(self, params: Mapping[str, Any]) -> Indices:
        """Return which plans of the table are on the menu, chosen on all prompts: the identity, then by depth."""
        order, least = self._order(np.arange(len(self._fold)))
        return by_depth(self._data, order[: max(least, int(params["plans"]))])

    def qualities(self, params: Mapping[str, Any], depths: Sequence[float]) -> Floats:
        """Return what each prompt gets at given mean depths, from menus that did not learn from it.

        Every fold keeps to the depth by itself: if only all of them did together, settings would win whose menus happen
        to differ between folds, by spending depth where it pays.

        Args:
            params: The settings.
            depths: The mean depths.

        Returns:
            Expected qualities; 0 at a depth that the menus do not go down to. Shape (depths, N), float64.
        """
        data, recipe = self._data, self.recipe(params)
        scores = self._fitter.held_out_scores(recipe)
        numbers = [data.prefixes(layer) for layer in recipe.layers]
        wanted = np.asarray(depths, dtype=np.float64)
        found = np.empty((len(wanted), len(self._fold)))
        for fold, (order, least) in enumerate(self._orders):
            inside = np.flatnonzero(self._fold == fold)
            off = np.ones(len(data.plans), dtype=bool)
            off[order[: max(least, int(params["plans"]))]] = False
            own = [np.where(off, -np.inf, step[inside]) for step in scores]
            curve = depth_curve(own, numbers, data.depths)
            part = at_depths(curve, self._fitter.values[inside], wanted)
            part[wanted < curve[0].min() - 1e-9] = 0.0
            found[:, inside] = part
        return found

    def evaluate(self, params: Mapping[str, Any], report: Report) -> Outcome:
        """See `dynadepth_search.tuning.space.Tunable`; a trial takes a second, so nothing is pruned."""
        del report
        depth = float(params["depth"]) if self._at is None else self._at
        quality = self.qualities(params, [depth])[0]
        folds = [float(quality[self._fold == fold].mean()) for fold in range(FOLDS)]
        mean = float(quality.mean())
        return Outcome((mean,) if self._at is not None else (depth, mean), {"folds": folds})

    def findings(self, trials: Sequence[StudyTrial]) -> dict[str, Any]:
        """See `dynadepth_search.tuning.space.Tunable`."""
        default = next(trial for trial in trials if trial.default)
        if self._at is not None:
            return {"comparison": self._comparison(trials, default, self._at), "curve": None}
        depths = np.linspace(self._lowest, 1.0, _CURVE)
        static = static_values(self._fitter.values, self._data.depths, depths).mean(axis=1)
        own = self.qualities(default.params, depths.tolist()).mean(axis=1)
        columns = {"depth": depths, "default": own, "static": static}
        rows = [
            dict(zip(columns, row, strict=True))
            for row in np.stack([*columns.values()], 1).tolist()
        ]
        return {"comparison": None, "curve": rows}

    def _comparison(
        self, trials: Sequence[StudyTrial], default: StudyTrial, at: float
    ) -> dict[str, Any]:
        """Compare tuned settings with the default; those of a fold are chosen by the prompts outside it."""
        folds = np.array([trial.notes["folds"] for trial in trials])
        sizes = np.array([int((self._fold == fold).sum()) for fold in range(FOLDS)])
        tuned = np.empty(len(self._fold))
        known: dict[int, Floats] = {}
        for fold in range(FOLDS):
            others = np.delete(folds, fold, axis=1) @ np.delete(sizes, fold)
            best = int(others.argmax())
            if best not in known:
                known[best] = self.qualities(trials[best].params, [at])[0]
            inside = self._fold == fold
            tuned[inside] = known[best][inside]
        own = self.qualities(default.params, [at])[0]
        return {
            "default": float(own.mean()),
            "tuned": float(tuned.mean()),
            "difference": paired_difference(tuned, own, seed=self._seed).to_dict(),
            "static": float(
                static_values(self._fitter.values, self._data.depths, np.array([at])).mean()
            ),
            "how": (
                "For each fifth of the prompts, the settings are those that did best on the other four; the default "
                "was chosen on all five. Settings had been drawn by what did well on all prompts, so this flatters the "
                "tuned ones a little: `eval` on held-out prompts decides."
            ),
        }

    def _order(self, rows: Indices) -> tuple[Indices, int]:
        """Return the plans in the order in which a menu chosen on some prompts takes them."""
        data = self._data
        part = MenuData(
            plans=data.plans,
            views={layer: views[rows] for layer, views in data.views.items()},
            agreement=data.agreement[rows],
            total_variation=data.total_variation[rows],
            reward=None if data.reward is None else data.reward[rows],
            groups=[str(data.names[row]) for row in rows.tolist()],
        )
        return plan_order(part, len(data.plans), objective=self._objective, seed=self._seed)


def _layers_text(layers: Sequence[int]) -> str:
    return "+".join(map(str, layers))
