"""What the driver of a run on many machines stores and moves for each prompt, and how fast it stores it.

    python benches/python/bench_stores.py --blocks 2000

Rows are made up: plans of one to eight edits, random rewards, prompts of random words. So no model runs and nothing is
fetched; sizes are those of a real run with as many layers, plans and characters, but for how well prompts compress.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynadepth.files import write_json_atomic
from dynadepth.plans import plan_depth, plan_text
from dynadepth.tree_search.forest import EditPrior, Evaluated
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.search.per_prompt_spec import PromptSearchSpec
from dynadepth_search.search.prompt_works import BlockJob, BlockLabels
from dynadepth_search.storage.choice import Candidate, Choice, best_plans, choose_label
from dynadepth_search.storage.compatibility import task_fields
from dynadepth_search.storage.label_manifest import MANIFEST, Manifest, Shard, shard_name
from dynadepth_search.storage.label_store import LabelStore
from dynadepth_search.storage.labels import label_row, read_labels
from dynadepth_search.storage.score_store import METRICS, part_of

LAYERS, EVALUATIONS, BLOCK = 30, 40, 16
PENALTY = 0.5
# Of a score table: plans, layers whose states are stored, ways in which the plans come there, windows, width.
MENU, STATES, WAYS, WINDOWS, HIDDEN = 16, 2, 4, 0, 2048
MILLION = 1_000_000


def prompts(count: int, rng: np.random.Generator) -> tuple[Example, ...]:
    """Return prompts of about 300 characters."""
    words = ["".join(rng.choice(list("abcdefghijklmnop"), 6)) for _ in range(500)]
    return tuple(Example(f"{index} {' '.join(rng.choice(words, 42))}") for index in range(count))


def row(index: int, example: Example, rng: np.random.Generator) -> dict[str, Any]:
    """Return a label as a search makes it."""
    plans = np.ones((EVALUATIONS, LAYERS), dtype=np.uint8)
    for plan in plans[1:]:
        plan[rng.choice(LAYERS, size=rng.integers(1, 9), replace=False)] = 0
    plans = np.unique(plans, axis=0)[::-1]
    rewards = -rng.random(len(plans))
    rewards[0] = 0.0
    visits = plans.sum(axis=1, dtype=np.uint32)
    evaluated = Evaluated(plans, rewards, plan_depth(plans), visits)
    candidates = tuple(
        Candidate(
            plan_text(plans[best]),
            float(rewards[best]),
            (float(-rng.random()),),
            PENALTY * float(evaluated.depths[best]),
        )
        for best in best_plans(evaluated, PENALTY, PromptSearchSpec().confirm).tolist()
    )
    choice = Choice(candidates[0], choose_label(candidates, margin=0.0), candidates)
    return label_row(index, example, evaluated, base_reward=0.0, choice=choice)


def manifest_of(task: Task) -> Manifest:
    """Return what a search would write."""
    return Manifest(
        base_model={"scheme": 1, "architecture": {}, "quantization": None, "weights": {}},
        num_layers=LAYERS,
        dtype="bfloat16",
        task={"name": task.name, **task_fields(task)},
        search=PromptSearchSpec().to_dict(),
        depth_penalty=PENALTY,
        prior=EditPrior(np.zeros(2 * LAYERS), np.ones(2 * LAYERS), 8),
        versions={},
    )


def store_labels(folder: Path, count: int, rng: np.random.Generator) -> dict[str, float]:
    """Store labels block by block, as the driver does, and read them again."""
    task = Task("made up", prompts(count * BLOCK, rng))
    spec, ids = PromptSearchSpec(), [item.prompt_id for item in task.examples]
    store = LabelStore(folder, ids, spec.shard_size)
    store.create(manifest_of(task))
    store.open()
    seconds, journal = [], 0
    for number in range(count):
        first = number * BLOCK
        block = task.examples[first : first + BLOCK]
        rows = tuple(row(first + offset, item, rng) for offset, item in enumerate(block))
        started = time.perf_counter()
        store.append(*rows)
        journal = max(journal, (folder / "journal.jsonl").stat().st_size)
        store.compact()
        seconds.append(time.perf_counter() - started)
    shards = sum(path.stat().st_size for path in folder.glob("part-*.parquet"))
    found = {
        "job_bytes": len(ForkingPickler.dumps(BlockJob(first, block))) / BLOCK,
        "result_bytes": len(ForkingPickler.dumps(BlockLabels(rows, 640, 48, 1, 1))) / BLOCK,
        "journal_bytes": journal / (BLOCK * spec.blocks_per_shard),
        "shard_bytes": shards / (count * BLOCK),
        # A shard is written with every fourth block.
        "block_ms_first_tenth": 1e3 * statistics.mean(seconds[: max(1, count // 10)]),
        "block_ms_last_tenth": 1e3 * statistics.mean(seconds[-max(1, count // 10) :]),
    }
    started = time.perf_counter()
    again = LabelStore(folder, ids, spec.shard_size)
    again.open()
    found["open_us"] = 1e6 * (time.perf_counter() - started) / (count * BLOCK)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    labels = read_labels(folder)
    found["read_us"] = 1e6 * (time.perf_counter() - started) / len(labels)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kibibytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    found["read_memory_bytes"] = unit * (after - before) / len(labels)
    return found


def million_manifest(folder: Path) -> dict[str, float]:
    """Write the manifest that a million prompts have in the end."""
    shards = tuple(Shard(shard_name(number), "ab" * 32, 64) for number in range(MILLION // 64))
    content = {**manifest_of(Task("t", prompts(1, np.random.default_rng(0)))).to_dict()}
    content["shards"] = [
        {"name": item.name, "sha256": item.sha256, "prompts": item.prompts} for item in shards
    ]
    started = time.perf_counter()
    write_json_atomic(folder / MANIFEST, content)
    return {
        "million_manifest_ms": 1e3 * (time.perf_counter() - started),
        "million_manifest_bytes": float((folder / MANIFEST).stat().st_size),
    }


def score_rows(rng: np.random.Generator) -> dict[str, float]:
    """Return what a prompt of a score table takes."""
    examples = prompts(BLOCK, rng)
    shape = (BLOCK, WAYS, WINDOWS + 1, HIDDEN)
    part = part_of(
        examples,
        rng.integers(0, 50_000, (BLOCK, MENU)),
        {name: rng.random((BLOCK, MENU)) for name in METRICS},
        {layer: torch.randn(shape).bfloat16() for layer in range(STATES)},
        {"table": "ab" * 32, "block": "0"},
    )
    return {
        "score_metric_bytes": len(part.metrics) / BLOCK,
        "score_state_bytes": len(part.states) / BLOCK,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=2000)
    parser.add_argument("--quick", action="store_true", help="few blocks, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "m").mkdir()
        found = million_manifest(folder / "m")
        (folder / "labels").mkdir()
        blocks = 12 if options.quick else options.blocks
        found |= store_labels(folder / "labels", blocks, rng)
        found |= score_rows(rng)
    for name, value in found.items():
        print(f"{name}: {value:,.1f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
