"""The ONNX graph of routers, node by node.

Written by hand instead of traced: the result is the same for every version of torch, carries no
trace of the machine that made it, and is a second reading of the routers that torch's is tested
against. Knows nothing of files or runtimes.
"""

import hashlib
import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynadepth.budget import Calibration
from dynadepth.config import RouterConfig
from dynadepth.errors import DynadepthError, ExportError
from dynadepth.fingerprint import fingerprint_digest
from dynadepth.plans import NUM_ACTIONS, Action
from dynadepth.routers import RouterHeads

__all__ = [
    "INVALID_ACTION",
    "ONNX_OPSET",
    "ONNX_SCHEMA_VERSION",
    "PROPERTY_PREFIX",
    "ExportableRouters",
    "build_onnx",
    "host_array",
    "need_package",
    "routers_digest",
]

ONNX_OPSET = 18
ONNX_SCHEMA_VERSION = 1
INVALID_ACTION = -1
PROPERTY_PREFIX = "dynadepth."
# The format version of the oldest runtimes that know opset 18.
_IR_VERSION = 8


class ExportableRouters(Protocol):
    """What the graph is made of; `dynadepth.checkpoint.Routers` is one."""

    @property
    def config(self) -> RouterConfig:
        """Shape of the heads."""
        ...

    @property
    def heads(self) -> RouterHeads:
        """The trained part h."""
        ...

    @property
    def bias(self) -> Tensor:
        """The static part b. Shape (num_layers, 3), float32."""
        ...

    @property
    def shrinkage(self) -> float:
        """s, how far prompts may deviate from the static part."""
        ...

    @property
    def calibration(self) -> Calibration:
        """From budget to penalty."""
        ...

    @property
    def protect(self) -> tuple[int, ...]:
        """Layers that always run once."""
        ...

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """Of the base model."""
        ...


def build_onnx(routers: ExportableRouters) -> bytes:
    """Return the ONNX file of some routers.

    Its inputs are `hidden_states` float[batch, tokens, hidden], the states entering a layer,
    `attention_mask` int64[batch, tokens], 1 for the prompt's real tokens, `layer` int64[], counted
    from 0, and `budget` float[], a mean depth. Its outputs are `logits` float[batch, 3], which are
    bias + shrinkage * heads - lambda(budget) * action in the order SKIP, EXECUTE, REPEAT, and
    `action` int64[batch], their argmax, ties to the lowest, but EXECUTE on protected layers.

    A budget outside the calibrated range gives NaN logits; wherever logits are NaN the action is
    -1. A layer beyond the last is an error of the runtime (-1 is the last, as `Gather` has it).
    What the graph cannot know is left to its caller: at least one layer of a prompt must run.

    Args:
        routers: The routers.

    Returns:
        A serialised model of opset 18, checked by onnx.

    Raises:
        ExportError: onnx is not installed, refuses the graph, or cannot put it into one file.
    """
    onnx = need_package("onnx", ExportError)
    model = _Graph(onnx, routers.config.hidden_size).model(routers)
    onnx.helper.set_model_props(model, _properties(routers))
    try:
        onnx.checker.check_model(model, full_check=True)
        data: bytes = model.SerializeToString()
    except Exception as error:  # protobuf and onnx have several errors of their own
        raise ExportError(
            f"the routers of {routers.config.num_layers} layers cannot be written as one ONNX file: "
            f"{error}"
        ) from error
    return data


def routers_digest(routers: ExportableRouters) -> str:
    """Return 16 hexadecimal digits that change with anything that changes a decision."""
    digest = hashlib.sha256()
    for name, tensor in sorted({**routers.heads.state_dict(), "bias": routers.bias}.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(host_array(tensor).tobytes())
    rest = [
        routers.config.to_dict(),
        routers.shrinkage,
        routers.calibration.to_dict(),
        list(routers.protect),
    ]
    digest.update(json.dumps(rest, sort_keys=True).encode())
    return digest.hexdigest()[:16]


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


class _Graph:
    """Nodes and initializers of the graph, in the order in which they are added.

    Args:
        onnx: The package.
        hidden_size: Width of the states.
    """

    def __init__(self, onnx: Any, hidden_size: int) -> None:
        self._onnx = onnx
        self._hidden_size = hidden_size
        self._nodes: list[Any] = []
        self._constants: dict[str, npt.NDArray[Any]] = {}

    def model(self, routers: ExportableRouters) -> Any:
        """Return the whole model."""
        logits = self._logits(routers)
        self._actions(routers, logits)
        onnx, helper = self._onnx, self._onnx.helper
        kinds = onnx.TensorProto
        batch_tokens = ["batch", "tokens"]
        graph = helper.make_graph(
            self._nodes,
            "dynadepth_routers",
            inputs=[
                helper.make_tensor_value_info(
                    "hidden_states", kinds.FLOAT, [*batch_tokens, self._hidden_size]
                ),
                helper.make_tensor_value_info("attention_mask", kinds.INT64, batch_tokens),
                helper.make_tensor_value_info("layer", kinds.INT64, []),
                helper.make_tensor_value_info("budget", kinds.FLOAT, []),
            ],
            outputs=[
                helper.make_tensor_value_info("logits", kinds.FLOAT, ["batch", NUM_ACTIONS]),
                helper.make_tensor_value_info("action", kinds.INT64, ["batch"]),
            ],
            initializer=[
                onnx.numpy_helper.from_array(np.asarray(value), name)
                for name, value in self._constants.items()
            ],
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", ONNX_OPSET)],
            ir_version=_IR_VERSION,
            producer_name="dynadepth",
        )

    def _add(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        output = name or f"{kind.lower()}_{len(self._nodes)}"
        self._nodes.append(
            self._onnx.helper.make_node(kind, inputs, [output], output, **attributes)
        )
        return output

    def _constant(self, name: str, value: Any, dtype: npt.DTypeLike) -> str:
        self._constants[name] = np.ascontiguousarray(value, dtype=dtype).reshape(np.shape(value))
        return name

    def _integers(self, name: str, value: Any) -> str:
        return self._constant(name, value, np.int64)

    def _floats(self, name: str, value: Any) -> str:
        return self._constant(name, value, np.float32)

    def _logits(self, routers: ExportableRouters) -> str:
        parts = {"windows": routers.heads.windows}
        windows, last = self._views(routers.config)
        views = {"windows": windows}
        if routers.heads.last is not None:
            parts["last"] = routers.heads.last
            views["last"] = last
        heads = [
            self._bottleneck(part, weights.tensors(), views[part])
            for part, weights in parts.items()
        ]
        trained = self._add("Add", *heads) if len(heads) == 2 else heads[0]
        bias = self._of_layer("bias", routers.bias)
        scaled = self._add("Mul", trained, self._floats("shrinkage", routers.shrinkage))
        price = self._add(
            "Mul",
            self._penalty(routers.calibration),
            self._floats("visits", np.arange(NUM_ACTIONS)),
        )
        priced = self._add("Sub", self._add("Add", bias, scaled), price)
        lowest = self._floats("lowest_budget", routers.calibration.lowest)
        highest = self._floats("highest_budget", routers.calibration.highest)
        reachable = self._add(
            "And",
            self._add("GreaterOrEqual", "budget", lowest),
            self._add("LessOrEqual", "budget", highest),
        )
        return self._add("Where", reachable, priced, self._floats("nan", np.nan), name="logits")

    def _actions(self, routers: ExportableRouters, logits: str) -> None:
        best = self._add("ArgMax", logits, axis=1, keepdims=0)
        protected = np.zeros(routers.config.num_layers, dtype=bool)
        protected[list(routers.protect)] = True
        executed = self._add("Gather", self._constant("protected", protected, np.bool_), "layer")
        action = self._add("Where", executed, self._integers("execute", int(Action.EXECUTE)), best)
        total = self._add("ReduceSum", logits, self._integers("axis_1", [1]), keepdims=0)
        broken = self._add("IsNaN", total)
        self._add("Where", broken, self._integers("invalid", INVALID_ACTION), action, name="action")

    def _penalty(self, calibration: Calibration) -> str:
        """Look up lambda as `Calibration.penalty_for` does: nearest depth in float32, the first of equals."""
        difference = self._add("Sub", self._floats("depths", calibration.depths), "budget")
        nearest = self._add("ArgMin", self._add("Abs", difference), axis=0, keepdims=0)
        return self._add("Gather", self._floats("lambdas", calibration.lambdas), nearest)

    def _of_layer(self, name: str, stacked: Tensor) -> str:
        return self._add("Gather", self._floats(name, host_array(stacked)), "layer")

    def _bottleneck(self, part: str, tensors: Mapping[str, Tensor], views: str) -> str:
        weights = {
            name: self._of_layer(f"{part}.{name}", tensor) for name, tensor in tensors.items()
        }
        inner = self._gelu(
            self._add(
                "Add", self._add("MatMul", views, weights["first_weight"]), weights["first_bias"]
            )
        )
        mean = self._add("ReduceMean", inner, self._integers("axis_1", [1]), keepdims=0)
        return self._add(
            "Add", self._add("MatMul", mean, weights["second_weight"]), weights["second_bias"]
        )

    def _gelu(self, value: str) -> str:
        """Spell the exact GELU out: as one operator it needs opset 20."""
        inner = self._add("Erf", self._add("Div", value, self._floats("root_2", np.sqrt(2.0))))
        raised = self._add("Mul", value, self._add("Add", inner, self._floats("one", 1.0)))
        return self._add("Mul", raised, self._floats("half", 0.5))

    def _views(self, config: RouterConfig) -> tuple[str, str]:
        """Pool the states as `dynadepth.routers.pool` does: window means, then the last token's state."""
        number = self._integers("num_windows", config.num_windows)
        window = self._integers("window", np.arange(config.num_windows)[None])
        following = self._integers("following", np.arange(1, config.num_windows + 1)[None])
        one, axis_1 = self._integers("integer_1", 1), self._integers("axis_1", [1])
        axis_2 = self._integers("axis_2", [2])
        real = self._add("Cast", "attention_mask", to=self._onnx.TensorProto.BOOL)
        counted = self._add("Cast", real, to=self._onnx.TensorProto.INT64)
        total = self._add("ReduceSum", counted, axis_1, keepdims=1)
        rank = self._add("CumSum", counted, self._integers("cumsum_axis", 1))
        first = self._add("Div", self._add("Mul", window, total), number)
        after = self._add(
            "Max",
            self._add("Div", self._add("Mul", following, total), number),
            self._add("Add", first, one),
        )
        place = self._add("Unsqueeze", self._add("Sub", rank, one), axis_1)
        within = self._add(
            "And",
            self._add("GreaterOrEqual", place, self._add("Unsqueeze", first, axis_2)),
            self._add("Less", place, self._add("Unsqueeze", after, axis_2)),
        )
        real_rows = self._add("Unsqueeze", real, axis_1)
        # Padding may hold inf or NaN, so it is replaced, not multiplied by zero.
        states = self._add(
            "Where",
            self._add("Unsqueeze", real, axis_2),
            "hidden_states",
            self._floats("zero", 0.0),
        )
        means = self._average(self._add("And", within, real_rows), states)
        if not config.last_token:
            return means, ""
        ending = self._add("Unsqueeze", self._add("Equal", rank, total), axis_1)
        return means, self._average(self._add("And", ending, real_rows), states)

    def _average(self, members: str, states: str) -> str:
        weights = self._add("Cast", members, to=self._onnx.TensorProto.FLOAT)
        total = self._add("ReduceSum", weights, self._integers("axis_2", [2]), keepdims=1)
        divisor = self._add("Max", total, self._floats("one", 1.0))
        return self._add("MatMul", self._add("Div", weights, divisor), states)


def _properties(routers: ExportableRouters) -> dict[str, str]:
    config = routers.config
    facts = {
        "schema_version": ONNX_SCHEMA_VERSION,
        "fingerprint": fingerprint_digest(routers.fingerprint),
        "routers_digest": routers_digest(routers),
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_windows": config.num_windows,
        "last_token": config.last_token,
        "action_order": [action.name.lower() for action in Action],
        "shrinkage": routers.shrinkage,
        # Layers whose decision depends on the prompt at all.
        "varying_layers": list(routers.heads.varying_layers()),
        "protect": list(routers.protect),
        "calibration": routers.calibration.to_dict(),
    }
    return {f"{PROPERTY_PREFIX}{name}": json.dumps(value) for name, value in facts.items()}
