"""Keep float64 where a model narrows to float32, in this thread and for the duration of a block.

Norms, softmaxes and routers of experts compute in float32 whatever the model's dtype. There a rounding that differs
between a padded row and the row alone is worth 1e-7, or another expert, and would hide what a proof looks for.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["KeepFloat64"]


class KeepFloat64(TorchFunctionMode):
    """Inside the block, what would turn a float64 tensor into float32 leaves it float64."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one function of torch, with float64 in place of float32 where a float64 tensor is given."""
        given = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            args = tuple(torch.float64 if _is_float32(each) else each for each in args)
            if _is_float32(given.get("dtype")):
                given = {**given, "dtype": torch.float64}
        return func(*args, **given)


def _is_float32(value: Any) -> bool:
    return value is torch.float32
