"""What exit heads learn from: at every token of some texts, the states before exit layers and the base's choice."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from dynadepth.errors import LabelError
from dynadepth.execution.reading import StateReader
from dynadepth.files import write_bytes_atomic
from dynadepth.models.structure import LayerStack, layer_signature, position_arguments
from dynadepth_search.progress import Progress
from dynadepth_search.scoring.batching import batches_of, pad_left
from dynadepth_search.scoring.own_text import Text

__all__ = ["ExitStates", "collect_states"]

# States that the head reads at once.
_READ = 512
_COLUMNS = ("final", "choice", "text", "own", "first")


@dataclass(slots=True, eq=False)
class ExitStates:
    """The states at n tokens, which are all tokens of some texts but each one's first and last.

    Attributes:
        before: By exit layer, the states that enter it. Shape (n, hidden), model dtype, on the host.
        final: The states after the last layer. Shape (n, hidden), as `before`.
        choice: The base model's choice of the next token. Shape (n,), int64.
        text: The text of each token. Shape (n,), int64.
        own: Whether the next token is the model's own, rather than the prompt's. Shape (n,), bool.
        first: Whether it is the first of these. Shape (n,), bool.
    """

    before: dict[int, Tensor]
    final: Tensor
    choice: Tensor
    text: Tensor
    own: Tensor
    first: Tensor

    def __len__(self) -> int:
        return len(self.choice)

    def take(self, rows: Tensor) -> "ExitStates":
        """Return some of the tokens.

        Args:
            rows: Which. Shape (m,), int64 or bool.
        """
        return ExitStates(
            {layer: states[rows] for layer, states in self.before.items()},
            self.final[rows],
            self.choice[rows],
            self.text[rows],
            self.own[rows],
            self.first[rows],
        )

    @classmethod
    def joined(cls, parts: Sequence["ExitStates"]) -> "ExitStates":
        """Return the tokens of several, in order."""
        return cls(
            {layer: torch.cat([part.before[layer] for part in parts]) for layer in parts[0].before},
            *(torch.cat([getattr(part, name) for part in parts]) for name in _COLUMNS),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return everything by name."""
        before = {f"before.{layer}": states for layer, states in self.before.items()}
        rest = {name: getattr(self, name) for name in _COLUMNS}
        return {name: each.contiguous() for name, each in {**before, **rest}.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "ExitStates":
        """Return what `tensors` returned."""
        before = {
            int(name.partition(".")[2]): tensor
            for name, tensor in tensors.items()
            if name.startswith("before.")
        }
        return cls(before, *(tensors[name] for name in _COLUMNS))


def collect_states(
    model: Any,
    stack: LayerStack,
    texts: Sequence[Text],
    layers: Sequence[int],
    folder: Path,
    *,
    batch_size: int,
    name: str,
    progress: Progress,
) -> ExitStates:
    """Return the states of texts; each batch is a file, so a killed run goes on from its last one.

    Args:
        model: The unwrapped base model.
        stack: Its layers, proved.
        texts: The texts.
        layers: The exit layers.
        folder: Where the files are.
        batch_size: Texts of one forward.
        name: What messages call this stage.
        progress: Called with the stage, the number of finished batches and of all.

    Raises:
        LabelError: A file is damaged.
    """
    batches = batches_of([len(text.ids) for text in texts], batch_size)
    parts = []
    for number, rows in enumerate(batches):
        progress(name, number, len(batches))
        path = folder / f"states-{number:05d}.safetensors"
        if not path.exists():
            found = _run(model, stack, texts, rows, layers)
            write_bytes_atomic(path, save(found.tensors()))
        try:
            parts.append(ExitStates.from_tensors(load_file(path)))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise LabelError(f"{path} is damaged ({error}); delete it and train again") from error
    progress(name, len(batches), len(batches))
    return ExitStates.joined(parts)


class _Note:
    """Hooks that note what enters and leaves layers."""

    def __init__(self, layer_idx: int, name: str, found: dict[int, Tensor], *, after: bool) -> None:
        self._layer_idx, self._name, self._found, self._after = layer_idx, name, found, after

    def __call__(self, _module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if self._after:
            self._found[-1] = output[0] if isinstance(output, tuple) else output
            return
        self._found[self._layer_idx] = args[0] if args else kwargs[self._name]


def _run(
    model: Any,
    stack: LayerStack,
    texts: Sequence[Text],
    rows: Sequence[int],
    layers: Sequence[int],
) -> ExitStates:
    ids, mask = pad_left((texts[row].ids for row in rows), model.device)
    found: dict[int, Tensor] = {}
    handles = []
    for layer_idx in [*layers, stack.num_layers - 1]:
        layer = stack.layers[layer_idx]
        name = layer_signature(type(layer).forward).names[0]
        if layer_idx in layers:
            note = _Note(layer_idx, name, found, after=False)
            handles.append(layer.register_forward_hook(note, with_kwargs=True))
        if layer_idx == stack.num_layers - 1:
            note = _Note(layer_idx, name, found, after=True)
            handles.append(layer.register_forward_hook(note, with_kwargs=True))
    try:
        with torch.inference_mode():
            # Without the output head, which reads the chosen tokens alone.
            stack.stack(
                input_ids=ids,
                attention_mask=mask,
                use_cache=False,
                **position_arguments(stack.stack, mask),
            )
    finally:
        for handle in handles:
            handle.remove()
    width = ids.shape[1]
    places, owners, own, first = [], [], [], []
    for number, row in enumerate(rows):
        text = texts[row]
        # The first token is an attention sink, unless it is all of the prompt.
        at = np.arange(min(1, text.prompt - 1), len(text.ids) - 1)
        places.append(number * width + width - len(text.ids) + at)
        owners.append(np.full(len(at), row))
        own.append(at >= text.prompt - 1)
        first.append(at == text.prompt - 1)
    here = torch.from_numpy(np.concatenate(places))
    states = {
        layer: each.flatten(0, 1)[here.to(each.device)].cpu() for layer, each in found.items()
    }
    final = states.pop(-1)
    with torch.inference_mode(), StateReader(model, stack) as reader:
        choice = torch.cat(
            [reader.read(part.to(model.device)).argmax(dim=-1).cpu() for part in final.split(_READ)]
        )
    return ExitStates(
        states,
        final,
        choice,
        torch.from_numpy(np.concatenate(owners)),
        torch.from_numpy(np.concatenate(own)),
        torch.from_numpy(np.concatenate(first)),
    )
