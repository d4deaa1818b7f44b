"""The parts that the ONNX graphs of routers and of menus share: nodes, pooling and the settings of the file."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynadepth.errors import DynadepthError, ExportError

__all__ = [
    "INVALID",
    "ONNX_OPSET",
    "ONNX_SCHEMA_VERSION",
    "PROPERTY_PREFIX",
    "Nodes",
    "PooledPrompt",
    "content_digest",
    "host_array",
    "need_package",
]

ONNX_OPSET = 18
ONNX_SCHEMA_VERSION = 1
PROPERTY_PREFIX = "dynadepth."
# The output of a graph where it cannot decide.
INVALID = -1
# The format version of the oldest runtimes that support opset 18.
_IR_VERSION = 8


def need_package(package: str, error: type[DynadepthError]) -> Any:
    """Import a package of the `onnx` extra, or raise `error` with the command that installs it."""
    try:
        return import_module(package)
    except ImportError as cause:
        raise error(
            f"{package} is not installed; ONNX needs it: `pip install dynadepth[onnx]`"
        ) from cause


def host_array(tensor: Tensor) -> npt.NDArray[np.float32]:
    """Return a tensor of any device and floating dtype as a contiguous float32 array."""
    array: npt.NDArray[np.float32] = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return array


def content_digest(tensors: Mapping[str, Tensor], rest: Any) -> str:
    """Return a digest of 16 hexadecimal digits over the tensors, their names and shapes, and the rest.

    Args:
        tensors: Name to tensor, any floating dtype.
        rest: Anything that JSON can hold.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(host_array(tensor).tobytes())
    digest.update(json.dumps(rest, sort_keys=True).encode())
    return digest.hexdigest()[:16]


class Nodes:
    """The nodes and initializers of one graph, in the order in which they are added.

    Most methods add nodes and return the name of their output.

    Raises:
        ExportError: onnx is not installed.
    """

    def __init__(self) -> None:
        self._onnx = need_package("onnx", ExportError)
        self.kinds = self._onnx.TensorProto
        self._nodes: list[Any] = []
        self._constants: dict[str, npt.NDArray[Any]] = {}

    def add(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Add one operator.

        Args:
            kind: The operator, by its name in the opset.
            *inputs: Names of its inputs.
            name: Name of its output; None: a new one.
            **attributes: Attributes of the operator.
        """
        output = name or f"{kind.lower()}_{len(self._nodes)}"
        self._nodes.append(
            self._onnx.helper.make_node(kind, inputs, [output], output, **attributes)
        )
        return output

    def constant(self, name: str, value: Any, dtype: npt.DTypeLike) -> str:
        """Add an initializer, unless it is there already.

        Args:
            name: Name of the initializer.
            value: Its value, of any shape.
            dtype: The dtype that the value is stored in.

        Returns:
            The name.

        Raises:
            ExportError: Another value has the same name, which is a bug of the graph's author.
        """
        array = np.ascontiguousarray(value, dtype=dtype).reshape(np.shape(value))
        former = self._constants.setdefault(name, array)
        if former.dtype != array.dtype or not np.array_equal(former, array, equal_nan=True):
            raise ExportError(
                f"the ONNX graph has two constants {name!r}; expected one value for each name"
            )
        return name

    def integers(self, name: str, value: Any) -> str:
        """Add an int64 initializer."""
        return self.constant(name, value, np.int64)

    def floats(self, name: str, value: Any) -> str:
        """Add a float32 initializer."""
        return self.constant(name, value, np.float32)

    def dense(self, value: str, weight: str, bias: str) -> str:
        """Multiply by a matrix and add a bias.

        Args:
            value: Name of the input. Shape (..., in).
            weight: Name of the matrix. Shape (in, out).
            bias: Name of the bias. Shape (out,).

        Returns:
            Name of the output. Shape (..., out).
        """
        return self.add("Add", self.add("MatMul", value, weight), bias)

    def gelu(self, value: str) -> str:
        """Add the exact GELU as several operators; as a single one it needs opset 20."""
        inner = self.add("Erf", self.add("Div", value, self.floats("root_2", np.sqrt(2.0))))
        raised = self.add("Mul", value, self.add("Add", inner, self.floats("one", 1.0)))
        return self.add("Mul", raised, self.floats("half", 0.5))

    def unless_out_of_range(
        self, values: str, lowest_budget: float, highest_budget: float, *, name: str
    ) -> str:
        """Replace values by NaN if the input `budget` is NaN or out of range, compared in float32.

        Args:
            values: Name of the values, float32, any shape.
            lowest_budget: Smallest budget accepted.
            highest_budget: Largest budget accepted.
            name: Name of the output.

        Returns:
            Name of the output, of the shape of `values`.
        """
        reachable = self.add(
            "And",
            self.add("GreaterOrEqual", "budget", self.floats("lowest_budget", lowest_budget)),
            self.add("LessOrEqual", "budget", self.floats("highest_budget", highest_budget)),
        )
        return self.add("Where", reachable, values, self.floats("nan", np.nan), name=name)

    def tensor_info(self, name: str, kind: int, shape: Sequence[int | str]) -> Any:
        """Describe an input or output of the graph.

        Args:
            name: Name of the input or output.
            kind: Its element type, as numbered in `onnx.TensorProto`.
            shape: Its shape; a text is the name of a size that may vary.

        Returns:
            An `onnx.ValueInfoProto`.
        """
        return self._onnx.helper.make_tensor_value_info(name, kind, shape)

    def file(
        self, name: str, inputs: Sequence[Any], outputs: Sequence[Any], facts: Mapping[str, Any]
    ) -> bytes:
        """Return the ONNX file of the graph.

        Args:
            name: Name of the graph.
            inputs: The `tensor_info` of each input.
            outputs: The `tensor_info` of each output.
            facts: Metadata, values that JSON can hold; their names are prefixed with that of dynadepth.

        Returns:
            A serialised model, checked by onnx.

        Raises:
            ExportError: onnx refuses the graph, or cannot put it into one file.
        """
        onnx, helper = self._onnx, self._onnx.helper
        try:
            constants = [
                onnx.numpy_helper.from_array(np.asarray(value), key)
                for key, value in self._constants.items()
            ]
            model = helper.make_model(
                helper.make_graph(self._nodes, name, inputs, outputs, initializer=constants),
                opset_imports=[helper.make_opsetid("", ONNX_OPSET)],
                ir_version=_IR_VERSION,
                producer_name="dynadepth",
            )
            texts = {f"{PROPERTY_PREFIX}{key}": json.dumps(value) for key, value in facts.items()}
            helper.set_model_props(model, texts)
            onnx.checker.check_model(model, full_check=True)
            data: bytes = model.SerializeToString()
        except Exception as error:  # protobuf and onnx have several errors of their own
            raise ExportError(
                f"the graph {name} for {facts['num_layers']} layers cannot be written as one ONNX file: {error}; "
                "train a smaller one, or use it through torch"
            ) from error
        return data


class PooledPrompt:
    """Pools `hidden_states` over the real tokens of `attention_mask`, as `dynadepth.policies.pooling` does.

    Args:
        nodes: The nodes of the graph that has these two inputs.
    """

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._one, self._axis_1 = nodes.integers("integer_1", 1), nodes.integers("axis_1", [1])
        self._axis_2 = nodes.integers("axis_2", [2])
        self._real = nodes.add("Cast", "attention_mask", to=nodes.kinds.BOOL)
        counted = nodes.add("Cast", self._real, to=nodes.kinds.INT64)
        self._total = nodes.add("ReduceSum", counted, self._axis_1, keepdims=1)
        self._rank = nodes.add("CumSum", counted, nodes.integers("cumsum_axis", 1))
        self._states = ""

    def window_means(self, num_windows: int) -> str:
        """Average over windows; see `policies.pooling.window_means`. Shape (batch, num_windows, hidden), float32."""
        nodes, add = self._nodes, self._nodes.add
        # Heads of one graph may differ in their number of windows.
        suffix = f"of_{num_windows}"
        number = nodes.integers(f"windows_{suffix}", num_windows)
        window = nodes.integers(f"window_{suffix}", np.arange(num_windows)[None])
        following = nodes.integers(f"following_{suffix}", np.arange(1, num_windows + 1)[None])
        first = add("Div", add("Mul", window, self._total), number)
        after = add(
            "Max",
            add("Div", add("Mul", following, self._total), number),
            add("Add", first, self._one),
        )
        place = add("Unsqueeze", add("Sub", self._rank, self._one), self._axis_1)
        within = add(
            "And",
            add("GreaterOrEqual", place, add("Unsqueeze", first, self._axis_2)),
            add("Less", place, add("Unsqueeze", after, self._axis_2)),
        )
        return self._average(within)

    def last_mean(self) -> str:
        """Average over the last real token alone, as `policies.router_heads.pool` does. Shape (batch, 1, hidden).

        As there, NaN at any real token makes the result NaN.
        """
        ending = self._nodes.add("Equal", self._rank, self._total)
        return self._average(self._nodes.add("Unsqueeze", ending, self._axis_1))

    def last_state(self) -> str:
        """Take the last real token's state and read no other. Shape (batch, hidden), float32; zeros without one."""
        add = self._nodes.add
        # The rank stops rising at the last real token, and ArgMax takes the first of equal values.
        last = add("ArgMax", self._rank, axis=1, keepdims=1)
        state = add("GatherND", "hidden_states", last, batch_dims=1)
        return add("Where", add("Cast", self._total, to=self._nodes.kinds.BOOL), state, self._zero)

    @property
    def _zero(self) -> str:
        return self._nodes.floats("zero", 0.0)

    def _average(self, members: str) -> str:
        nodes, add = self._nodes, self._nodes.add
        if not self._states:
            # Padding may hold inf or NaN, so it is replaced, not multiplied by zero.
            real = add("Unsqueeze", self._real, self._axis_2)
            self._states = add("Where", real, "hidden_states", self._zero)
        inside = add("And", members, add("Unsqueeze", self._real, self._axis_1))
        weights = add("Cast", inside, to=nodes.kinds.FLOAT)
        total = add("ReduceSum", weights, self._axis_2, keepdims=1)
        divisor = add("Max", total, nodes.floats("one", 1.0))
        return add("MatMul", add("Div", weights, divisor), self._states)
