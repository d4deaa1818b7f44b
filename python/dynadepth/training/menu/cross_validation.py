"""One cross-validation of a menu's heads: recipes tried on folds that share their bases and predictions.

It works on arrays. `dynadepth.training.menu.fit` decides which recipes are tried and which one is used.
"""

from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynadepth.errors import ConfigError
from dynadepth.policies.menu import Menu, MenuHead, score_states
from dynadepth.training.menu.menu_data import FOLDS, MenuData, MenuRecipe, MenuTrial
from dynadepth.training.menu.ridge import Basis, Moments, Perceptron
from dynadepth.training.menu.tradeoff import (
    at_depths,
    depth_curve,
    depth_grid,
    front_means,
    standard_error,
    static_values,
)

__all__ = ["MenuCrossValidation"]

_RANKS = (32, 64, 128, 256)
# In units of the standardised features' squared singular values.
_RIDGES = (300.0, 1000.0, 3000.0, 10000.0, 30000.0, 100000.0)
# What plans spoil has few causes, above all how certain an answer is; 0: every plan has its own.
_FACTORS = (1, 2, 0)
# Each fold leaves out so few prompts that its heads are almost the final ones.
_CALIBRATION_FOLDS = 25

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


class MenuCrossValidation:
    """One cross-validation, whose folds, bases and predictions are computed once and shared between recipes.

    Args:
        data: The prompts under the plans.
        objective: `preserve` or `reward`, see `fit_menu`.
        seed: Seed of the folds and the perceptrons.

    Raises:
        ConfigError: The objective is unknown, or needs answers that the prompts do not have.
    """

    def __init__(self, data: MenuData, objective: str, seed: int) -> None:
        if objective not in ("preserve", "reward"):
            raise ConfigError(f"objective {objective!r} is unknown; expected preserve or reward")
        if objective == "reward" and data.reward is None:
            raise ConfigError(
                "objective 'reward' needs prompts with right answers; use objective 'preserve'"
            )
        self._data, self._seed = data, seed
        self._fold = data.folds(seed)
        self._targets = data.targets()
        self.values = self._targets["agreement" if objective == "preserve" else "reward"]
        self._wanted = depth_grid(data.depths)
        self._static = static_values(self.values, data.depths, self._wanted)
        # The gains on every prompt of each recipe that was compared.
        self._tried: list[Floats] = []
        self._flat: dict[tuple[int, int], Floats] = {}
        self._bases: dict[tuple[int, int, int], Basis] = {}
        self._known: dict[tuple[int, int, int], list[Moments]] = {}
        blends: list[dict[str, float]] = [
            {"agreement": 1.0},
            {"agreement": 0.5, "closeness": 0.5},
        ]
        if "reward" in self._targets:
            blends += [
                {name: share / 2 for name, share in blend.items()} | {"reward": 0.5}
                for blend in blends
            ]
        self._blends = [tuple(sorted(blend.items())) for blend in blends]

    def default(self, layer_idx: int) -> MenuRecipe:
        """Return a recipe that does well without being tuned, for few prompts."""
        return MenuRecipe(
            layers=(layer_idx,),
            num_windows=0,
            rank=_RANKS[-1],
            ridge=10000.0,
            weights=self._blends[1],
            factors=1,
        )

    def best_of(self, layers: tuple[int, ...]) -> tuple[MenuTrial, Floats]:
        """Return the best linear recipe that decides at the given layers, and its gain on every prompt.

        Raises:
            ConfigError: No recipe can be tried at these layers, because there are no states or too few prompts.
        """
        stored = min(views.shape[2] for views in self._data.views.values()) - 1
        best: tuple[MenuTrial, Floats] | None = None
        for num_windows in dict.fromkeys((0, stored)):
            for rank in _RANKS:
                if rank > self._most_rank(layers, num_windows) and rank != _RANKS[0]:
                    continue
                for penalty, weights, factors in product(_RIDGES, self._blends, _FACTORS):
                    recipe = MenuRecipe(
                        layers=layers,
                        num_windows=num_windows,
                        rank=rank,
                        ridge=penalty,
                        weights=weights,
                        factors=factors,
                    )
                    found = self.try_recipe(recipe)
                    if best is None or found[0].gain > best[0].gain:
                        best = found
        if best is None:
            raise ConfigError(f"no recipe can be tried at layers {layers}")
        return best

    def try_recipe(self, recipe: MenuRecipe) -> tuple[MenuTrial, Floats]:
        """Cross-validate a recipe; return its mean gain and its gain on every prompt. Shape (N,), float64."""
        numbers = [self._data.prefixes(layer) for layer in recipe.layers]
        curve = depth_curve(self.held_out_scores(recipe), numbers, self._data.depths)
        gains = (at_depths(curve, self.values, self._wanted) - self._static).mean(axis=0)
        if recipe.shrinkage == 1.0:
            self._tried.append(gains)
        trial = MenuTrial(
            recipe=recipe, gain=float(gains.mean()), standard_error=standard_error(gains)
        )
        return trial, gains

    def selection_bias(self) -> float:
        """Return the selection bias of the best gain: the best of many recipes is also the luckiest.

        For each fold, the recipe with the highest gain on the prompts outside it is evaluated on those inside.

        Returns:
            The best gain over all recipes tried, minus the gain of recipes chosen in this way; at least 0.
        """
        gains = np.stack(self._tried)
        honest = np.empty(gains.shape[1])
        for fold in range(FOLDS):
            inside = self._fold == fold
            honest[inside] = gains[gains[:, ~inside].mean(axis=1).argmax()][inside]
        return max(0.0, float(gains.mean(axis=1).max() - honest.mean()))

    def held_out_scores(self, recipe: MenuRecipe) -> list[Floats]:
        """Return every prompt's scores by heads that did not learn from it, for each step. Shape (N, K) each.

        The heads predict deviations from the plans' means over all prompts, as the final heads do: with the means of
        each fold, the prompts of one fold would get deeper plans than those of another.
        """
        means = self.values.mean(axis=0)
        deviations = self._perceptron_deviations if recipe.inner else self._deviations
        return [means + recipe.shrinkage * deviations(layer, recipe) for layer in recipe.layers]

    def out_of_fold_scores(self, recipe: MenuRecipe) -> tuple[list[Floats], list[list[Floats]]]:
        """Score all prompts by menus that are each trained on almost all of them.

        Budgets are calibrated on these scores. Prompts of one kind have similar scores and change plans at nearly the
        same penalty; heads trained on a fifth fewer prompts would place that penalty elsewhere than the final heads.

        Returns:
            For each step, the scores of every prompt by the menu that did not learn from it, shape (N, K) each; and for
            each of the menus, its scores of all prompts.
        """
        data = self._data
        fold = data.folds(self._seed, _CALIBRATION_FOLDS)
        out_of_fold = [np.empty_like(self.values) for _ in recipe.layers]
        every = []
        for number in np.unique(fold).tolist():
            menu = self.train(recipe, np.flatnonzero(fold != number))
            scores = [
                score_states(head, data.views[head.layer_idx], data.prefixes(head.layer_idx))
                for head in menu.heads
            ]
            for step, found in enumerate(scores):
                out_of_fold[step][fold == number] = found[fold == number]
            every.append(scores)
        return out_of_fold, every

    def train(self, recipe: MenuRecipe, rows: Indices | None = None) -> Menu:
        """Train on some prompts, or on all; heads always predict deviations from the plans' means over all."""
        means = self.values.mean(axis=0)
        if recipe.shrinkage == 0.0:
            means = front_means(self.values, self._data.depths)
        chosen = np.arange(len(self.values)) if rows is None else rows
        heads = []
        for layer in recipe.layers:
            basis = Basis(self._views(layer, recipe.num_windows), chosen, keep=_RANKS[-1])
            if recipe.inner:
                heads.append(self._train_perceptron(layer, recipe, basis, means, chosen))
                continue
            weight = np.zeros((min(recipe.rank, basis.rank), len(means)))
            offset = np.zeros(len(means))
            for number, columns in self._groups(layer):
                moments = self._moments_of(basis, number, columns, chosen)
                weight[:, columns] = moments.weights(
                    recipe.weights, recipe.rank, recipe.ridge, recipe.factors
                )
                offset[columns] = moments.centre[: len(weight)] @ weight[:, columns]
            wide, shift = basis.fold(weight)
            heads.append(
                MenuHead(
                    layer,
                    recipe.num_windows,
                    _tensor(recipe.shrinkage * wide.T),
                    _tensor(means - recipe.shrinkage * (shift + offset)),
                )
            )
        return Menu(self._data.plans, tuple(heads))

    def _blend(self, recipe: MenuRecipe) -> Floats:
        return sum(
            (share * self._targets[name] for name, share in recipe.weights),
            start=np.zeros_like(self.values),
        )

    def _views(self, layer: int, num_windows: int) -> Floats:
        """Return the views that a head reads, concatenated. Shape (N, prefixes, views * hidden), float64."""
        if layer not in self._data.views:
            raise ConfigError(
                f"there are no states of layer {layer}; expected one of {sorted(self._data.views)}"
            )
        key = (layer, num_windows)
        if key not in self._flat:
            views = self._data.views[layer]
            picked = views[:, :, -1:] if num_windows == 0 else views
            # Shared by all folds, since these are the largest arrays here.
            self._flat[key] = picked.flatten(2).to(torch.float64).numpy()
        return self._flat[key]

    def _basis(self, layer: int, num_windows: int, fold: int) -> "Basis":
        key = (layer, num_windows, fold)
        if key not in self._bases:
            rows = np.flatnonzero(self._fold != fold)
            self._bases[key] = Basis(self._views(layer, num_windows), rows, keep=_RANKS[-1])
        return self._bases[key]

    def _most_rank(self, layers: tuple[int, ...], num_windows: int) -> int:
        return min(self._basis(layer, num_windows, 0).rank for layer in layers)

    def _groups(self, layer: int) -> list[tuple[int, Indices]]:
        """Return the prefixes of the plans before a layer, and which plans have each."""
        numbers = self._data.prefixes(layer)
        return [
            (number, np.flatnonzero(numbers == number)) for number in range(int(numbers.max()) + 1)
        ]

    def _moments_of(self, basis: Basis, number: int, columns: Indices, rows: Indices) -> Moments:
        targets = {name: values[np.ix_(rows, columns)] for name, values in self._targets.items()}
        return Moments(basis.project(number)[rows], targets)

    def _moments(self, layer: int, num_windows: int, fold: int) -> list[Moments]:
        """Return the moments of the prompts outside a fold, for the plans of each prefix."""
        key = (layer, num_windows, fold)
        if key not in self._known:
            basis, inside = self._basis(*key), np.flatnonzero(self._fold != fold)
            self._known[key] = [
                self._moments_of(basis, number, columns, inside)
                for number, columns in self._groups(layer)
            ]
        return self._known[key]

    def _deviations(self, layer: int, recipe: MenuRecipe) -> Floats:
        """Return each prompt's predicted deviations from the plans' means, out of fold. Shape (N, K), float64."""
        found = np.empty_like(self.values)
        for fold in range(FOLDS):
            basis = self._basis(layer, recipe.num_windows, fold)
            outside = np.flatnonzero(self._fold == fold)
            every = self._moments(layer, recipe.num_windows, fold)
            for (number, columns), moments in zip(self._groups(layer), every, strict=True):
                weight = moments.weights(recipe.weights, recipe.rank, recipe.ridge, recipe.factors)
                z = basis.project(number)[outside, : len(weight)]
                found[np.ix_(outside, columns)] = (z - moments.centre[: len(weight)]) @ weight
        return found

    def _perceptron_deviations(self, layer: int, recipe: MenuRecipe) -> Floats:
        target = self._blend(recipe)
        found = np.empty_like(target)
        for fold in range(FOLDS):
            basis = self._basis(layer, recipe.num_windows, fold)
            inside, outside = np.flatnonzero(self._fold != fold), np.flatnonzero(self._fold == fold)
            net = self._perceptron(layer, recipe, basis, inside)
            found[outside] = net.scores(outside) - target[inside].mean(axis=0)
        return found

    def _perceptron(
        self, layer: int, recipe: MenuRecipe, basis: Basis, rows: Indices
    ) -> Perceptron:
        numbers = self._data.prefixes(layer)
        net = Perceptron(basis, numbers, rank=recipe.rank, inner=recipe.inner, seed=self._seed)
        net.fit(rows, self._blend(recipe), self._data.names)
        return net

    def _train_perceptron(
        self, layer: int, recipe: MenuRecipe, basis: Basis, means: Floats, rows: Indices
    ) -> MenuHead:
        target = self._blend(recipe)[rows]
        net = self._perceptron(layer, recipe, basis, rows)
        inner, inner_shift = basis.fold(net.inner_weight)
        return MenuHead(
            layer,
            recipe.num_windows,
            _tensor(recipe.shrinkage * net.weight.T),
            _tensor(means + recipe.shrinkage * (net.bias - target.mean(axis=0))),
            _tensor(inner.T),
            _tensor(net.inner_bias - inner_shift),
        )


def _tensor(values: Floats) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.float32)
