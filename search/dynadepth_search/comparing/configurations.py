"""How a model is wrapped for a comparison, as text: `budget=0.9,routers=menu`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dynadepth.config import did_you_mean
from dynadepth.errors import ConfigError

__all__ = ["Configuration"]


def _plan(text: str) -> str:
    # Commas are between settings.
    return text.replace("+", ",")


_SETTINGS: Mapping[str, Callable[[str], Any]] = {
    "budget": float,
    "fidelity": float,
    "plan": _plan,
    "routers": str,
    "shortcuts": str,
    "max_depth": float,
}
_DIALS = ("budget", "fidelity", "plan")


@dataclass(frozen=True, slots=True)
class Configuration:
    """One way to wrap a model.

    Attributes:
        name: What a comparison calls it.
        arguments: Of `wrap_model`.
    """

    name: str
    arguments: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> "Configuration":
        """Read a configuration.

        Args:
            text: Settings of `wrap_model` with commas between: one of budget, fidelity and plan (ranges with `+`
                between, as in `0-11+14-27`), and routers, shortcuts, max_depth. It is its name too.

        Raises:
            ConfigError: It does not say how to wrap a model, or fidelity is 1, where the text is the base model's own.

        Example:
            >>> Configuration.parse("plan=0-3+5,shortcuts=maps").arguments
            {'plan': '0-3,5', 'shortcuts': 'maps'}
        """
        arguments: dict[str, Any] = {}
        for part in text.split(","):
            name, equals, value = part.strip().partition("=")
            if name not in _SETTINGS or not equals or not value or name in arguments:
                raise ConfigError(
                    f"configuration {text!r} has {part.strip()!r}{did_you_mean(name, list(_SETTINGS))}; expected "
                    f"settings such as budget=0.9,routers=menu, each once, of {', '.join(_SETTINGS)}"
                )
            try:
                arguments[name] = _SETTINGS[name](value)
            except ValueError as error:
                raise ConfigError(
                    f"configuration {text!r} has {name}={value!r}; expected a number"
                ) from error
        if sum(name in arguments for name in _DIALS) != 1:
            raise ConfigError(
                f"configuration {text!r} gives {', '.join(arguments)}; expected exactly one of {', '.join(_DIALS)}"
            )
        if arguments.get("fidelity") == 1:
            raise ConfigError(
                f"configuration {text!r} verifies every token, so its text is the base model's own; give a fidelity "
                "below 1"
            )
        return cls(text, arguments)
