"""A driver with a tiny model, what it does through a runner, and drivers that are killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from dynadepth.models.loading import load_model, load_tokenizer
from dynadepth_search.evaluation.outcome_cache import OutcomeCache
from dynadepth_search.runners.work import Loaded
from dynadepth_search.runners.worker import ModelSource
from dynadepth_search.scoring.score_table import score_prompts
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.search.per_prompt import search_prompts
from dynadepth_search.storage.labels import read_labels
from tests.tiny_search import folder_bytes, tiny_spec, tiny_task

ROOT = Path(__file__).parents[1]
# Seven blocks of four prompts, one of them short; four shards of eight.
COUNT = 26
PLANS = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [1, 2, 0, 1]], dtype=np.uint8)


def tiny_driver(base):
    """The driver's model, its tokenizer, and where workers find both."""
    return SimpleNamespace(
        model=load_model(base), tokenizer=load_tokenizer(base), source=ModelSource(str(base))
    )


def everything(base, folder, runner):
    """Search, score and evaluate; return the bytes of all files."""
    task = tiny_task(COUNT)
    search_prompts(base.model, base.tokenizer, task, folder / "labels", tiny_spec(), runner=runner)
    score_prompts(
        base.model,
        base.tokenizer,
        tiny_task(40),
        PLANS,
        folder / "scores",
        layers=[1, 3],
        num_windows=2,
        runner=runner,
    )
    sets = {str(index): np.tile(plan, (COUNT, 1)) for index, plan in enumerate(PLANS)}
    for names in ("01", "0123"):
        cache = OutcomeCache(
            Scorer(base.model, base.tokenizer), task, folder / "outcomes.jsonl", runner=runner
        )
        cache.score({name: sets[name] for name in names}, progress=lambda done, total: None)
    return {
        **folder_bytes(folder / "labels"),
        **{f"scores {name}": data for name, data in folder_bytes(folder / "scores").items()},
        "outcomes": (folder / "outcomes.jsonl").read_bytes(),
    }


def loaded(base):
    return Loaded(base.model, base.tokenizer)


def jobs(count):
    return ((number, number) for number in range(count))


CHILD = """
import sys
import torch
torch.set_num_threads(1)
from dynadepth.models.loading import load_model, load_tokenizer
from dynadepth_search.runners.choosing import choose_runner
from dynadepth_search.runners.worker import ModelSource
from dynadepth_search.search.per_prompt import search_prompts
from tests.tiny_search import tiny_spec, tiny_task

if __name__ == "__main__":
    base, out, kind, count, *address = sys.argv[1:]
    runner = choose_runner(kind, ModelSource(base), workers=2, threads=1, address=(address or [None])[0])

    def tell(what, done, total):
        print(what, done, *runner.processes, flush=True)

    search_prompts(
        load_model(base),
        load_tokenizer(base),
        tiny_task(int(count)),
        out,
        tiny_spec(config={"max_evaluations": 16}),
        runner=runner,
        progress=tell,
    )
    runner.close()
"""


def kill_driver(tmp_path, base, *, kind, count, after, how=signal.SIGKILL, address=()):
    """Search in another process until so many prompts are done, and kill it; return its workers."""
    script = tmp_path / "driver.py"
    script.write_text(CHILD)
    arguments = [base.source.model, str(tmp_path / "labels"), kind, str(count), *address]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen(
        [sys.executable, str(script), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            for line in process.stdout:
                what, done, *workers = line.split()
                if what == "search" and int(done) >= after:
                    # Ctrl-C in a terminal reaches all of its processes.
                    (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)
                    break
            process.wait(timeout=60)
        finally:
            process.kill()
    assert process.returncode != 0
    return [int(each) for each in workers]


def in_whole_blocks(folder, count, size=4):
    """Number of prompts of blocks that are on disk as a whole."""
    known = {item.prompt_id for item in read_labels(folder, accept_partial=True).examples}
    examples = tiny_task(count).examples
    blocks = [examples[first : first + size] for first in range(0, count, size)]
    return sum(len(block) for block in blocks if all(item.prompt_id in known for item in block))
