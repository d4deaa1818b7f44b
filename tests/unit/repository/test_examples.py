"""The examples run as they stand, with nothing but what they import."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dynadepth.onnx.menu_policy import export_menu_onnx
from dynadepth.plans import plan_text
from dynadepth.policies.menu_policy import MenuPolicy
from dynadepth.policies.prompt_batch import PromptBatch, prompt_mix
from dynadepth_search.data import questions
from dynadepth_search.data.tasks import Example, read_task
from tests.tiny_menus import PLANS, random_menu

EXAMPLE = Path(__file__).parents[3] / "examples/decide_with_onnx.py"
ONE_STEP, TWO_STEPS = {}, {"layers": (2, 4), "windows": (3, 0), "inner": (0, 8)}


@pytest.mark.parametrize("settings", [ONE_STEP, TWO_STEPS], ids=["one step", "two steps"])
def test_the_example_decides_without_torch_or_dynadepth(settings, tmp_path):
    trained = random_menu(**settings)
    export_menu_onnx(trained, tmp_path / "routers.onnx")
    hidden = torch.randn(9, 7, 48, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(9, 7, dtype=torch.bool)
    mask[1, :3], mask[2, 4:] = False, False
    tokens = torch.randint(0, 150_000, mask.shape, generator=torch.Generator().manual_seed(1))
    policy = MenuPolicy(trained.menu, trained.calibration.mix_for(0.8))
    plans = policy.initial_plans(9)
    states = {}
    for layer in policy.decision_layers:
        states[f"layer_{layer}"] = hidden.numpy()
        actions = policy.decide(layer, hidden, PromptBatch(mask, plans.copy(), tokens))
        plans[:, layer : layer + actions.shape[1]] = actions
        hidden = hidden.flip(1)
    np.savez(
        tmp_path / "prompts.npz",
        token_ids=tokens.numpy(),
        attention_mask=mask.numpy().astype(np.int64),
        **states,
    )
    program = (
        "import runpy, sys; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__'); "
        "assert not {'torch', 'dynadepth', 'transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", program, EXAMPLE, "routers.onnx", "prompts.npz", "0.8"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, text=True)
    texts = [plan_text(plan) for plan in PLANS]
    expected = [f"{texts.index(plan_text(plan))} {plan_text(plan)}" for plan in plans]
    assert result.stdout.splitlines() == expected
    # Prompts are charged both penalties, so their numbers count.
    mixed = prompt_mix(tokens, mask).numpy() < policy.penalty.share
    assert 0 < mixed.sum() < 9


def test_word_problems_become_task_files(tmp_path, monkeypatch):
    problems = [
        Example(f"{n} and {n}?", completion=f" {2 * n}", solution=f"{2 * n}") for n in range(9)
    ]
    monkeypatch.setattr(questions, "fetch_word_problems", lambda _cache: problems)
    monkeypatch.setattr(sys, "argv", ["word_problems.py", str(tmp_path / "new"), "5", "3"])
    runpy.run_path(str(EXAMPLE.parent / "word_problems.py"), run_name="__main__")
    train, heldout = (
        read_task(tmp_path / "new" / f"{name}.jsonl") for name in ("problems", "heldout-problems")
    )
    assert (train.kind, len(train.examples), len(heldout.examples)) == ("solution", 5, 3)
    assert {*train.examples, *heldout.examples} < {*problems}
    assert not {*train.examples} & {*heldout.examples}


def test_the_example_is_short_and_imports_next_to_nothing():
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) <= 30
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import)]
    assert {name.name for node in nodes for name in node.names} == {
        *("json", "sys", "numpy", "onnxruntime"),
    }
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(ast.parse(text)))
