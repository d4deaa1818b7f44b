"""Trained exit heads: the lens and the exit router before one layer, and the head that asks them while decoding."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import dropout as dropped
from torch.nn.functional import gelu

from dynadepth.errors import ConfigError
from dynadepth.exits.dial import Dial

__all__ = ["ExitWeights", "TrainedHead", "apply_lens", "apply_router", "unit_size"]

_NAMES = (
    "lens.weight",
    "lens.bias",
    "lens.down",
    "lens.down_bias",
    "lens.up",
    "router.mean",
    "router.scale",
    "router.down",
    "router.down_bias",
    "router.up",
    "router.bias",
)


@dataclass(frozen=True, slots=True, eq=False)
class ExitWeights:
    """The lens and the exit router before one layer.

    With x = h / rms(h), the lens is h + h W + b + rms(h) gelu(x D + d) U: an affine map, and a bottleneck relative to
    the size of the state. The router's score is gelu((x - m) s R + r) . u + c, the log-odds that the reading through
    the lens is the base model's own choice.

    Attributes:
        layer_idx: The layer, 1 or more.
        tensors: By name, all float32: `lens.weight` W (hidden, hidden), `lens.bias` b (hidden,), `lens.down` D (hidden,
            width), `lens.down_bias` d (width,), `lens.up` U (width, hidden), `router.mean` m and `router.scale` s
            (hidden,), `router.down` R (hidden, width), `router.down_bias` r (width,), `router.up` u (width,),
            `router.bias` c ().

    Raises:
        ConfigError: A tensor is missing, unknown, or of a wrong shape or dtype, or holds values that are not finite.

    Source:
        A lens: Belrose et al., the tuned lens (arXiv 2303.08112); deviation: a bottleneck
        beside the affine map. Confidence heads: CALM (arXiv 2207.07061).
    """

    layer_idx: int
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        where = f"the exit head before layer {self.layer_idx}"
        wrong = sorted(set(self.tensors) ^ set(_NAMES))
        if wrong:
            what = "an unknown" if wrong[0] in self.tensors else "no"
            raise ConfigError(
                f"{where} has {what} tensor {wrong[0]!r}; expected {', '.join(_NAMES)}"
            )
        if self.layer_idx < 1:
            raise ConfigError(f"{where} has no layer to stand behind; expected layer 1 or more")
        hidden = self.tensors["lens.bias"].numel()
        lens, router = self.tensors["lens.up"].shape[0], self.tensors["router.up"].numel()
        shapes = {
            "lens.weight": (hidden, hidden),
            "lens.bias": (hidden,),
            "lens.down": (hidden, lens),
            "lens.down_bias": (lens,),
            "lens.up": (lens, hidden),
            "router.mean": (hidden,),
            "router.scale": (hidden,),
            "router.down": (hidden, router),
            "router.down_bias": (router,),
            "router.up": (router,),
            "router.bias": (),
        }
        for name, shape in shapes.items():
            tensor = self.tensors[name]
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
                raise ConfigError(
                    f"{where}: tensor {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected "
                    f"torch.float32 of shape {shape}"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise ConfigError(f"{where}: tensor {name!r} holds values that are not finite")

    @property
    def hidden_size(self) -> int:
        """Width of the states."""
        return self.tensors["lens.bias"].numel()

    def to(self, device: torch.device) -> "ExitWeights":
        """Return the same weights on a device."""
        return ExitWeights(
            self.layer_idx, {name: each.to(device) for name, each in self.tensors.items()}
        )

    def lens(self, states: Tensor) -> Tensor:
        """Return what stands for the states after the last layer.

        Args:
            states: As they enter the layer. Shape (..., hidden), any floating dtype.

        Returns:
            Shape and dtype as given.
        """
        return apply_lens(self.tensors, states).to(states.dtype)

    def score(self, states: Tensor) -> Tensor:
        """Return the log-odds that the reading through the lens is the base model's choice.

        Args:
            states: As for `lens`.

        Returns:
            Shape (...), float32.
        """
        return apply_router(self.tensors, states)


def apply_lens(tensors: Mapping[str, Tensor], states: Tensor) -> Tensor:
    """Return what a lens makes of states; gradients flow to its tensors.

    Args:
        tensors: The lens' tensors of `ExitWeights`, on the device of the states.
        states: Shape (..., hidden), any floating dtype.

    Returns:
        Shape as given, float32.
    """
    given = states.float()
    size = _rms(given)
    narrow = gelu(given / size @ tensors["lens.down"] + tensors["lens.down_bias"])
    affine = given @ tensors["lens.weight"] + tensors["lens.bias"]
    return given + affine + size * (narrow @ tensors["lens.up"])


def apply_router(tensors: Mapping[str, Tensor], states: Tensor, *, dropout: float = 0.0) -> Tensor:
    """Return a router's scores of states; gradients flow to its tensors.

    Args:
        tensors: The router's tensors of `ExitWeights`, on the device of the states.
        states: Shape (..., hidden), any floating dtype.
        dropout: Share of the numbers of each state that are set to zero, in training.

    Returns:
        Shape (...), float32.
    """
    scaled = (unit_size(states) - tensors["router.mean"]) * tensors["router.scale"]
    narrow = gelu(dropped(scaled, dropout) @ tensors["router.down"] + tensors["router.down_bias"])
    score: Tensor = narrow @ tensors["router.up"] + tensors["router.bias"]
    return score


def unit_size(states: Tensor) -> Tensor:
    """Return states over their root mean square. Shape as given, float32."""
    given = states.float()
    return given / _rms(given)


def _rms(states: Tensor) -> Tensor:
    """Return the root mean square of each state, never 0. Shape (..., 1)."""
    return states.square().mean(dim=-1, keepdim=True).clamp_min(1e-12).sqrt()


class TrainedHead:
    """An exit head that lets tokens leave whose score reaches the dial's threshold.

    Args:
        weights: Its lens and its router.
        dial: Has the threshold.
    """

    def __init__(self, weights: ExitWeights, dial: Dial) -> None:
        self.layer_idx = weights.layer_idx
        self._weights, self._dial = weights, dial

    def leaves(self, states: Tensor) -> Tensor:
        """Return which rows leave. Shape (rows,), bool."""
        return self._on(states).score(states) >= self._dial.threshold

    def final(self, states: Tensor) -> Tensor:
        """Return what stands for the states after the last layer. Shape (rows, hidden), as given."""
        return self._on(states).lens(states)

    def _on(self, states: Tensor) -> ExitWeights:
        """Return the weights on the device of states; a layer stays where it is, so they are moved once."""
        if self._weights.tensors["lens.bias"].device != states.device:
            self._weights = self._weights.to(states.device)
        return self._weights
