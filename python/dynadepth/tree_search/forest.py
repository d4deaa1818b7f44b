"""The search for plans: one tree for each prompt, driven by ask and tell.

A typed interface to the Rust core's forest. The caller evaluates the plans that `ask` hands out and reports their
rewards with `tell`.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dynadepth import _core
from dynadepth.errors import ConfigError, SearchError
from dynadepth.plans import Plans
from dynadepth.tree_search.config import EditPrior, SearchConfig

__all__ = ["AskBatch", "BestPlan", "EditPrior", "Evaluated", "Forest", "SearchConfig"]

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class AskBatch:
    """Plans to evaluate.

    Args:
        tree: Tree of each plan, ascending. Shape (rows,), uint32.
        plans: The plans. Shape (rows, num_layers), uint8.
        ticket: The ticket of each plan, to be given to `tell` with its reward. Shape (rows,), uint64.
    """

    tree: npt.NDArray[np.uint32]
    plans: Plans
    ticket: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.ticket)


@dataclass(frozen=True, slots=True, eq=False)
class BestPlan:
    """An evaluated plan.

    Args:
        plan: The plan. Shape (num_layers,), uint8.
        reward: Its reward, as told.
        value: reward - depth_penalty * depth.
        depth: Visits as a fraction of the number of layers.
        visits: Number of layer executions.
    """

    plan: Plans
    reward: float
    value: float
    depth: float
    visits: int


@dataclass(frozen=True, slots=True, eq=False)
class Evaluated:
    """All told plans of a tree, in the order in which the search chose them.

    Args:
        plans: The plans. Shape (evaluations, num_layers), uint8.
        rewards: The reward of each. Shape (evaluations,), float64.
        depths: The depth of each, as a fraction of the number of layers. Shape (evaluations,), float64.
        visits: The number of layer executions of each. Shape (evaluations,), uint32.
    """

    plans: Plans
    rewards: _Floats
    depths: _Floats
    visits: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.rewards)


class Forest:
    """A search over plans for many prompts at once.

    Each tree starts from the identity plan and adds one edit (skip or repeat a layer) at a time. The same edits in
    another order lead to the same node, so every plan within the caps can be reached and none is asked twice. A tree
    chooses `round_size` plans at once and learns from them together, so what it asks depends only on its own rewards,
    the settings, the prior, the seed and its key: not on the other trees, the batch sizes or the order of the tells.

    Without a prior, and with `probe_trees` above 0, the forest first asks the identity plan and every single edit on
    some trees that the seed chooses, and takes their mean effects as the prior. This probe also asks a single REPEAT
    that `max_depth` forbids on its own, since a SKIP may make room for it; `best` and `pareto` leave such plans out.

    A forest may be used from several threads; the GIL is released while Rust works.

    Args:
        num_layers: Decoder layers of the model.
        num_trees: Prompts, one tree each.
        config: Settings of the search.
        seed: Seed of everything random, 0 to 2**64 - 1.
        prior: The effects of single edits on the reward; if it is given, the forest does not run a probe.
        tree_keys: A number that identifies each prompt; the randomness of a tree follows from the seed and its key.
            Shape (num_trees,), uint64; None: 0, 1, 2 and so on.

    Raises:
        ConfigError: A setting, the seed, the keys or the prior do not fit.

    Source:
        The rule `"posterior"` takes the child of highest upper confidence bound under Bayesian linear regression on
        edits (as LinUCB, Li et al., WWW 2010); deviations: the mean also knows pairs of edits, how strong these and the
        noise are is chosen by each tree's evidence, and every second plan is looked for close to the best one. `"puct"`
        is the rule of AlphaZero (Silver et al., Science 2018) on a graph of plans; deviations: a child that has not
        been asked has its prior mean, and the bonus is in units of the tree's own spread. `"drllm"` is the rule of
        Dr.LLM (arXiv 2510.12773) on the same graph.

    Example:
        >>> config = SearchConfig(max_evaluations=8, probe_trees=0)
        >>> forest = Forest(3, 2, config=config, seed=0)
        >>> while not forest.finished:
        ...     batch = forest.ask(256)
        ...     forest.tell(batch.ticket, batch.plans[:, 0].clip(max=1).astype(float))
        >>> forest.best(1).plan
        array([1, 0, 0], dtype=uint8)
    """

    def __init__(
        self,
        num_layers: int,
        num_trees: int,
        *,
        config: SearchConfig,
        seed: int,
        prior: EditPrior | None = None,
        tree_keys: npt.ArrayLike | None = None,
    ) -> None:
        for name, number, most in (
            ("num_layers", num_layers, 4096),
            ("num_trees", num_trees, 2**32 - 1),
        ):
            if not 1 <= number <= most:
                raise ConfigError(f"Forest was given {name}={number}; expected 1 to {most}")
        if not 0 <= seed < 2**64:
            raise ConfigError(f"Forest was given seed={seed}; expected 0 to 2**64 - 1")
        settings = {**config.to_dict(), "protect": list(config.protect)}
        self._core = _core.Forest(
            num_layers,
            _tree_keys(tree_keys, num_trees),
            seed=seed,
            prior=None if prior is None else _prior_arrays(prior),
            **settings,
        )
        self._config = config

    @property
    def config(self) -> SearchConfig:
        """Settings of the search."""
        return self._config

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return self._core.num_layers

    @property
    def num_trees(self) -> int:
        """Number of prompts."""
        return self._core.num_trees

    @property
    def finished(self) -> bool:
        """Whether every tree has stopped or used up its evaluations or plans, and has been told all rewards."""
        return self._core.finished

    def tree_finished(self, tree: int) -> bool:
        """Return whether one tree is finished.

        Raises:
            SearchError: No such tree.
        """
        return self._core.tree_finished(self._checked(tree))

    def ask(self, max_plans: int) -> AskBatch:
        """Hand out plans to evaluate, never one that has been handed out before.

        Trees with waiting plans get the same number of rows, up to a difference of one; if there are fewer rows than
        trees, the trees take turns. Rows of one tree are adjacent, so that they share prefixes in a sweep.

        Args:
            max_plans: Maximum number of plans to hand out, at least 1.

        Returns:
            The plans; none if all trees are finished or wait for their rewards.

        Raises:
            SearchError: `max_plans` is below 1.
        """
        if max_plans < 1:
            raise SearchError(f"max_plans is {max_plans}; ask for at least one plan")
        return AskBatch(*self._core.ask(max_plans))

    def tell(self, ticket: npt.ArrayLike, rewards: npt.ArrayLike) -> None:
        """Report the rewards of plans, in any order; if it raises, none of them is recorded.

        Args:
            ticket: Tickets that `ask` handed out. Shape (rows,), whole numbers.
            rewards: Reward of each plan. Shape (rows,), finite.

        Raises:
            SearchError: A ticket is unknown or was already told, a reward is not finite, or there is not one reward for
                each ticket.
        """
        tickets, numbers = np.asarray(ticket), np.asarray(rewards)
        whole = tickets.dtype.kind in "iu" or tickets.size == 0
        if not whole or tickets.ndim != 1 or (tickets < 0).any():
            raise SearchError(
                f"tickets are an array of {tickets.dtype} with shape {tickets.shape}; "
                "expected those of `ask`, shape (rows,)"
            )
        if numbers.dtype.kind not in "fiu" or numbers.ndim != 1:
            raise SearchError(
                f"rewards are an array of {numbers.dtype} with shape {numbers.shape}; "
                "expected one number for each ticket"
            )
        self._core.tell(tickets.astype(np.uint64), numbers.astype(np.float64))

    def best(self, tree: int) -> BestPlan:
        """Return the evaluated plan with the highest value within the caps.

        Ties go to the lower depth, then to the lower plan.

        Raises:
            SearchError: There is no such tree, or none of its plans has been told.
        """
        return BestPlan(*self._core.best(self._checked(tree)))

    def pareto(self, tree: int) -> list[BestPlan]:
        """Return the Pareto front in depth and reward of the evaluated plans within the caps, by ascending depth.

        Raises:
            SearchError: No such tree.
        """
        return [BestPlan(*plan) for plan in self._core.pareto(self._checked(tree))]

    def evaluated(self, tree: int) -> Evaluated:
        """Return every told plan of a tree, including those of the probe.

        Raises:
            SearchError: No such tree.
        """
        return Evaluated(*self._core.evaluated(self._checked(tree)))

    def prior(self) -> EditPrior:
        """Return the prior that was given to the forest or measured by its probe.

        Raises:
            SearchError: The rewards of the probe have not been told yet, or there is neither a prior nor a probe.
        """
        return EditPrior(*self._core.prior())

    def _checked(self, tree: int) -> int:
        if tree < 0:
            raise SearchError(f"tree {tree} does not exist; expected 0 to {self.num_trees - 1}")
        return tree


def _tree_keys(keys: npt.ArrayLike | None, num_trees: int) -> npt.NDArray[np.uint64]:
    if keys is None:
        return np.arange(num_trees, dtype=np.uint64)
    array = np.asarray(keys)
    if array.dtype.kind not in "iu" or array.shape != (num_trees,) or (array < 0).any():
        raise ConfigError(
            f"tree_keys are an array of {array.dtype} with shape {array.shape}; "
            f"expected whole numbers from 0, shape ({num_trees},)"
        )
    return array.astype(np.uint64)


def _prior_arrays(prior: EditPrior) -> tuple[_Floats, _Floats, int]:
    return (
        np.ascontiguousarray(prior.mean, dtype=np.float64),
        np.ascontiguousarray(prior.variance, dtype=np.float64),
        prior.count,
    )
