"""RowPlans: which rows of a batch make which visit.

The plans are kept on the host; the index of the rows of a visit is copied to the device once and kept there, so with a
fixed plan no layer waits for the device.
"""

from collections.abc import Sequence

import numpy as np
import torch

from dynadepth.plans import EXECUTE, SKIP, Plans

__all__ = ["RowPlans"]

# Stands for a visit that is not made.
_SKIPPING = -1


class RowPlans:
    """The plans of the rows of one batch, of which later layers may still be undecided.

    Attributes:
        plans: The actions. Shape (rows, num_layers), uint8. Layers from `num_decided` on are not decided yet.
        num_decided: Leading layers whose actions are final.
    """

    def __init__(self, plans: Plans, *, num_decided: int | None = None) -> None:
        self.plans = plans
        self.num_decided = plans.shape[1] if num_decided is None else num_decided
        self._rows: dict[tuple[int, int], list[int]] = {}
        self._shared: list[int | None] | None = None
        self._index: dict[tuple[int, int, torch.device], torch.Tensor] = {}
        self._num_visits: int | None = None

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return int(self.plans.shape[0])

    @property
    def is_uniform(self) -> bool:
        """Whether all rows have the same plan."""
        return bool((self.plans == self.plans[:1]).all())

    @property
    def num_visits(self) -> int:
        """Visits of all rows together, computed once; all layers must be decided."""
        if self._num_visits is None:
            self._num_visits = int(self.plans.sum(dtype=np.int64))
        return self._num_visits

    def shared_actions(self) -> list[int | None]:
        """Return, for every layer, the action that all rows share; None where rows differ or are undecided."""
        if self._shared is None:
            same = (self.plans == self.plans[:1]).all(axis=0)
            same[self.num_decided :] = False
            first = self.plans[0].tolist()
            self._shared = [
                action if kept else None for action, kept in zip(first, same, strict=True)
            ]
        return self._shared

    def rows(self, layer_idx: int, visit: int) -> list[int]:
        """Return the rows that make a visit, ascending.

        Args:
            layer_idx: Which decoder layer; its actions must be decided.
            visit: 0 for the first execution, 1 for the repeat.

        Returns:
            Row numbers.
        """
        key = (layer_idx, visit)
        rows = self._rows.get(key)
        if rows is None:
            actions = self.plans[:, layer_idx]
            found = actions == int(SKIP) if visit == _SKIPPING else actions >= int(EXECUTE) + visit
            rows = self._rows[key] = np.flatnonzero(found).tolist()
        return rows

    def skipping(self, layer_idx: int) -> list[int]:
        """Return the rows that skip a layer, ascending; its actions must be decided."""
        return self.rows(layer_idx, _SKIPPING)

    def index(self, layer_idx: int, visit: int, device: torch.device) -> torch.Tensor:
        """Return the rows that make a visit as an index tensor, which is copied to the device once.

        Args:
            layer_idx: Which decoder layer; its actions must be decided.
            visit: 0 for the first execution, 1 for the repeat.
            device: Where the index is needed.

        Returns:
            Row numbers, ascending. Shape (rows that make the visit,), int64.
        """
        key = (layer_idx, visit, device)
        index = self._index.get(key)
        if index is None:
            index = self._index[key] = torch.tensor(
                self.rows(layer_idx, visit), dtype=torch.long
            ).to(device)
        return index

    def skipping_index(self, layer_idx: int, device: torch.device) -> torch.Tensor:
        """Return the rows that skip a layer as an index tensor, see `index`. Shape (rows that skip it,), int64."""
        return self.index(layer_idx, _SKIPPING, device)

    def decide(self, layer_idx: int, actions: Plans) -> None:
        """Fix the actions of consecutive layers.

        Args:
            layer_idx: The first of them; it must be the first undecided layer.
            actions: The actions of each row. Shape (rows, layers decided), uint8.
        """
        self.plans[:, layer_idx : layer_idx + actions.shape[1]] = actions
        self.num_decided = layer_idx + actions.shape[1]
        self._shared = None

    def select(self, rows: Sequence[int]) -> "RowPlans":
        """Return the plans of the given rows, in that order."""
        return RowPlans(self.plans[np.asarray(rows, dtype=np.int64)], num_decided=self.num_decided)
