"""Training of a menu's heads on a damage table: arrays in, a menu out.

Owns the fit (standardise, principal components, ridge, folded into one matrix), the cross-validation that chooses
between recipes, and the choice of a menu from a pool of plans. Knows nothing of models, prompts or files.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from dynadepth.errors import ConfigError
from dynadepth.evaluation import concave_hull
from dynadepth.menus import Menu, MenuHead
from dynadepth.plans import Plans, plan_depth

__all__ = [
    "PENALTIES",
    "MenuData",
    "MenuFit",
    "MenuRecipe",
    "MenuTrial",
    "choose_plans",
    "decision_layers",
    "fit_menu",
    "walk_budget",
]

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_FOLDS = 5
_RANKS = (16, 32, 64, 128, 256)
# In units of the standardised features' squared singular values.
_RIDGES = (10.0, 100.0, 1000.0, 10000.0)
_SHRINKAGES = (1.0, 0.5, 0.25)
_INNER = 32
# Depths at which recipes are compared, as shares of the way from the lowest plan to the deepest.
_SHARES = (0.2, 0.4, 0.6, 0.8)
# Penalties in agreement per unit of depth; neighbours are mixed, so the grid need not be finer.
PENALTIES: Floats = np.concatenate([[-100.0, 0.0], np.geomspace(0.02, 200.0, 47)])
_FLAT = 1e-6


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class MenuData:
    """What heads are trained on: N prompts under K plans.

    Args:
        plans: The identity first. Shape (K, num_layers), uint8.
        views: By layer, what a head reads of each prompt that comes there under each distinct prefix of the plans,
            prefixes numbered in the order in which plans first show them. Shape (N, prefixes, views, hidden), floating.
        agreement: 1 where a plan keeps the base model's answer. Shape (N, K).
        total_variation: Between base and plan, 0 to 1. Shape (N, K).
        reward: Probability of the right answer; None where there is none. Shape (N, K).
        groups: Names of the prompts; rows of one name share a fold. None: all differ.

    Raises:
        ConfigError: Shapes that do not belong together, numbers that are not finite, or fewer than 20 prompts.
    """

    plans: Plans
    views: Mapping[int, Tensor]
    agreement: Floats
    total_variation: Floats
    reward: Floats | None = None
    groups: Sequence[str] | None = None

    def __post_init__(self) -> None:
        shape = (len(self.agreement), len(self.plans))
        if shape[0] < 4 * _FOLDS:
            raise ConfigError(
                f"{shape[0]} prompts cannot train and cross-validate a menu; score {4 * _FOLDS} or more"
            )
        for name in ("agreement", "total_variation", "reward"):
            values = getattr(self, name)
            if values is not None and (values.shape != shape or not np.isfinite(values).all()):
                raise ConfigError(
                    f"{name} has shape {values.shape} or values that are not finite; expected finite numbers of shape "
                    f"{shape}"
                )
        for layer, views in self.views.items():
            if len(views) != shape[0] or not bool(torch.isfinite(views).all()):
                raise ConfigError(
                    f"the states of layer {layer} are of {len(views)} prompts or not finite; expected finite states of "
                    f"{shape[0]} prompts"
                )

    @property
    def depths(self) -> Floats:
        """Depth of each plan. Shape (K,)."""
        return plan_depth(self.plans)

    def targets(self) -> dict[str, Floats]:
        """Return what is learned, all between 0 and 1 with 1 best. Shape (N, K) each."""
        found = {"agreement": self.agreement, "closeness": 1.0 - self.total_variation}
        if self.reward is not None:
            found["reward"] = self.reward
        return found

    def prefixes(self, layer_idx: int) -> Indices:
        """Return the number of each plan's prefix before a layer. Shape (K,)."""
        known: dict[bytes, int] = {}
        numbers = [known.setdefault(plan[:layer_idx].tobytes(), len(known)) for plan in self.plans]
        return np.array(numbers, dtype=np.int64)

    def folds(self, seed: int) -> Indices:
        """Return the fold of each prompt. Shape (N,)."""
        names = list(self.groups) if self.groups is not None else list(range(len(self.agreement)))
        number = {name: index for index, name in enumerate(dict.fromkeys(names))}
        drawn = np.random.default_rng(seed).permutation(len(number)) % _FOLDS
        folds: Indices = drawn[[number[name] for name in names]]
        return folds


@dataclass(frozen=True, slots=True, kw_only=True)
class MenuRecipe:
    """How a menu's heads are trained.

    Args:
        layers: Where they read, ascending; two or more decide in steps.
        num_windows: Windows that they read besides the last token's state.
        rank: Principal components that are kept.
        ridge: Penalty of the squared weights on them.
        weights: Share of each target in the blend that is learned; they sum to 1.
        shrinkage: How far a prompt's scores may leave the plans' means, 0 to 1.
        inner: Hidden units of a perceptron; 0 for a linear head.
    """

    layers: tuple[int, ...]
    num_windows: int
    rank: int
    ridge: float
    weights: tuple[tuple[str, float], ...]
    shrinkage: float = 1.0
    inner: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as values that JSON knows."""
        return {
            "layers": list(self.layers),
            "num_windows": self.num_windows,
            "rank": self.rank,
            "ridge": self.ridge,
            "weights": dict(self.weights),
            "shrinkage": self.shrinkage,
            "inner": self.inner,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MenuTrial:
    """A recipe and what it gained in cross-validation.

    Args:
        recipe: The recipe.
        gain: Mean over prompts and depths of what it gains over the static mixture of equal depth.
        standard_error: Of that mean.
    """

    recipe: MenuRecipe
    gain: float
    standard_error: float

    def to_dict(self) -> dict[str, Any]:
        """Return it as values that JSON knows."""
        return {
            **self.recipe.to_dict(),
            "gain": self.gain,
            "standard_error": self.standard_error,
        }


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class MenuFit:
    """A trained menu and how it was chosen.

    Args:
        menu: Trained on all prompts.
        recipe: The chosen one.
        trials: Those that came to the last rounds, in order.
        scores: Scores of each prompt by heads that did not learn from it, about the plans' means over all prompts, one
            array for each step. Shape (N, K) each.
    """

    menu: Menu
    recipe: MenuRecipe
    trials: tuple[MenuTrial, ...]
    scores: tuple[Floats, ...]

    def choices(self, penalty: float) -> Indices:
        """Return the plan of each training prompt under a penalty, by heads that did not learn from it. Shape (N,)."""
        numbers = [_prefixes(self.menu.plans, layer) for layer in self.recipe.layers]
        return _choose(self.scores, numbers, self.menu.depths, penalty)


def fit_menu(
    data: MenuData,
    *,
    objective: str = "preserve",
    seed: int = 0,
    steps: Sequence[Sequence[int]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MenuFit:
    """Choose a recipe by cross-validation and train a menu's heads with it.

    Recipes are compared by what they gain over the best mixture of the menu's own plans of equal depth, averaged over
    four depths: in agreement for `preserve`, in the probability of the right answer for `reward`. A perceptron, and a
    decision in several steps, is taken only if it gains more by at least one standard error of the paired difference.
    The shrinkage is the largest of 1, 1/2 and 1/4 whose gain is more than one standard error, else 0: then all prompts
    are treated alike.

    Args:
        data: Prompts under plans.
        objective: `preserve` or `reward`.
        seed: Of the folds and the perceptron.
        steps: Layers to decide at, one tuple for each alternative; None takes each layer of the data at which no plans
            differ yet and, behind the last of these, pairs with every later layer.
        progress: Called with finished and all alternatives.

    Returns:
        The menu and how it was chosen.

    Raises:
        ConfigError: An unknown objective, or layers that the data has no states of.

    Source:
        Own. CARROT (arXiv 2502.03261) scores each choice with a head of its own and subtracts cost; deviation: targets
        are the frozen model's own answers, so that no labels are needed.
    """
    if objective not in ("preserve", "reward"):
        raise ConfigError(f"objective {objective!r} is unknown; expected preserve or reward")
    if objective == "reward" and data.reward is None:
        raise ConfigError(
            "objective 'reward' needs prompts with right answers; use objective 'preserve'"
        )
    fitter = _Fitter(data, objective, seed)
    single, several = _alternatives(data, steps)
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
    recipe = replace(best[0].recipe, shrinkage=0.0)
    for shrinkage in _SHRINKAGES:
        trial, _ = fitter.try_recipe(replace(best[0].recipe, shrinkage=shrinkage))
        if shrinkage != 1.0:
            trials.append(trial)
        if trial.gain > trial.standard_error:
            recipe = trial.recipe
            break
    if progress is not None:
        progress(total, total)
    return MenuFit(
        menu=fitter.train(recipe),
        recipe=recipe,
        trials=tuple(trials),
        scores=tuple(fitter.held_out_scores(recipe, centred=True)),
    )


def decision_layers(plans: Plans) -> tuple[int, ...]:
    """Return the layers at which it may pay to decide between plans, ascending.

    Half and three quarters of the way to the first layer at which plans differ, that layer, and every second or, if
    plans differ early, every fourth one behind it, for a second step.

    Args:
        plans: Shape (K, num_layers), uint8.

    Returns:
        Layers, at least one at or before the first at which plans differ.
    """
    differ = np.flatnonzero((plans != plans[0]).any(axis=0))
    first, last = (int(differ[0]), int(differ[-1])) if len(differ) else (0, 0)
    stride = 2 if first > len(plans[0]) // 3 else 4
    return tuple(sorted({first // 2, 3 * first // 4, first, *range(first + 2, last, stride)}))


def choose_plans(
    data: MenuData, size: int, *, objective: str = "preserve", seed: int = 0
) -> Indices:
    """Choose a menu from a pool of plans, so that choosing among them by the prompt gains most.

    The menu starts with the plans of the best static mixtures, so that a policy that cannot tell prompts apart still
    has those. Each step adds the plan with which a policy that was trained on other prompts does best, averaged over
    four depths. What an oracle would gain is not asked: most of that is luck.

    Args:
        data: The pool.
        size: Plans wanted, the identity included; more come back if the static mixtures need more, fewer if the pool
            has no more.
        objective: `preserve` or `reward`, see `fit_menu`.
        seed: Of the folds.

    Returns:
        Rows of the pool, the identity first, then by falling depth. Shape (chosen,).

    Raises:
        ConfigError: A size below 2, or a pool of one plan.
    """
    if size < 2 or len(data.plans) < 2:
        raise ConfigError(
            f"a menu of {size} from a pool of {len(data.plans)} plans was asked for; expected 2 or more of both"
        )
    fitter = _Fitter(data, objective, seed)
    first = min(layer for layer in data.views)
    scores = fitter.held_out_scores(fitter.default(first))[0]
    depths = data.depths
    # The graded figures beside the counted one: with few prompts counts alone cannot tell plans apart.
    values = np.mean(list(data.targets().values()), axis=0)
    taken = sorted({0, *concave_hull(depths, fitter.values.mean(axis=0)).tolist()})
    wanted = _depth_grid(depths)
    while len(taken) < min(size, len(data.plans)):
        rest = [plan for plan in range(len(data.plans)) if plan not in taken]
        gains = [_menu_value(scores, values, depths, [*taken, plan], wanted) for plan in rest]
        taken.append(rest[int(np.argmax(gains))])
    others = sorted(taken[1:], key=lambda plan: (-depths[plan], plan))
    return np.array([0, *others], dtype=np.int64)


def _menu_value(
    scores: Floats, values: Floats, depths: Floats, rows: list[int], wanted: Floats
) -> float:
    """Return what a policy that chooses among some plans by held-out scores gets, averaged over depths."""
    one = np.zeros(len(rows), dtype=np.int64)
    curve = _curve([scores[:, rows]], [one], depths[rows])
    return float(np.mean(_at_depths(curve, values[:, rows], wanted)))


class _Fitter:
    """One cross-validation: folds, bases and predictions are made once and shared between recipes."""

    def __init__(self, data: MenuData, objective: str, seed: int) -> None:
        self._data, self._seed = data, seed
        self._fold = data.folds(seed)
        self._targets = data.targets()
        self.values = self._targets["agreement" if objective == "preserve" else "reward"]
        self._wanted = _depth_grid(data.depths)
        self._static = _static_values(self.values, data.depths, self._wanted)
        self._flat: dict[tuple[int, int], Floats] = {}
        self._bases: dict[tuple[int, int, int], _Basis] = {}
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
                for ridge in _RIDGES:
                    for weights in self._blends:
                        found = self.try_recipe(
                            MenuRecipe(
                                layers=layers,
                                num_windows=num_windows,
                                rank=rank,
                                ridge=ridge,
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
        curve = _curve(self.held_out_scores(recipe), numbers, self._data.depths)
        gains = (_at_depths(curve, self.values, self._wanted) - self._static).mean(axis=0)
        trial = MenuTrial(
            recipe=recipe, gain=float(gains.mean()), standard_error=_standard_error(gains)
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
        for fold in range(_FOLDS):
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
            basis = _Basis(self._views(layer, recipe.num_windows), np.arange(len(target)))
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
                weight[:, columns], bias[columns] = _ridge(z, target[:, columns], recipe.ridge)
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

    def _basis(self, layer: int, num_windows: int, fold: int) -> "_Basis":
        key = (layer, num_windows, fold)
        if key not in self._bases:
            rows = np.flatnonzero(self._fold != fold)
            self._bases[key] = _Basis(self._views(layer, num_windows), rows, keep=_RANKS[-1])
        return self._bases[key]

    def _most_rank(self, layers: tuple[int, ...], num_windows: int) -> int:
        return min(self._basis(layer, num_windows, 0).rank for layer in layers)

    def _predictions(
        self, layer: int, num_windows: int, rank: int, ridge: float
    ) -> dict[str, Floats]:
        """Return held-out predictions of every target: ridge is linear in it, so blends need no fit of their own."""
        key = (layer, num_windows, rank, ridge)
        if key in self._known:
            return self._known[key]
        names = list(self._targets)
        stacked = np.concatenate([self._targets[name] for name in names], axis=1)
        numbers = np.tile(self._data.prefixes(layer), len(names))
        found = np.empty_like(stacked)
        for fold in range(_FOLDS):
            basis = self._basis(layer, num_windows, fold)
            inside, outside = np.flatnonzero(self._fold != fold), np.flatnonzero(self._fold == fold)
            for number in range(int(numbers.max()) + 1):
                columns = np.flatnonzero(numbers == number)
                z = basis.project(number)[:, : min(rank, basis.rank)]
                weight, bias = _ridge(z[inside], stacked[np.ix_(inside, columns)], ridge)
                found[np.ix_(outside, columns)] = z[outside] @ weight + bias
        count = len(self._data.plans)
        self._known[key] = {
            name: found[:, index * count : (index + 1) * count] for index, name in enumerate(names)
        }
        return self._known[key]

    def _perceptron_scores(self, layer: int, recipe: MenuRecipe, target: Floats) -> Floats:
        found = np.empty_like(target)
        numbers = self._data.prefixes(layer)
        for fold in range(_FOLDS):
            basis = self._basis(layer, recipe.num_windows, fold)
            inside, outside = self._fold != fold, self._fold == fold
            net = _Perceptron(basis, recipe, numbers, self._seed)
            net.fit(np.flatnonzero(inside), target)
            found[outside] = net.scores(np.flatnonzero(outside))
        return found

    def _train_perceptron(
        self, layer: int, recipe: MenuRecipe, basis: "_Basis", target: Floats, means: Floats
    ) -> MenuHead:
        net = _Perceptron(basis, recipe, self._data.prefixes(layer), self._seed)
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


class _Basis:
    """Standardised principal components of the states under the first prefix, fitted on some prompts.

    All prefixes share it: they are a few visits apart, and one basis keeps their heads comparable.
    """

    def __init__(self, views: Floats, rows: Indices, keep: int | None = None) -> None:
        self._views = views
        fitted = views[rows, 0]
        self._mean = fitted.mean(axis=0)
        spread = fitted.std(axis=0)
        size = np.sqrt(np.square(fitted).mean(axis=0))
        self._scale = np.where(
            spread > _FLAT * np.maximum(size, 1e-30), 1 / np.maximum(spread, 1e-30), 0.0
        )
        standard = (fitted - self._mean) * self._scale
        # The smaller of the two Gram matrices has the same components.
        if standard.shape[0] <= standard.shape[1]:
            values, left = np.linalg.eigh(standard @ standard.T)
            order = self._leading(values, keep)
            components = standard.T @ (left[:, order] / np.sqrt(values[order]))
        else:
            values, right = np.linalg.eigh(standard.T @ standard)
            order = self._leading(values, keep)
            components = right[:, order]
        # States that are the same for all prompts have none, and say nothing.
        self._components = components if len(order) else np.zeros((standard.shape[1], 1))
        self._projected: dict[int, Floats] = {}

    @staticmethod
    def _leading(values: Floats, keep: int | None) -> Indices:
        order = np.argsort(-values, kind="stable")
        order = order[values[order] > max(1e-9 * float(values.max()), 1e-12)]
        return order[: keep or len(order)]

    @property
    def rank(self) -> int:
        """Components."""
        return int(self._components.shape[1])

    def project(self, prefix: int) -> Floats:
        """Return the components of all prompts under a prefix. Shape (N, rank)."""
        if prefix not in self._projected:
            standard = (self._views[:, prefix] - self._mean) * self._scale
            self._projected[prefix] = standard @ self._components
        return self._projected[prefix]

    def fold(self, weight: Floats) -> tuple[Floats, Floats]:
        """Return weights on raw states that do what given ones do on components, and what to subtract."""
        wide = self._scale[:, None] * (self._components[:, : len(weight)] @ weight)
        return wide, self._mean @ wide


class _Perceptron:
    """One hidden layer on the components, trained on the squared error, stopped by prompts held out of it."""

    _EPOCHS = 60
    _BATCH = 64

    def __init__(self, basis: _Basis, recipe: MenuRecipe, numbers: Indices, seed: int) -> None:
        self._basis, self._numbers, self._seed = basis, numbers, seed
        self._rank = min(recipe.rank, basis.rank)
        self._inner = recipe.inner
        self.inner_weight = self.inner_bias = self.weight = self.bias = np.empty(0)

    @torch.enable_grad()
    def fit(self, rows: Indices, target: Floats) -> None:
        """Train on some prompts."""
        generator = torch.Generator().manual_seed(self._seed)
        inputs = self._inputs(rows)
        size = float(inputs[:, 0].std()) or 1.0
        wanted = torch.from_numpy(target[rows])
        means = wanted.mean(dim=0)
        first = torch.randn(self._rank, self._inner, generator=generator, dtype=torch.float64)
        parameters = [
            (first / (size * self._rank**0.5)).requires_grad_(),
            torch.zeros(self._inner, dtype=torch.float64, requires_grad=True),
            torch.zeros(self._inner, target.shape[1], dtype=torch.float64, requires_grad=True),
            means.clone().requires_grad_(),
        ]
        optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01)
        order = torch.randperm(len(rows), generator=generator)
        held, used = order[: len(rows) // 6], order[len(rows) // 6 :]
        best, kept = float("inf"), [part.detach().clone() for part in parameters]
        own = torch.from_numpy(self._numbers)
        for _ in range(self._EPOCHS):
            with torch.no_grad():
                loss = float(
                    (self._forward(parameters, inputs[held], own) - wanted[held]).square().mean()
                )
            if loss < best:
                best, kept = loss, [part.detach().clone() for part in parameters]
            shuffled = used[torch.randperm(len(used), generator=generator)]
            for batch in shuffled.split(self._BATCH):
                optimizer.zero_grad(set_to_none=True)
                error = self._forward(parameters, inputs[batch], own) - wanted[batch]
                error.square().mean().backward()
                optimizer.step()
        self.inner_weight, self.inner_bias, self.weight, self.bias = (part.numpy() for part in kept)

    def scores(self, rows: Indices) -> Floats:
        """Return the scores of prompts. Shape (rows, K)."""
        parts = [
            torch.from_numpy(part)
            for part in (self.inner_weight, self.inner_bias, self.weight, self.bias)
        ]
        with torch.no_grad():
            found: Floats = self._forward(
                parts, self._inputs(rows), torch.from_numpy(self._numbers)
            ).numpy()
        return found

    def _inputs(self, rows: Indices) -> Tensor:
        """Shape (rows, prefixes, rank)."""
        count = int(self._numbers.max()) + 1
        stacked = [self._basis.project(number)[rows, : self._rank] for number in range(count)]
        return torch.from_numpy(np.stack(stacked, axis=1))

    @staticmethod
    def _forward(parts: Sequence[Tensor], inputs: Tensor, own: Tensor) -> Tensor:
        inner = functional.gelu(inputs @ parts[0] + parts[1])
        every = inner @ parts[2] + parts[3]
        # Plan k is judged by the states under its own prefix.
        return every[:, own, torch.arange(every.shape[2])]


def walk_budget(
    scores: Sequence[Floats], plans: Plans, layers: Sequence[int], penalty: float
) -> Indices:
    """Return the plan that a menu gives each prompt under a penalty.

    Args:
        scores: Of each step. Shape (N, K) each.
        plans: Shape (K, num_layers), uint8.
        layers: Where each step reads.
        penalty: Price of a depth of 1.

    Returns:
        Row of `plans` for each prompt. Shape (N,).
    """
    return _choose(
        scores, [_prefixes(plans, layer) for layer in layers], plan_depth(plans), penalty
    )


def _choose(
    scores: Sequence[Floats], numbers: Sequence[Indices], depths: Floats, penalty: float
) -> Indices:
    chosen: Indices = (scores[0] - penalty * depths).argmax(axis=1)
    for later, prefix in zip(scores[1:], numbers[1:], strict=True):
        still_open = prefix[None, :] == prefix[chosen][:, None]
        chosen = np.where(still_open, later - penalty * depths, -np.inf).argmax(axis=1)
    return chosen


def _curve(
    scores: Sequence[Floats], numbers: Sequence[Indices], depths: Floats
) -> tuple[Floats, Indices]:
    """Return mean depth and choices under every penalty of the grid, depth falling. Shapes (P,) and (P, N)."""
    chosen = np.stack([_choose(scores, numbers, depths, penalty) for penalty in PENALTIES])
    return depths[chosen].mean(axis=1), chosen


def _at_depths(curve: tuple[Floats, Indices], values: Floats, wanted: Floats) -> Floats:
    """Return what each prompt gets at given mean depths, neighbouring penalties mixed. Shape (wanted, N)."""
    means, chosen = curve
    # Several steps need not fall everywhere; the running minimum does.
    falling = np.minimum.accumulate(means)
    rows = np.arange(len(values))
    found = np.empty((len(wanted), len(values)))
    for index, depth in enumerate(wanted):
        after = int(np.argmax(falling <= depth + 1e-12)) if (falling <= depth + 1e-12).any() else -1
        if after <= 0:
            found[index] = values[rows, chosen[after]]
            continue
        high, low = falling[after - 1], falling[after]
        share = 0.0 if high == low else (depth - low) / (high - low)
        found[index] = (1 - share) * values[rows, chosen[after]] + share * values[
            rows, chosen[after - 1]
        ]
    return found


def _static_values(values: Floats, depths: Floats, wanted: Floats) -> Floats:
    """Return what each prompt gets from the best static mixture of each depth. Shape (wanted, N)."""
    hull = concave_hull(depths, values.mean(axis=0))
    knots = depths[hull]
    found = np.empty((len(wanted), len(values)))
    for index, depth in enumerate(wanted):
        right = int(np.clip(np.searchsorted(knots, depth), 1, len(knots) - 1))
        share = float(np.clip((depth - knots[right - 1]) / (knots[right] - knots[right - 1]), 0, 1))
        found[index] = (1 - share) * values[:, hull[right - 1]] + share * values[:, hull[right]]
    return found


def _depth_grid(depths: Floats) -> Floats:
    low, high = float(depths.min()), min(1.0, float(depths.max()))
    return low + np.array(_SHARES) * (high - low)


def _alternatives(
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


def _wins(gains: Floats, over: Floats) -> bool:
    """Say whether gains on the same prompts are larger by more than one standard error."""
    difference = gains - over
    return float(difference.mean()) > _standard_error(difference)


def _standard_error(values: Floats) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _ridge(z: Floats, target: Floats, penalty: float) -> tuple[Floats, Floats]:
    """Return weights (rank, columns) and bias (columns,) of least squares with a penalty on the weights."""
    centre, mean = z.mean(axis=0), target.mean(axis=0)
    inner = z - centre
    gram = inner.T @ inner + penalty * np.eye(z.shape[1])
    weight: Floats = np.linalg.solve(gram, inner.T @ (target - mean))
    bias: Floats = mean - centre @ weight
    return weight, bias


def _prefixes(plans: Plans, layer_idx: int) -> Indices:
    known: dict[bytes, int] = {}
    return np.array([known.setdefault(plan[:layer_idx].tobytes(), len(known)) for plan in plans])


def _tensor(values: Floats) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.float32)
