"""Exits as one ONNX file, and the heads that run it in onnxruntime."""

import copy
import os
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dynadepth.errors import CheckpointError, ExportError
from dynadepth.files import write_bytes_atomic
from dynadepth.onnx.exit_graph import ExportableExits, build_exits_onnx
from dynadepth.onnx.graph_builder import host_array
from dynadepth.onnx.session import Source, open_session, read_facts, source_name

__all__ = ["OnnxExitHead", "export_exits_onnx", "onnx_exit_heads"]

_TOLERANCE = 1e-5
_NEEDED_FACTS = ("layers", "num_layers", "promises", "window")


class _Dial(Protocol):
    """Has the threshold that scores are compared with."""

    threshold: float


def export_exits_onnx(trained: ExportableExits, path: str | os.PathLike[str]) -> None:
    """Write exits as one ONNX file, after checking that the file decides as they do.

    Args:
        trained: The exits and their calibration.
        path: The file; it is written whole or not at all.

    Raises:
        ExportError: A package is missing, the graph is too large for one file, or it does not decide as the exits do.
            No file is written then.
    """
    data = build_exits_onnx(trained)
    _verify(trained, data)
    write_bytes_atomic(path, data)


class OnnxExitHead:
    """An exit head that onnxruntime computes on the host; a deep copy shares its session.

    Args:
        session: Opened on the file of the exits.
        layer_idx: The exit layer.
        dial: Has the threshold.
    """

    def __init__(self, session: Any, layer_idx: int, dial: _Dial) -> None:
        self.layer_idx = layer_idx
        self._session, self._dial = session, dial

    def leaves(self, states: Tensor) -> Tensor:
        """Return which rows leave. Shape (rows,), bool, on the device of the states."""
        return self._run(states, "exit")

    def final(self, states: Tensor) -> Tensor:
        """Return what stands for the states after the last layer. Shape, dtype and device as given."""
        return self._run(states, "lens").to(states.dtype)

    def _run(self, states: Tensor, output: str) -> Tensor:
        feed = {
            "hidden_states": host_array(states),
            "threshold": np.asarray(self._dial.threshold, dtype=np.float32),
        }
        (found,) = self._session.run([f"{output}_{self.layer_idx}"], feed)
        return torch.from_numpy(found).to(states.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnnxExitHead":
        return OnnxExitHead(self._session, self.layer_idx, copy.deepcopy(self._dial, memo))


def onnx_exit_heads(
    source: Source, dial: _Dial, *, digest: str | None = None
) -> tuple[OnnxExitHead, ...]:
    """Return the heads of an ONNX file, ascending.

    Args:
        source: The file, or its content.
        dial: Has the threshold.
        digest: `graph_digest` of the graph that the file must hold, if that is known.

    Raises:
        CheckpointError: The file is damaged, holds no exits, is newer than this dynadepth, or of other exits.
        ConfigError: onnxruntime is not installed.
        FileNotFoundError: There is no such file.
    """
    session = open_session(source)
    facts = read_facts(session, source, "exits", _NEEDED_FACTS, digest=digest)
    layers = facts["layers"]
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise CheckpointError(
            f"{source_name(source)} has damaged metadata: layers are {layers!r}; export it again"
        )
    return tuple(OnnxExitHead(session, layer, dial) for layer in layers)


def _verify(trained: ExportableExits, data: bytes) -> None:
    """Compare the graph with torch on random states, at thresholds between their scores."""
    session = open_session(data)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn((16, trained.hidden_size), generator=generator)
    for head in trained.heads:
        layer = head.layer_idx
        score, lens = (host_array(each) for each in (head.score(states), head.lens(states)))
        threshold = np.asarray(np.median(score), dtype=np.float32)
        feed = {"hidden_states": states.numpy(), "threshold": threshold}
        leaves, found, final = session.run(
            [f"{name}_{layer}" for name in ("exit", "score", "lens")], feed
        )
        worst = max(
            float(np.abs(given - wanted).max()) / max(1.0, float(np.abs(wanted).max()))
            for given, wanted in ((found, score), (final, lens))
        )
        clear = np.abs(score - threshold) > _TOLERANCE * max(1.0, float(np.abs(score).max()))
        wrong = int((leaves != (score >= threshold))[clear].sum())
        if not worst <= _TOLERANCE or wrong:
            raise ExportError(
                f"the ONNX graph differs from torch by {worst:.2g} at layer {layer} (allowed {_TOLERANCE:.2g}), and in "
                f"{wrong} decisions; nothing was written"
            )
