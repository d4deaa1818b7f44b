"""The moments of a base model's layers over texts, from its own undisturbed states."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch

from dynadepth.models.structure import LayerStack, layer_signature, position_arguments
from dynadepth.shortcuts.moments import Moments
from dynadepth_search.scoring.batching import pad_left
from dynadepth_search.scoring.own_text import Text

__all__ = ["MomentCollector"]


class MomentCollector:
    """Adds the states of forwards to the moments of some layers; a context manager.

    All real tokens count but each text's first, on which attention often rests whatever it says.

    Args:
        stack: The layers of the unwrapped base model; not changed.
        moments: The moments of each layer that is collected, by layer.
        device: Where the model takes its tokens.
    """

    def __init__(
        self, stack: LayerStack, moments: dict[int, Moments], device: torch.device
    ) -> None:
        self._stack, self._moments, self._device = stack, moments, device
        self._handles: list[Any] = []
        self._counted = torch.zeros(0, dtype=torch.bool)

    def __enter__(self) -> "MomentCollector":
        for layer_idx in self._moments:
            layer = self._stack.layers[layer_idx]
            hook = _Hook(self, layer_idx, layer_signature(type(layer).forward).names[0])
            self._handles.append(layer.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def run(self, texts: Sequence[Text]) -> None:
        """Add the tokens of some texts, which run as one batch."""
        ids, mask = pad_left((text.ids for text in texts), self._device)
        self._counted = (mask.cumsum(dim=1) > 1).flatten()
        stack = self._stack.stack
        # Without the output head, which nothing here reads.
        with torch.inference_mode():
            stack(
                input_ids=ids,
                attention_mask=mask,
                use_cache=False,
                **position_arguments(stack, mask),
            )

    def add(self, layer_idx: int, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        """Add what a layer did in a forward.

        Args:
            layer_idx: The layer.
            entering: The states that entered it. Shape (rows, tokens, hidden).
            leaving: The states that left it. Shape as `entering`.
        """
        moments, counted = self._moments[layer_idx], self._counted.to(entering.device)
        moments.add(
            *(each.flatten(0, 1)[counted].to(moments.hh.device) for each in (entering, leaving))
        )


class _Hook:
    """Forward hook of one layer."""

    def __init__(self, collector: MomentCollector, layer_idx: int, name: str) -> None:
        self._collector, self._layer_idx, self._name = collector, layer_idx, name

    def __call__(self, _module: Any, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        leaving = output if isinstance(output, torch.Tensor) else output[0]
        self._collector.add(self._layer_idx, args[0] if args else kwargs[self._name], leaving)
