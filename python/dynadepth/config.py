"""Settings as frozen dataclasses that survive a round trip through JSON: checks of types and of unknown keys."""

import difflib
import math
import numbers
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, TypeVar

from dynadepth.errors import ConfigError

__all__ = [
    "check_fields",
    "check_lowest",
    "config_from_dict",
    "config_to_dict",
    "did_you_mean",
    "plain_number",
]

_Config = TypeVar("_Config")


def did_you_mean(name: str, known: typing.Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the known name closest to a wrong one, or nothing.

    Example:
        >>> did_you_mean("num_window", ["num_windows", "preset"])
        " (did you mean 'num_windows'?)"
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def plain_number(value: Any) -> Any:
    """Return a number of numpy (or of any library that registers its own) as Python's; anything else unchanged.

    Example:
        >>> from fractions import Fraction
        >>> plain_number(Fraction(1, 4)), plain_number("1")
        (0.25, '1')
    """
    if type(value) in (bool, int, float) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def check_lowest(config: Any, lowest: Mapping[str, float]) -> None:
    """Check that fields of a dataclass are not below a number each.

    Args:
        config: An instance of a dataclass.
        lowest: The lowest value accepted, by field.

    Raises:
        ConfigError: Names the class, the field, the value and what was expected.
    """
    for name, least in lowest.items():
        if getattr(config, name) < least:
            raise ConfigError(
                f"{type(config).__name__}.{name} is {getattr(config, name)}; expected {least} or more"
            )


def check_fields(config: Any) -> None:
    """Check that every field of a dataclass holds a value of its annotated type; numpy's numbers become Python's.

    Understands `int`, `float` (finite; a whole number passes), `bool`, `str`, `Literal`, `tuple[X, ...]` and unions of
    these with `None`. Call it first in `__post_init__`.

    Args:
        config: An instance of a dataclass.

    Raises:
        ConfigError: Names the class, the field, the value and what was expected.
    """
    hints = typing.get_type_hints(type(config))
    for item in fields(config):
        given = getattr(config, item.name)
        value = (
            tuple(plain_number(each) for each in given)
            if isinstance(given, tuple)
            else plain_number(given)
        )
        if value is not given:
            object.__setattr__(config, item.name, value)
        if not _fits(value, hints[item.name]):
            raise ConfigError(
                f"{type(config).__name__}.{item.name} is {value!r} ({type(value).__name__}); "
                f"expected {_words(hints[item.name])}"
            )


def config_to_dict(config: Any) -> dict[str, Any]:
    """Return all fields of a configuration as values that JSON can hold.

    Args:
        config: An instance of a flat dataclass that `check_fields` has passed.

    Returns:
        Field name to value; tuples become lists.
    """
    content = {item.name: getattr(config, item.name) for item in fields(config)}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in content.items()
    }


def config_from_dict(config_class: type[_Config], content: Any) -> _Config:
    """Make a configuration from what `config_to_dict` wrote.

    Args:
        config_class: The dataclass to make.
        content: Field name to value; fields with a default may be missing.

    Returns:
        The configuration, checked by its own `__post_init__`.

    Raises:
        ConfigError: The content is not an object, a key is unknown or missing, or a value has the wrong type or size.
    """
    name = config_class.__name__
    if not isinstance(content, Mapping):
        raise ConfigError(f"{name} is {content!r}; expected an object of settings")
    items = {item.name: item for item in fields(config_class)}  # type: ignore[arg-type]
    for key in content:
        if key not in items:
            raise ConfigError(
                f"{name} has no setting {key!r}{did_you_mean(str(key), items)}; "
                f"expected only {', '.join(sorted(items))}"
            )
    for key, item in items.items():
        needed = item.default is MISSING and item.default_factory is MISSING
        if needed and key not in content:
            raise ConfigError(f"{name} lacks the setting {key!r}; add it")
    return config_class(
        **{
            key: tuple(value) if isinstance(value, list) else value
            for key, value in content.items()
        }
    )


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return any(
            value == choice and type(value) is type(choice) for choice in typing.get_args(hint)
        )
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if origin is tuple:
        return isinstance(value, tuple) and all(
            _fits(part, typing.get_args(hint)[0]) for part in value
        )
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(part) for part in typing.get_args(hint))
    if origin is tuple:
        return f"a list, each entry {_words(typing.get_args(hint)[0])}"
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    return names.get(
        hint, "nothing" if hint is type(None) else getattr(hint, "__name__", str(hint))
    )
