"""The stats of a wrapped model: what was planned last, and totals since wrapping.

They are integers on the host, updated once for each batch and each forward, so they cost no measurable time and never
wait for the device. Several threads may read and write them.
"""

import weakref
from dataclasses import dataclass
from threading import Lock
from typing import Any

from dynadepth.caching.depth_cache import DepthCache
from dynadepth.caching.memory import KvBytes, kv_bytes
from dynadepth.caching.row_plans import RowPlans
from dynadepth.plans import Plans

__all__ = ["Stats", "Totals"]


@dataclass(frozen=True, slots=True)
class Totals:
    """What a wrapped model has done since it was wrapped, or since `reset_totals`.

    Attributes:
        prompts: Rows planned; a prompt with three beams or three return sequences is three rows.
        planned_visits: Visits in their plans, each row counted once.
        plain_planned_visits: What that would be if every layer ran once.
        prefill_forwards: Forwards that planned their rows.
        decode_forwards: Forwards that continued planned rows: decoding steps, later turns, later chunks.
        visits: Executions of a layer for a row, over all these forwards.
        plain_visits: What the plain model would have made in the same forwards.

    Example:
        >>> Totals(2, 5, 6, prefill_forwards=1, decode_forwards=1, visits=10, plain_visits=12).mean_depth
        0.8333333333333334
    """

    prompts: int = 0
    planned_visits: int = 0
    plain_planned_visits: int = 0
    prefill_forwards: int = 0
    decode_forwards: int = 0
    visits: int = 0
    plain_visits: int = 0

    @property
    def mean_depth(self) -> float | None:
        """Mean depth over the prompts, the quantity that a budget limits; None before the first."""
        return self.planned_visits / self.plain_planned_visits if self.prompts else None


class Stats:
    """The stats of one controller.

    Attributes:
        last_plans: The plans of the batch planned last. Shape (rows, num_layers), uint8; None before the first.
    """

    def __init__(self) -> None:
        self.last_plans: Plans | None = None
        # The cache belongs to its user: a strong reference from here would keep its memory alive.
        self._last_cache: weakref.ref[DepthCache] | None = None
        self._last_kv: KvBytes | None = None
        self._lock = Lock()
        self.reset()

    def reset(self) -> None:
        """Set the totals back to zero."""
        with self._lock:
            self._prompts = self._planned_visits = self._plain_planned_visits = 0
            self._prefill_forwards = self._decode_forwards = 0
            self._visits = self._plain_visits = 0

    @property
    def totals(self) -> Totals:
        """The current totals."""
        with self._lock:
            return Totals(
                self._prompts,
                self._planned_visits,
                self._plain_planned_visits,
                self._prefill_forwards,
                self._decode_forwards,
                self._visits,
                self._plain_visits,
            )

    @property
    def last_kv(self) -> KvBytes | None:
        """Bytes of the cache of the batch planned last; None if there is none, or it is gone and was not measured."""
        with self._lock:
            cache = None if self._last_cache is None else self._last_cache()
            measured = self._last_kv
        return measured if cache is None else kv_bytes(cache)

    def begin(self, cache: DepthCache | None) -> None:
        """Record that a batch is about to be planned, and which cache will hold its states."""
        with self._lock:
            self._last_cache = None if cache is None else weakref.ref(cache)
            self._last_kv = None

    def planned(self, plans: RowPlans) -> None:
        """Record the plans of a batch, in which all layers are decided."""
        with self._lock:
            self.last_plans = plans.plans.copy()

    def ran(self, plans: RowPlans, *, is_prefill: bool) -> None:
        """Record a forward that has completed; one that failed may be tried again, so it does not count."""
        visits, plain = plans.num_visits, plans.plans.size
        with self._lock:
            if is_prefill:
                self._prompts += plans.num_rows
                self._planned_visits += visits
                self._plain_planned_visits += plain
            self._prefill_forwards += is_prefill
            self._decode_forwards += not is_prefill
            self._visits += visits
            self._plain_visits += plain

    def measure(self, cache: DepthCache) -> None:
        """Record what a cache holds, so that it is known when the cache is gone; only for the batch planned last."""
        measured = kv_bytes(cache)
        with self._lock:
            if self._last_cache is not None and self._last_cache() is cache:
                self._last_kv = measured

    # A deep copy of a wrapped model continues with its own stats; locks and weak references are not copied.
    def __getstate__(self) -> dict[str, Any]:
        kv = self.last_kv
        with self._lock:
            state = dict(self.__dict__)
        del state["_lock"]
        return {**state, "_last_cache": None, "_last_kv": kv}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = Lock()
