"""The audit of late exits: when the owed layers of early tokens have run, what the base model would have chosen.

The states that early tokens were read from, and their true final states, are collected and read together by the model's
own norm and head, many at a time, since a reading costs about the same for one state as for many.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch

from dynadepth.exits.dial import Dial

__all__ = ["Audit", "Audited"]

# From states of shape (states, hidden) to logits of shape (states, vocabulary).
Read = Callable[[torch.Tensor], torch.Tensor]
# New tokens that wait to be looked at, at most.
_WAITING = 32


@dataclass(frozen=True, slots=True)
class Audited:
    """What audits have found.

    Attributes:
        tokens: New tokens whose layers have all run.
        early: Those that left early.
        read: Early tokens whose true final state was read.
        changed: Those of them for which the base model's choice is another.

    Example:
        >>> Audited(tokens=100, early=50, read=25, changed=1).fidelity
        0.98
    """

    tokens: int = 0
    early: int = 0
    read: int = 0
    changed: int = 0

    @property
    def fidelity(self) -> float | None:
        """Share of new tokens that are the base model's own choice after the same text; None before the first audit."""
        if not self.tokens or (self.early and not self.read):
            return None
        return 1.0 - self.early / self.tokens * (self.changed / max(1, self.read))

    @property
    def interval(self) -> tuple[float, float] | None:
        """A 95 % interval of `fidelity` (Wilson), as if tokens were independent of each other; None where it is."""
        if self.fidelity is None:
            return None
        if not self.read:
            return 1.0, 1.0
        count, share, z = self.read, self.changed / self.read, 1.96
        middle = (share + z * z / (2 * count)) / (1 + z * z / count)
        half = (
            z
            * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
            / (1 + z * z / count)
        )
        early = self.early / self.tokens
        return 1.0 - early * (middle + half), 1.0 - early * max(0.0, middle - half)


@dataclass(slots=True)
class _Settled:
    """A new token of each row whose layers have all run; shapes (rows, hidden) and (rows,)."""

    true: torch.Tensor | None
    given: torch.Tensor | None
    early: torch.Tensor
    counts: torch.Tensor


class Audit:
    """Compares what early tokens were with what the base model says; several threads may use one.

    Args:
        share: Of early tokens, the share that is read, above 0 and at most 1.
        dial: What is told of every token; None: nothing.
    """

    def __init__(self, share: float = 1.0, dial: Dial | None = None) -> None:
        self._share, self._dial = share, dial
        self._lock = Lock()
        self.reset()

    def reset(self) -> None:
        """Set the counts back to zero, and forget what waits."""
        with self._lock:
            self._waiting: list[_Settled] = []
            self._num_waiting, self._due = 0, 0.0
            self._found = Audited()

    @property
    def found(self) -> Audited:
        """What has been found so far."""
        with self._lock:
            return self._found

    @property
    def is_due(self) -> bool:
        """Whether enough tokens wait to be looked at together."""
        return self._num_waiting >= _WAITING

    def went_on(self, counts: torch.Tensor) -> None:
        """Note a new token of each row, none of which left.

        Args:
            counts: Which rows still write; the others pad. Shape (rows,), bool.
        """
        with self._lock:
            self._waiting.append(_Settled(None, None, torch.zeros_like(counts), counts))
            self._num_waiting += len(counts)

    def settled(
        self,
        true: torch.Tensor,
        given: torch.Tensor | None,
        early: torch.Tensor,
        counts: torch.Tensor,
    ) -> None:
        """Note a new token of each row, whose layers have all run.

        Args:
            true: Its final state. Shape (rows, hidden).
            given: The state that early rows were read from. Shape (rows, hidden); None: they are not known.
            early: Which rows left early. Shape (rows,), bool.
            counts: Which rows still write; the others pad. Shape (rows,), bool.
        """
        with self._lock:
            self._waiting.append(_Settled(true, given, early, counts))
            self._num_waiting += len(early)

    def look(self, read: Read) -> None:
        """Look at all that waits.

        Args:
            read: The model's own norm and head.
        """
        with self._lock:
            waiting, self._waiting = self._waiting, []
            self._num_waiting = 0
        if not waiting:
            return
        tokens = sum(int(each.counts.sum()) for each in waiting)
        true, given = [], []
        for each in waiting:
            if each.given is None or each.true is None:
                continue
            chosen = (each.early & each.counts).to(each.given.device)
            true.append(each.true.to(each.given.device)[chosen])
            given.append(each.given[chosen])
        early = sum(map(len, given))
        rows = self._drawn(early)
        changed = 0
        if rows:
            states = torch.cat([torch.cat(true)[rows], torch.cat(given)[rows]])
            choices = read(states).argmax(dim=-1)
            changed = int((choices[: len(rows)] != choices[len(rows) :]).sum())
        with self._lock:
            found = self._found
            self._found = Audited(
                found.tokens + tokens,
                found.early + early,
                found.read + len(rows),
                found.changed + changed,
            )
        if self._dial is not None:
            # Each token that is read stands for as many as one in `share` are.
            self._dial.record(tokens=tokens, changed=changed / self._share)

    def _drawn(self, count: int) -> list[int]:
        """Return which of so many early tokens are read: evenly many, whatever comes in one call."""
        with self._lock:
            rows = []
            for row in range(count):
                self._due += self._share
                if self._due >= 1.0 - 1e-9:
                    self._due -= 1.0
                    rows.append(row)
        return rows

    # A deep copy of a wrapped model continues with its own counts; locks and what waits are not copied.
    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            state = {name: value for name, value in self.__dict__.items() if name != "_lock"}
        return {**state, "_waiting": [], "_num_waiting": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = Lock()
