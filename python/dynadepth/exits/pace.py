"""The pace of lossless decoding: whether drafts are worth their time, measured while they are made."""

from dataclasses import dataclass
from threading import Lock
from typing import Any

__all__ = ["Pace", "PaceTotals"]

# Cycles without drafts that are timed first, and from time to time again.
_TRIAL, _PERIOD = 6, 48
# Each new time counts this much of the running mean.
_WEIGHT = 0.1
# Drafts must be slower than plain decoding by this before they stop.
_SLACK = 1.02
_FEWEST = 8
# After so many tokens without drafts they are tried again.
_PAUSE = 512


@dataclass(frozen=True, slots=True)
class PaceTotals:
    """What lossless decoding has done.

    Attributes:
        tokens: New tokens, without the first of each text.
        drafts: Tokens that were drafted.
        kept: Drafts that the base model would have chosen.
        cycles: Calls that ran every layer.
        plain_seconds: Time of a token without drafts, a running mean; None before the first.
        draft_seconds: Time of a token with drafts, likewise.
        paused: How often drafts were found too slow and stopped for a while.
    """

    tokens: int = 0
    drafts: int = 0
    kept: int = 0
    cycles: int = 0
    plain_seconds: float | None = None
    draft_seconds: float | None = None
    paused: int = 0

    @property
    def speedup(self) -> float | None:
        """Measured time of plain decoding over that with drafts; above 1 drafts pay. None before both were timed."""
        if not self.plain_seconds or not self.draft_seconds:
            return None
        return self.plain_seconds / self.draft_seconds


class Pace:
    """Decides whether a cycle drafts; several threads may use one.

    Args:
        measured: Whether times decide. Without, every cycle drafts.
    """

    def __init__(self, *, measured: bool = True) -> None:
        self._measured, self._lock = measured, Lock()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        with self._lock:
            self._tokens = self._drafts = self._kept = self._cycles = self._paused = 0
            self._plain: float | None = None
            self._drafting: float | None = None
            self._plain_timed = self._drafts_timed = self._pause = 0

    @property
    def totals(self) -> PaceTotals:
        """What has been done so far."""
        with self._lock:
            return PaceTotals(
                self._tokens,
                self._drafts,
                self._kept,
                self._cycles,
                self._plain,
                self._drafting,
                self._paused,
            )

    def drafts(self) -> bool:
        """Say whether the next cycle may draft."""
        if not self._measured:
            return True
        with self._lock:
            if self._pause > 0 or self._plain_timed < _TRIAL:
                return False
            # Plain decoding is timed again now and then: texts grow, and machines have other work.
            return self._cycles % _PERIOD != 0

    def cycle(self, *, drafting: bool, drafts: int, kept: int, tokens: int, seconds: float) -> None:
        """Record a cycle.

        Args:
            drafting: Whether it was allowed to draft.
            drafts: Tokens that it drafted.
            kept: Of these, how many were kept.
            tokens: New tokens that it gave.
            seconds: How long it took.
        """
        with self._lock:
            self._cycles += 1
            self._tokens, self._drafts = self._tokens + tokens, self._drafts + drafts
            self._kept += kept
            pace = seconds / max(1, tokens)
            if not drafting:
                self._plain_timed += 1
                self._plain = _mean(self._plain, pace)
                self._pause = max(0, self._pause - tokens)
                return
            self._drafts_timed += 1
            # By tokens: a cycle of many tokens says more than one of a single token.
            self._drafting = _mean(self._drafting, pace, tokens)
            slow = self._plain is not None and self._drafting > _SLACK * self._plain
            if self._measured and slow and self._drafts_timed >= _FEWEST:
                self._paused += 1
                self._pause, self._drafts_timed, self._drafting = _PAUSE, 0, None

    # A deep copy of a wrapped model continues with its own times; locks are not copied.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = Lock()


def _mean(known: float | None, new: float, count: int = 1) -> float:
    if known is None:
        return new
    weight = 1.0 - (1.0 - _WEIGHT) ** count
    return known + weight * (new - known)
