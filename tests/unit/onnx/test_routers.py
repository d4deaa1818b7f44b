"""The ONNX file and its policy: what is written, what is refused."""

import copy
import importlib
import math
import pickle
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import dynadepth.onnx.router_policy
from dynadepth.errors import BudgetError, CheckpointError, ConfigError, ExportError
from dynadepth.onnx.router_graph import build_onnx, routers_digest
from dynadepth.onnx.router_policy import OnnxRouterPolicy, export_onnx
from dynadepth.policies.calibration import Calibration
from tests.tiny_routers import random_routers, seen


@pytest.fixture(scope="module")
def routers():
    return random_routers(protect=(1,), base_model="org/base")


@pytest.fixture(scope="module")
def content(routers):
    return build_onnx(routers)


def batch(rows=4, tokens=6, seed=0):
    hidden = torch.randn(rows, tokens, 32, generator=torch.Generator().manual_seed(seed))
    return hidden, torch.ones(rows, tokens, dtype=torch.bool)


def test_the_file_is_one_graph_of_the_stated_opset_and_nothing_else(routers, tmp_path):
    export_onnx(routers, tmp_path / "routers.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["routers.onnx"]
    model = onnx.load(tmp_path / "routers.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(item.domain, item.version) for item in model.opset_import] == [("", 18)]
    shapes = {
        item.name: (
            onnx.TensorProto.DataType.Name(item.type.tensor_type.elem_type),
            [size.dim_param or size.dim_value for size in item.type.tensor_type.shape.dim],
        )
        for item in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "hidden_states": ("FLOAT", ["batch", "tokens", 32]),
        "attention_mask": ("INT64", ["batch", "tokens"]),
        "layer": ("INT64", []),
        "budget": ("FLOAT", []),
        "logits": ("FLOAT", ["batch", 3]),
        "action": ("INT64", ["batch"]),
    }


def test_nothing_tells_of_the_machine_that_made_it(routers, content):
    for text in (str(Path.cwd()), str(Path.home()), "/home", "site-packages", ".py", "stack_trace"):
        assert text.encode() not in content, text
    model = onnx.load_from_string(content)
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert not any(item.external_data for item in model.graph.initializer)
    assert not model.doc_string
    assert content == build_onnx(routers)


def test_the_metadata_say_what_it_is(routers, content):
    facts = {item.key: item.value for item in onnx.load_from_string(content).metadata_props}
    assert facts["dynadepth.schema_version"] == "1"
    assert facts["dynadepth.kind"] == '"routers"'
    assert facts["dynadepth.num_layers"] == "4"
    assert facts["dynadepth.num_windows"] == "8"
    assert facts["dynadepth.action_order"] == '["skip", "execute", "repeat"]'
    assert facts["dynadepth.protect"] == "[1]"
    assert facts["dynadepth.routers_digest"] == f'"{routers_digest(routers)}"'
    assert '"depths": [0.5, 0.7, 0.9, 1.1]' in facts["dynadepth.calibration"]
    assert len(facts["dynadepth.fingerprint"]) == 18


@pytest.mark.parametrize(
    "change",
    [
        {"bias": torch.zeros(4, 3)},
        {"shrinkage": 0.25},
        {"protect": ()},
        {"seed": 3},
        {"calibration": Calibration(lambdas=(0.0,), depths=(1.0,), lowest=1.0, highest=1.0)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_digest_changes_with_every_part_of_a_decision(routers, change):
    same = random_routers(protect=(1,), base_model="elsewhere")
    assert routers_digest(same) == routers_digest(routers)
    assert routers_digest(random_routers(**{"protect": (1,), **change})) != routers_digest(routers)


def test_an_export_that_does_not_decide_as_torch_writes_nothing(routers, tmp_path, monkeypatch):
    (tmp_path / "routers.onnx").write_bytes(b"former")
    other = build_onnx(random_routers(protect=(1,), seed=4))
    monkeypatch.setattr(dynadepth.onnx.router_policy, "build_onnx", lambda _: other)
    with pytest.raises(ExportError, match=r"differs from torch by .* nothing was written"):
        export_onnx(routers, tmp_path / "routers.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["routers.onnx"]
    assert (tmp_path / "routers.onnx").read_bytes() == b"former"


def test_an_export_that_takes_any_budget_writes_nothing(routers, tmp_path, monkeypatch):
    model = onnx.load_from_string(build_onnx(routers))
    for item in model.graph.initializer:
        if item.name == "highest_budget":
            item.CopyFrom(onnx.numpy_helper.from_array(np.float32(99.0), item.name))
    monkeypatch.setattr(
        dynadepth.onnx.router_policy, "build_onnx", lambda _: model.SerializeToString()
    )
    with pytest.raises(ExportError, match="accepts a budget out of range; nothing was written"):
        export_onnx(routers, tmp_path / "routers.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_says_how_to_get_it(routers, content, tmp_path, monkeypatch, package):
    genuine = importlib.import_module

    def without(name, *rest):
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return genuine(name, *rest)

    monkeypatch.setattr("dynadepth.onnx.graph_builder.import_module", without)
    text = rf"{package} is not installed; .*`pip install dynadepth\[onnx\]`"
    with pytest.raises((ExportError, ConfigError), match=text):
        export_onnx(routers, tmp_path / "routers.onnx")
    assert list(tmp_path.iterdir()) == []
    if package == "onnxruntime":
        with pytest.raises(ConfigError, match=text):
            OnnxRouterPolicy(content, 0.8)
    else:
        assert OnnxRouterPolicy(content, 0.8).num_layers == 4


def test_the_policy_is_a_policy(content):
    policy = OnnxRouterPolicy(content, 0.8)
    assert (policy.num_layers, policy.decision_layers) == (4, (0, 1, 2, 3))
    assert policy.initial_plans(2).tolist() == [[1] * 4] * 2
    hidden, mask = batch()
    actions = policy.decide(2, hidden, seen(mask))
    assert actions.shape == (4, 1)
    assert actions.dtype == np.uint8
    for again in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert (again.decide(2, hidden, seen(mask)) == actions).all()
    assert (policy.decide(1, hidden, seen(mask)) == 1).all()
    half = policy.decide(2, hidden.to(torch.bfloat16).requires_grad_(), seen(mask))
    assert half.shape == (4, 1)


def test_without_deviation_the_plan_is_static():
    routers = random_routers(shrinkage=0.0, protect=(2,))
    policy = OnnxRouterPolicy(build_onnx(routers), 0.7)
    assert policy.decision_layers == ()
    expected = routers.policy(0.7).initial_plans(3)
    expected[:, 2] = 1
    assert (policy.initial_plans(3) == expected).all()


@pytest.mark.parametrize("budget", [-1, 0, math.nan, 3, "0.8", True])
def test_a_budget_out_of_range_is_refused(content, budget):
    with pytest.raises(BudgetError, match=r"within the calibrated range, 0\.5 to 1\.0"):
        OnnxRouterPolicy(content, budget)


def test_states_of_another_model_are_refused(content):
    policy = OnnxRouterPolicy(content, 0.8)
    hidden, mask = batch()
    with pytest.raises(ConfigError, match=r"states of shape \(4, 6, 31\); these routers read"):
        policy.decide(0, hidden[..., :31], seen(mask))
    hidden[2, 3] = math.nan
    with pytest.raises(ConfigError, match="states entering layer 0 hold NaN"):
        policy.decide(0, hidden, seen(mask))
    mask[2, 3] = False
    assert policy.decide(0, hidden, seen(mask)).shape == (4, 1)


def test_a_file_that_is_none_is_refused(content, tmp_path):
    file = tmp_path / "routers.onnx"
    with pytest.raises(FileNotFoundError, match=r"there is no .*make it with `dynadepth export`"):
        OnnxRouterPolicy(file, 0.8)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"routers\.onnx cannot be read by onnxruntime"):
        OnnxRouterPolicy(file, 0.8)
    model = onnx.load_from_string(content)
    by_key = {item.key: item for item in model.metadata_props}
    by_key["dynadepth.schema_version"].value = "7"
    with pytest.raises(CheckpointError, match="schema version 7; this dynadepth reads up to 1"):
        OnnxRouterPolicy(model.SerializeToString(), 0.8)
    by_key["dynadepth.schema_version"].value = "{"
    with pytest.raises(CheckpointError, match="damaged metadata"):
        OnnxRouterPolicy(model.SerializeToString(), 0.8)
    by_key["dynadepth.schema_version"].value = "1"
    # Files of earlier builds do not say of which kind they are.
    model.metadata_props.remove(by_key["dynadepth.kind"])
    assert OnnxRouterPolicy(model.SerializeToString(), 0.8).num_layers == 4
    model.metadata_props.remove(by_key["dynadepth.varying_layers"])
    with pytest.raises(CheckpointError, match="lacks the property 'varying_layers'; export it"):
        OnnxRouterPolicy(model.SerializeToString(), 0.8)
    del model.metadata_props[:]
    with pytest.raises(CheckpointError, match="an ONNX file, but not one of routers"):
        OnnxRouterPolicy(model.SerializeToString(), 0.8)
    with pytest.raises(CheckpointError, match="made from other routers"):
        OnnxRouterPolicy(content, 0.8, digest="0" * 16)


def test_a_layer_beyond_the_last_is_an_error_of_the_runtime(content):
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    hidden, mask = batch()
    feed = {
        "hidden_states": hidden.numpy(),
        "attention_mask": mask.numpy().astype(np.int64),
        "budget": np.asarray(0.8, dtype=np.float32),
    }
    assert session.run(["action"], {**feed, "layer": np.asarray(3)})[0].shape == (4,)
    with pytest.raises(Exception, match="out of data bounds|out of bounds"):
        session.run(None, {**feed, "layer": np.asarray(4)})
