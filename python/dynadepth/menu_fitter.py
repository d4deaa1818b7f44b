"""One cross-validation of a menu's heads: recipes tried on folds that share their bases and predictions.

Works on arrays. Which recipes are tried, and which one wins, is `menu_training`.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynadepth.errors import ConfigError
from dynadepth.menu_curves import at_depths, depth_curve, depth_grid, static_values
from dynadepth.menu_data import FOLDS, MenuData, MenuRecipe, MenuTrial
from dynadepth.menu_heads import Basis, Perceptron, ridge
from dynadepth.menus import Menu, MenuHead

__all__ = ["MenuFitter", "standard_error"]

_RANKS = (16, 32, 64, 128, 256)
# In units of the standardised features' squared singular values.
_RIDGES = (10.0, 100.0, 1000.0, 10000.0)

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


class MenuFitter:
    """One cross-validation: folds, bases and predictions are made once and shared between recipes."""

    def __init__(self, data: MenuData, objective: str, seed: int) -> None:
        self._data, self._seed = data, seed
        self._fold = data.folds(seed)
        self._targets = data.targets()
        self.values = self._targets["agreement" if objective == "preserve" else "reward"]
        self._wanted = depth_grid(data.depths)
        self._static = static_values(self.values, data.depths, self._wanted)
        self._flat: dict[tuple[int, int], Floats] = {}
        self._bases: dict[tuple[int, int, int], Basis] = {}
        self._known: dict[tuple[int, int, int, float], dict[str, Floats]] = {}
        blends: list[dict[str, float]] = [
            {"agreement": 1.0},
            {"agreement": 0.5, "closeness": 0.5},
            {"closeness": 1.0},
        ]
        if "reward" in self._targets:
            blends += [
                {name: share / 2 for name, share in blend.items()} | {"reward": 0.5}
                for blend in blends
            ]
        self._blends = [tuple(sorted(blend.items())) for blend in blends]

    def default(self, layer_idx: int) -> MenuRecipe:
        """Return a recipe that does well without a choice, for pools of few prompts."""
        return MenuRecipe(
            layers=(layer_idx,), num_windows=0, rank=32, ridge=1000.0, weights=self._blends[1]
        )

    def best_of(self, layers: tuple[int, ...]) -> tuple[MenuTrial, Floats]:
        """Return the best linear recipe that decides at some layers, and its gain on every prompt."""
        stored = min(views.shape[2] for views in self._data.views.values()) - 1
        best: tuple[MenuTrial, Floats] | None = None
        for num_windows in dict.fromkeys((0, stored)):
            for rank in _RANKS:
                if rank > self._most_rank(layers, num_windows) and rank != _RANKS[0]:
                    continue
                for penalty in _RIDGES:
                    for weights in self._blends:
                        found = self.try_recipe(
                            MenuRecipe(
                                layers=layers,
                                num_windows=num_windows,
                                rank=rank,
                                ridge=penalty,
                                weights=weights,
                            )
                        )
                        if best is None or found[0].gain > best[0].gain:
                            best = found
        if best is None:
            raise ConfigError(f"no recipe can be tried at layers {layers}")
        return best

    def try_recipe(self, recipe: MenuRecipe) -> tuple[MenuTrial, Floats]:
        """Cross-validate a recipe; return what it gains, and that on every prompt."""
        numbers = [self._data.prefixes(layer) for layer in recipe.layers]
        curve = depth_curve(self.held_out_scores(recipe), numbers, self._data.depths)
        gains = (at_depths(curve, self.values, self._wanted) - self._static).mean(axis=0)
        trial = MenuTrial(
            recipe=recipe, gain=float(gains.mean()), standard_error=standard_error(gains)
        )
        return trial, gains

    def held_out_scores(self, recipe: MenuRecipe, *, centred: bool = False) -> list[Floats]:
        """Return every prompt's scores by heads that did not learn from it, for each step. Shape (N, K) each.

        Args:
            recipe: How the heads are trained.
            centred: Let the scores deviate from the plans' means over all prompts, as those of the final heads do, not
                from the means of each fold, which part prompts that the final heads treat alike.
        """
        means = np.empty_like(self.values)
        target = self._blend(recipe)
        for fold in range(FOLDS):
            means[self._fold == fold] = target[self._fold != fold].mean(axis=0)
        scores = []
        for layer in recipe.layers:
            if recipe.inner:
                predicted = self._perceptron_scores(layer, recipe, target)
            else:
                known = self._predictions(layer, recipe.num_windows, recipe.rank, recipe.ridge)
                predicted = sum(
                    (share * known[name] for name, share in recipe.weights),
                    start=np.zeros_like(means),
                )
            start = target.mean(axis=0) if centred else means
            scores.append(start + recipe.shrinkage * (predicted - means))
        return scores

    def train(self, recipe: MenuRecipe) -> Menu:
        """Train on all prompts."""
        target = self._blend(recipe)
        means = target.mean(axis=0)
        heads = []
        for layer in recipe.layers:
            basis = Basis(self._views(layer, recipe.num_windows), np.arange(len(target)))
            numbers = self._data.prefixes(layer)
            rank = min(recipe.rank, basis.rank)
            if recipe.inner:
                heads.append(self._train_perceptron(layer, recipe, basis, target, means))
                continue
            weight = np.zeros((rank, len(means)))
            bias = means.copy()
            for number in range(int(numbers.max()) + 1):
                columns = numbers == number
                z = basis.project(number)[:, :rank]
                weight[:, columns], bias[columns] = ridge(z, target[:, columns], recipe.ridge)
            wide, shift = basis.fold(weight)
            heads.append(
                MenuHead(
                    layer,
                    recipe.num_windows,
                    _tensor(recipe.shrinkage * wide.T),
                    _tensor(means + recipe.shrinkage * (bias - shift - means)),
                )
            )
        return Menu(self._data.plans, tuple(heads))

    def _blend(self, recipe: MenuRecipe) -> Floats:
        return sum(
            (share * self._targets[name] for name, share in recipe.weights),
            start=np.zeros_like(self.values),
        )

    def _views(self, layer: int, num_windows: int) -> Floats:
        """Return what a head reads, flat. Shape (N, prefixes, views * hidden), float64."""
        if layer not in self._data.views:
            raise ConfigError(
                f"there are no states of layer {layer}; expected one of {sorted(self._data.views)}"
            )
        key = (layer, num_windows)
        if key not in self._flat:
            views = self._data.views[layer]
            picked = views[:, :, -1:] if num_windows == 0 else views
            # Shared by all folds: they are the largest arrays here.
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

    def _predictions(
        self, layer: int, num_windows: int, rank: int, penalty: float
    ) -> dict[str, Floats]:
        """Return held-out predictions of every target: ridge is linear in it, so blends need no fit of their own."""
        key = (layer, num_windows, rank, penalty)
        if key in self._known:
            return self._known[key]
        names = list(self._targets)
        stacked = np.concatenate([self._targets[name] for name in names], axis=1)
        numbers = np.tile(self._data.prefixes(layer), len(names))
        found = np.empty_like(stacked)
        for fold in range(FOLDS):
            basis = self._basis(layer, num_windows, fold)
            inside, outside = np.flatnonzero(self._fold != fold), np.flatnonzero(self._fold == fold)
            for number in range(int(numbers.max()) + 1):
                columns = np.flatnonzero(numbers == number)
                z = basis.project(number)[:, : min(rank, basis.rank)]
                weight, bias = ridge(z[inside], stacked[np.ix_(inside, columns)], penalty)
                found[np.ix_(outside, columns)] = z[outside] @ weight + bias
        count = len(self._data.plans)
        self._known[key] = {
            name: found[:, index * count : (index + 1) * count] for index, name in enumerate(names)
        }
        return self._known[key]

    def _perceptron_scores(self, layer: int, recipe: MenuRecipe, target: Floats) -> Floats:
        found = np.empty_like(target)
        numbers = self._data.prefixes(layer)
        for fold in range(FOLDS):
            basis = self._basis(layer, recipe.num_windows, fold)
            inside, outside = self._fold != fold, self._fold == fold
            net = Perceptron(basis, numbers, rank=recipe.rank, inner=recipe.inner, seed=self._seed)
            net.fit(np.flatnonzero(inside), target)
            found[outside] = net.scores(np.flatnonzero(outside))
        return found

    def _train_perceptron(
        self, layer: int, recipe: MenuRecipe, basis: "Basis", target: Floats, means: Floats
    ) -> MenuHead:
        net = Perceptron(
            basis,
            self._data.prefixes(layer),
            rank=recipe.rank,
            inner=recipe.inner,
            seed=self._seed,
        )
        net.fit(np.arange(len(target)), target)
        inner, inner_shift = basis.fold(net.inner_weight)
        return MenuHead(
            layer,
            recipe.num_windows,
            _tensor(recipe.shrinkage * net.weight.T),
            _tensor(means + recipe.shrinkage * (net.bias - means)),
            _tensor(inner.T),
            _tensor(net.inner_bias - inner_shift),
        )


def standard_error(values: Floats) -> float:
    """Return the standard error of a mean."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _tensor(values: Floats) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.float32)
