"""The ONNX file of exits: what it computes, and the heads that run it."""

import copy

import numpy as np
import onnxruntime
import pytest
import torch

from dynadepth import unwrap_model, wrap_model
from dynadepth.checkpoints.save_load import export_policy, load_policy, save_policy
from dynadepth.errors import CheckpointError, ExportError
from dynadepth.exits.dial import Dial
from dynadepth.exits.exit_heads import TrainedHead
from dynadepth.onnx import exit_heads
from dynadepth.onnx.exit_graph import build_exits_onnx
from dynadepth.onnx.exit_heads import onnx_exit_heads
from dynadepth.onnx.menu_graph import build_menu_onnx
from dynadepth.onnx.session import graph_digest
from tests.tiny import random_prompts, tiny_model
from tests.tiny_exits import random_exits, random_weights
from tests.tiny_menus import random_menu


@pytest.fixture(scope="module")
def trained():
    return random_exits()


@pytest.fixture(scope="module")
def content(trained):
    return build_exits_onnx(trained)


def states(rows=12, seed=0):
    return 3 * torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed))


def test_its_outputs_are_torchs(trained, content):
    session = onnxruntime.InferenceSession(content)
    given = states()
    for head in trained.heads:
        layer = head.layer_idx
        leaves, score, lens = session.run(
            [f"exit_{layer}", f"score_{layer}", f"lens_{layer}"],
            {"hidden_states": given.numpy(), "threshold": np.array(0.25, dtype=np.float32)},
        )
        np.testing.assert_allclose(score, head.score(given), atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(lens, head.lens(given), atol=1e-5, rtol=1e-5)
        assert (leaves == (score >= 0.25)).all()
        assert 0 < leaves.sum() < len(leaves)


def test_what_is_no_number_does_not_leave(content):
    given = states(3)
    given[1, 0] = torch.nan
    session = onnxruntime.InferenceSession(content)
    feed = {"hidden_states": given.numpy(), "threshold": np.array(-1e9, dtype=np.float32)}
    assert session.run(["exit_1"], feed)[0].tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_heads_do_what_torchs_do(trained, content, dtype):
    dial = Dial(0.0, fidelity=1.0)
    given = states().to(dtype)
    for ours, head in zip(onnx_exit_heads(content, dial), trained.heads, strict=True):
        torchs = TrainedHead(head, dial)
        for threshold in (-2.0, 0.0, 2.0):
            dial.threshold = threshold
            assert torch.equal(ours.leaves(given), torchs.leaves(given))
        final = ours.final(given)
        assert final.dtype == dtype
        torch.testing.assert_close(final, torchs.final(given))


def test_a_copied_head_has_the_copied_dial(content):
    dial = Dial(0.0, fidelity=1.0)
    heads, other = copy.deepcopy((onnx_exit_heads(content, dial), dial))
    other.threshold = 1e9
    assert not heads[0].leaves(states()).any()
    assert dial.threshold == 0.0


def test_generation_is_the_same_with_either(tmp_path):
    model = tiny_model("llama").float()
    trained = random_exits(model)
    save_policy(tmp_path, trained)
    export_policy(trained, tmp_path / "routers.onnx")
    prompt = torch.from_numpy(random_prompts([7])[0])[None]
    found = []
    for backend in ("torch", "onnx"):
        wrap_model(model, budget=0.7, routers=tmp_path, router_backend=backend)
        found.append(
            model.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False).tolist()
        )
        assert model.dynadepth.exit_totals.left
        unwrap_model(model)
    assert found[0] == found[1]


def test_a_file_of_others_is_refused(trained, content, tmp_path):
    dial = Dial(0.0, fidelity=1.0)
    with pytest.raises(CheckpointError, match="kind 'menu'"):
        onnx_exit_heads(build_menu_onnx(random_menu()), dial)
    other = random_exits(heads=(random_weights(1, seed=9), random_weights(2, seed=9)))
    with pytest.raises(CheckpointError, match="other routers"):
        onnx_exit_heads(content, dial, digest=graph_digest(build_exits_onnx(other)))
    save_policy(tmp_path, trained)
    export_policy(other, tmp_path / "routers.onnx")
    with pytest.raises(CheckpointError, match="other routers"):
        load_policy(tmp_path).exits(budget=0.8, backend="onnx")


def test_a_graph_that_differs_is_not_written(trained, tmp_path, monkeypatch):
    other = random_exits(heads=(random_weights(1, seed=9), random_weights(2, seed=9)))
    monkeypatch.setattr(exit_heads, "build_exits_onnx", lambda _: build_exits_onnx(other))
    with pytest.raises(ExportError, match="nothing was written"):
        export_policy(trained, tmp_path / "routers.onnx")
    assert not list(tmp_path.iterdir())
