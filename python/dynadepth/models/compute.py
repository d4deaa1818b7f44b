"""Multiply-adds: what layers, and what stands in their places, cost for one token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from dynadepth.models.structure import LayerStack, text_config_of

__all__ = ["PlanCost", "layer_multiply_adds"]

_Floats = npt.NDArray[np.float64]
# The names under which configs say how many experts a token takes.
_CHOSEN_EXPERTS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_top_k",
    "moe_topk",
    "top_k_experts",
)


@dataclass(frozen=True, slots=True)
class PlanCost:
    """What plans cost, as a fraction of what the base model's layers cost.

    Products with weights are counted. Attention to the tokens before is not: it is small for short texts, and grows
    with the layers that run as everything else does. The embedding and the output head are the same under every plan,
    and are left out, as they are of the depth.

    Attributes:
        layers: Multiply-adds of each layer for one token. Shape (layers,), float64.
        skips: Those of what is in place of each layer that is skipped. Shape (layers,), float64.
    """

    layers: _Floats
    skips: _Floats

    @classmethod
    def of_model(cls, model: Any, stack: LayerStack, skips: Sequence[float] = ()) -> "PlanCost":
        """Return what plans of a model cost.

        Args:
            model: The base model.
            stack: Its layers.
            skips: As above; none: a skipped layer costs nothing.
        """
        config = text_config_of(model.config)
        layers = [layer_multiply_adds(layer, config) for layer in stack.layers]
        return cls(
            np.array(layers, dtype=np.float64),
            np.array(list(skips) or [0.0] * len(layers), dtype=np.float64),
        )

    def compute(self, plans: Any, heads: float = 0.0) -> _Floats:
        """Return the compute of plans, 1.0 being the base model's.

        Args:
            plans: Shape (plans, layers), uint8.
            heads: Multiply-adds of the heads that decide, for one token of the prompt.

        Returns:
            Shape (plans,), float64.
        """
        actions = np.asarray(plans, dtype=np.float64)
        spent = actions @ self.layers + (actions == 0) @ self.skips + heads
        result: _Floats = spent / self.layers.sum()
        return result


def layer_multiply_adds(layer: nn.Module, config: Any) -> int:
    """Return the multiply-adds of a layer's weights for one token.

    Args:
        layer: A decoder layer, of any dtype, quantised or not.
        config: The model's text config, which says how many experts a token takes.
    """
    chosen = next(
        (value for name in _CHOSEN_EXPERTS if (value := getattr(config, name, None))), None
    )
    shares: dict[nn.Module, float] = {}
    total = 0.0
    for module in layer.modules():
        share = shares.get(module, 1.0)
        for name, child in module.named_children():
            here = share
            # A list of experts, of which each token takes a few.
            if (
                isinstance(child, nn.ModuleList)
                and chosen
                and "expert" in name
                and len(child) > chosen
            ):
                here *= chosen / len(child)
            shares[child] = here
        if isinstance(module, nn.Embedding):
            continue
        wide = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if isinstance(wide[0], int) and isinstance(wide[1], int):
            total += share * wide[0] * wide[1]
            continue
        for weight in module._parameters.values():
            if weight is None or weight.dim() not in (2, 3):
                continue
            # Stacked experts have one more dimension.
            part = chosen / weight.shape[0] if weight.dim() == 3 and chosen else 1.0
            total += share * min(part, 1.0) * weight.numel()
    return round(total)
