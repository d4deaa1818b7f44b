"""Streamed moments of a layer's input and update, which is all that a fit needs of any number of tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dynadepth.errors import ConfigError

__all__ = ["Moments"]


@dataclass(slots=True)
class Moments:
    """Weighted moments of the states h that enter a layer and of its update u = h_out - h.

    A token counts 1 / rms(h)^2, so that its residual counts relative to the size of its state and no token of giant
    norm rules; one whose state is all zeros, as some embeddings are, counts nothing. Memory is 2 hidden^2 numbers,
    whatever the number of tokens.

    Attributes:
        weight: Sum of the weights. Shape (), float64 (float32 on devices without it), as all others.
        tokens: Number of tokens. Shape ().
        mean_h: Weighted sum of h. Shape (hidden,).
        mean_u: Weighted sum of u. Shape (hidden,).
        hh: Weighted sum of h h^T. Shape (hidden, hidden).
        hu: Weighted sum of h u^T. Shape (hidden, hidden).
        uu: Weighted sum of |u|^2. Shape ().
    """

    weight: Tensor
    tokens: Tensor
    mean_h: Tensor
    mean_u: Tensor
    hh: Tensor
    hu: Tensor
    uu: Tensor

    @classmethod
    def zero(cls, hidden_size: int, device: torch.device | str = "cpu") -> "Moments":
        """Return the moments of no token.

        Args:
            hidden_size: Width of the states.
            device: Where they are accumulated.
        """
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        square = (hidden_size, hidden_size)
        return cls(
            zeros(),
            zeros(),
            zeros(hidden_size),
            zeros(hidden_size),
            zeros(*square),
            zeros(*square),
            zeros(),
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Moments":
        """Return moments from what `tensors` returned.

        Args:
            tensors: By name.

        Raises:
            ConfigError: The names or shapes are others.
        """
        names = list(cls.__slots__)
        square = tensors.get("hh", torch.zeros(()))
        width = square.shape[0] if square.dim() else 0
        expected = {name: tuple(each.shape) for name, each in cls.zero(width).tensors().items()}
        found = {name: tuple(each.shape) for name, each in tensors.items()}
        if found != expected:
            raise ConfigError(f"moments have the tensors {found}; expected {', '.join(names)}")
        return cls(**tensors)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything by name."""
        return {name: getattr(self, name) for name in self.__slots__}

    def add(self, entering: Tensor, leaving: Tensor, *, weighed_by: Tensor | None = None) -> None:
        """Add some tokens.

        Args:
            entering: The states that enter the layer. Shape (tokens, hidden), any floating dtype; products are taken in
                float32 or better.
            leaving: The states that leave it. Shape and dtype as `entering`.
            weighed_by: The states whose size decides how much each token counts. Shape and dtype as `entering`; None:
                `entering` itself.
        """
        exact = torch.promote_types(entering.dtype, torch.float32)
        states = entering.to(exact)
        update = leaving.to(exact) - states
        sized = states if weighed_by is None else weighed_by.to(exact)
        square = sized.square().mean(dim=1, keepdim=True)
        scale = torch.where(square > torch.finfo(exact).tiny, square.rsqrt(), 0.0)
        scaled, scaled_update = states * scale, update * scale
        wide = self.hh.dtype
        self.weight += scale.square().sum(dtype=wide)
        self.tokens += len(states)
        self.mean_h += (scaled * scale).sum(dim=0, dtype=wide)
        self.mean_u += (scaled_update * scale).sum(dim=0, dtype=wide)
        self.hh += scaled.T @ scaled
        self.hu += scaled.T @ scaled_update
        self.uu += scaled_update.square().sum(dtype=wide)

    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the weighted means of h and u, and the moments hh, hu and uu around them.

        Raises:
            ConfigError: There are no tokens.
        """
        if not float(self.weight):
            raise ConfigError(
                "there are no tokens to fit shortcuts on; give prompts of two tokens or more"
            )
        mean_h, mean_u = self.mean_h / self.weight, self.mean_u / self.weight
        return (
            mean_h,
            mean_u,
            self.hh - self.weight * torch.outer(mean_h, mean_h),
            self.hu - self.weight * torch.outer(mean_h, mean_u),
            self.uu - self.weight * mean_u.square().sum(),
        )
