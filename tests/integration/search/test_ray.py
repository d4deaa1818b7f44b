"""Actors on a real Ray cluster of two nodes: killed workers, killed drivers, and the bytes of one process."""

import os
import signal
from contextlib import suppress

import pytest

from dynadepth.errors import DynadepthWarning, RunnerError
from dynadepth_search.runners.choosing import choose_runner
from dynadepth_search.runners.ray_actors import ray_runner
from dynadepth_search.search.per_prompt import search_prompts
from tests.tiny_runners import (
    everything,
    in_whole_blocks,
    jobs,
    kill_driver,
    loaded,
    tiny_driver,
)
from tests.tiny_search import folder_bytes, tiny_spec, tiny_task
from tests.tiny_works import LoggedWork

# Ray leaves files and sockets of its own to the garbage collector.
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
# The cluster is on this machine alone and asks nobody; its start is slow where other tests run beside it, and Ray would
# have its workers give way to these.
SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_agent_register_timeout_ms": "100000",
    "RAY_worker_niceness": "0",
}


@pytest.fixture(scope="module")
def base(tiny_base):
    return tiny_driver(tiny_base)


@pytest.fixture(scope="module")
def address():
    """The address of a cluster of two nodes with one CPU each."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "object_store_memory": 100_000_000}
        cluster = Cluster()
        for _ in range(2):
            # Ray gives a node half a minute, which a busy machine may need for its imports alone.
            with suppress(Exception):
                cluster.add_node(**node)
                break
        else:
            cluster.add_node(**node)
        try:
            cluster.add_node(**node)
            yield cluster.address
        finally:
            cluster.shutdown()


@pytest.fixture(scope="module")
def actors(base, address):
    """One actor on each node; a test that kills one leaves another."""
    with choose_runner("ray", base.source, address=address) as runner:
        yield runner


def test_actors_write_the_bytes_of_this_process(base, actors, tmp_path):
    found = everything(base, tmp_path / "ray", actors)
    whole = everything(base, tmp_path / "whole", None)
    assert found.keys() == whole.keys()
    assert {name for name, data in found.items() if data != whole[name]} == set()
    assert len(set(actors.processes)) == 2


def test_a_worker_that_is_killed_in_the_middle_costs_nothing(base, actors, tmp_path):
    def kill(what, done, total):
        if what == "search" and done >= 8 and not killed:
            killed.append(actors.processes[0])
            os.kill(killed[0], signal.SIGKILL)

    killed = []
    task, spec = tiny_task(60), tiny_spec()
    with pytest.warns(DynadepthWarning, match="died in block .*; another one takes its place"):
        found = search_prompts(
            base.model,
            base.tokenizer,
            task,
            tmp_path / "ray",
            spec,
            runner=actors,
            progress=kill,
        )
    whole = search_prompts(base.model, base.tokenizer, task, tmp_path / "whole", spec)
    assert killed
    # What came to the driver was done once.
    assert (found.searched, found.evaluations) == (60, whole.evaluations)
    assert folder_bytes(tmp_path / "ray") == folder_bytes(tmp_path / "whole")


def test_only_the_job_of_a_dead_actor_is_done_again(base, actors, tmp_path):
    work = LoggedWork(str(tmp_path / "log"), deadly=(3,))
    with pytest.warns(DynadepthWarning, match="died in block 3 .ActorDiedError"):
        found = dict(actors.run(work, jobs(8), loaded(base)))
    assert found == {number: (number, 32) for number in range(8)}
    assert sorted(work.begun()) == [0, 1, 2, 3, 3, 4, 5, 6, 7]


def test_a_driver_that_is_killed_loses_nothing(base, address, actors, tmp_path, monkeypatch):
    # The cluster has room for two workers, and the other driver needs both.
    actors.close()
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    count, spec = 40, tiny_spec(config={"max_evaluations": 16})
    kill_driver(tmp_path, base, kind="ray", count=count, after=8, address=(address,))
    stored = in_whole_blocks(tmp_path / "labels", count)
    assert 8 <= stored < count
    task = tiny_task(count)
    with choose_runner("ray", base.source, address=address) as runner:
        again = search_prompts(
            base.model, base.tokenizer, task, tmp_path / "labels", spec, runner=runner
        )
    assert (again.searched, again.probe_evaluations) == (count - stored, 0)
    search_prompts(base.model, base.tokenizer, task, tmp_path / "whole", spec)
    assert folder_bytes(tmp_path / "labels") == folder_bytes(tmp_path / "whole")


def test_more_than_the_cluster_has_is_refused(base, address):
    with pytest.raises(
        RunnerError, match="2 machines with 2 CPUs and 0 GPUs, room for 2: give few"
    ):
        ray_runner(base.source, address=address, workers=3)
    with pytest.raises(RunnerError, match="1 workers of 1 CPUs and a GPU each"):
        ray_runner(base.source, address=address, workers=1, device="cuda")


def test_an_address_where_nothing_is(base):
    with pytest.raises(
        RunnerError, match="no Ray cluster to work with at '127.0.0.1:1' .*ray start"
    ):
        ray_runner(base.source, address="127.0.0.1:1")
