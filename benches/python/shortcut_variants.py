"""Moments for bench_shortcuts.py: other forms of map, parts of the texts, and runs of layers, in one pass each."""

from collections.abc import Callable, Hashable, Iterable, Sequence

import torch

from dynadepth.models.structure import LayerStack
from dynadepth.shortcuts.maps import LinearShortcut
from dynadepth.shortcuts.moments import Moments
from dynadepth_search.scoring.own_text import Text
from dynadepth_search.shortcuts.collecting import MomentCollector

LayerMoments = dict[int, Moments]
# The sets that are collected over all texts besides the parts.
UNWEIGHTED, NORMALISED, PROMPTS = "unweighted", "normalised", "prompts alone"


def without_size(entering: torch.Tensor, leaving: torch.Tensor) -> list[torch.Tensor]:
    """Return h / rms(h), and the update on top of it."""
    scale = entering.float().square().mean(dim=1, keepdim=True).rsqrt()
    states = entering.float() * scale
    return [states, states + leaving.float() - entering.float()]


def normalised(shortcut: LinearShortcut) -> Callable[[torch.Tensor], torch.Tensor]:
    def through(states: torch.Tensor) -> torch.Tensor:
        scale = states.float().square().mean(dim=-1, keepdim=True).rsqrt().to(states.dtype)
        scaled = states * scale
        return states + (shortcut(scaled) - scaled)

    return through


def diagonal(moments: Moments, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    mean_h, mean_u, hh, hu, _ = moments.centred()
    factor = hu.diagonal() / hh.diagonal().clamp_min(1e-12)
    bias = mean_u - mean_h * factor
    factor, bias = (1 + factor).to(dtype), bias.to(dtype)

    def through(states: torch.Tensor) -> torch.Tensor:
        return states * factor + bias

    return through


class PartCollector(MomentCollector):
    """Collects moments of several parts of the texts, and of variants over all of them, in one pass.

    A batch belongs to one part: `part` says which before `run`. Moments add up, so that what is fitted on several parts
    needs no further pass.
    """

    def __init__(self, stack: LayerStack, device: torch.device) -> None:
        self._width, self._layers = stack.hidden_size, range(stack.num_layers)
        self.parts: dict[Hashable, LayerMoments] = {}
        self.part: Hashable = None
        self.variants = {name: self._zero() for name in (UNWEIGHTED, NORMALISED, PROMPTS)}
        self._in_prompt = torch.zeros(0, dtype=torch.bool)
        super().__init__(stack, self._zero(), device)

    def _zero(self) -> LayerMoments:
        return {layer: Moments.zero(self._width) for layer in self._layers}

    def run(self, texts: Sequence[Text]) -> None:
        """Add the tokens of some texts of one part."""
        longest = max(len(text.ids) for text in texts)
        place = torch.arange(longest) - torch.tensor([[longest - len(text.ids)] for text in texts])
        self._in_prompt = (place < torch.tensor([[text.prompt] for text in texts])).flatten()
        super().run(texts)

    def add(self, layer_idx: int, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        """Add what a layer did to the part and to all variants."""
        if self.part not in self.parts:
            self.parts[self.part] = self._zero()
        counted = self._counted
        rows = [each.flatten(0, 1)[counted] for each in (entering, leaving)]
        self.parts[self.part][layer_idx].add(*rows)
        self.variants[UNWEIGHTED][layer_idx].add(*rows, weighed_by=torch.ones_like(rows[0]))
        self.variants[NORMALISED][layer_idx].add(*without_size(*rows), weighed_by=rows[0])
        # A causal model has the same states of a prompt whatever follows it.
        prompt = self._in_prompt[counted]
        self.variants[PROMPTS][layer_idx].add(*(each[prompt] for each in rows))


def summed(parts: Iterable[LayerMoments]) -> LayerMoments:
    """Return the moments of all tokens of several parts."""
    every = list(parts)
    return {
        layer: Moments(
            **{
                name: torch.stack([part[layer].tensors()[name] for part in every]).sum(dim=0)
                for name in first.tensors()
            }
        )
        for layer, first in every[0].items()
    }


class SpanCollector(MomentCollector):
    """Collects moments of runs of layers: of what enters the first and what leaves the last.

    Args:
        stack: The layers of the unwrapped base model.
        spans: The first and the last layer of each run.
        device: Where the model takes its tokens.
    """

    def __init__(
        self, stack: LayerStack, spans: Iterable[tuple[int, int]], device: torch.device
    ) -> None:
        self.spans = {span: Moments.zero(stack.hidden_size) for span in spans}
        self._begun: dict[int, torch.Tensor] = {}
        unused = {layer: Moments.zero(1) for layer in range(stack.num_layers)}
        super().__init__(stack, unused, device)

    def add(self, layer_idx: int, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        """Add the runs that end with a layer."""
        if any(first == layer_idx for first, _ in self.spans):
            self._begun[layer_idx] = entering.flatten(0, 1)[self._counted]
        for (first, last), moments in self.spans.items():
            if last == layer_idx:
                moments.add(self._begun[first], leaving.flatten(0, 1)[self._counted])
