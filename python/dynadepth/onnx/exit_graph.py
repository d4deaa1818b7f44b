"""The ONNX graph of exits, node by node.

It is written by hand for the reasons given in `dynadepth.onnx.router_graph`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from dynadepth.models.fingerprint import fingerprint_digest
from dynadepth.onnx.graph_builder import ONNX_SCHEMA_VERSION, Nodes, content_digest, host_array

__all__ = ["ExportableExits", "build_exits_onnx", "exits_digest"]


class _Head(Protocol):
    """The lens and the router before one layer, such as `dynadepth.exits.exit_heads.ExitWeights`."""

    @property
    def layer_idx(self) -> int:
        """The layer."""
        ...

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Its weights, by name."""
        ...

    def score(self, states: Tensor) -> Tensor:
        """Return the log-odds that the reading through the lens is the base model's choice."""
        ...

    def lens(self, states: Tensor) -> Tensor:
        """Return what stands for the states after the last layer."""
        ...


class ExportableExits(Protocol):
    """What the graph is built from, such as a `dynadepth.checkpoints.trained_exits.TrainedExits`."""

    @property
    def heads(self) -> Sequence[_Head]:
        """The heads, ascending."""
        ...

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        ...

    @property
    def hidden_size(self) -> int:
        """Width of the states."""
        ...

    @property
    def window(self) -> int:
        """Most tokens of a row that later layers run for in one call."""
        ...

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """The fingerprint of the base model."""
        ...

    @property
    def promises(self) -> Any:
        """The calibration, with `to_dict`."""
        ...


def build_exits_onnx(trained: ExportableExits) -> bytes:
    """Return the ONNX file of exits.

    Inputs:

    - `hidden_states` float[batch, hidden]: of each row, the state of its newest token as it enters an exit layer.
    - `threshold` float[]: in log-odds; the metadata's `promises` say which threshold keeps which share of tokens and
      costs how many passes, and audits may move it.

    Outputs, for each exit layer l that the metadata's `layers` name; a runtime computes only those that are asked for:

    - `exit_l` bool[batch]: whether the row leaves, that is, whether its score is the threshold or more. A score that is
      NaN does not leave.
    - `score_l` float[batch]: the log-odds that the reading through the lens is the base model's choice.
    - `lens_l` float[batch, hidden]: what stands for the state after the last layer, to go through norm and head.

    Args:
        trained: The exits and their calibration.

    Returns:
        A serialised model of opset 18, checked by onnx.

    Raises:
        ExportError: onnx is not installed, refuses the graph, or cannot write it as one file.
    """
    nodes = Nodes()
    kinds, size = nodes.kinds, trained.hidden_size
    outputs = []
    square = nodes.add("Mul", "hidden_states", "hidden_states")
    mean = nodes.add("ReduceMean", square, nodes.integers("axis_1", [1]), keepdims=1)
    rms = nodes.add("Sqrt", nodes.add("Max", mean, nodes.floats("smallest", 1e-12)))
    scaled = nodes.add("Div", "hidden_states", rms)
    for head in trained.heads:
        layer = head.layer_idx
        weights = {
            name: nodes.floats(f"exits.{layer}.{name}", host_array(tensor))
            for name, tensor in sorted(head.tensors.items())
        }
        score = _score(nodes, weights, scaled, name=f"score_{layer}")
        nodes.add("GreaterOrEqual", score, "threshold", name=f"exit_{layer}")
        _lens(nodes, weights, scaled, rms, name=f"lens_{layer}")
        outputs += [
            nodes.tensor_info(f"exit_{layer}", kinds.BOOL, ["batch"]),
            nodes.tensor_info(f"score_{layer}", kinds.FLOAT, ["batch"]),
            nodes.tensor_info(f"lens_{layer}", kinds.FLOAT, ["batch", size]),
        ]
    return nodes.file(
        "dynadepth_exits",
        inputs=[
            nodes.tensor_info("hidden_states", kinds.FLOAT, ["batch", size]),
            nodes.tensor_info("threshold", kinds.FLOAT, []),
        ],
        outputs=outputs,
        facts=_facts(trained),
    )


def exits_digest(trained: ExportableExits) -> str:
    """Return a digest of everything that decides."""
    tensors = {
        f"{head.layer_idx}.{name}": tensor
        for head in trained.heads
        for name, tensor in head.tensors.items()
    }
    return content_digest(tensors, [trained.num_layers, trained.promises.to_dict()])


def _score(nodes: Nodes, weights: Mapping[str, str], scaled: str, *, name: str) -> str:
    centred = nodes.add("Sub", scaled, weights["router.mean"])
    given = nodes.add("Mul", centred, weights["router.scale"])
    narrow = nodes.gelu(nodes.dense(given, weights["router.down"], weights["router.down_bias"]))
    whole = nodes.add("MatMul", narrow, weights["router.up"])
    return nodes.add("Add", whole, weights["router.bias"], name=name)


def _lens(nodes: Nodes, weights: Mapping[str, str], scaled: str, rms: str, *, name: str) -> str:
    affine = nodes.dense("hidden_states", weights["lens.weight"], weights["lens.bias"])
    narrow = nodes.gelu(nodes.dense(scaled, weights["lens.down"], weights["lens.down_bias"]))
    bent = nodes.add("Mul", rms, nodes.add("MatMul", narrow, weights["lens.up"]))
    return nodes.add("Add", nodes.add("Add", "hidden_states", affine), bent, name=name)


def _facts(trained: ExportableExits) -> dict[str, Any]:
    return {
        "schema_version": ONNX_SCHEMA_VERSION,
        "kind": "exits",
        "fingerprint": fingerprint_digest(trained.fingerprint),
        "exits_digest": exits_digest(trained),
        "num_layers": trained.num_layers,
        "hidden_size": trained.hidden_size,
        "layers": [head.layer_idx for head in trained.heads],
        "window": trained.window,
        "promises": trained.promises.to_dict(),
    }
