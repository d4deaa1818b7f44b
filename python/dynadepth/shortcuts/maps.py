"""Linear shortcuts: what a map computes, and the maps of all layers of one base model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dynadepth.errors import ConfigError, ShortcutError
from dynadepth.files import sha256_bytes
from dynadepth.models.fingerprint import check_base_model

__all__ = ["LinearShortcut", "Rank", "Shortcuts"]

Rank = int | Literal["full"]
_Placed = tuple[Tensor | None, Tensor | None, Tensor]


class LinearShortcut:
    """The map `h + (h A) B + b` of the states that enter a skipped layer.

    Immutable but for the copies that it keeps on each device and in each dtype where it has been called; safe to share
    between models and threads.

    Attributes:
        A: Shape (hidden, rank); None at rank 0.
        B: Shape (rank, hidden); None at rank 0 and at full rank, where `A` alone is the map: `h + h A + b`.
        b: Shape (hidden,).

    Args:
        A: As above, of any floating dtype, on any device.
        B: As above.
        b: As above.

    Raises:
        ConfigError: The shapes do not fit together, or a value is not finite.

    Source:
        Linear maps in place of layers: arXiv 2303.09435, one map from a layer to a later one, and arXiv 2605.15491, a
        map of full rank for each removed layer. Deviation: a rank, and maps that compose over any skipped layers.

    Example:
        >>> shortcut = LinearShortcut(torch.ones(2, 1), torch.tensor([[0.0, 3.0]]), torch.tensor([1.0, 0.0]))
        >>> shortcut(torch.tensor([[[1.0, 2.0]]]))
        tensor([[[ 2., 11.]]])
    """

    def __init__(self, A: Tensor | None, B: Tensor | None, b: Tensor) -> None:  # noqa: N803 (as in the formula)
        shapes = [None if each is None else tuple(each.shape) for each in (A, B)]
        width = b.shape[0] if b.dim() == 1 and len(b) else -1
        rank = 0 if A is None or A.dim() != 2 else int(A.shape[1])
        known: list[list[tuple[int, ...] | None]] = [
            [None, None],
            [(width, width), None],
            [(width, rank), (rank, width)],
        ]
        if width < 1 or rank > width or shapes not in known:
            raise ConfigError(
                f"a shortcut was given A {shapes[0]}, B {shapes[1]} and b {tuple(b.shape)}; expected (hidden, rank), "
                "(rank, hidden) and (hidden,), no B at full rank, and neither at rank 0"
            )
        for name, each in (("A", A), ("B", B), ("b", b)):
            if each is not None and not bool(torch.isfinite(each).all()):
                raise ConfigError(
                    f"{name} of a shortcut holds values that are not finite; fit it again"
                )
        self.A, self.B, self.b = A, B, b
        self._placed: dict[tuple[torch.device, torch.dtype], _Placed] = {}

    def __deepcopy__(self, _memo: object) -> "LinearShortcut":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return LinearShortcut, (self.A, self.B, self.b)

    def __call__(self, states: Tensor) -> Tensor:
        """Return what leaves the skipped layer.

        Args:
            states: What enters it. Shape (..., hidden), any floating dtype and device, which are those of the result.

        Returns:
            Shape (..., hidden).
        """
        down, up, bias = self._placed.get((states.device, states.dtype)) or self.place(
            states.device, states.dtype
        )
        if down is None:
            return states + bias
        if up is None:
            return states + linear(states, down, bias)
        return states + linear(linear(states, down), up, bias)

    def place(self, device: torch.device, dtype: torch.dtype) -> _Placed:
        """Copy the map to a device and a dtype ahead of its first call there; returns A and B transposed, and b."""
        # A copy that was made in inference mode could not be used where gradients flow.
        with torch.inference_mode(mode=False):
            down, up = (
                None if each is None else each.detach().to(device, dtype).t().contiguous()
                for each in (self.A, self.B)
            )
            placed = self._placed[device, dtype] = (down, up, self.b.detach().to(device, dtype))
        return placed

    @property
    def hidden_size(self) -> int:
        """Width of the states."""
        return int(self.b.shape[0])

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds for one token; additions alone count nothing."""
        return sum(each.numel() for each in (self.A, self.B) if each is not None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Shortcuts:
    """The shortcuts of one base model, with what was measured when they were fitted.

    Immutable and independent of the model object.

    Attributes:
        maps: The map of each layer; None: a layer that is skipped without anything in its place.
        fingerprint: `dynadepth.models.fingerprint.fingerprint` of the base model.
        rank: The rank of the maps.
        base_model: The name of the base model, as `base_model_name` returns it.
        revision: The hub commit of the base model, if known.
        layers: For each layer what was measured of its map, as values that JSON can hold.
        training: How they were fitted, as values that JSON can hold.
        folder: Where they were loaded from; None if they were not.
        accepted: Whether the user has accepted that the base model differs from the fingerprint.

    Raises:
        ConfigError: There is no map at all, or their widths differ.
    """

    maps: Sequence[LinearShortcut | None]
    fingerprint: Mapping[str, Any]
    rank: Rank
    base_model: str = ""
    revision: str | None = None
    layers: Sequence[Mapping[str, Any]] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    accepted: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "maps", tuple(self.maps))
        widths = {each.hidden_size for each in self.maps if each is not None}
        if len(widths) != 1:
            raise ConfigError(
                f"shortcuts of widths {sorted(widths)} for {len(self.maps)} layers were given; expected one width, and "
                "a map for one layer or more"
            )

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return len(self.maps)

    @property
    def hidden_size(self) -> int:
        """Width of the states."""
        return next(each.hidden_size for each in self.maps if each is not None)

    @property
    def mapped_layers(self) -> tuple[int, ...]:
        """The layers that have a map."""
        return tuple(layer for layer, each in enumerate(self.maps) if each is not None)

    def tensors(self) -> dict[str, Tensor]:
        """Return the maps by name: `layers.<l>.A`, `.B` and `.b`."""
        return {
            f"layers.{layer}.{name}": tensor
            for layer, each in enumerate(self.maps)
            if each is not None
            for name, tensor in (("A", each.A), ("B", each.B), ("b", each.b))
            if tensor is not None
        }

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that tell these maps from all others: of names, shapes, dtypes and values."""
        parts = []
        for name, tensor in sorted(self.tensors().items()):
            flat = tensor.detach().cpu().contiguous()
            parts += [f"{name} {tuple(flat.shape)} {flat.dtype}\n".encode(), _bytes(flat)]
        return sha256_bytes(b"".join(parts))[:16]

    def check_model(self, model: nn.Module) -> None:
        """Check that a model is the one that the shortcuts were fitted on.

        Args:
            model: The base model, wrapped or not.

        Raises:
            ShortcutError: It differs and that was not accepted, or the shapes do not fit.
        """
        path = repr(str(self.folder)) if self.folder else "path"
        check_base_model(
            model,
            self.fingerprint,
            holder=f"the shortcuts in {self.folder}" if self.folder else "the shortcuts",
            error=ShortcutError,
            made_with=self.base_model or "a model without a name",
            shape=(self.num_layers, self.hidden_size),
            accepted=self.accepted,
            advice="fit shortcuts on this model",
            how_to_accept=f"pass shortcuts=load_shortcuts({path}, model=model, accept_mismatch=True)",
        )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()
