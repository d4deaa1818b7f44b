"""Routers: the perceptrons that turn a prompt's pooled states into logits over the actions of each layer.

The stacked weights of all layers are plain tensors, never part of the base model's module tree.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from dynadepth.config import check_fields, config_from_dict, config_to_dict, did_you_mean
from dynadepth.errors import ConfigError
from dynadepth.plans import NUM_ACTIONS
from dynadepth.policies.pooling import Pooling

__all__ = [
    "PRESETS",
    "Bottleneck",
    "RouterConfig",
    "RouterHeads",
    "all_logits",
    "pool",
]

PRESETS = ("dynadepth", "drllm")


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
        ConfigError: A value has the wrong type or is out of range.

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
        """Number V of vectors that a router reads: the windows, then the last token's state if it is used."""
        return self.num_windows + int(self.last_token)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as values that JSON can hold."""
        return config_to_dict(self)

    @classmethod
    def from_dict(cls, content: Any) -> "RouterConfig":
        """Make the configuration from what `to_dict` wrote.

        Raises:
            ConfigError: A key is unknown or missing, or a value has the wrong type or size.
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
        check_preset(preset)
        return cls.from_dict(
            {
                "num_layers": num_layers,
                "hidden_size": hidden_size,
                "last_token": preset != "drllm",
                "preset": preset,
            }
        )


def check_preset(preset: Any) -> None:
    """Check the name of a preset.

    Raises:
        ConfigError: There is no such preset.
    """
    if preset not in PRESETS:
        raise ConfigError(
            f"preset is {preset!r}; expected one of {', '.join(PRESETS)}"
            f"{did_you_mean(str(preset), PRESETS)}"
        )


def pool(hidden_states: Tensor, prompt_mask: Tensor, config: RouterConfig) -> Tensor:
    """Return everything that a router reads of a prompt: the window means, then the last token's state if it is used.

    Args:
        hidden_states: States entering a layer. Shape (batch, tokens, hidden), any floating dtype.
        prompt_mask: Non-zero for real tokens. Shape (batch, tokens), bool or integer.
        config: Shape of the routers.

    Returns:
        Views. Shape (batch, config.num_views, hidden), float32.
    """
    pooling = Pooling.of(prompt_mask, config.num_windows, last_token=config.last_token)
    return pooling(hidden_states)


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """Two linear layers with a GELU between them, for all decoder layers at once.

    Args:
        first_weight: Shape (num_layers, hidden, bottleneck), float32.
        first_bias: Shape (num_layers, bottleneck), float32.
        second_weight: Shape (num_layers, bottleneck, 3), float32.
        second_bias: Shape (num_layers, 3), float32.
    """

    first_weight: Tensor
    first_bias: Tensor
    second_weight: Tensor
    second_bias: Tensor

    def logits(self, layer_idx: int, views: Tensor) -> Tensor:
        """Return one layer's logits, averaged over the views.

        Args:
            layer_idx: The decoder layer.
            views: Shape (batch, views, hidden), float32.

        Returns:
            Shape (batch, 3), float32.
        """
        inner = functional.gelu(views @ self.first_weight[layer_idx] + self.first_bias[layer_idx])
        # The mean commutes with the second linear layer, so it is taken before, where there is less to multiply.
        return inner.mean(dim=1) @ self.second_weight[layer_idx] + self.second_bias[layer_idx]

    def all_logits(self, views: Tensor) -> Tensor:
        """Return the logits of all layers, averaged over the views.

        Args:
            views: Shape (num_layers, batch, views, hidden), float32.

        Returns:
            Shape (num_layers, batch, 3), float32.
        """
        num_layers, batch, num_views, hidden = views.shape
        flat = views.reshape(num_layers, batch * num_views, hidden)
        inner = functional.gelu(
            torch.baddbmm(self.first_bias.unsqueeze(1), flat, self.first_weight)
        )
        mean = inner.view(num_layers, batch, num_views, -1).mean(dim=2)
        return torch.baddbmm(self.second_bias.unsqueeze(1), mean, self.second_weight)

    def tensors(self) -> dict[str, Tensor]:
        """Return the four tensors by name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass(frozen=True, eq=False)
class RouterHeads:
    """The routers of all layers: a perceptron over the windows and, if used, one over the last token's state.

    Immutable and without gradients; safe to share between policies and threads.

    Args:
        config: Their shape.
        windows: Weights of the perceptron whose logits are averaged over the windows.
        last: Weights of the perceptron over the last token's state, added to the former; None if not used.

    Raises:
        ConfigError: A tensor does not have the shape or dtype that the configuration demands, or is not finite.

    Source:
        Router of Dr.LLM (arXiv 2510.12773): Linear-GELU-Linear for each layer, logits averaged over windows;
        deviation: the second perceptron on the last token's state.
    """

    config: RouterConfig
    windows: Bottleneck
    last: Bottleneck | None = None

    def __post_init__(self) -> None:
        if (self.last is not None) != self.config.last_token:
            raise ConfigError(
                f"RouterConfig.last_token is {self.config.last_token}, but weights for the last token are "
                f"{'missing' if self.last is None else 'given'}; give both or neither"
            )
        given, expected = self.state_dict(), self.expected_shapes(self.config)
        for name, shape in expected.items():
            tensor = given[name]
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
                raise ConfigError(
                    f"router tensor {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected "
                    f"torch.float32 of shape {shape} for {self.config.num_layers} layers of width "
                    f"{self.config.hidden_size}"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise ConfigError(
                    f"router tensor {name!r} holds values that are not finite; train the routers again"
                )

    def logits(self, layer_idx: int, pooled: Tensor) -> Tensor:
        """Return one layer's logits.

        Args:
            layer_idx: The decoder layer.
            pooled: What `pool` made of the states entering that layer. Shape (batch, views, hidden), float32.

        Returns:
            Shape (batch, 3), float32, order SKIP, EXECUTE, REPEAT.
        """
        logits = self.windows.logits(layer_idx, pooled[:, : self.config.num_windows])
        if self.last is not None:
            logits = logits + self.last.logits(layer_idx, pooled[:, self.config.num_windows :])
        return logits

    def all_logits(self, features: Tensor) -> Tensor:
        """Return the logits of all layers for cached features.

        Args:
            features: What `pool` made of the states entering each layer, with exactly the configured views. Shape
                (prompts, num_layers, views, hidden), float32.

        Returns:
            Shape (prompts, num_layers, 3), float32.
        """
        return all_logits(self.windows, self.last, self.config.num_windows, features)

    def varying_layers(self) -> tuple[int, ...]:
        """Return the layers whose logits depend on the prompt, ascending; those of the others are constant."""
        varying = torch.zeros(self.config.num_layers, dtype=torch.bool)
        for part in (self.windows, self.last):
            if part is not None:
                varying |= (part.second_weight != 0).any(dim=2).any(dim=1).cpu()
        return tuple(varying.nonzero().squeeze(1).tolist())

    def constant_logits(self) -> Tensor:
        """Return the logits of the layers that ignore the prompt. Shape (num_layers, 3), float32, on the host."""
        logits = self.windows.second_bias
        if self.last is not None:
            logits = logits + self.last.second_bias
        return logits.cpu()

    def to(self, device: torch.device | str) -> "RouterHeads":
        """Return the same routers with their tensors on a device."""
        moved = {name: tensor.to(device) for name, tensor in self.state_dict().items()}
        return self.from_state_dict(self.config, moved)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all tensors under the names that a routers file gives them."""
        parts = {"windows": self.windows, "last": self.last}
        return {
            f"{part}.{name}": tensor
            for part, weights in parts.items()
            if weights is not None
            for name, tensor in weights.tensors().items()
        }

    @staticmethod
    def expected_shapes(config: RouterConfig) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every tensor that routers of this configuration have."""
        layers, width, inner = config.num_layers, config.hidden_size, config.bottleneck
        shapes: dict[str, tuple[int, ...]] = {
            "first_weight": (layers, width, inner),
            "first_bias": (layers, inner),
            "second_weight": (layers, inner, NUM_ACTIONS),
            "second_bias": (layers, NUM_ACTIONS),
        }
        parts = ("windows", "last") if config.last_token else ("windows",)
        return {f"{part}.{name}": shape for part in parts for name, shape in shapes.items()}

    @classmethod
    def from_state_dict(cls, config: RouterConfig, tensors: Mapping[str, Tensor]) -> "RouterHeads":
        """Make routers from what `state_dict` returned.

        Args:
            config: Their shape.
            tensors: Name to tensor, exactly the names of `expected_shapes`.

        Returns:
            The routers, without gradients.

        Raises:
            ConfigError: A tensor is missing, unknown or of the wrong shape or dtype.
        """
        expected = cls.expected_shapes(config)
        wrong = sorted(set(expected) ^ set(tensors))
        if wrong:
            state = "missing" if wrong[0] in expected else "unknown"
            raise ConfigError(
                f"router tensor {wrong[0]!r} is {state}; expected exactly {', '.join(sorted(expected))}"
            )

        def part(prefix: str) -> Bottleneck:
            names = [item.name for item in fields(Bottleneck)]
            return Bottleneck(**{name: tensors[f"{prefix}.{name}"].detach() for name in names})

        return cls(config, part("windows"), part("last") if config.last_token else None)


def all_logits(
    windows: Bottleneck, last: Bottleneck | None, num_windows: int, features: Tensor
) -> Tensor:
    """Return what `RouterHeads.all_logits` returns, for weights that have not been checked.

    Args:
        windows: Weights of the perceptron whose logits are averaged over the windows.
        last: Weights of the perceptron over the last token's state; None if not used.
        num_windows: Number of windows, which are the first views.
        features: Views of the states entering each layer. Shape (prompts, num_layers, views, hidden), float32.

    Returns:
        Logits. Shape (prompts, num_layers, 3), float32.
    """
    by_layer = features.transpose(0, 1)
    logits = windows.all_logits(by_layer[:, :, :num_windows])
    if last is not None:
        logits = logits + last.all_logits(by_layer[:, :, num_windows:])
    return logits.transpose(0, 1)
