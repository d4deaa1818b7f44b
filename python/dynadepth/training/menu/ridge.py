"""The fitting of one head of a menu: standardisation, principal components, ridge regression or a small perceptron."""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from dynadepth.evaluation.folds import hold_out

__all__ = ["Basis", "Moments", "Perceptron"]

_FLAT = 1e-6
# Solutions that are kept for each set of moments: more than a grid of recipes asks for; a study of thousands of recipes
# does not grow without bound.
_KEPT = 64

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


class Basis:
    """Standardised principal components of the states under the first prefix, fitted on some prompts.

    All prefixes share it: their states differ by only a few visits, and one basis keeps their heads comparable.
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
        # States that are the same for all prompts have no components and carry no information.
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
        """Return weights on raw states that are equivalent to given ones on components, and the offset to subtract."""
        wide = self._scale[:, None] * (self._components[:, : len(weight)] @ weight)
        return wide, self._mean @ wide


class Perceptron:
    """One hidden layer on the components, trained on the squared error and stopped early by held-out prompts.

    Args:
        basis: The principal components of the states.
        numbers: The index of each plan's prefix, from whose states the plan is scored. Shape (K,), int64.
        rank: Number of components that are read.
        inner: Number of hidden units.
        seed: Seed of the weights and the order of the prompts.
    """

    _EPOCHS = 60
    _BATCH = 64
    _HELD_OUT = 1 / 6

    def __init__(self, basis: Basis, numbers: Indices, *, rank: int, inner: int, seed: int) -> None:
        self._basis, self._numbers, self._seed = basis, numbers, seed
        self._rank = min(rank, basis.rank)
        self._inner = inner
        self.inner_weight = self.inner_bias = self.weight = self.bias = np.empty(0)

    @torch.enable_grad()
    def fit(self, rows: Indices, target: Floats, names: Sequence[Hashable]) -> None:
        """Train on some prompts.

        Args:
            rows: Their numbers.
            target: What is predicted of every prompt. Shape (N, K).
            names: What identifies every prompt; those of one name are held out together. Length N.
        """
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
        apart = hold_out(
            [names[row] for row in rows], self._HELD_OUT, np.random.default_rng(self._seed)
        )
        held, used = (torch.from_numpy(np.flatnonzero(part)) for part in (apart, ~apart))
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
        """Return the scores of the given prompts. Shape (rows, K), float64."""
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
        """Return the components of the given prompts. Shape (rows, prefixes, rank)."""
        count = int(self._numbers.max()) + 1
        stacked = [self._basis.project(number)[rows, : self._rank] for number in range(count)]
        return torch.from_numpy(np.stack(stacked, axis=1))

    @staticmethod
    def _forward(parts: Sequence[Tensor], inputs: Tensor, own: Tensor) -> Tensor:
        inner = functional.gelu(inputs @ parts[0] + parts[1])
        every = inner @ parts[2] + parts[3]
        # Plan k is scored from the states under its own prefix.
        return every[:, own, torch.arange(every.shape[2])]


class Moments:
    """The moments of some prompts that ridge regression needs, so that each further regression is cheap.

    Args:
        z: Components of the prompts' states. Shape (N, rank), float64.
        targets: The targets by name. Shape (N, K) each, float64.

    Attributes:
        centre: Mean of the components. Shape (rank,).
    """

    def __init__(self, z: Floats, targets: Mapping[str, Floats]) -> None:
        self.centre: Floats = z.mean(axis=0)
        inner = z - self.centre
        self._gram: Floats = inner.T @ inner
        self._cross: dict[str, Floats] = {
            name: inner.T @ (values - values.mean(axis=0)) for name, values in targets.items()
        }
        # By rank and penalty: a blend's weights are the blend of its targets' weights; factors are applied afterwards.
        self._solved: dict[tuple[int, float], dict[str, Floats]] = {}

    def weights(
        self, blend: Sequence[tuple[str, float]], rank: int, penalty: float, factors: int
    ) -> Floats:
        """Return weights on the centred components that predict the deviations of a blend of targets from its mean.

        Args:
            blend: Names of targets and their shares.
            rank: Number of leading components that are used.
            penalty: Penalty on the squared weights.
            factors: Number of principal directions of the K predictions that are kept; 0: all.

        Returns:
            Weights. Shape (rank or fewer, K), float64.

        Source:
            Ridge regression; reduced rank as in Mukherjee and Zhu (2011), Statistical Analysis and Data Mining 4:612.
        """
        used = min(rank, len(self._gram))
        gram = self._gram[:used, :used]
        solved = self._solve(used, penalty)
        weight: Floats = sum(
            (share * solved[name] for name, share in blend),
            start=np.zeros_like(next(iter(solved.values()))),
        )
        if not 0 < factors < weight.shape[1]:
            return weight
        _, directions = np.linalg.eigh(weight.T @ gram @ weight)
        kept = directions[:, -factors:]
        reduced: Floats = weight @ (kept @ kept.T)
        return reduced

    def _solve(self, used: int, penalty: float) -> dict[str, Floats]:
        """Return the weights of every target. Shape (used, K) each."""
        key = (used, penalty)
        if key not in self._solved:
            names = list(self._cross)
            cross = np.concatenate([self._cross[name][:used] for name in names], axis=1)
            gram = self._gram[:used, :used] + penalty * np.eye(used)
            if len(self._solved) >= _KEPT:
                self._solved.clear()
            parts = np.split(np.linalg.solve(gram, cross), len(names), axis=1)
            self._solved[key] = dict(zip(names, parts, strict=True))
        return self._solved[key]
