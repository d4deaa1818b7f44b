"""Settings as frozen dataclasses that go to JSON and come back unchanged.

Owns the checks that every configuration class shares (types, unknown keys), the shape of the routers and the recipes
that train them. Knows nothing of models or files.
"""

import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, TypeVar

from dynadepth.errors import ConfigError

__all__ = [
    "PRESETS",
    "RouterConfig",
    "TrainConfig",
    "check_fields",
    "config_from_dict",
    "config_to_dict",
    "did_you_mean",
]

PRESETS = ("dynadepth", "drllm")

_Config = TypeVar("_Config")


def did_you_mean(name: str, known: typing.Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the known name closest to a wrong one, or nothing.

    Example:
        >>> did_you_mean("num_window", ["num_windows", "preset"])
        " (did you mean 'num_windows'?)"
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_fields(config: Any) -> None:
    """Check that every field of a dataclass holds a value of its annotated type.

    Understands `int`, `float` (finite; a whole number passes), `bool`, `str`, `Literal`, `tuple[X, ...]` and unions of
    these with `None`. Call it first in `__post_init__`.

    Args:
        config: An instance of a dataclass.

    Raises:
        ConfigError: Names the class, the field, the value and what was expected.
    """
    hints = typing.get_type_hints(type(config))
    for item in fields(config):
        value = getattr(config, item.name)
        if not _fits(value, hints[item.name]):
            raise ConfigError(
                f"{type(config).__name__}.{item.name} is {value!r} ({type(value).__name__}); "
                f"expected {_words(hints[item.name])}"
            )


def config_to_dict(config: Any) -> dict[str, Any]:
    """Return all fields of a configuration as values that JSON knows.

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
        config_class: The dataclass.
        content: Field name to value; fields with a default may be missing.

    Returns:
        The configuration, checked by its own `__post_init__`.

    Raises:
        ConfigError: Not an object, an unknown or missing key, or a value of the wrong type or size.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """The shape of one set of routers.

    Args:
        num_layers: Decoder layers of the base model, one router each.
        hidden_size: Width d of the residual stream.
        num_windows: Windows W that the prompt's tokens are averaged over.
        bottleneck: Hidden units of each router's perceptron.
        last_token: Also read the state of the last prompt token, through a second perceptron.
        preset: The recipe that trained them: `"dynadepth"` or `"drllm"` (windows only).

    Raises:
        ConfigError: A value of the wrong type or out of range.

    Example:
        >>> RouterConfig(num_layers=4, hidden_size=32).num_views
        9
    """

    num_layers: int
    hidden_size: int
    num_windows: int = 8
    bottleneck: int = 128
    last_token: bool = True
    preset: Literal["dynadepth", "drllm"] = "dynadepth"

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("num_layers", "hidden_size", "num_windows", "bottleneck"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"RouterConfig.{name} is {getattr(self, name)}; expected 1 or more"
                )
        if self.preset == "drllm" and self.last_token:
            raise ConfigError(
                f"RouterConfig.last_token is True with the preset {self.preset!r}, which sees windows "
                "only; give last_token=False or the preset 'dynadepth'"
            )

    @property
    def num_views(self) -> int:
        """Vectors V that a router reads: the windows, then the last token's state if it is used."""
        return self.num_windows + int(self.last_token)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as values that JSON knows."""
        return config_to_dict(self)

    @classmethod
    def from_dict(cls, content: Any) -> "RouterConfig":
        """Make the configuration from what `to_dict` wrote.

        Raises:
            ConfigError: An unknown or missing key, or a value of the wrong type or size.
        """
        return config_from_dict(cls, content)

    @classmethod
    def for_preset(cls, preset: str, *, num_layers: int, hidden_size: int) -> "RouterConfig":
        """Return the shape that a preset's routers have.

        Args:
            preset: `"dynadepth"` or `"drllm"`.
            num_layers: Decoder layers of the base model.
            hidden_size: Width of the residual stream.

        Raises:
            ConfigError: Unknown preset, or a size below 1.
        """
        _check_preset(preset)
        return cls.from_dict(
            {
                "num_layers": num_layers,
                "hidden_size": hidden_size,
                "last_token": preset != "drllm",
                "preset": preset,
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How routers are trained.

    The defaults are the preset `dynadepth`'s: features standardised, a perceptron whose output starts at the best
    constant, and for each layer the weights of the epoch that did best on prompts held out of the training prompts. A
    layer that learns nothing which holds there keeps its constant output, and so never deviates from the static plans.

    Args:
        epochs: Passes over the prompts.
        batch_size: Prompts of a step.
        learning_rate: Peak rate of AdamW.
        weight_decay: Of the weight matrices.
        warmup_steps: Steps of linear warm-up; the cosine begins after them and ends at zero. If there are no more
            steps than these, the peak is never reached.
        focal_gamma: Exponent of the focal loss.
        class_balance: beta of the effective number of labels; 0 weighs all actions alike.
        standardise: Scale every dimension to unit spread; folded into the first linear layer afterwards.
        centre: Subtract the mean logits over the prompts; folded into the last bias.
        held_out: Share of the prompts that choose each layer's epoch; 0 starts from random outputs and keeps the last
            epoch's weights.

    Raises:
        ConfigError: A value of the wrong type or out of range.

    Source:
        Dr.LLM (arXiv 2510.12773), for what `for_preset("drllm")` returns.
    """

    epochs: int = 12
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_steps: int = 10
    focal_gamma: float = 2.0
    class_balance: float = 0.999
    standardise: bool = True
    centre: bool = True
    held_out: float = 0.2

    def __post_init__(self) -> None:
        check_fields(self)
        ranges: dict[str, tuple[bool, str]] = {
            "epochs": (self.epochs >= 1, "1 or more"),
            "batch_size": (self.batch_size >= 1, "1 or more"),
            "learning_rate": (self.learning_rate > 0, "more than 0"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "warmup_steps": (self.warmup_steps >= 0, "0 or more"),
            "focal_gamma": (self.focal_gamma >= 0, "0 or more"),
            "class_balance": (0 <= self.class_balance < 1, "0 or more and less than 1"),
            "held_out": (0 <= self.held_out <= 0.5, "0 to 0.5"),
        }
        for name, (good, words) in ranges.items():
            if not good:
                raise ConfigError(f"TrainConfig.{name} is {getattr(self, name)}; expected {words}")

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as values that JSON knows."""
        return config_to_dict(self)

    @classmethod
    def from_dict(cls, content: Any) -> "TrainConfig":
        """Make the configuration from what `to_dict` wrote.

        Raises:
            ConfigError: An unknown key, or a value of the wrong type or size.
        """
        return config_from_dict(cls, content)

    @classmethod
    def for_preset(cls, preset: str) -> "TrainConfig":
        """Return a preset's recipe.

        Args:
            preset: `"dynadepth"` or `"drllm"`, the published settings.

        Raises:
            ConfigError: Unknown preset.
        """
        _check_preset(preset)
        if preset != "drllm":
            return cls()
        return cls(
            epochs=25,
            batch_size=16,
            learning_rate=1e-3,
            weight_decay=0.01,
            warmup_steps=500,
            standardise=False,
            centre=False,
            held_out=0.0,
        )


def _check_preset(preset: Any) -> None:
    if preset not in PRESETS:
        raise ConfigError(
            f"preset is {preset!r}; expected one of {', '.join(PRESETS)}"
            f"{did_you_mean(str(preset), PRESETS)}"
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
