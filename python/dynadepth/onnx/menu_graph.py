"""The ONNX graph of a menu, node by node.

It is written by hand for the reasons given in `dynadepth.onnx.router_graph`.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from dynadepth.errors import ExportError
from dynadepth.models.fingerprint import fingerprint_digest
from dynadepth.onnx.graph_builder import (
    INVALID,
    ONNX_SCHEMA_VERSION,
    Nodes,
    PooledPrompt,
    content_digest,
    host_array,
)
from dynadepth.plans import Action, plan_text
from dynadepth.policies.calibration import Calibration
from dynadepth.policies.menu import Menu, MenuHead

__all__ = ["MIX_FORMULA", "ExportableMenu", "build_menu_onnx", "menu_digest"]

# `dynadepth.policies.prompt_batch.prompt_mix`, for authors of other runtimes.
MIX_FORMULA = (
    "t_0 .. t_(n-1) are the ids of the prompt's n real tokens, p = 2^31 - 1; "
    "h = sum over i of (t_i + 1) * 1103515245^(i+1) mod p; mix = floor((48271 * h mod p) / 2^7) / 2^24"
)


class ExportableMenu(Protocol):
    """What the graph is built from, such as a `dynadepth.checkpoints.trained_policy.TrainedMenu`."""

    @property
    def menu(self) -> Menu:
        """The plans and the heads that choose among them."""
        ...

    @property
    def calibration(self) -> Calibration:
        """The table from budget to penalties."""
        ...

    @property
    def protect(self) -> tuple[int, ...]:
        """Layers that always run once."""
        ...

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """The fingerprint of the base model."""
        ...


def build_menu_onnx(trained: ExportableMenu) -> bytes:
    """Return the ONNX file of a menu.

    Inputs:

    - `hidden_states` float[batch, tokens, hidden]: the states entering the layer of the step's head; the metadata's
      `layers` names one layer for each step.
    - `attention_mask` int64[batch, tokens]: 1 for the prompt's real tokens.
    - `budget` float[]: a mean depth over prompts.
    - `mix` float[batch]: the number in [0, 1) of each prompt, by the formula in the metadata's `mix`.
    - `step` int64[], `earlier` int64[batch], only if the menu has several heads: the index of the step, and the plan
      chosen in the previous step; at step 0 `earlier` may hold anything.

    Outputs:

    - `plan` int64[batch]: among the plans that agree with the earlier one up to the step's layer, the index of the plan
      with the highest score - penalty * depth, ties to the lowest index. The penalty is `deep` where mix < share, else
      `shallow`, as `Calibration.mix_for` gives them for the budget in float32. -1 where scores are NaN, where the
      budget is out of the calibrated range, or where `earlier` is not the index of a plan at a later step.
    - `scores` float[batch, K]: the scores of all plans, without the price; NaN if the budget is out of range.
    - `actions` uint8[batch, num_layers]: the row of the initializer `plans` uint8[K, num_layers] that was chosen; where
      `plan` is -1, the row of plan 0, to be ignored. Layers before the step's are as they were decided.

    No plan edits a layer that `protect` names, so `protect` is only in the metadata. A step beyond the last is an error
    of the runtime (-1 is the last, by the rules of `Gather`).

    Args:
        trained: The menu and its calibration.

    Returns:
        A serialised model of opset 18, checked by onnx.

    Raises:
        ExportError: A plan edits a protected layer; or onnx is not installed, refuses the graph, or cannot write it as
            one file.
    """
    menu = trained.menu
    edited = sorted(set(trained.protect) & set(menu.edited_layers()))
    if edited:
        raise ExportError(
            f"plans of the menu edit layers {edited}, which are protected; search a menu with these layers protected"
        )
    nodes = Nodes()
    scores = nodes.unless_out_of_range(
        _scores(nodes, menu), *trained.calibration.range, name="scores"
    )
    _choice(nodes, menu, scores, _prices(nodes, trained.calibration))
    kinds, batch_tokens = nodes.kinds, ["batch", "tokens"]
    inputs = [
        nodes.tensor_info("hidden_states", kinds.FLOAT, [*batch_tokens, menu.hidden_size]),
        nodes.tensor_info("attention_mask", kinds.INT64, batch_tokens),
        nodes.tensor_info("budget", kinds.FLOAT, []),
        nodes.tensor_info("mix", kinds.FLOAT, ["batch"]),
    ]
    if len(menu.heads) > 1:
        inputs.append(nodes.tensor_info("step", kinds.INT64, []))
        inputs.append(nodes.tensor_info("earlier", kinds.INT64, ["batch"]))
    return nodes.file(
        "dynadepth_menu",
        inputs=inputs,
        outputs=[
            nodes.tensor_info("plan", kinds.INT64, ["batch"]),
            nodes.tensor_info("scores", kinds.FLOAT, ["batch", len(menu.plans)]),
            nodes.tensor_info("actions", kinds.UINT8, ["batch", menu.num_layers]),
        ],
        facts=_facts(trained),
    )


def menu_digest(trained: ExportableMenu) -> str:
    """Return a digest of 16 hexadecimal digits over everything that affects a decision."""
    menu = trained.menu
    rest = [
        [plan_text(plan) for plan in menu.plans],
        [[head.layer_idx, head.num_windows] for head in menu.heads],
        trained.calibration.to_dict(),
        list(trained.protect),
    ]
    return content_digest(menu.state_dict(), rest)


def _scores(nodes: Nodes, menu: Menu) -> str:
    prompt = PooledPrompt(nodes)
    last = nodes.add("Unsqueeze", prompt.last_state(), nodes.integers("axis_1", [1]))
    read = {
        number: nodes.add("Concat", prompt.window_means(number), last, axis=1) if number else last
        for number in sorted({head.num_windows for head in menu.heads})
    }
    flat = {number: nodes.add("Flatten", views, axis=1) for number, views in read.items()}
    # All heads are computed and one is used; they are too small for that to matter.
    every = [
        _head(nodes, f"heads.{step}", head, flat[head.num_windows])
        for step, head in enumerate(menu.heads)
    ]
    if len(every) == 1:
        return every[0]
    axis_0 = nodes.integers("axis_0", [0])
    stacked = nodes.add("Concat", *(nodes.add("Unsqueeze", one, axis_0) for one in every), axis=0)
    return nodes.add("Gather", stacked, "step", axis=0)


def _head(nodes: Nodes, name: str, head: MenuHead, flat: str) -> str:
    tensors = {
        part: nodes.floats(f"{name}.{part}", host_array(tensor.t()))
        for part, tensor in head.tensors().items()
    }
    if "inner_weight" in tensors:
        flat = nodes.gelu(nodes.dense(flat, tensors["inner_weight"], tensors["inner_bias"]))
    return nodes.dense(flat, tensors["weight"], tensors["bias"])


def _prices(nodes: Nodes, calibration: Calibration) -> str:
    """Give each prompt its penalty as `Calibration.mix_for` and `MenuPolicy` do. Shape (batch,), float32."""
    add, zero = nodes.add, nodes.integers("integer_0", 0)
    depths, lambdas = (
        nodes.floats("depths", calibration.depths),
        nodes.floats("lambdas", calibration.lambdas),
    )
    below = add("Cast", add("Less", depths, "budget"), to=nodes.kinds.INT64)
    last = nodes.integers("last_entry", len(calibration.depths) - 1)
    after = add("Min", add("ReduceSum", below, keepdims=0), last)
    before = add("Max", add("Sub", after, nodes.integers("integer_1", 1)), zero)
    low = add("Gather", depths, before)
    gap = add("Sub", add("Gather", depths, after), low)
    part = add("Div", add("Sub", "budget", low), gap)
    wide = add("Greater", gap, nodes.floats("zero", 0.0))
    share = add("Where", wide, part, nodes.floats("one", 1.0), name="share")
    deep = add("Gather", lambdas, after, name="deep")
    shallow = add("Gather", lambdas, before, name="shallow")
    return add("Where", add("Less", "mix", share), deep, shallow, name="prices")


def _choice(nodes: Nodes, menu: Menu, scores: str, prices: str) -> None:
    add = nodes.add
    axis_1, zero = nodes.integers("axis_1", [1]), nodes.integers("integer_0", 0)
    depths = nodes.floats("plan_depths", menu.depths)
    priced = add("Sub", scores, add("Mul", add("Unsqueeze", prices, axis_1), depths))
    undecided = add("Cast", add("IsNaN", scores), to=nodes.kinds.INT64)
    undecided = add("Cast", add("ReduceMax", undecided, axis_1, keepdims=0), to=nodes.kinds.BOOL)
    if len(menu.heads) > 1:
        # At step 0 all plans agree, so the content of `earlier` does not matter.
        opened = np.stack([menu.open_plans(step, menu.plans) for step in range(len(menu.heads))])
        known = add(
            "Min",
            add("Max", "earlier", zero),
            nodes.integers("last_plan", len(menu.plans) - 1),
        )
        agreeing = add("Gather", nodes.constant("open", opened, np.bool_), "step", axis=0)
        priced = add(
            "Where",
            add("Gather", agreeing, known, axis=0),
            priced,
            nodes.floats("minus_infinity", -np.inf),
        )
        later = add("Not", add("Equal", "step", zero))
        stray = add("Not", add("Equal", "earlier", known))
        undecided = add("Or", undecided, add("And", later, stray))
    best = add("ArgMax", priced, axis=1, keepdims=0)
    plan = add("Where", undecided, nodes.integers("invalid", INVALID), best, name="plan")
    table = nodes.constant("plans", menu.plans, np.uint8)
    add("Gather", table, add("Max", plan, zero), axis=0, name="actions")


def _facts(trained: ExportableMenu) -> dict[str, Any]:
    menu = trained.menu
    return {
        "schema_version": ONNX_SCHEMA_VERSION,
        "kind": "menu",
        "fingerprint": fingerprint_digest(trained.fingerprint),
        "menu_digest": menu_digest(trained),
        "num_layers": menu.num_layers,
        "hidden_size": menu.hidden_size,
        # Of the head of each step.
        "layers": list(menu.decision_layers),
        "windows": [head.num_windows for head in menu.heads],
        # One digit for each layer.
        "plans": [plan_text(plan) for plan in menu.plans],
        "action_order": [action.name.lower() for action in Action],
        "protect": list(trained.protect),
        "calibration": trained.calibration.to_dict(),
        "mix": MIX_FORMULA,
    }
