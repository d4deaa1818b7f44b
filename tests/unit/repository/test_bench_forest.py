"""The bench of the search runs, and what it calls the achievable gain is what brute force finds."""

import importlib
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dynadepth_search.scoring.score_table import score_prompts
from dynadepth_search.tuning.replay import ReplayTable, skip_subsets
from tests.tiny import tiny_model
from tests.tiny_search import tiny_task
from tests.tiny_text import word_tokenizer

FOLDER = Path(__file__).parents[3] / "benches/python"
BENCH = FOLDER / "bench_forest.py"
BUDGETS = (10, 20, 40, 80, 160, 240)


@pytest.fixture(scope="module")
def bench():
    """The bench's modules, which find each other as they do when the bench is run."""
    sys.path.insert(0, str(FOLDER))
    yield {
        name: importlib.import_module(f"forest.{name}")
        for name in ("oracles", "methods", "table", "figures")
    }
    sys.path.remove(str(FOLDER))
    for name in [name for name in sys.modules if name == "forest" or name.startswith("forest.")]:
        del sys.modules[name]


@pytest.fixture
def known():
    """Rewards of 21 prompts under all skips of three of six layers, of which the last 16 tell the prior."""
    plans = skip_subsets([1, 3, 4], 6)
    rng = np.random.default_rng(0)
    values = (plans == 0) @ -np.abs(rng.normal(0.5, 0.3, (6, 21)))
    return ReplayTable(plans=plans, values=values.T.astype(np.float32))


@pytest.fixture
def table(bench, known):
    return bench["table"].Table.of(known, {"of": "nothing"})


def test_a_quick_run_reports_every_table(tmp_path):
    model, plans = tiny_model(num_layers=6), skip_subsets([1, 3, 4], 6)
    task = tiny_task(21, kind="prompt")
    score_prompts(model, word_tokenizer(), task, plans, tmp_path / "table", layers=(0,))
    report = tmp_path / "forest.json"
    command = [
        *(sys.executable, str(BENCH), "--quick", "--seed", "3"),
        *("--table", str(tmp_path / "table"), "--json", str(report)),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    content = json.loads(report.read_text())
    columns = [column["column"] for column in content["columns"]]
    assert columns == ["shared, L = 12", "noisy, L = 12", "replay, L = 6"]
    assert all(column["proved"] == column["prompts"] for column in content["columns"])
    methods = {row["method"] for row in content["rows"]}
    assert len(methods) == 7
    assert len(content["rows"]) == 7 * len(columns) * len(BUDGETS)
    regret = {
        (row["column"], row["method"], row["evaluations"]): row["regret"] for row in content["rows"]
    }
    for column, method in itertools.product(("shared, L = 12", "replay, L = 6"), methods):
        misses = [regret[column, method, count] for count in BUDGETS]
        # The union begins anew for each budget; all others only go on.
        assert method.startswith("singles") or misses == sorted(misses, reverse=True)
        assert min(misses) > -1e-9
    # Eight plans are soon all evaluated.
    assert regret["replay, L = 6", "forest, prior", 10] == pytest.approx(0, abs=1e-12)
    ours = regret["shared, L = 12", "forest, prior", 40]
    assert ours < regret["shared, L = 12", "published walk", 240] - 0.2
    assert {"shared, L = 28", "replay"} <= set(content["learning"]["saved"])
    stopped = {row["oracle"]: row["evaluations"] for row in content["learning"]["stopped"]}
    assert stopped["nothing to gain"] < stopped["additive, L = 28"] <= 40
    assert "| published walk |" in result.stdout
    again = tmp_path / "again.json"
    subprocess.run([*command[:-1], str(again)], capture_output=True, check=True)
    assert again.read_text() == report.read_text()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("caps", [{}, {"max_edits": 2}, {"max_repeats": 0}, {"max_depth": 1.2}])
def test_the_achievable_gain_is_exact(bench, monkeypatch, seed, caps):
    oracles = bench["oracles"]
    monkeypatch.setattr(oracles, "CAPS", replace(oracles.CAPS, **caps))
    oracle = oracles.draw("shared", 6, 2, seed)
    oracle = replace(oracle, max_repeats=oracles.CAPS.max_repeats, protect=(seed,))
    # More and stronger pairs than the bench draws, or six layers would hardly have any.
    rng = np.random.default_rng(seed)
    oracle.pairs[:] = rng.normal(0, 0.5, oracle.pairs.shape) * (oracle.pairs == 0)
    layer = np.arange(12) % 6
    oracle.pairs[:, layer[:, None] == layer] = 0
    oracle.pairs += oracle.pairs.transpose(0, 2, 1)
    oracle.effect += 0.5
    plans = np.array(list(itertools.product((0, 1, 2), repeat=6)))
    plans = plans[oracles.within(plans, oracle.caps)]
    assert (plans[:, seed] == 1).all()
    for prompt in range(2):
        gains = oracle.gains(prompt, plans, oracle.truth(prompt, plans))
        assert oracle.best_gain(prompt) == (pytest.approx(gains.max(), abs=1e-12), True)


def test_a_replay_looks_its_rewards_up(bench, known, table):
    oracles = bench["oracles"]
    oracle = oracles.Replay.of(table)
    assert oracle.free.tolist() == [1, 3, 4]
    plans = np.array([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1]])
    values = known.values[2].astype(float)
    skips_1_and_4 = (known.plans == [1, 0, 1, 1, 0, 1]).all(axis=1)
    expected = values[skips_1_and_4][0] - values[(known.plans == 1).all(axis=1)][0]
    np.testing.assert_allclose(oracle.truth(2, plans), [0, expected])
    searches = bench["methods"].by_forest(oracle, 20, 0, prior=oracle.prior(0))
    assert all(len(plans) == 8 for plans in searches)


@pytest.mark.parametrize("name", ["beam", "singles_then_union", "thompson"])
@pytest.mark.parametrize("kind", ["additive", "repeats"])
def test_baselines_keep_the_caps_and_ask_no_plan_twice(bench, name, kind):
    oracle = bench["oracles"].draw(kind, 12, 2, 1)
    method = getattr(bench["methods"], name)
    extra = (np.random.default_rng(0),) if name == "thompson" else ()
    judge = bench["methods"].Judge(oracle, 0, 60)
    method(judge, oracle.prior(0), *extra)
    plans = np.stack(judge.plans)
    assert bench["oracles"].within(plans, oracle.caps).all()
    assert len(np.unique(plans, axis=0)) == len(plans) <= 60
    gains = bench["figures"].found(oracle, 0, plans)
    assert gains[-1] > 0


def test_noise_is_seen_and_regret_is_true(bench):
    oracle = bench["oracles"].draw("noisy", 12, 2, 0)
    plans = np.ones((400, 12), dtype=int)
    plans[:, :10] = np.random.default_rng(0).integers(0, 2, (400, 10))
    seen, true = oracle.seen(0, plans), oracle.truth(0, plans)
    np.testing.assert_array_equal(seen, oracle.seen(0, plans))
    assert np.std(seen - true) == pytest.approx(oracle.noise, rel=0.2)
    looks = oracle.gains(0, plans, seen)[bench["oracles"].within(plans, oracle.caps)]
    best = np.flatnonzero(oracle.gains(0, plans, seen) == looks.max())[0]
    curve = bench["figures"].found(oracle, 0, plans)
    assert curve[-1] == pytest.approx(oracle.gains(0, plans, true)[best])


def test_the_walk_moves_as_published(bench):
    """A path of n visits has n skips of one, n - 1 of two, n repeats and n moves that change nothing."""
    oracle = bench["oracles"].draw("shared", 28, 1, 0)
    firsts = []
    for seed in range(400):
        walk = list(
            itertools.islice(
                bench["methods"].published_walk(oracle, np.random.default_rng(seed)), 200
            )
        )
        assert (walk[0] == 1).all()
        assert all(plan.any() and plan.max() <= 2 for plan in walk)
        firsts.append(walk[1].sum() - 28)
    shares = [np.mean(np.array(firsts) == change) for change in (-2, -1, 0, 1)]
    assert shares == pytest.approx([27 / 111, 28 / 111, 28 / 111, 28 / 111], abs=0.08)
