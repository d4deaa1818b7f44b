"""What a study may set, and what it asks of the work that it tunes; nothing here knows Optuna."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["Goal", "Outcome", "Report", "Setting", "StudyTrial", "Tunable", "Value"]

Value = int | float | str
# Called with the number of a step and the value so far; true if the trial is not worth going on with.
Report = Callable[[int, float], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting and its range: either choices, or numbers from `low` to `high`, both ends included.

    Args:
        name: Its name.
        choices: What it may be; empty: a number.
        low: The lowest number.
        high: The highest number.
        whole: Whether it is a whole number.
        log: Whether its logarithm is searched.
    """

    name: str
    choices: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 1.0
    whole: bool = False
    log: bool = False

    def suggest(self, trial: Any) -> Value:
        """Return the value that a trial of Optuna has, or draws, for this setting."""
        found: Value
        if self.choices:
            found = trial.suggest_categorical(self.name, list(self.choices))
        elif self.whole:
            found = trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log)
        else:
            found = trial.suggest_float(self.name, self.low, self.high, log=self.log)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the range as values that JSON can hold."""
        if self.choices:
            return {"name": self.name, "choices": list(self.choices)}
        ends: dict[str, Any] = {"low": self.low, "high": self.high}
        return {"name": self.name, **ends, "whole": self.whole, "log": self.log}


@dataclass(frozen=True, slots=True)
class Goal:
    """What a trial is judged by.

    Args:
        name: In words, as a report shows it.
        maximise: Whether more is better.
    """

    name: str
    maximise: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came out of a trial.

    Args:
        values: One number for each goal.
        notes: What else is kept with the trial, as values that JSON can hold.
    """

    values: tuple[float, ...]
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyTrial:
    """A trial as it was stored.

    Args:
        number: Its number in the study, from 0.
        state: `complete`, `pruned`, `running`, `waiting` or `fail`.
        params: Its settings.
        values: One number for each goal; None unless it is complete.
        default: Whether its settings are those that are used without a study.
        notes: What its outcome kept.
        seconds: How long it took; None unless it ended.
    """

    number: int
    state: str
    params: dict[str, Any]
    values: tuple[float, ...] | None
    default: bool
    notes: dict[str, Any]
    seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the trial as values that JSON can hold, without its notes."""
        return {
            "number": self.number,
            "state": self.state,
            "default": self.default,
            "params": self.params,
            "values": None if self.values is None else list(self.values),
            "seconds": self.seconds,
        }


class Tunable(Protocol):
    """Work whose settings a study tunes. A trial's values follow from its settings alone, whoever runs it."""

    @property
    def kind(self) -> str:
        """Name of the kind of study."""
        ...

    @property
    def settings(self) -> tuple[Setting, ...]:
        """What is tuned."""
        ...

    @property
    def goals(self) -> tuple[Goal, ...]:
        """What trials are judged by: one goal, or two."""
        ...

    @property
    def asked(self) -> dict[str, Any]:
        """What identifies the work, as values that JSON can hold; trials of other work do not mix with it."""
        ...

    def default(self) -> dict[str, Value]:
        """Return the settings that are used without a study."""
        ...

    def evaluate(self, params: Mapping[str, Any], report: Report) -> Outcome | None:
        """Run a trial.

        Args:
            params: A value for each setting.
            report: Told of steps on the way, if there are any.

        Returns:
            What came out; None if `report` said that the trial is not worth going on with.
        """
        ...

    def findings(self, trials: Sequence[StudyTrial]) -> dict[str, Any]:
        """Say what the complete trials show, as values that JSON can hold.

        Args:
            trials: The complete trials, in the order of their numbers; one of them has the default settings.

        Returns:
            `comparison` of default and tuned settings on what tuned settings were not chosen on, or None; other keys as
            the kind of study has them.
        """
        ...
