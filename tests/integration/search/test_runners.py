"""Runners of other processes: what they find is what this process finds, whoever dies."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest

from dynadepth.errors import ConfigError, DynadepthWarning, RunnerError, SearchError
from dynadepth_search.evaluation.outcome_cache import OutcomeCache
from dynadepth_search.runners import crew as crew_module
from dynadepth_search.runners.choosing import choose_runner
from dynadepth_search.runners.processes import process_runner
from dynadepth_search.runners.worker import ModelSource, what_runs
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.search.per_prompt import search_prompts
from dynadepth_search.storage.labels import read_labels
from tests.tiny_folder import save_tiny_base
from tests.tiny_runners import (
    COUNT,
    PLANS,
    everything,
    in_whole_blocks,
    jobs,
    kill_driver,
    loaded,
    tiny_driver,
)
from tests.tiny_search import folder_bytes, tiny_spec, tiny_task
from tests.tiny_works import LoggedWork

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def base(tiny_base):
    return tiny_driver(tiny_base)


@pytest.fixture(scope="module")
def pair(base):
    """Two processes; tests that kill them leave two others."""
    with process_runner(base.source, ["cpu", "cpu"], threads=1) as runner:
        yield runner


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """The bytes of all files, as this process writes them without a runner."""
    return everything(base, tmp_path_factory.mktemp("whole"), None)


def test_processes_write_the_bytes_of_this_process(base, pair, whole, tmp_path):
    found = everything(base, tmp_path, pair)
    assert found.keys() == whole.keys()
    assert {name for name, data in found.items() if data != whole[name]} == set()


def test_processes_generate_and_compare_the_answers_of_this_process(base, pair, tmp_path):
    task = tiny_task(11, kind="solution")
    spec = tiny_spec(objective="reward", new_tokens=8, depth_penalty=0.5)
    for name, runner in (("here", None), ("there", pair)):
        search_prompts(base.model, base.tokenizer, task, tmp_path / name, spec, runner=runner)
    assert folder_bytes(tmp_path / "there") == folder_bytes(tmp_path / "here")
    assert all(item.answers for each in read_labels(tmp_path / "here").candidates for item in each)


def test_outcomes_that_came_in_another_order_are_put_in_order(base, whole, tmp_path):
    """As after a kill: the lines of half the prompts are there, in any order."""
    header, *lines = whole["outcomes"].splitlines(keepends=True)
    path = tmp_path / "outcomes.jsonl"
    assert len(lines) == 2 * COUNT
    again = np.random.default_rng(0).permutation(COUNT)[: COUNT // 2]
    path.write_bytes(header + b"".join(lines[index] for index in again) + b'{"example": "to')
    sets = {str(index): np.tile(plan, (COUNT, 1)) for index, plan in enumerate(PLANS)}
    scorer = Scorer(base.model, base.tokenizer)
    for names in ("01", "0123"):
        OutcomeCache(scorer, tiny_task(COUNT), path).score(
            {name: sets[name] for name in names}, progress=lambda done, total: None
        )
    assert path.read_bytes() == whole["outcomes"]


class TestDeaths:
    def test_a_dead_worker_is_replaced_and_its_job_given_again(self, base, pair, tmp_path):
        work = LoggedWork(str(tmp_path / "log"), deadly=(3,))
        with pytest.warns(DynadepthWarning, match=r"worker \d on cpu died in block 3 \(killed by "):
            found = dict(pair.run(work, jobs(8), loaded(base)))
        assert found == {number: (number, 32) for number in range(8)}
        # No other job was done twice.
        assert sorted(work.begun()) == [0, 1, 2, 3, 3, 4, 5, 6, 7]

    def test_a_worker_that_dies_between_two_works(self, base, pair, tmp_path):
        work = LoggedWork(str(tmp_path / "log"))
        assert len(dict(pair.run(work, jobs(4), loaded(base)))) == 4
        os.kill(pair.processes[0], signal.SIGKILL)
        with pytest.warns(
            DynadepthWarning, match=r"died in block \d+ \(killed by signal 9, SIGKILL\); another"
        ):
            found = dict(pair.run(work, jobs(20), loaded(base)))
        assert sorted(found) == list(range(20))

    def test_a_job_that_kills_every_worker_ends_the_run(self, base, tmp_path):
        work = LoggedWork(str(tmp_path / "log"), deadly=(1,), deaths=9)
        with (
            process_runner(base.source, ["cpu"] * 2, threads=1) as runner,
            pytest.warns(DynadepthWarning, match="died in block 1"),
            pytest.raises(RunnerError, match=r"block 1 was with 3 workers|no worker is left"),
        ):
            dict(runner.run(work, jobs(8), loaded(base)))
        assert 2 <= work.begun().count(1) <= 3
        assert runner.processes == ()


class TestErrors:
    @pytest.fixture
    def single(self, base):
        with process_runner(base.source, ["cpu"], threads=1) as runner:
            yield runner

    def test_an_error_of_a_job_is_raised_here(self, base, single, tmp_path):
        work = LoggedWork(str(tmp_path / "log"), failing=(2,))
        found = []
        with pytest.raises(SearchError, match="^job 2 failed$"):
            found += [number for number, _ in single.run(work, jobs(8), loaded(base))]
        assert single.processes == ()

    def test_an_error_that_nobody_foresaw_says_where_it_was(self, base, single, tmp_path):
        work = LoggedWork(str(tmp_path))
        with pytest.raises(RunnerError, match=r"(?s)a worker on cpu failed .IsADir.*in do\n"):
            list(single.run(work, jobs(1), loaded(base)))

    def test_workers_with_another_model_are_refused(self, base, tmp_path):
        other = save_tiny_base(tmp_path / "other", num_layers=5)
        with (
            process_runner(ModelSource(str(other)), ["cpu"], threads=1) as runner,
            pytest.raises(RunnerError, match="has base model .*, but the driver has .*same on all"),
        ):
            list(runner.run(LoggedWork(str(tmp_path / "log")), jobs(1), loaded(base)))
        assert not (tmp_path / "log").exists()

    def test_workers_with_another_version_are_refused(self, base, single, tmp_path, monkeypatch):
        monkeypatch.setattr(
            crew_module, "what_runs", lambda loaded: {**what_runs(loaded), "torch": "0.0"}
        )
        with pytest.raises(RunnerError, match=r"has torch .*, but the driver has 0\.0; .*install"):
            list(single.run(LoggedWork(str(tmp_path / "log")), jobs(1), loaded(base)))

    def test_a_worker_that_does_not_come_is_not_waited_for_in_silence(
        self, base, single, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(crew_module, "_PATIENCE_SECONDS", 0.01)
        with pytest.warns(DynadepthWarning, match="no worker has begun in 0 s; it still loads"):
            list(single.run(LoggedWork(str(tmp_path / "log")), jobs(1), loaded(base)))

    def test_a_work_that_is_over_starts_no_worker(self, base, single, tmp_path):
        assert list(single.run(LoggedWork(str(tmp_path / "log")), jobs(0), loaded(base))) == []
        assert single.processes == ()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("cloud", {}, "runner 'cloud' is unknown; expected one of local, processes, ray"),
        ("local", {"workers": 2}, "--workers was given, but the runner local has no such option"),
        ("processes", {"address": "a:1", "workers": 2}, "--address was given, .* --runner ray"),
        ("processes", {}, "without a GPU and without a number of workers; give --workers"),
        ("processes", {"workers": 3, "devices": ("cuda:0",)}, "3 workers were asked for on 1 dev"),
        ("ray", {"devices": ("cuda:0", "cuda:1")}, "gives each worker its GPU: give cuda or cpu"),
        ("ray", {"devices": ("mps",)}, "device 'mps' was asked for on a Ray cluster"),
    ],
)
def test_options_that_make_no_runner(kind, options, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ConfigError, match=message):
        choose_runner(kind, ModelSource("model"), **options)


def test_without_ray_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunnerError, match=r"pip install 'dynadepth-search\[ray\]'"):
        choose_runner("ray", ModelSource("model"))


def test_runners_are_at_hand_without_ray():
    script = (
        "import sys\n"
        "import dynadepth_search.cli.main, dynadepth_search.runners.choosing\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def gone(process):
    """Wait until a process is no more; a zombie whose parent is slow to ask for it is none."""
    for _ in range(200):
        with suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.05)
                continue
        return True
    return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_is_killed_takes_its_workers_along(base, pair, tmp_path, how):
    count, spec = 40, tiny_spec(config={"max_evaluations": 16})
    workers = kill_driver(tmp_path, base, kind="processes", count=count, after=8, how=how)
    assert workers
    if Path("/proc/self/stat").exists():
        assert all(gone(worker) for worker in workers)
    stored = in_whole_blocks(tmp_path / "labels", count)
    assert stored >= 8
    task = tiny_task(count)
    again = search_prompts(base.model, base.tokenizer, task, tmp_path / "labels", spec, runner=pair)
    # What was stored is not searched again, and the probe is not made again.
    assert (again.searched, again.probe_evaluations) == (count - stored, 0)
    search_prompts(base.model, base.tokenizer, task, tmp_path / "whole", spec)
    assert folder_bytes(tmp_path / "labels") == folder_bytes(tmp_path / "whole")


def test_local_is_this_process():
    with closing(choose_runner("local", ModelSource("model"))) as runner:
        assert type(runner).__name__ == "LocalRunner"
