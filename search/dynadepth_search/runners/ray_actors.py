"""Workers as actors of a Ray cluster.

Ray restarts no actor and repeats no call here (`max_restarts=0`, `max_task_retries=0`). With repeated calls it would do
a block again that may have been done, while the driver, which alone knows what is stored, heard nothing of it; and a
worker that dies of its block would be restarted for ever. So the driver hears of every death and decides, as it does
for processes. Actors belong to the driver: they end with it, however it ends.
"""

import logging
import socket
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from dynadepth.errors import ConfigError, RunnerError
from dynadepth_search.runners.crew import CrewRunner, Gone
from dynadepth_search.runners.worker import Call, ModelSource, Reply, Setup, Worker

__all__ = ["ray_runner"]

_CONNECT_SECONDS = 10.0


def ray_runner(
    source: ModelSource,
    *,
    address: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    device: str | None = None,
) -> CrewRunner:
    """Return a runner whose workers are actors of a Ray cluster.

    Args:
        source: Where the actors load the model from; every machine must find the same there.
        address: Of the cluster, as `ray.init` takes it; None: the one that this process is connected to, or a new one
            on this machine.
        workers: Number of actors; None: one for each GPU, or if there is none one for each machine.
        threads: Number of threads of torch in each actor, and of CPUs that it takes; None: the machines' CPUs divided.
        device: "cuda" gives each actor a GPU of its own, "cpu" none; None: what the cluster has.

    Raises:
        ConfigError: The device is another one.
        RunnerError: Ray is not installed, there is no such cluster, or it has no room for the workers.
    """
    if device not in (None, "cpu", "cuda"):
        raise ConfigError(
            f"device {device!r} was asked for on a Ray cluster, which itself gives each actor its GPU; expected "
            "cuda or cpu"
        )
    ray = _ray()
    began = not ray.is_initialized()
    if began:
        _connect(ray, address)
    try:
        crew = _Actors(ray, source.absolute(), workers, threads, device, began=began)
    except BaseException:
        if began:
            ray.shutdown()
        raise
    return CrewRunner(crew)


class _Actor:
    """A worker in an actor."""

    def __init__(self, ray: Any, handle: Any) -> None:
        self._ray, self._handle = ray, handle
        self.answer_to: Any = None

    def ask(self, call: Call) -> None:
        self.answer_to = self._handle.call.remote(call)

    def answer(self) -> Reply | Gone:
        try:
            reply: Reply = self._ray.get(self.answer_to)
        except self._ray.exceptions.RayError as error:
            # Dead, or out of reach for a while; in either case its answer is lost, and `stop` ends it for good.
            return Gone(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
        return reply

    def stop(self) -> None:
        self._ray.kill(self._handle, no_restart=True)


class _Actors:
    """The actors of a cluster."""

    def __init__(
        self,
        ray: Any,
        source: ModelSource,
        workers: int | None,
        threads: int | None,
        device: str | None,
        *,
        began: bool,
    ) -> None:
        self._ray, self._source, self._began = ray, source, began
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = sum(int(each.get("GPU", 0)) for each in machines)
        self._device = device or ("cuda" if gpus else "cpu")
        on_gpu = self._device == "cuda"
        self._count = workers or (gpus if on_gpu else len(machines))
        cpus = [int(each.get("CPU", 0)) for each in machines]
        self._threads = threads or max(
            1, min(max(cpus, default=1), sum(cpus) // max(1, self._count))
        )
        if threads is None and workers is None and not on_gpu:
            # One for each machine: the smallest must have room for one too.
            self._threads = max(1, min(cpus, default=1))
        room = sum(
            min(
                int(each.get("CPU", 0)) // self._threads,
                int(each.get("GPU", 0)) if on_gpu else self._count,
            )
            for each in machines
        )
        if room < self._count or not self._count:
            raise RunnerError(
                f"{self._count or 'no'} workers of {self._threads} CPUs{' and a GPU' if on_gpu else ''} each were "
                f"asked for; the cluster has {len(machines)} machines with {sum(cpus)} CPUs and {gpus} GPUs, room for "
                f"{room}: give fewer --workers or --threads"
            )
        self._actor = ray.remote(Worker).options(
            num_cpus=self._threads,
            num_gpus=1 if on_gpu else 0,
            max_restarts=0,
            max_task_retries=0,
        )

    def places(self) -> Sequence[str]:
        return [f"{number} of the cluster" for number in range(self._count)]

    def hire(self, _place: int, expected: dict[str, str]) -> _Actor:
        setup = Setup(self._source, self._device, self._threads, expected)
        return _Actor(self._ray, self._actor.remote(setup))

    def wait(self, members: Sequence[_Actor], seconds: float) -> Sequence[_Actor]:
        by_answer = {member.answer_to: member for member in members}
        ready, _ = self._ray.wait(
            list(by_answer), num_returns=1, timeout=seconds, fetch_local=False
        )
        return [by_answer[each] for each in ready]

    def close(self) -> None:
        if self._began and self._ray.is_initialized():
            self._ray.shutdown()


def _ray() -> Any:
    try:
        return import_module("ray")
    except ImportError as error:
        raise RunnerError(
            f"the runner ray needs Ray, which cannot be imported ({error}): pip install 'dynadepth-search[ray]', or "
            "give another --runner"
        ) from error


def _connect(ray: Any, address: str | None) -> None:
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdecimal() and "//" not in host:
        # Ray itself asks such an address for ten minutes before it says so.
        try:
            socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise _no_cluster(address, error) from error
    options = {"include_dashboard": False} if address is None else {}
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level=logging.WARNING,
            **options,
        )
    except Exception as error:  # Ray raises errors of many kinds, plain ones among them
        raise _no_cluster(address, error) from error


def _no_cluster(address: str | None, error: Exception) -> RunnerError:
    where = "on this machine" if address is None else f"at {address!r}"
    return RunnerError(
        f"there is no Ray cluster to work with {where} ({type(error).__name__}: {error}); start one with `ray start`, "
        "and give its address"
    )
