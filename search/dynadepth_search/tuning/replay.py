"""The per-prompt search replayed on a table that knows every plan it may ask: milliseconds in place of forwards."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from dynadepth.errors import ConfigError
from dynadepth.plans import EXECUTE, SKIP, Plans, identity_plan, plan_depth
from dynadepth.tree_search.forest import EditPrior, Forest, SearchConfig
from dynadepth_search.scoring.objectives import check_objective
from dynadepth_search.scoring.score_table import ScoreTable
from dynadepth_search.search.per_prompt import probe_penalty

__all__ = ["MOST_LAYERS", "ReplayTable", "skip_subsets"]

MOST_LAYERS = 12

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


def skip_subsets(layers: Sequence[int], num_layers: int) -> Plans:
    """Return the plans that skip each subset of some layers.

    Args:
        layers: The layers, from 2 to 12 of them.
        num_layers: Decoder layers of the model.

    Returns:
        The identity first. Shape (2 ** number of layers, num_layers), uint8.

    Raises:
        ConfigError: There are too few or too many layers, the model does not have one of them, or they are all of its.
    """
    chosen = sorted(set(layers))
    fits = 2 <= len(chosen) <= min(MOST_LAYERS, num_layers - 1)
    if not fits or not 0 <= chosen[0] <= chosen[-1] < num_layers:
        raise ConfigError(
            f"all subsets of layers {chosen} of {num_layers} were asked for; expected 2 to "
            f"{min(MOST_LAYERS, num_layers - 1)} layers from 0 to {num_layers - 1}"
        )
    bits = np.arange(2 ** len(chosen))[:, None] >> np.arange(len(chosen)) & 1
    plans: Plans = np.tile(identity_plan(num_layers), (len(bits), 1))
    plans[:, chosen] = np.where(bits == 1, SKIP, EXECUTE)
    return plans


@dataclass(frozen=True, eq=False, kw_only=True)
class ReplayTable:
    """The values of N prompts under every subset of skips of some layers.

    Args:
        plans: The plans, each subset once, in any order. Shape (K, num_layers), uint8.
        values: What the search maximises, without the price of depth. Shape (N, K), float32.
        names: What identifies each prompt; rows of one name are not parted. Length N; None: all are distinct.

    Raises:
        ConfigError: The plans are not all subsets of skips of 2 to 12 layers, or the values do not fit or are not
            finite.
    """

    plans: Plans
    values: npt.NDArray[np.float32]
    names: Sequence[Hashable] | None = None
    layers: tuple[int, ...] = field(init=False)
    _column: Indices = field(init=False, repr=False)

    def __post_init__(self) -> None:
        plans = np.asarray(self.plans, dtype=np.uint8)
        if plans.ndim != 2 or not plans.size or plans.max() > EXECUTE:
            raise ConfigError(
                f"the plans of a replay have shape {plans.shape} or repeat layers; expected plans that only skip"
            )
        layers = tuple(np.flatnonzero((plans == SKIP).any(axis=0)).tolist())
        bits = self._bits(plans, layers)
        whole = 2 <= len(layers) <= MOST_LAYERS and len(plans) == 2 ** len(layers)
        if not whole or len(np.unique(bits)) != len(plans):
            raise ConfigError(
                f"a table of {len(plans)} plans that skip {len(layers)} layers cannot be replayed; expected every "
                f"subset of 2 to {MOST_LAYERS} layers once: make it by `score --subsets`"
            )
        values = np.asarray(self.values, dtype=np.float32)
        if values.ndim != 2 or values.shape[1] != len(plans) or not np.isfinite(values).all():
            raise ConfigError(
                f"the values of a replay have shape {values.shape} or are not finite; expected finite numbers of shape "
                f"(prompts, {len(plans)})"
            )
        if self.names is not None and len(self.names) != len(values):
            raise ConfigError(
                f"names has {len(self.names)} entries for {len(values)} prompts; expected one for each"
            )
        column = np.empty(len(plans), dtype=np.int64)
        column[bits] = np.arange(len(plans))
        for name, found in {
            "plans": plans,
            "values": values,
            "layers": layers,
            "_column": column,
        }.items():
            object.__setattr__(self, name, found)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return int(self.plans.shape[1])

    @classmethod
    def from_scores(cls, table: ScoreTable, objective: str) -> "ReplayTable":
        """Take the values from a score table whose plans are all subsets of skips of some layers.

        Args:
            table: What `score --subsets` made.
            objective: `preserve` (minus the divergence from the base model) or `reward`.

        Raises:
            ConfigError: Plans are missing, or the objective needs answers that the prompts do not have.
        """
        goal = check_objective(objective)
        if goal == "reward" and not table.graded:
            raise ConfigError(
                "objective 'reward' needs prompts with right answers; use objective 'preserve'"
            )
        values = table.reward if goal == "reward" else -table.divergence
        return cls(
            plans=table.plans,
            values=values.astype(np.float32),
            names=[example.prompt.strip() for example in table.examples],
        )

    def take(self, prompts: Indices) -> "ReplayTable":
        """Return the table of some of its prompts, given by index."""
        names = None if self.names is None else [self.names[row] for row in prompts.tolist()]
        return ReplayTable(plans=self.plans, values=self.values[prompts], names=names)

    def rewards(self, prompts: Indices, plans: Plans) -> Floats:
        """Return the value of each pair of a prompt and a plan. Shape (pairs,), float64."""
        columns = self._column[self._bits(plans, self.layers)]
        return self.values[prompts, columns].astype(np.float64)

    def prior(self) -> EditPrior:
        """Return what a probe of all prompts of the table would measure: the mean change of value by each skip."""
        mean, variance = np.full((2, 2 * self.num_layers), np.nan)
        base, every = identity_plan(self.num_layers), np.arange(len(self))
        for layer in self.layers:
            plan = base.copy()
            plan[layer] = SKIP
            change = self._of(plan, every) - self._of(base, every)
            mean[layer] = change.mean()
            variance[layer] = change.var(ddof=1) if len(self) > 1 else 0.0
        return EditPrior(mean, variance, len(self))

    def penalty(self) -> float:
        """Return the price of depth that a probe of all prompts of the table would choose."""
        return probe_penalty(self.prior())

    def best_gains(self, penalty: float) -> Floats:
        """Return how much better than the base model each prompt's best plan is, depth priced in. Shape (N,)."""
        priced = self.values.astype(np.float64) - penalty * plan_depth(self.plans)
        base = priced[:, int(self._column[0])]
        found: Floats = priced.max(axis=1) - base
        return found

    def search(self, config: SearchConfig, *, penalty: float, seed: int) -> Floats:
        """Search every prompt, as `dynadepth_search.search.per_prompt.search_prompts` does, and return what it gained.

        Args:
            config: Settings of the search. Its price of depth and its protected layers are replaced, and it repeats
                nothing, since the table knows no such plan. `probe_trees` prompts are probed.
            penalty: Price of a depth of 1.
            seed: Seed of everything random.

        Returns:
            The value of the best plan that was found, minus the base model's. Shape (N,), float64.
        """
        free = set(self.layers)
        config = replace(
            config,
            depth_penalty=penalty,
            protect=tuple(layer for layer in range(self.num_layers) if layer not in free),
            max_repeats=0,
        )
        count = min(config.probe_trees, len(self))
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self))[:count])
        prior = self.take(chosen).prior()
        forest = Forest(self.num_layers, len(self), config=config, seed=seed, prior=prior)
        while not forest.finished:
            batch = forest.ask(len(self) * config.round_size)
            forest.tell(batch.ticket, self.rewards(batch.tree.astype(np.int64), batch.plans))
        base = self.values[:, int(self._column[0])].astype(np.float64) - penalty
        return np.array([forest.best(tree).value for tree in range(len(self))]) - base

    def _of(self, plan: Plans, prompts: Indices) -> Floats:
        return self.rewards(prompts, np.tile(plan, (len(prompts), 1)))

    @staticmethod
    def _bits(plans: Plans, layers: Sequence[int]) -> Indices:
        """Return a number for each plan: the sum of 2 ** i over the layers, by their index i, that it skips."""
        skipped = (plans[:, list(layers)] == SKIP).astype(np.int64)
        numbers: Indices = skipped @ (1 << np.arange(len(layers), dtype=np.int64))
        return numbers
