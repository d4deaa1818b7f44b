"""Compiled core of dynadepth: the sweep planner and the search forest."""

from typing import final

import numpy as np
import numpy.typing as npt

__version__: str

_Indices = npt.NDArray[np.int64]

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

def plan_sweep(
    plans: npt.NDArray[np.uint8], example: npt.NDArray[np.uint32], num_examples: int
) -> SweepPlan: ...
