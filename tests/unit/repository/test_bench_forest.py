"""The bench of the search runs, and what it calls the achievable gain is what brute force finds."""

import importlib.util
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).parents[3] / "benches/python/bench_forest.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_forest", BENCH)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by its name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_a_quick_run_reports_both_tables(tmp_path):
    report = tmp_path / "forest.json"
    command = [sys.executable, str(BENCH), "--quick", "--seed", "3", "--json", str(report)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    content = json.loads(report.read_text())
    assert content["seeds"] == [3, 4]
    methods = {row["method"] for row in content["gain"]}
    assert len(methods) == 6
    assert len(content["gain"]) == 6 * 4
    assert len(content["shorter"]) == 6 * 3
    share = {(row["method"], row["evaluations"]): row["share"] for row in content["gain"]}
    assert all(0 <= entry <= 1 for entry in share.values())
    for method in methods:
        shares = [share[method, count] for count in (20, 40, 80, 240)]
        assert shares == sorted(shares)
        assert f"| {method} | {shares[0]:.3f} ± " in result.stdout
    best = share["forest, prior", 40]
    assert best > max(share["drllm rule, prior", 40], share["published walk", 40]) + 0.2
    again = tmp_path / "again.json"
    subprocess.run([*command[:-1], str(again)], capture_output=True, check=True)
    assert again.read_text() == report.read_text()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("caps", [{}, {"max_edits": 2}, {"max_repeats": 0}, {"max_depth": 1.2}])
def test_the_achievable_gain_is_exact(bench, monkeypatch, seed, caps):
    monkeypatch.setattr(bench, "CAPS", replace(bench.CAPS, **caps))
    oracle = bench.SharedOracle.draw(2, seed, num_layers=6)
    # More and stronger pairs than the bench draws, or six layers would hardly have any.
    rng = np.random.default_rng(seed)
    oracle.pairs[:] = rng.normal(0, 0.5, oracle.pairs.shape) * (oracle.pairs == 0)
    layer = np.arange(12) % 6
    oracle.pairs[:, layer[:, None] == layer] = 0
    oracle.pairs += oracle.pairs.transpose(0, 2, 1)
    oracle.effect += 0.5
    plans = np.array(list(itertools.product((0, 1, 2), repeat=6)))
    plans = plans[bench.within_caps(plans)]
    for prompt in range(2):
        gains = oracle.reward(prompt, plans) + oracle.depth_penalty * (1 - plans.sum(axis=1) / 6)
        assert oracle.best_gain(prompt) == pytest.approx(gains.max(), abs=1e-12)


def test_the_walk_moves_as_published(bench):
    """A path of n visits has n skips of one, n - 1 of two, n repeats and n moves that change nothing."""
    walks = [list(bench.published_walk(np.random.default_rng(seed))) for seed in range(400)]
    assert all((walk[0] == 1).all() and walk[-1].any() for walk in walks)
    assert all(plan.max() <= 2 for walk in walks for plan in walk)
    first = np.array([walk[1].sum() - 28 for walk in walks])
    shares = [np.mean(first == change) for change in (-2, -1, 0, 1)]
    assert shares == pytest.approx([27 / 111, 28 / 111, 28 / 111, 28 / 111], abs=0.08)
