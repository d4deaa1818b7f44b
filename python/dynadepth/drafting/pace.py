"""The pace of lossless decoding: which drafts are worth their time, measured while they are made."""

from dataclasses import dataclass, replace
from enum import Enum
from threading import Lock
from typing import Any

__all__ = ["Drafts", "Pace", "PaceTotals"]

# Cycles without drafts that are timed first, and from time to time again.
_TRIAL, _PERIOD = 6, 48
# Where both kinds of drafts could be made, the slower one is timed again this often.
_OTHER_PERIOD = 16
# Each new token's time counts this much of the running mean; the first ones count alike. Drafts that fail for a
# sentence say little about the next one.
_WEIGHT = 0.01
# Drafts must be slower than plain decoding by this before they stop.
_SLACK = 1.02
_FEWEST = 24
# After so many tokens in other ways, drafts that were too slow are tried again; each time in a row, twice as many.
_PAUSE, _LONGEST_PAUSE = 128, 4096


class Drafts(Enum):
    """Where the drafts of a cycle come from."""

    NONE = "none"
    EXITS = "exits"
    LOOKUP = "lookup"


@dataclass(frozen=True, slots=True)
class PaceTotals:
    """What lossless decoding has done.

    Attributes:
        tokens: New tokens, without the first of each text.
        drafts: Tokens that were drafted.
        kept: Drafts that the base model would have chosen.
        looked_up: Of the drafts, those that prompt lookup made.
        looked_up_kept: Of these, how many were kept.
        cycles: Calls that ran every layer.
        plain_seconds: Time of a token without drafts, a running mean; None before the first.
        draft_seconds: Time of a token with drafts, likewise.
        paused: How often drafts of one kind were found too slow and stopped for a while.
    """

    tokens: int = 0
    drafts: int = 0
    kept: int = 0
    looked_up: int = 0
    looked_up_kept: int = 0
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


@dataclass(slots=True)
class _Timed:
    """Cycles of one kind."""

    # Since the last pause: cycles, tokens, and the time of a token.
    cycles: int = 0
    tokens: int = 0
    seconds: float | None = None
    # Tokens until it is tried again, and how many they are to be the next time.
    pause: int = 0
    next_pause: int = _PAUSE


class Pace:
    """Decides what a cycle drafts; several threads may use one.

    Args:
        measured: Whether times decide. Without, every cycle drafts.
    """

    def __init__(self, *, measured: bool = True) -> None:
        self._measured, self._lock = measured, Lock()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        with self._lock:
            self._totals, self._draft_tokens = PaceTotals(), 0
            self._timed = {kind: _Timed() for kind in Drafts}

    @property
    def totals(self) -> PaceTotals:
        """What has been done so far."""
        with self._lock:
            return self._totals

    def choose(self, *, lookup: bool) -> Drafts:
        """Say what the next cycle drafts.

        Args:
            lookup: Whether prompt lookup has anything to offer.
        """
        if not self._measured:
            return Drafts.LOOKUP if lookup else Drafts.EXITS
        with self._lock:
            cycles = self._totals.cycles
            # Plain decoding is timed again now and then: texts grow, and machines have other work.
            if self._timed[Drafts.NONE].cycles < _TRIAL or cycles % _PERIOD == 0:
                return Drafts.NONE
            kinds = (Drafts.LOOKUP, Drafts.EXITS) if lookup else (Drafts.EXITS,)
            able = [kind for kind in kinds if not self._timed[kind].pause]
            # What has no time yet comes first.
            able.sort(key=lambda kind: self._timed[kind].seconds or 0.0)
            if not able:
                return Drafts.NONE
            return able[-1] if cycles % _OTHER_PERIOD == 0 else able[0]

    def cycle(self, kind: Drafts, *, drafts: int, kept: int, tokens: int, seconds: float) -> None:
        """Record a cycle.

        Args:
            kind: What it was to draft.
            drafts: Tokens that it drafted.
            kept: Of these, how many were kept.
            tokens: New tokens that it gave.
            seconds: How long it took.
        """
        with self._lock:
            # By tokens: a cycle of many tokens says more than one of a single token.
            pace, timed = seconds / max(1, tokens), self._timed[kind]
            timed.cycles, timed.tokens = timed.cycles + 1, timed.tokens + tokens
            timed.seconds = _mean(timed.seconds, pace, tokens, timed.tokens)
            for other in self._timed.values():
                other.pause = max(0, other.pause - tokens * (other is not timed))
            plain, drafting = self._timed[Drafts.NONE].seconds, self._totals.draft_seconds
            paused = False
            if kind is not Drafts.NONE:
                self._draft_tokens += tokens
                drafting = _mean(drafting, pace, tokens, self._draft_tokens)
                slow = plain is not None and timed.seconds > _SLACK * plain
                if timed.cycles >= _FEWEST and not slow:
                    timed.next_pause = _PAUSE
                paused = self._measured and slow and timed.cycles >= _FEWEST
                if paused:
                    longer = min(2 * timed.next_pause, _LONGEST_PAUSE)
                    self._timed[kind] = _Timed(pause=timed.next_pause, next_pause=longer)
            looked_up = kind is Drafts.LOOKUP
            known = self._totals
            self._totals = PaceTotals(
                known.tokens + tokens,
                known.drafts + drafts,
                known.kept + kept,
                known.looked_up + drafts * looked_up,
                known.looked_up_kept + kept * looked_up,
                known.cycles + 1,
                plain,
                drafting,
                known.paused + paused,
            )

    # A deep copy of a wrapped model continues with its own times; locks are not copied.
    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            state = {name: value for name, value in self.__dict__.items() if name != "_lock"}
            return {
                **state,
                "_timed": {kind: replace(each) for kind, each in self._timed.items()},
            }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = Lock()


def _mean(known: float | None, new: float, count: int, total: int) -> float:
    """Return a running mean after `count` more of `total` tokens."""
    if known is None:
        return new
    weight = max(count / max(1, total), 1.0 - (1.0 - _WEIGHT) ** count)
    return known + weight * (new - known)
