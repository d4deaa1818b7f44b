"""Searches that are really killed, and searches of every kind from task to labels."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dynadepth.errors import ConfigError, SearchError, TaskError, WrapError
from dynadepth.tree_search.forest import Forest
from dynadepth.wrapping.wrap import wrap_model
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.search.per_prompt import probe_penalty, search_prompts
from dynadepth_search.search.static import read_static
from dynadepth_search.storage.labels import read_labels
from tests.tiny import tiny_model
from tests.tiny_search import folder_bytes, tiny_spec, tiny_task
from tests.tiny_text import word_tokenizer

ROOT = Path(__file__).parents[3]
COUNT = 60
SHARED = (
    "StaticSpec(min_depth=0.5, size=4, beam=2, num_prompts=9, num_screened=3, num_confirmed=32)"
)
CHILD = f"""
import sys
import torch
torch.set_num_threads(1)
from dynadepth_search.search.per_prompt import search_prompts
from dynadepth_search.search.static import StaticSpec, search_static
from tests.tiny import tiny_model
from tests.tiny_search import tiny_spec, tiny_task
from tests.tiny_text import word_tokenizer

model = tiny_model(num_layers=6, dtype=torch.float32)
tokenizer = word_tokenizer()
task = tiny_task({COUNT})
search_prompts(model, tokenizer, tiny_task(4), sys.argv[1] + "-warm", tiny_spec())
print("ready", flush=True)
search_prompts(model, tokenizer, task, sys.argv[1], tiny_spec(config={{"max_evaluations": 16, "max_repeats": 1}}))
search_static(model, tokenizer, task, sys.argv[1] + "/plans", {SHARED})
"""


@contextmanager
def child(folder: Path) -> Iterator[subprocess.Popen]:
    """A process that is about to search into a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
            process.wait(timeout=120)
        finally:
            process.kill()


def stored_prompts(folder: Path) -> set[str]:
    """Prompts that a reader finds; damage would raise."""
    if not (folder / "manifest.json").exists():
        return set()
    if not list(folder.glob("part-*.parquet")) and not (folder / "journal.jsonl").exists():
        return set()
    return {item.prompt_id for item in read_labels(folder, accept_partial=True).examples}


PROMPT_IDS = [item.prompt_id for item in tiny_task(COUNT).examples]


def num_written(folder: Path) -> int:
    """How many prompts are on disk at least; cheap, and never mind a file that goes away.

    A prompt never leaves the disk: it goes from the journal into a shard, and is in both for a moment. So the journal
    is read first, and each prompt counts once.
    """
    try:
        lines = (folder / "journal.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        lines = []
    written = {json.loads(line)["prompt_id"] for line in lines}
    for path in folder.glob("part-*.parquet"):
        first = 8 * int(path.stem.removeprefix("part-"))
        written.update(PROMPT_IDS[first : first + 8])
    return len(written)


def content_of(folder: Path) -> dict[str, bytes]:
    """All files of a search, those of the plans for all prompts included."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.timeout(400)
def test_kill_minus_nine(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with child(whole):
        pass
    assert len(read_labels(whole)) == COUNT
    assert len(read_static(whole / "plans").front) == 4

    generator = np.random.default_rng()
    few, many = generator.integers([1, COUNT // 3], [COUNT // 3, COUNT - 8]).tolist()
    strikes = [
        lambda: True,
        lambda: num_written(killed) >= few,
        lambda: num_written(killed) >= many,
        lambda: (killed / "plans" / "menu.json").exists(),
        lambda: any((killed / "plans" / "pool").glob("part-*.parquet")),
    ]
    found, waits = [], generator.uniform(0, 0.05, size=len(strikes)).tolist()
    before: set[str] = set()
    for strike, wait in zip(strikes, waits, strict=True):
        with child(killed) as process:
            while not strike() and process.poll() is None:
                time.sleep(0.001)
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
        now = stored_prompts(killed)
        assert before <= now, (few, many, waits)
        before = now
        found.append(len(now))
    with child(killed) as process:
        pass
    assert process.returncode == 0
    assert content_of(killed) == content_of(whole), (few, many, waits, found)
    assert few <= found[1], (few, many, waits, found)
    assert many <= found[2] <= found[3] == found[4] == COUNT, (few, many, waits, found)


class TestEveryKind:
    @pytest.fixture(scope="class")
    def model(self):
        return tiny_model(dtype=torch.float32)

    @pytest.mark.parametrize("kind", ["choices", "completion", "prompt"])
    @pytest.mark.parametrize("objective", ["preserve", "reward"])
    def test_labels_are_the_best_of_what_was_tried(self, model, tmp_path, kind, objective):
        task, spec = tiny_task(5, kind=kind), tiny_spec(objective=objective, depth_penalty=0.5)
        if (kind, objective) == ("prompt", "reward"):
            with pytest.raises(
                TaskError, match="'colours' has prompts alone, so there is no labelled reward"
            ):
                search_prompts(model, word_tokenizer(), task, tmp_path / "labels", spec)
            assert not (tmp_path / "labels").exists()
            return
        summary = search_prompts(model, word_tokenizer(), task, tmp_path, spec)
        labels = read_labels(tmp_path, model=model)
        assert (summary.prompts, summary.searched) == (5, 5)
        assert summary.evaluations_per_label == 8
        assert summary.probe_evaluations == 2 * (1 + 2 * 4)
        assert summary.sharing_factor > 1
        assert summary.to_dict()["evaluations"] == summary.evaluations == 5 * 8
        scorer = Scorer(model, word_tokenizer())
        rewards = scorer.outcomes(task.examples, labels.plans, np.arange(5)).of(objective)
        np.testing.assert_allclose(labels.rewards, rewards, atol=1e-4)
        np.testing.assert_allclose(labels.values, labels.rewards - 0.5 * labels.depths, atol=1e-12)
        assert (labels.values >= labels.base_rewards - 0.5).all()
        assert (labels.depths <= 1).all()

    def test_a_large_penalty_buys_shallow_labels(self, model, tmp_path):
        depths = []
        for penalty in (0.0, 1000.0):
            search_prompts(
                model,
                word_tokenizer(),
                tiny_task(6),
                tmp_path / str(penalty),
                tiny_spec(depth_penalty=penalty),
            )
            labels = read_labels(tmp_path / str(penalty))
            assert labels.manifest.depth_penalty == penalty
            depths.append(labels.depths.mean())
        assert depths[0] > depths[1]

    def test_the_probe_chooses_the_penalty(self, model, tmp_path):
        summary = search_prompts(model, word_tokenizer(), tiny_task(6), tmp_path, tiny_spec())
        manifest = read_labels(tmp_path).manifest
        losses = -manifest.prior.mean[:4]
        assert summary.depth_penalty == manifest.depth_penalty == probe_penalty(manifest.prior) > 0
        assert (losses / (1 / 4) >= summary.depth_penalty).sum() == 2

    def test_a_label_depends_on_its_block_and_not_on_the_order_of_the_work(self, tmp_path):
        model, task, spec = tiny_model(), tiny_task(12), tiny_spec(depth_penalty=0.5)
        search_prompts(model, word_tokenizer(), task, tmp_path, spec)
        labels = read_labels(tmp_path)
        # The second block by itself, its plans told one at a time.
        block = task.examples[4:8]
        forest = Forest(
            4,
            4,
            config=replace(spec.config, depth_penalty=0.5),
            seed=spec.seed,
            prior=labels.manifest.prior,
            tree_keys=np.array([int(item.prompt_id, 16) for item in block], dtype=np.uint64),
        )
        scorer = Scorer(model, word_tokenizer())
        while not forest.finished:
            batch = forest.ask(1)
            forest.tell(batch.ticket, scorer.outcomes(block, batch.plans, batch.tree).preserve)
        for tree in range(4):
            tried = labels.evaluated[4 + tree]
            np.testing.assert_array_equal(forest.evaluated(tree).plans, tried.plans)
            np.testing.assert_allclose(forest.evaluated(tree).rewards, tried.rewards, atol=1e-12)
            np.testing.assert_array_equal(forest.best(tree).plan, labels.raw_plans[4 + tree])

    def test_a_wrapped_model_is_refused(self, tmp_path):
        model = tiny_model(dtype=torch.float32)
        wrap_model(model, plan=[1, 0, 1, 1])
        with pytest.raises(WrapError):
            search_prompts(model, word_tokenizer(), tiny_task(4), tmp_path, tiny_spec())
        assert folder_bytes(tmp_path) == {}

    def test_rewards_that_are_not_finite(self, tmp_path):
        model = tiny_model(dtype=torch.float32)
        with torch.no_grad():
            model.model.layers[2].mlp.down_proj.weight.mul_(float("nan"))
        with pytest.raises(
            SearchError,
            match=r"plan 1111 gives prompt 'Number .*' the reward nan; .* another dtype",
        ):
            search_prompts(model, word_tokenizer(), tiny_task(4), tmp_path, tiny_spec())
        assert folder_bytes(tmp_path) == {}

    def test_a_prompt_that_is_too_long_is_found_before_the_search(self, model, tmp_path):
        task = Task("t", (*tiny_task(4, kind="prompt").examples, Example("x" * 300)))
        with pytest.raises(TaskError, match="is 300 tokens long; the model has positions for 128"):
            search_prompts(model, word_tokenizer(), task, tmp_path / "labels", tiny_spec())
        assert not (tmp_path / "labels").exists()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"block_size": 0},
                "PromptSearchSpec.block_size is 0; expected a whole number, 1 or more",
            ),
            ({"seed": -1}, "PromptSearchSpec.seed is -1; expected a whole number, 0 or more"),
            ({"seed": 1.5}, "PromptSearchSpec.seed is 1.5; expected a whole number"),
            (
                {"depth_penalty": float("nan")},
                "PromptSearchSpec.depth_penalty is nan; expected 0 or more, or None",
            ),
            ({"depth_penalty": -1.0}, "PromptSearchSpec.depth_penalty is -1.0; expected 0 or more"),
            ({"config": {"probe_trees": 0}}, "probe_trees is 0; a search opens with a probe"),
            (
                {"objective": "rewards"},
                r"objective 'rewards' is unknown \(did you mean 'reward'\?\)",
            ),
        ],
    )
    def test_bad_specs(self, changes, message):
        with pytest.raises(ConfigError, match=message):
            tiny_spec(**changes)

    def test_protected_layers_run_in_every_plan(self, model, tmp_path):
        spec = tiny_spec(config={"protect": (0, 3)}, depth_penalty=5.0)
        search_prompts(model, word_tokenizer(), tiny_task(5), tmp_path, spec)
        labels = read_labels(tmp_path)
        assert all((tried.plans[:, [0, 3]] == 1).all() for tried in labels.evaluated)
        assert np.isnan(labels.manifest.prior.mean[[0, 3]]).all()
