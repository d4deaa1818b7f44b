"""Values read back from a file: each is checked for its type and range before anything is made of it.

Owns the words for what is wrong: the file, what was found, what was expected and what to do.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from dynadepth.config import did_you_mean
from dynadepth.errors import DynadepthError, LabelError
from dynadepth.models.encoding import lone_surrogate

__all__ = ["Stored"]

_T = TypeVar("_T")
_ACTIONS = frozenset("012")
_HEXADECIMAL = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class Stored:
    """A value that was read from a file, and the words for where it stands there.

    Every method either returns the value as what it must be, or raises an error of type `error`.

    Args:
        value: As JSON or Parquet gave it.
        where: The file, with the line if it has lines.
        advice: What the user can do about a damaged file.
        name: Of the value within the file, such as `task.prompts`; empty for the whole.
        error: Raised if the value is not what it must be.
    """

    value: Any
    where: str
    advice: str
    name: str = ""
    error: type[DynadepthError] = LabelError

    def damaged(self, what: str) -> NoReturn:
        """Raise the error.

        Args:
            what: Is wrong, as a sentence without its end.
        """
        raise self.error(f"{self.where} is damaged ({what}): {self.advice}")

    def wrong(self, expected: str) -> NoReturn:
        """Raise the error that says what the value is, and what was expected."""
        self.damaged(f"{self.name or 'it'} is {self._shown()}; expected {expected}")

    def fields(self, needed: Iterable[str], optional: Iterable[str] = ()) -> dict[str, "Stored"]:
        """Return the entries of an object that has these keys and no others.

        Args:
            needed: Keys that it has.
            optional: Keys that it may have; those that it lacks are left out.
        """
        found, wanted = self.mapping(), list(needed)
        known = [*wanted, *optional]
        for key in found:
            if key not in known:
                self.damaged(f"{self._of()}unknown key {key!a}{did_you_mean(key, known)}")
        for key in wanted:
            if key not in found:
                self.damaged(f"{self._of()}no {key!r}")
        return found

    def mapping(self) -> dict[str, "Stored"]:
        """Return the entries of an object, whatever its keys are."""
        if not isinstance(self.value, dict):
            self.wrong("an object")
        prefix = f"{self.name}." if self.name else ""
        return {
            key: self._part(value, prefix + ascii(key)[1:-1]) for key, value in self.value.items()
        }

    def entries(self, count: int | None = None, *, least: int = 0) -> list["Stored"]:
        """Return the entries of a list.

        Args:
            count: How many there have to be; None: any number.
            least: The lowest number of them.
        """
        if not isinstance(self.value, list) or len(self.value) < least:
            self.wrong(f"a list of {least} entries or more" if least else "a list")
        if count is not None and len(self.value) != count:
            self.damaged(f"{self.name} has {len(self.value)} entries; expected {count}")
        return [
            self._part(value, f"{self.name}[{number}]") for number, value in enumerate(self.value)
        ]

    def optional(self, read: Callable[["Stored"], _T]) -> _T | None:
        """Return what `read` returns of the value, or None if it is None."""
        return None if self.value is None else read(self)

    def text(self) -> str:
        """Return a text; half of a surrogate pair, which no file can hold, is no character of one."""
        if not isinstance(self.value, str) or lone_surrogate(self.value) is not None:
            self.wrong("a text")
        return self.value

    def one_of(self, known: Iterable[str]) -> str:
        """Return one of some texts."""
        names = list(known)
        if not isinstance(self.value, str) or self.value not in names:
            self.wrong(f"one of {', '.join(names)}")
        return self.value

    def hexadecimal(self, digits: int) -> str:
        """Return a hash."""
        found = self.value
        if not isinstance(found, str) or len(found) != digits or not _HEXADECIMAL.issuperset(found):
            self.wrong(f"{digits} hexadecimal digits")
        return found

    def boolean(self) -> bool:
        """Return true or false."""
        if not isinstance(self.value, bool):
            self.wrong("true or false")
        return self.value

    def whole(self, lowest: int = 0, highest: int | None = None) -> int:
        """Return a whole number within a range, both ends included."""
        if type(self.value) is not int or not _within(self.value, lowest, highest):
            self.wrong(f"a whole number{_range(lowest, highest)}")
        return self.value

    def number(self, lowest: float | None = None, highest: float | None = None) -> float:
        """Return a finite number within a range, both ends included."""
        found = self.value
        if (
            type(found) not in (int, float)
            or abs(found) > 1e308
            or not math.isfinite(found)
            or not _within(found, lowest, highest)
        ):
            self.wrong(f"a finite number{_range(lowest, highest)}")
        return float(found)

    def texts(self, count: int | None = None) -> list[str]:
        """Return a list of texts."""
        return [item.text() for item in self.entries(count)]

    def numbers(
        self, count: int | None = None, lowest: float | None = None, highest: float | None = None
    ) -> list[float]:
        """Return a list of finite numbers.

        Args:
            count: How many there have to be; None: any number.
            lowest: The lowest number that is accepted; None: any.
            highest: The highest number that is accepted; None: any.
        """
        return [item.number(lowest, highest) for item in self.entries(count)]

    def plan(self, num_layers: int) -> str:
        """Return a plan, one digit for each layer."""
        found = self.value
        if (
            not isinstance(found, str)
            or len(found) != num_layers
            or not _ACTIONS.issuperset(found)
            or not found.strip("0")
        ):
            self.wrong(
                f"a plan of {num_layers} digits, each 0 (skip), 1 (execute) or 2 (repeat) and one of them not 0"
            )
        return found

    def plans(self, num_layers: int, count: int | None = None, *, least: int = 0) -> list[str]:
        """Return a list of different plans, one digit for each layer.

        Args:
            num_layers: Decoder layers of the model.
            count: How many plans there have to be; None: any number.
            least: The lowest number of them.
        """
        found = [item.plan(num_layers) for item in self.entries(count, least=least)]
        if len(set(found)) < len(found):
            twice = next(plan for plan in found if found.count(plan) > 1)
            self.damaged(f"{self.name} has plan {twice} twice; expected each once")
        return found

    def _part(self, value: Any, name: str) -> "Stored":
        return Stored(value, self.where, self.advice, name, self.error)

    def _of(self) -> str:
        return f"{self.name} has " if self.name else "it has "

    def _shown(self) -> str:
        try:
            text = json.dumps(self.value)
        except (TypeError, ValueError, RecursionError):
            text = ascii(self.value)
        return text if len(text) <= 60 else f"{text[:57]}..."


def _within(value: float, lowest: float | None, highest: float | None) -> bool:
    return (lowest is None or value >= lowest) and (highest is None or value <= highest)


def _range(lowest: float | None, highest: float | None) -> str:
    if highest is None:
        return "" if lowest is None else f", {lowest} or more"
    return f" from {lowest} to {highest}" if lowest is not None else f", {highest} or less"
