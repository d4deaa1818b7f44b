"""One call of a decoder layer by its model, and how visits of it are run for some rows of the batch.

Gathers states, masks and positions and calls the layer's own forward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dynadepth.errors import UnsupportedModelError
from dynadepth.models.structure import LayerSignature, LayerTraits

__all__ = ["LayerCall"]

# Arguments of a decoder layer whose first dimension is the batch (or 1; for alibi a multiple), in all supported
# families. Any other tensor is refused when rows are gathered: guessing by shape would also gather packed lengths, or
# the positions of T tokens where T equals the batch size.
_ROW_ARGUMENTS = frozenset({"alibi", "attention_mask", "position_embeddings", "position_ids"})


@dataclass(slots=True)
class LayerCall:
    """One call of a decoder layer by its model, not yet run.

    Attributes:
        layer_idx: Which decoder layer.
        hidden_states: The states that enter it. Shape (rows, tokens, hidden).
        arguments: Everything else it was called with, by parameter name.
        signature: How its class is called.
        extras: What the last visit of the whole batch returned after the states, as many values as the family has. Each
            is None if no visit ran the whole batch, since values of some rows are not those of the batch. None: the
            layer returns a tensor.
        layer: The layer.
    """

    layer_idx: int
    hidden_states: torch.Tensor
    arguments: dict[str, Any]
    signature: LayerSignature
    extras: tuple[Any, ...] | None
    layer: nn.Module
    _forward: Callable[..., Any]
    _traits: LayerTraits

    @property
    def cache(self) -> Any:
        """The cache that the model passed, or None."""
        name = self.signature.cache_name
        return None if name is None else self.arguments.get(name)

    @property
    def attention_mask(self) -> Any:
        """The mask that the model made for this layer, or None."""
        return self.arguments.get(self.signature.mask_name)

    def visit(
        self,
        hidden_states: torch.Tensor,
        *,
        cache: Any,
        index: torch.Tensor | None = None,
        num_rows: int | None = None,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the layer's own forward once.

        Args:
            hidden_states: States to run. Shape (rows run, tokens, hidden).
            cache: What the layer sees as its cache in this visit, or None.
            index: For each row run, the row of the model's batch whose mask and positions it has. Shape (rows run,),
                int64, on the states' device. None: the whole batch in order.
            num_rows: Rows of the model's batch; needed with `index`.
            wanted: Indices of the outputs that will be read, in the flattened (rows, tokens) order. The others may hold
                anything, so the feed-forward module need not run for them. Shape (outputs,), int64, on the states'
                device. None: all.

        Returns:
            The layer's output. Shape as `hidden_states`.

        Raises:
            UnsupportedModelError: An argument cannot be gathered by row, or the output is not one tensor of the
                input's shape.
        """
        arguments = self.arguments
        if index is not None:
            by_row = _ROW_ARGUMENTS.union(self._traits.row_arguments)
            shared = self._traits.shared_arguments
            arguments = {
                name: _gather_argument(name, value, index, num_rows or 0, by_row)
                if (name in self.signature.names or name in by_row) and name not in shared
                else _passed_through(name, value, shared)
                for name, value in arguments.items()
            }
        if self.signature.cache_name is not None:
            arguments = {**arguments, self.signature.cache_name: cache}
        feed_forward = self._traits.feed_forward
        if wanted is None or feed_forward is None:
            output = self._forward(self.layer, hidden_states, **arguments)
        else:
            with _FeedForwardSubset(wanted, getattr(self.layer, feed_forward)):
                output = self._forward(self.layer, hidden_states, **arguments)
        if (
            self.extras is not None
            and isinstance(output, (tuple, list))
            and len(output) == 1 + len(self.extras)
        ):
            self.extras = tuple(output[1:]) if index is None else (None,) * len(self.extras)
            output = output[0]
        if not isinstance(output, torch.Tensor) or output.shape != hidden_states.shape:
            found = (
                tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            )
            raise UnsupportedModelError(
                f"decoder layer {self.layer_idx} returned {found}; expected one tensor of shape "
                f"{tuple(hidden_states.shape)} (batch, tokens, hidden)"
            )
        return output


class _FeedForwardSubset:
    """Lets a feed-forward module run for some tokens only, inside the block; the others are zeros."""

    def __init__(self, wanted: torch.Tensor, feed_forward: nn.Module) -> None:
        self._wanted, self._feed_forward = wanted, feed_forward
        self._handles: list[Any] = []
        self._shape = torch.Size()

    def __enter__(self) -> None:
        self._handles = [
            self._feed_forward.register_forward_pre_hook(self._before),
            self._feed_forward.register_forward_hook(self._after),
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, _module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        self._shape = args[0].shape
        return (args[0].flatten(0, 1).index_select(0, self._wanted).unsqueeze(0),)

    def _after(self, _module: nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor:
        full = output.new_zeros(self._shape)
        full.flatten(0, 1).index_copy_(0, self._wanted, output[0])
        return full


class _NotByRow:
    """Stands in for a tensor that cannot be split by row: a layer may pass it on, but nothing may read it.

    A model hands its layers whatever its own forward was called with beyond what it knows: counts and labels for the
    loss, token types. No layer reads these, so they may stay; lengths of packed rows, which some attention reads, may
    not, and cannot be told from the others by name or shape.
    """

    __slots__ = ("_name", "_shape")

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self._name, self._shape = name, shape

    def to(self, *_: Any, **__: Any) -> "_NotByRow":
        """Return itself: accelerate moves all arguments of a module to its device."""
        return self

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise UnsupportedModelError(
            f"a decoder layer reads the tensor {self._name!r} of shape {self._shape}; with plans that differ between "
            f"rows only {', '.join(sorted(_ROW_ARGUMENTS))} can be split by row: leave it out, or use one plan for all "
            "rows"
        )

    __bool__ = __len__ = __iter__ = __getitem__ = __array__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = (
        _refuse
    )
    __lt__ = __le__ = __gt__ = __ge__ = __neg__ = __float__ = __int__ = __index__ = _refuse

    def __getattr__(self, name: str) -> Any:
        # Python and its libraries look such names up without reading the tensor.
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse()

    @classmethod
    def __torch_function__(
        cls, _function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = (*args, *(kwargs or {}).values())
        next(each for each in given if isinstance(each, cls))._refuse()


def _passed_through(name: str, value: Any, shared: tuple[str, ...]) -> Any:
    if isinstance(value, torch.Tensor) and name not in shared:
        return _NotByRow(name, tuple(value.shape))
    return value


def _gather_argument(
    name: str, value: Any, index: torch.Tensor, num_rows: int, by_row: frozenset[str]
) -> Any:
    if isinstance(value, torch.Tensor):
        if name not in by_row:
            raise UnsupportedModelError(
                f"a decoder layer was called with the tensor {name!r} of shape {tuple(value.shape)}; with plans that "
                f"differ between rows only {', '.join(sorted(by_row))} can be split by row"
            )
        if name == "alibi" and value.shape[0] % num_rows == 0:
            # bloom folds rows and heads into one dimension.
            return value.unflatten(0, (num_rows, -1)).index_select(0, index).flatten(0, 1)
        if value.shape[0] == 1:
            return value
        if value.shape[0] != num_rows:
            raise UnsupportedModelError(
                f"{name} has {value.shape[0]} rows in a batch of {num_rows}; packed batches cannot be split by row"
            )
        return value.index_select(0, index)
    if name in by_row and value is not None:
        if not isinstance(value, tuple):
            raise UnsupportedModelError(
                f"{name} is a {type(value).__name__}, which cannot be split by row; use another attn_implementation, "
                "such as sdpa, or one plan for all rows"
            )
        return tuple(_gather_argument(name, item, index, num_rows, by_row) for item in value)
    return value
