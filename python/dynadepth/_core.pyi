"""Compiled core of dynadepth: the sweep planner and the search forest."""

from typing import final

import numpy as np
import numpy.typing as npt

__all__ = ["Forest", "SweepPlan", "__version__", "plan_sweep"]

__version__: str

_Bytes = npt.NDArray[np.uint8]
_Indices = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]
_Best = tuple[_Bytes, float, float, float, int]

@final
class Forest:
    """A search over plans for many prompts at once."""

    def __new__(
        cls,
        num_layers: int,
        tree_keys: npt.NDArray[np.uint64],
        *,
        seed: int,
        prior: tuple[_Floats, _Floats, int] | None,
        max_evaluations: int,
        depth_penalty: float,
        exploration: float,
        selection: str,
        protect: list[int],
        max_depth: float,
        max_repeats: int,
        max_edits: int,
        virtual_loss: float,
        probe_trees: int,
        round_size: int,
        temperature: float,
        prior_weight: float,
        random_child: float,
        interaction: float,
        noise: float,
        stop_at: float,
    ) -> Forest: ...
    def ask(
        self, max_plans: int
    ) -> tuple[npt.NDArray[np.uint32], _Bytes, npt.NDArray[np.uint64]]: ...
    def tell(self, ticket: npt.NDArray[np.uint64], rewards: _Floats) -> None: ...
    @property
    def finished(self) -> bool: ...
    def tree_finished(self, tree: int) -> bool: ...
    def best(self, tree: int) -> _Best: ...
    def pareto(self, tree: int) -> list[_Best]: ...
    def evaluated(self, tree: int) -> tuple[_Bytes, _Floats, _Floats, npt.NDArray[np.uint32]]: ...
    def prior(self) -> tuple[_Floats, _Floats, int]: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_trees(self) -> int: ...

@final
class SweepPlan:
    """One pass over the layers that yields the last hidden state of every plan."""

    @property
    def num_layers(self) -> int: ...
    @property
    def naive_visits(self) -> int: ...
    @property
    def executed_visits(self) -> int: ...
    def layer(self, layer_idx: int) -> tuple[_Indices, _Indices, _Indices, _Indices]: ...
    def entering(self, layer_idx: int) -> _Indices: ...
    def leaving(self, layer_idx: int) -> _Indices: ...
    def settled(self, layer_idx: int) -> _Indices: ...

def plan_sweep(
    plans: npt.NDArray[np.uint8], example: npt.NDArray[np.uint32], num_examples: int
) -> SweepPlan: ...
