"""A menu's ONNX file and its policy: what is written, what is refused."""

import copy
import importlib
import math
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

import dynadepth.onnx.menu_policy
from dynadepth.errors import BudgetError, CheckpointError, ConfigError, ExportError, PlanError
from dynadepth.onnx.graph_builder import Nodes
from dynadepth.onnx.menu_graph import build_menu_onnx
from dynadepth.onnx.menu_policy import OnnxMenuPolicy, export_menu_onnx, menu_digest
from dynadepth.onnx.router_graph import build_onnx
from dynadepth.onnx.router_policy import OnnxRouterPolicy
from dynadepth.onnx.session import graph_digest
from dynadepth.policies.calibration import Calibration
from dynadepth.policies.menu import Menu
from dynadepth.policies.menu_policy import MenuPolicy
from dynadepth.policies.prompt_batch import PromptBatch
from tests.tiny_menus import PLANS, random_head, random_menu, told
from tests.tiny_routers import CALIBRATION, random_routers

TWO_STEPS = {"layers": (2, 4), "windows": (3, 0), "inner": (0, 8)}


@pytest.fixture(scope="module")
def trained():
    return random_menu(protect=(1,), base_model="org/base")


@pytest.fixture(scope="module")
def content(trained):
    return build_menu_onnx(trained)


@pytest.fixture(scope="module")
def two_steps():
    return random_menu(**TWO_STEPS)


def batch(rows=4, tokens=6, seed=0):
    hidden = torch.randn(rows, tokens, 48, generator=torch.Generator().manual_seed(seed))
    return hidden, torch.ones(rows, tokens, dtype=torch.bool)


def facts_of(content):
    return {item.key: item.value for item in onnx.load_from_string(content).metadata_props}


INPUTS = {
    "hidden_states": ("FLOAT", ["batch", "tokens", 48]),
    "attention_mask": ("INT64", ["batch", "tokens"]),
    "budget": ("FLOAT", []),
    "mix": ("FLOAT", ["batch"]),
}
LATER_INPUTS = {"step": ("INT64", []), "earlier": ("INT64", ["batch"])}
OUTPUTS = {
    "plan": ("INT64", ["batch"]),
    "scores": ("FLOAT", ["batch", 6]),
    "actions": ("UINT8", ["batch", 6]),
}


@pytest.mark.parametrize(
    ("settings", "inputs"),
    [({}, INPUTS), (TWO_STEPS, {**INPUTS, **LATER_INPUTS})],
    ids=["one step", "two steps"],
)
def test_the_file_is_one_graph_of_the_stated_opset_and_nothing_else(settings, inputs, tmp_path):
    export_menu_onnx(random_menu(**settings), tmp_path / "routers.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["routers.onnx"]
    model = onnx.load(tmp_path / "routers.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(item.domain, item.version) for item in model.opset_import] == [("", 18)]

    def shapes(items):
        return {
            item.name: (
                onnx.TensorProto.DataType.Name(item.type.tensor_type.elem_type),
                [size.dim_param or size.dim_value for size in item.type.tensor_type.shape.dim],
            )
            for item in items
        }

    assert shapes(model.graph.input) == inputs
    assert shapes(model.graph.output) == OUTPUTS


def test_the_plans_are_a_part_of_the_graph(content):
    model = onnx.load_from_string(content)
    (table,) = (item for item in model.graph.initializer if item.name == "plans")
    plans = onnx.numpy_helper.to_array(table)
    assert plans.dtype == np.uint8
    assert (plans == PLANS).all()
    (reader,) = (node for node in model.graph.node if "plans" in node.input)
    assert (reader.op_type, list(reader.output)) == ("Gather", ["actions"])


def test_nothing_tells_of_the_machine_that_made_it(trained, content):
    for text in (str(Path.cwd()), str(Path.home()), "/home", "site-packages", ".py", "stack_trace"):
        assert text.encode() not in content, text
    model = onnx.load_from_string(content)
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert not any(item.external_data for item in model.graph.initializer)
    assert not model.doc_string
    assert content == build_menu_onnx(trained)


def test_the_metadata_say_what_it_is(trained, content):
    facts = facts_of(content)
    assert facts["dynadepth.schema_version"] == "1"
    assert facts["dynadepth.kind"] == '"menu"'
    assert facts["dynadepth.menu_digest"] == f'"{menu_digest(trained)}"'
    assert len(facts["dynadepth.fingerprint"]) == 18
    assert facts["dynadepth.num_layers"] == "6"
    assert facts["dynadepth.hidden_size"] == "48"
    assert facts["dynadepth.layers"] == "[2]"
    assert facts["dynadepth.windows"] == "[0]"
    assert facts["dynadepth.plans"].startswith('["111111", "111101", ')
    assert facts["dynadepth.action_order"] == '["skip", "execute", "repeat"]'
    assert facts["dynadepth.protect"] == "[1]"
    assert '"depths": [0.5, 0.7, 0.9, 1.1]' in facts["dynadepth.calibration"]
    for part in ("1103515245^(i+1) mod p", "48271 * h", "p = 2^31 - 1"):
        assert part in facts["dynadepth.mix"]
    two = facts_of(build_menu_onnx(random_menu(**TWO_STEPS)))
    assert (two["dynadepth.layers"], two["dynadepth.windows"]) == ("[2, 4]", "[3, 0]")


def test_a_menu_of_a_real_size_is_a_small_file():
    rng = np.random.default_rng(0)
    plans = np.ones((16, 28), dtype=np.uint8)
    plans[:, 20:] = np.unique(rng.integers(0, 3, (64, 8)), axis=0)[:16]
    content = build_menu_onnx(random_menu(layers=(20,), hidden_size=1536, plans=plans))
    assert len(content) < 5_000_000
    # The weights, and little else.
    assert len(content) - 16 * 1536 * 4 < 20_000


@pytest.mark.parametrize(
    "change",
    [
        {"protect": ()},
        {"seed": 3},
        {"calibration": Calibration(lambdas=(0.0,), depths=(1.0,), lowest=1.0, highest=1.0)},
        {"menu": Menu([*PLANS[:5], [1, 1, 1, 1, 2, 0]], random_menu().menu.heads)},
        {"menu": Menu(PLANS[::-1], random_menu().menu.heads)},
        {"menu": Menu(PLANS, (random_head(1, 0),))},
        {"inner": (4,)},
        {"windows": (3,)},
        {"layers": (2, 4)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_digest_changes_with_every_part_of_a_decision(trained, change):
    same = random_menu(protect=(1,), base_model="elsewhere", fingerprint={"other": 1})
    assert menu_digest(same) == menu_digest(trained)
    assert menu_digest(random_menu(**{"protect": (1,), **change})) != menu_digest(trained)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        TWO_STEPS,
        {"plans": PLANS[:1]},
        {"calibration": Calibration(lambdas=(0.1,), depths=(1.0,), lowest=1.0, highest=1.0)},
    ],
    ids=["one step", "two steps", "one plan", "one entry"],
)
def test_what_is_exported_has_been_checked(settings, tmp_path):
    trained = random_menu(**settings)
    export_menu_onnx(trained, tmp_path / "routers.onnx")
    highest = trained.calibration.highest
    policy = OnnxMenuPolicy(
        tmp_path / "routers.onnx", highest, digest=graph_digest(build_menu_onnx(trained))
    )
    hidden, mask = batch()
    by_torch = MenuPolicy(trained.menu, trained.calibration.mix_for(highest))
    for layer in policy.decision_layers:
        actions = policy.decide(layer, hidden, told(mask, PLANS[[0] * 4]))
        assert (actions == by_torch.decide(layer, hidden, told(mask, PLANS[[0] * 4]))).all()


def changed(content, **values):
    """Return a file with other values for some of its initializers."""
    model = onnx.load_from_string(content)
    for item in model.graph.initializer:
        if item.name in values:
            former = onnx.numpy_helper.to_array(item)
            value = np.broadcast_to(np.asarray(values[item.name], former.dtype), former.shape)
            item.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(value), item.name))
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"heads.0.weight": 0.1}, r"differs from torch by .* at step 0 .* nothing was written"),
        ({"heads.1.bias": 0.1}, r"differs from torch by .* at step 1 .* nothing was written"),
        ({"lambdas": 50.0}, r"and in \d plans; nothing was written"),
        ({"open": True}, r"and in \d plans; nothing was written"),
        ({"highest_budget": 99.0}, "accepts a budget out of range; nothing was written"),
    ],
    ids=lambda part: next(iter(part)) if isinstance(part, dict) else "",
)
def test_an_export_that_does_not_decide_as_torch_writes_nothing(
    two_steps, tmp_path, monkeypatch, values, message
):
    (tmp_path / "routers.onnx").write_bytes(b"former")
    other = changed(build_menu_onnx(two_steps), **values)
    monkeypatch.setattr(dynadepth.onnx.menu_policy, "build_menu_onnx", lambda _: other)
    with pytest.raises(ExportError, match=message):
        export_menu_onnx(two_steps, tmp_path / "routers.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["routers.onnx"]
    assert (tmp_path / "routers.onnx").read_bytes() == b"former"


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_says_how_to_get_it(trained, content, tmp_path, monkeypatch, package):
    genuine = importlib.import_module

    def without(name, *rest):
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return genuine(name, *rest)

    monkeypatch.setattr("dynadepth.onnx.graph_builder.import_module", without)
    text = rf"{package} is not installed; .*`pip install dynadepth\[onnx\]`"
    with pytest.raises((ExportError, ConfigError), match=text):
        export_menu_onnx(trained, tmp_path / "routers.onnx")
    assert list(tmp_path.iterdir()) == []
    if package == "onnxruntime":
        with pytest.raises(ConfigError, match=text):
            OnnxMenuPolicy(content, 0.8)
    else:
        assert OnnxMenuPolicy(content, 0.8).num_layers == 6


def test_a_menu_that_edits_a_protected_layer_is_not_exported(trained):
    parts = {"menu": trained.menu, "calibration": CALIBRATION, "fingerprint": {}}
    with pytest.raises(ExportError, match=r"edit layers \[2, 4\], which are protected; search"):
        build_menu_onnx(SimpleNamespace(**parts, protect=(0, 2, 4)))


def test_a_graph_too_large_for_one_file_is_refused(trained, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("more than 2 GiB")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(ExportError, match="dynadepth_menu for 6 layers .* more than 2 GiB; train"):
        build_menu_onnx(trained)


def test_two_constants_of_one_name_are_refused():
    nodes = Nodes()
    assert nodes.floats("nan", np.nan) == nodes.floats("nan", np.nan) == "nan"
    for value, dtype in ((1.0, np.float32), (np.nan, np.float64)):
        with pytest.raises(ExportError, match="two constants 'nan'; expected one value for each"):
            nodes.constant("nan", value, dtype)


def test_the_policy_is_a_policy(content):
    policy = OnnxMenuPolicy(content, 0.8)
    assert (policy.num_layers, policy.decision_layers) == (6, (2,))
    assert policy.initial_plans(2).tolist() == [[1] * 6] * 2
    hidden, mask = batch()
    actions = policy.decide(2, hidden, told(mask))
    assert actions.shape == (4, 4)
    assert actions.dtype == np.uint8
    for again in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert (again.decide(2, hidden, told(mask)) == actions).all()
    half = policy.decide(2, hidden.to(torch.bfloat16).requires_grad_(), told(mask))
    assert half.shape == (4, 4)


def test_what_all_plans_begin_with_is_in_force_before_the_decision():
    plans = np.array([[0, 2, 1, 1, 1, 1], [0, 2, 1, 1, 1, 0]])
    trained = random_menu(plans=plans)
    by_onnx = OnnxMenuPolicy(build_menu_onnx(trained), 0.8).initial_plans(3)
    assert by_onnx.tolist() == [[0, 2, 1, 1, 1, 1]] * 3
    assert (by_onnx == MenuPolicy(trained.menu).initial_plans(3)).all()


def test_tokens_are_needed_where_two_penalties_are_mixed(trained, content):
    hidden, mask = batch()
    nameless = PromptBatch(mask, np.ones((4, 6), np.uint8))
    with pytest.raises(ConfigError, match="tells prompts apart by their tokens"):
        OnnxMenuPolicy(content, 0.8).decide(2, hidden, nameless)
    by_torch = MenuPolicy(trained.menu, CALIBRATION.mix_for(0.5))
    actions = OnnxMenuPolicy(content, 0.5).decide(2, hidden, nameless)
    assert (actions == by_torch.decide(2, hidden, nameless)).all()


def test_where_a_callers_limits_leave_no_plan_open_both_runtimes_refuse(two_steps):
    hidden, mask = batch(rows=6)
    limited = np.ones((6, 6), dtype=np.uint8)
    limited[:, :4] = [[1, 1, 1, 1], [1, 1, 0, 1], [1, 1, 2, 0], [1, 1, 1, 1], [1, 1, 0, 1], [1] * 4]
    by_torch = MenuPolicy(two_steps.menu, CALIBRATION.mix_for(0.8))
    by_onnx = OnnxMenuPolicy(build_menu_onnx(two_steps), 0.8)
    for layer in (2, 4):
        given = told(mask, limited)
        actions = by_onnx.decide(layer, hidden, given)
        assert (actions == by_torch.decide(layer, hidden, given)).all()
    # As `max_depth` leaves the fifth plan, and `protect` the third.
    for stray in ([1, 1, 1, 0], [1, 0, 0, 1]):
        limited[3, :4] = stray
        for policy in (by_torch, by_onnx):
            text = "no plan of the menu agrees with what row 3 .* before layer 4: .* train the menu"
            with pytest.raises(PlanError, match=text):
                policy.decide(4, hidden, told(mask, limited))
            # At the first step nothing has been chosen yet.
            assert policy.decide(2, hidden, told(mask, limited)).shape == (6, 2)


@pytest.mark.parametrize("budget", [-1, 0, math.nan, 3, "0.8", True])
def test_a_budget_out_of_range_is_refused(content, budget):
    with pytest.raises(BudgetError, match=r"within the calibrated range, 0\.5 to 1\.0"):
        OnnxMenuPolicy(content, budget)


def test_states_of_another_model_are_refused(content):
    policy = OnnxMenuPolicy(content, 0.8)
    hidden, mask = batch()
    with pytest.raises(ConfigError, match="layer 2 has states of width 47; this menu reads width"):
        policy.decide(2, hidden[..., :47], told(mask))
    with pytest.raises(PlanError, match=r"asked to decide layer 3; it decides at layers \[2\]"):
        policy.decide(3, hidden, told(mask))
    hidden[2, 5] = math.nan
    with pytest.raises(ConfigError, match="states entering layer 2 hold NaN"):
        policy.decide(2, hidden, told(mask))
    mask[2, 5] = False
    assert policy.decide(2, hidden, told(mask)).shape == (4, 4)


def test_a_file_that_is_none_is_refused(content, tmp_path):
    file = tmp_path / "routers.onnx"
    with pytest.raises(FileNotFoundError, match=r"there is no .*make it with `dynadepth export`"):
        OnnxMenuPolicy(file, 0.8)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"routers\.onnx cannot be read by onnxruntime"):
        OnnxMenuPolicy(file, 0.8)
    with pytest.raises(CheckpointError, match="made from other routers"):
        OnnxMenuPolicy(content, 0.8, digest="0" * 16)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("schema_version", "7", "schema version 7; this dynadepth reads up to 1: update"),
        ("schema_version", None, "an ONNX file, but not one of routers; expected what"),
        ("schema_version", "{", "damaged metadata: .*; export it again"),
        ("kind", '"forest"', "of kind 'forest'; expected 'menu': write it again"),
        ("menu_digest", None, "lacks the property 'menu_digest'; export it again"),
        ("plans", None, "lacks the property 'plans'; export it again"),
        ("plans", '["11"]', "damaged metadata: a plan names 2 layers"),
        ("plans", "3", "damaged metadata: .*; export it again"),
        ("plans", "[]", "damaged metadata: .*; export it again"),
        ("layers", '["a"]', "damaged metadata: .*; export it again"),
        ("calibration", "{}", "damaged metadata: .*; export it again"),
    ],
)
def test_metadata_that_are_not_a_menus_are_refused(content, name, value, message):
    model = onnx.load_from_string(content)
    (item,) = (entry for entry in model.metadata_props if entry.key == f"dynadepth.{name}")
    if value is None:
        model.metadata_props.remove(item)
    else:
        item.value = value
    with pytest.raises(CheckpointError, match=message):
        OnnxMenuPolicy(model.SerializeToString(), 0.8)


def test_a_file_of_the_other_kind_is_refused(content):
    with pytest.raises(CheckpointError, match="of kind 'menu'; expected 'routers': write it again"):
        OnnxRouterPolicy(content, 0.8)
    routers = build_onnx(random_routers())
    with pytest.raises(CheckpointError, match="of kind 'routers'; expected 'menu': write it again"):
        OnnxMenuPolicy(routers, 0.8)
