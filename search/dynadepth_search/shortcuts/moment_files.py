"""Moments of all layers over many texts, written now and then, so that a killed fit goes on from its last block."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dynadepth.errors import ConfigError, LabelError
from dynadepth.files import write_bytes_atomic
from dynadepth.models.structure import LayerStack
from dynadepth.shortcuts.moments import Moments
from dynadepth_search.progress import Progress
from dynadepth_search.scoring.batching import batches_of
from dynadepth_search.scoring.own_text import Text
from dynadepth_search.shortcuts.collecting import MomentCollector

__all__ = ["MomentFiles"]

# Moments are 2 hidden^2 numbers for each layer, too many to write after every batch.
_WRITE_SECONDS = 20.0
# Of the layers that are collected in one pass over the texts.
_GROUP_BYTES = 4_000_000_000


class MomentFiles:
    """Collects moments, a group of layers at a time if all together are too large.

    Args:
        folder: Where the files are.
        stack: The layers of the unwrapped base model.
        device: Where the model takes its tokens.
        batch_size: Texts of one forward.
        group_bytes: The most bytes of moments that are collected at once.
    """

    def __init__(
        self,
        folder: Path,
        stack: LayerStack,
        device: torch.device,
        batch_size: int,
        group_bytes: int = _GROUP_BYTES,
    ) -> None:
        self._folder, self._stack, self._device = folder, stack, device
        self._batch_size = batch_size
        self._group = max(1, group_bytes // (16 * stack.hidden_size**2))

    def collect(self, name: str, texts: Sequence[Text], progress: Progress) -> dict[int, Moments]:
        """Return the moments of every layer over some texts.

        Args:
            name: What messages and files call them.
            texts: The texts.
            progress: Called with the stage, the number of finished batches and of all.

        Raises:
            LabelError: A file is damaged.
        """
        found: dict[int, Moments] = {}
        num_layers = self._stack.num_layers
        groups = [
            range(first, min(first + self._group, num_layers))
            for first in range(0, num_layers, self._group)
        ]
        batches = batches_of([len(text.ids) for text in texts], self._batch_size)
        for number, layers in enumerate(groups):
            path = self._folder / f"{name.replace(' ', '-')}-{number}.safetensors"
            moments, done = self._read(path, layers)
            written = time.monotonic()
            with MomentCollector(self._stack, moments, self._device) as collector:
                for step in range(done, len(batches)):
                    progress(name, number * len(batches) + step, len(groups) * len(batches))
                    collector.run([texts[row] for row in batches[step]])
                    last = step == len(batches) - 1
                    if last or time.monotonic() - written > _WRITE_SECONDS:
                        _write(path, moments, step + 1)
                        written = time.monotonic()
            found |= moments
        progress(name, len(groups) * len(batches), len(groups) * len(batches))
        return found

    def _read(self, path: Path, layers: range) -> tuple[dict[int, Moments], int]:
        """Return what was collected, and how many batches it is."""
        width = self._stack.hidden_size
        if not path.exists():
            return {layer: Moments.zero(width, self._device) for layer in layers}, 0
        try:
            with safe_open(path, framework="pt", device=str(self._device)) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
                done = int(file.metadata()["batches"])
            moments = {
                layer: Moments.from_tensors(
                    {
                        name.partition(".")[2]: tensor
                        for name, tensor in tensors.items()
                        if name.partition(".")[0] == str(layer)
                    }
                )
                for layer in layers
            }
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, ConfigError) as error:
            raise LabelError(f"{path} is damaged ({error}); delete it and fit again") from error
        return moments, done


def _write(path: Path, moments: dict[int, Moments], batches: int) -> None:
    tensors = {
        f"{layer}.{name}": tensor.cpu().contiguous()
        for layer, each in moments.items()
        for name, tensor in each.tensors().items()
    }
    write_bytes_atomic(path, save(tensors, metadata={"batches": str(batches)}))
