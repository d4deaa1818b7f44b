"""The ONNX graph of routers, node by node.

It is written by hand instead of being traced: the result is the same for every version of torch, does
not depend on the machine that made it, and is a second implementation that torch's is tested against.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from dynadepth.models.fingerprint import fingerprint_digest
from dynadepth.onnx.graph_builder import (
    INVALID,
    ONNX_SCHEMA_VERSION,
    Nodes,
    PooledPrompt,
    content_digest,
    host_array,
)
from dynadepth.plans import NUM_ACTIONS, Action
from dynadepth.policies.calibration import Calibration
from dynadepth.policies.router_heads import RouterConfig, RouterHeads

__all__ = ["ExportableRouters", "build_onnx", "routers_digest"]


class ExportableRouters(Protocol):
    """What the graph is built from, such as a `dynadepth.checkpoints.trained_policy.Routers`."""

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
        """The table from budget to penalty."""
        ...

    @property
    def protect(self) -> tuple[int, ...]:
        """Layers that always run once."""
        ...

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """The fingerprint of the base model."""
        ...


def build_onnx(routers: ExportableRouters) -> bytes:
    """Return the ONNX file of some routers.

    Its inputs are `hidden_states` float[batch, tokens, hidden], the states entering a layer,
    `attention_mask` int64[batch, tokens], 1 for the prompt's real tokens, `layer` int64[], counted
    from 0, and `budget` float[], a mean depth. Its outputs are `logits` float[batch, 3], which are
    bias + shrinkage * heads - lambda(budget) * action in the order SKIP, EXECUTE, REPEAT, and
    `action` int64[batch], their argmax, ties to the lowest, but EXECUTE on protected layers.

    A budget outside the calibrated range gives NaN logits; wherever logits are NaN the action is
    -1. A layer beyond the last is an error of the runtime (-1 is the last, by the rules of `Gather`).
    The caller has to ensure what the graph cannot: that at least one layer runs for every prompt.

    Args:
        routers: The routers.

    Returns:
        A serialised model of opset 18, checked by onnx.

    Raises:
        ExportError: onnx is not installed, refuses the graph, or cannot write it as one file.
    """
    nodes = Nodes()
    _actions(nodes, routers, _logits(nodes, routers))
    kinds, batch_tokens = nodes.kinds, ["batch", "tokens"]
    width = routers.config.hidden_size
    return nodes.file(
        "dynadepth_routers",
        inputs=[
            nodes.tensor_info("hidden_states", kinds.FLOAT, [*batch_tokens, width]),
            nodes.tensor_info("attention_mask", kinds.INT64, batch_tokens),
            nodes.tensor_info("layer", kinds.INT64, []),
            nodes.tensor_info("budget", kinds.FLOAT, []),
        ],
        outputs=[
            nodes.tensor_info("logits", kinds.FLOAT, ["batch", NUM_ACTIONS]),
            nodes.tensor_info("action", kinds.INT64, ["batch"]),
        ],
        facts=_facts(routers),
    )


def routers_digest(routers: ExportableRouters) -> str:
    """Return 16 hexadecimal digits that change with anything that changes a decision."""
    rest = [
        routers.config.to_dict(),
        routers.shrinkage,
        routers.calibration.to_dict(),
        list(routers.protect),
    ]
    return content_digest({**routers.heads.state_dict(), "bias": routers.bias}, rest)


def _logits(nodes: Nodes, routers: ExportableRouters) -> str:
    prompt = PooledPrompt(nodes)
    parts = [("windows", routers.heads.windows, prompt.window_means(routers.config.num_windows))]
    if routers.heads.last is not None:
        parts.append(("last", routers.heads.last, prompt.last_mean()))
    heads = [_bottleneck(nodes, part, weights.tensors(), views) for part, weights, views in parts]
    trained = nodes.add("Add", *heads) if len(heads) == 2 else heads[0]
    bias = _of_layer(nodes, "bias", routers.bias)
    scaled = nodes.add("Mul", trained, nodes.floats("shrinkage", routers.shrinkage))
    penalty = _penalty(nodes, routers.calibration)
    price = nodes.add("Mul", penalty, nodes.floats("visits", np.arange(NUM_ACTIONS)))
    priced = nodes.add("Sub", nodes.add("Add", bias, scaled), price)
    return nodes.unless_out_of_range(priced, *routers.calibration.range, name="logits")


def _actions(nodes: Nodes, routers: ExportableRouters, logits: str) -> None:
    best = nodes.add("ArgMax", logits, axis=1, keepdims=0)
    protected = np.zeros(routers.config.num_layers, dtype=bool)
    protected[list(routers.protect)] = True
    executed = nodes.add("Gather", nodes.constant("protected", protected, np.bool_), "layer")
    action = nodes.add("Where", executed, nodes.integers("execute", int(Action.EXECUTE)), best)
    total = nodes.add("ReduceSum", logits, nodes.integers("axis_1", [1]), keepdims=0)
    invalid = nodes.integers("invalid", INVALID)
    nodes.add("Where", nodes.add("IsNaN", total), invalid, action, name="action")


def _penalty(nodes: Nodes, calibration: Calibration) -> str:
    """Look up lambda as `Calibration.penalty_for` does: nearest depth in float32, the first of equals."""
    difference = nodes.add("Sub", nodes.floats("depths", calibration.depths), "budget")
    nearest = nodes.add("ArgMin", nodes.add("Abs", difference), axis=0, keepdims=0)
    return nodes.add("Gather", nodes.floats("lambdas", calibration.lambdas), nearest)


def _of_layer(nodes: Nodes, name: str, stacked: Tensor) -> str:
    return nodes.add("Gather", nodes.floats(name, host_array(stacked)), "layer")


def _bottleneck(nodes: Nodes, part: str, tensors: Mapping[str, Tensor], views: str) -> str:
    weights = {name: _of_layer(nodes, f"{part}.{name}", tensor) for name, tensor in tensors.items()}
    inner = nodes.gelu(nodes.dense(views, weights["first_weight"], weights["first_bias"]))
    mean = nodes.add("ReduceMean", inner, nodes.integers("axis_1", [1]), keepdims=0)
    return nodes.dense(mean, weights["second_weight"], weights["second_bias"])


def _facts(routers: ExportableRouters) -> dict[str, Any]:
    config = routers.config
    return {
        "schema_version": ONNX_SCHEMA_VERSION,
        "kind": "routers",
        "fingerprint": fingerprint_digest(routers.fingerprint),
        "routers_digest": routers_digest(routers),
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_windows": config.num_windows,
        "last_token": config.last_token,
        "action_order": [action.name.lower() for action in Action],
        "shrinkage": routers.shrinkage,
        # The layers whose decision depends on the prompt.
        "varying_layers": list(routers.heads.varying_layers()),
        "protect": list(routers.protect),
        "calibration": routers.calibration.to_dict(),
    }
