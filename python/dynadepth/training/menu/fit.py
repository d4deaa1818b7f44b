"""Training of a menu on a score table: the choice of the recipe and the plans, and the final heads.

The choices rest on `dynadepth.training.menu.cross_validation`. It works on arrays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dynadepth.errors import ConfigError
from dynadepth.evaluation.mixtures import concave_hull
from dynadepth.plans import Plans, prefix_numbers
from dynadepth.policies.menu import Menu, MenuHead
from dynadepth.training.menu.cross_validation import MenuCrossValidation
from dynadepth.training.menu.menu_data import MenuData, MenuRecipe, MenuTrial
from dynadepth.training.menu.tradeoff import (
    at_depths,
    choose,
    depth_curve,
    depth_grid,
    standard_error,
)

__all__ = [
    "MenuFit",
    "by_depth",
    "choose_plans",
    "decision_layers",
    "fit_menu",
    "fit_recipe",
    "plan_order",
    "step_alternatives",
]

_SHRINKAGES = (1.0, 0.5, 0.25)
_INNER = 32
# Weight of a plan's static shortfall when a menu is chosen.
_SHORTFALL = 0.5

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True)
class MenuFit:
    """A trained menu and how it was chosen.

    Args:
        menu: Trained on all prompts.
        recipe: The chosen recipe.
        gain: The gain of the best recipe in cross-validation at shrinkage 1, minus its selection bias.
        trials: The trials of the last rounds, in order.
        fitter: The cross-validation, for what not every caller needs.
        columns: Which plans of the data are on the menu; None: all. Shape (plans of the menu,), int64.
    """

    menu: Menu
    recipe: MenuRecipe
    gain: float
    trials: tuple[MenuTrial, ...]
    fitter: MenuCrossValidation
    columns: Indices | None = None

    @property
    def scores(self) -> Sequence[Floats]:
        """Out-of-fold scores of each prompt, by heads that learned from almost all others, for each step.

        Shape (N, K) each.
        """
        return self._out_of_fold[0]

    @cached_property
    def _out_of_fold(self) -> tuple[list[Floats], list[list[Floats]]]:
        scores, every = self.fitter.out_of_fold_scores(self.recipe)
        if self.columns is None:
            return scores, every
        taken = self.columns
        return [step[:, taken] for step in scores], [
            [step[:, taken] for step in steps] for steps in every
        ]

    def choices(self, penalty: float) -> Indices:
        """Return the plan of each training prompt under a penalty, by its out-of-fold scores. Shape (N,), int64."""
        return self._choose(self.scores, penalty)

    def mean_depth(self, penalty: float) -> float:
        """Return the mean depth of the training prompts under a penalty, by their out-of-fold scores."""
        return float(self.menu.depths[self.choices(penalty)].mean())

    def depth_spread(self, penalty: float) -> float:
        """Return the standard deviation of the mean depth over the choice of the prompts that the heads learn from."""
        depths = [
            self.menu.depths[self._choose(scores, penalty)].mean()
            for scores in self._out_of_fold[1]
        ]
        return float(np.std(depths))

    def _choose(self, scores: Sequence[Floats], penalty: float) -> Indices:
        numbers = [prefix_numbers(self.menu.plans, layer) for layer in self.recipe.layers]
        return choose(scores, numbers, self.menu.depths, penalty)


def fit_menu(
    data: MenuData,
    *,
    objective: str = "preserve",
    seed: int = 0,
    steps: Sequence[Sequence[int]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MenuFit:
    """Choose a recipe by cross-validation and train a menu's heads with it.

    Recipes are compared by their gain over the best mixture of the menu's own plans of equal depth, averaged over
    four depths: in agreement for `preserve`, in the probability of the right answer for `reward`. A perceptron, or a
    decision in several steps, is used only if it gains more by at least one standard error of the paired difference.
    The shrinkage is the largest of 1, 1/2 and 1/4 whose gain, minus the selection bias of the recipe, is more than one
    standard error, else 0: then all prompts are treated alike.

    Args:
        data: The prompts under the plans.
        objective: `preserve` (agreement with the base model) or `reward` (probability of the right answer).
        seed: Seed of the folds and the perceptron.
        steps: Layers to decide at, one tuple for each alternative. None: each layer of the data at which no plans
            differ yet, and the last of these paired with every later layer.
        progress: Called with the numbers of finished alternatives and of all alternatives.

    Returns:
        The menu and how it was chosen.

    Raises:
        ConfigError: The objective is unknown, or the data has no states of some layer.

    Source:
        Our own. CARROT (arXiv 2502.03261) scores each choice with its own head and subtracts the cost; deviation:
        targets are the frozen model's own answers, so that no labels are needed.
    """
    fitter = MenuCrossValidation(data, objective, seed)
    single, several = _divided(data, steps)
    total = len(single) + len(several) + 1
    trials: list[MenuTrial] = []
    best: tuple[MenuTrial, Floats] | None = None
    for done, layers in enumerate(single):
        found = fitter.best_of(layers)
        trials.append(found[0])
        if best is None or found[0].gain > best[0].gain:
            best = found
        if progress is not None:
            progress(done + 1, total)
    if best is None:
        raise ConfigError("no layer to decide at was given; give the layers of the data's states")
    for done, layers in enumerate(several):
        found = fitter.best_of(layers)
        trials.append(found[0])
        if _wins(found[1], best[1]):
            best = found
        if progress is not None:
            progress(len(single) + done + 1, total)
    perceptron = fitter.try_recipe(replace(best[0].recipe, inner=_INNER))
    trials.append(perceptron[0])
    if _wins(perceptron[1], best[1]):
        best = perceptron
    recipe, bias = replace(best[0].recipe, shrinkage=0.0), fitter.selection_bias()
    for shrinkage in _SHRINKAGES:
        trial, _ = fitter.try_recipe(replace(best[0].recipe, shrinkage=shrinkage))
        if shrinkage != 1.0:
            trials.append(trial)
        if trial.gain - shrinkage * bias > trial.standard_error:
            recipe = trial.recipe
            break
    if progress is not None:
        progress(total, total)
    return MenuFit(
        menu=fitter.train(recipe),
        recipe=recipe,
        trials=tuple(trials),
        gain=best[0].gain - bias,
        fitter=fitter,
    )


def fit_recipe(
    data: MenuData,
    recipe: MenuRecipe,
    *,
    columns: Indices | None = None,
    objective: str = "preserve",
    seed: int = 0,
) -> MenuFit:
    """Train a menu's heads with a given recipe.

    The heads learn from all plans of the data; those of the menu are kept of them.

    Args:
        data: The prompts under the plans.
        recipe: How the heads are trained.
        columns: The plans of the menu, as rows of the data's, the identity first; None: all. Shape (plans,), int64.
        objective: See `fit_menu`.
        seed: Seed of the folds and the perceptron.

    Returns:
        The menu; its only trial is the recipe, whose gain is that of all plans of the data.

    Raises:
        ConfigError: The objective is unknown, the data has no states of a layer of the recipe, or plans differ before
            the first of them.
    """
    fitter = MenuCrossValidation(data, objective, seed)
    differ = np.flatnonzero((data.plans != data.plans[0]).any(axis=0))
    if len(differ) and recipe.layers[0] > differ[0]:
        raise ConfigError(
            f"the recipe decides at layer {recipe.layers[0]}, but plans differ from layer {differ[0]} on; decide there "
            "or before"
        )
    trial, _ = fitter.try_recipe(recipe)
    menu = fitter.train(recipe)
    return MenuFit(
        menu=menu if columns is None else _part_of(menu, columns),
        recipe=recipe,
        gain=trial.gain,
        trials=(trial,),
        fitter=fitter,
        columns=columns,
    )


def decision_layers(plans: Plans) -> tuple[int, ...]:
    """Return the layers at which it may be worthwhile to decide between plans, ascending.

    They are half and three quarters of the way to the first layer at which plans differ, that layer, and, for a second
    step, every second layer after it, or every fourth if plans differ early.

    Args:
        plans: The plans. Shape (K, num_layers), uint8.

    Returns:
        Layers, of which at least one is at or before the first layer at which plans differ.
    """
    differ = np.flatnonzero((plans != plans[0]).any(axis=0))
    first, last = (int(differ[0]), int(differ[-1])) if len(differ) else (0, 0)
    stride = 2 if first > len(plans[0]) // 3 else 4
    return tuple(sorted({first // 2, 3 * first // 4, first, *range(first + 2, last, stride)}))


def choose_plans(
    data: MenuData, size: int, *, objective: str = "preserve", seed: int = 0
) -> Indices:
    """Choose a menu from a pool of plans such that choosing among them for each prompt gains most.

    The menu starts with the plans of the best static mixtures, so that a policy that cannot tell prompts apart still
    has those. Each step adds the plan with the highest lower bound on the gain of a policy that was trained on other
    prompts (the mean over prompts and four depths, minus its standard error), minus half of the plan's shortfall, if
    given to all prompts, from the best mixture of its depth: with too few prompts to tell the gain of a plan, a good
    plan is the better bet. The gain of an oracle is not considered, since most of it is luck.

    Args:
        data: The prompts under the pool of plans.
        size: Number of plans wanted, including the identity. More are returned if the static mixtures need more, fewer
            if the pool is smaller.
        objective: `preserve` or `reward`, see `fit_menu`.
        seed: Seed of the folds.

    Returns:
        Rows of the pool: the identity first, then by descending depth. Shape (chosen,), int64.

    Raises:
        ConfigError: The size is below 2, or the pool has only one plan.
    """
    return by_depth(data, plan_order(data, size, objective=objective, seed=seed)[0])


def by_depth(data: MenuData, taken: Indices) -> Indices:
    """Return plans of a menu as they stand on it: the identity first, then by descending depth.

    Args:
        data: The prompts under the pool of plans.
        taken: Rows of the pool, the identity first. Shape (plans,), int64.
    """
    depths = data.depths
    others = sorted(taken[1:].tolist(), key=lambda plan: (-depths[plan], plan))
    return np.array([0, *others], dtype=np.int64)


def plan_order(
    data: MenuData, size: int, *, objective: str = "preserve", seed: int = 0
) -> tuple[Indices, int]:
    """Return the plans of a menu in the order in which `choose_plans` takes them, so that smaller menus are its begin.

    Args:
        data: The prompts under the pool of plans.
        size: As for `choose_plans`.
        objective: `preserve` or `reward`, see `fit_menu`.
        seed: Seed of the folds.

    Returns:
        Rows of the pool, the identity first, shape (chosen,), int64; and how many of the first ones are the identity
        and the plans of the best static mixtures.

    Raises:
        ConfigError: The size is below 2, or the pool has only one plan.
    """
    if size < 2 or len(data.plans) < 2:
        raise ConfigError(
            f"a menu of {size} from a pool of {len(data.plans)} plans was asked for; expected 2 or more of both"
        )
    fitter = MenuCrossValidation(data, objective, seed)
    first = min(layer for layer in data.views)
    scores = fitter.held_out_scores(fitter.default(first))[0]
    depths = data.depths
    # Graded targets in addition to counts: with few prompts, counts alone cannot tell plans apart.
    values = 0.75 * fitter.values + 0.25 * data.targets()["closeness"]
    hull = concave_hull(depths, fitter.values.mean(axis=0))
    taken = sorted({0, *hull.tolist()})
    least = len(taken)
    frontier = concave_hull(depths, values.mean(axis=0))
    shortfall = np.interp(depths, depths[frontier], values.mean(axis=0)[frontier])
    shortfall = shortfall - values.mean(axis=0)
    wanted = depth_grid(depths)
    while len(taken) < min(size, len(data.plans)):
        rest = [plan for plan in range(len(data.plans)) if plan not in taken]
        before = _menu_values(scores, values, depths, taken, wanted)
        worth = []
        for plan in rest:
            gains = _menu_values(scores, values, depths, [*taken, plan], wanted) - before
            sure = float(gains.mean()) - standard_error(gains)
            worth.append(sure - _SHORTFALL * float(shortfall[plan]))
        taken.append(rest[int(np.argmax(worth))])
    return np.array(taken, dtype=np.int64), least


def step_alternatives(data: MenuData) -> list[tuple[int, ...]]:
    """Return the layers at which `fit_menu` tries to decide: in one step at each early layer, then in two.

    Raises:
        ConfigError: The data has no states of a layer at which no plans differ yet.
    """
    single, several = _divided(data, None)
    return [*single, *several]


def _menu_values(
    scores: Floats, values: Floats, depths: Floats, rows: list[int], wanted: Floats
) -> Floats:
    """Return what each prompt gets, over the depths, if held-out scores choose among the given plans."""
    one = np.zeros(len(rows), dtype=np.int64)
    curve = depth_curve([scores[:, rows]], [one], depths[rows])
    each: Floats = at_depths(curve, values[:, rows], wanted).mean(axis=0)
    return each


def _divided(
    data: MenuData, steps: Sequence[Sequence[int]] | None
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return decisions in one step and in several, each in the order in which they are tried."""
    if steps is not None:
        given = [tuple(layers) for layers in steps]
        return [each for each in given if len(each) == 1], [each for each in given if len(each) > 1]
    differ = np.flatnonzero((data.plans != data.plans[0]).any(axis=0))
    first = int(differ[0]) if len(differ) else int(data.plans.shape[1]) - 1
    early = [layer for layer in sorted(data.views) if layer <= first]
    late = [layer for layer in sorted(data.views) if layer > first]
    if not early:
        raise ConfigError(
            f"plans differ from layer {first} on, but the first states are of layer {min(data.views)}; keep the "
            f"states of layer {first}"
        )
    return [(layer,) for layer in early], [(early[-1], layer) for layer in late]


def _part_of(menu: Menu, columns: Indices) -> Menu:
    """Return the menu with some of its plans only."""
    heads = [
        MenuHead(
            head.layer_idx,
            head.num_windows,
            head.weight[columns].contiguous(),
            head.bias[columns].contiguous(),
            head.inner_weight,
            head.inner_bias,
        )
        for head in menu.heads
    ]
    return Menu(menu.plans[columns], tuple(heads))


def _wins(gains: Floats, over: Floats) -> bool:
    """Say whether gains on the same prompts are larger by more than one standard error."""
    difference = gains - over
    return float(difference.mean()) > standard_error(difference)
