"""Limits that every plan of a wrapped model must respect, whoever made it.

A plan that the caller gives is refused if it breaks them; a policy's actions are changed to fit.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from dynadepth.errors import ConfigError, PlanError
from dynadepth.plans import EXECUTE, REPEAT, Plans

__all__ = ["Limits"]


class Limits:
    """Protected layers and the hard limit of a prompt's depth.

    Args:
        num_layers: Decoder layers of the model.
        max_depth: Maximum visits of a prompt, as a fraction of the number of layers, at least 1; None: no limit.
        protect: Layers that always run once.

    Attributes:
        max_visits: Maximum visits of a prompt.
    """

    def __init__(
        self, num_layers: int, *, max_depth: float | None = None, protect: Iterable[int] = ()
    ) -> None:
        self.num_layers = num_layers
        self.max_depth = max_depth
        self.protect = tuple(sorted(set(protect)))
        self.max_visits = (
            2 * num_layers if max_depth is None else math.floor(max_depth * num_layers + 1e-9)
        )

    def check(self, plans: Plans) -> None:
        """Refuse plans that break the limits that the model was wrapped with.

        Raises:
            PlanError: A protected layer does not run once, or a plan has more visits than `max_depth` allows.
        """
        broken = [layer for layer in self.protect if (plans[:, layer] != EXECUTE).any()]
        if broken:
            raise PlanError(
                f"layers {broken} are protected and must have action 1; change the plan or protect"
            )
        visits = int(plans.sum(axis=1, dtype=np.int64).max())
        if visits > self.max_visits:
            raise PlanError(
                f"a plan has {visits} visits (depth {visits / self.num_layers:.3f}); max_depth allows "
                f"{self.max_visits}: give a shorter plan or a larger max_depth"
            )

    def apply(self, actions: Plans, first: int, visits: npt.NDArray[np.int64]) -> Plans:
        """Apply protection, `max_depth` and "at least one layer runs" to the actions of consecutive layers.

        A repeat is removed if the remaining layers, each run once, would no longer fit: how many visits they will make
        is not known yet.

        Args:
            actions: The actions decided. Shape (rows, layers decided), uint8; changed in place.
            first: The first of these layers.
            visits: Visits of each row in the layers before it. Shape (rows,), int64.

        Returns:
            `actions`.
        """
        after = first + actions.shape[1]
        for layer in self.protect:
            if first <= layer < after:
                actions[:, layer - first] = EXECUTE
        if self.max_depth is not None:
            self._take_repeats(actions, first, visits.copy())
        if after == self.num_layers:
            empty = visits + actions.sum(axis=1, dtype=np.int64) == 0
            actions[empty, -1] = EXECUTE
        return actions

    def check_menu(self, menu: Plans, decision_layers: Sequence[int]) -> None:
        """Refuse limits that can change a menu's choice at one step so that no plan is left for a later step.

        All choices that could be made for some prompt are tried, each changed to fit the limits.

        Args:
            menu: The plans. Shape (K, num_layers), uint8.
            decision_layers: The layers at which the menu chooses, ascending.

        Raises:
            ConfigError: Some step can be left without a plan.
        """
        ends = [*decision_layers[1:], self.num_layers]
        none_yet = np.zeros(1, dtype=np.int64)
        start = self.apply(menu[:1, : decision_layers[0]].copy(), 0, none_yet)[0]
        chosen = {tuple(start.tolist())}
        for step, (first, end) in enumerate(zip(decision_layers, ends, strict=True)):
            longer = set()
            for so_far in chosen:
                # The first step chooses among all plans, whatever ran before it.
                is_open = (menu[:, :first] == so_far).all(axis=1) | (step == 0)
                if not is_open.any():
                    raise ConfigError(
                        f"max_depth {self.max_depth} and protect {list(self.protect)} change what this menu chooses "
                        f"before layer {first} so that no plan of it is left there; train a menu with these layers "
                        "protected and without the repeats, or leave these limits out"
                    )
                visits = np.array([sum(so_far)], dtype=np.int64)
                for actions in np.unique(menu[is_open, first:end], axis=0):
                    kept = self.apply(actions[None].copy(), first, visits)[0]
                    longer.add((*so_far, *kept.tolist()))
            chosen = longer

    def _take_repeats(self, actions: Plans, first: int, visits: npt.NDArray[np.int64]) -> None:
        for column in range(actions.shape[1]):
            later = self.num_layers - (first + column) - 1
            too_deep = (actions[:, column] == REPEAT) & (
                visits + int(REPEAT) + later > self.max_visits
            )
            actions[too_deep, column] = EXECUTE
            visits += actions[:, column]
