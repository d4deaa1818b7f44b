"""Workers as processes of this machine, one for each device."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait

from dynadepth_search.runners.crew import CrewRunner, Gone
from dynadepth_search.runners.worker import Call, ModelSource, Reply, Setup, Worker

__all__ = ["process_runner"]

_WAIT_SECONDS = 5.0


def process_runner(source: ModelSource, devices: Sequence[str], *, threads: int) -> CrewRunner:
    """Return a runner with one process for each device.

    Args:
        source: Where the processes load the model from.
        devices: A torch device for each process; "cpu" may be named several times.
        threads: Number of threads of torch in each process.
    """
    return CrewRunner(_Processes(source.absolute(), tuple(devices), threads))


class _Process:
    """A worker in a process of its own; it ends with the driver, however that ends."""

    def __init__(self, setup: Setup) -> None:
        # A forked process would inherit threads and an initialised CUDA, neither of which work in it.
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, setup), daemon=True)
        self.process.start()
        # The worker's end is open in the worker alone, so that reading ends when the worker does.
        other.close()

    def ask(self, call: Call) -> None:
        try:
            self.connection.send(call)
        except OSError:
            # It has died since its last answer; reading says so.
            return

    def answer(self) -> Reply | Gone:
        try:
            reply: Reply = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(_WAIT_SECONDS)
            return Gone(_end_of(self.process.exitcode))
        return reply

    def stop(self) -> None:
        # It writes no files, so nothing is left half done.
        self.process.kill()
        self.process.join(_WAIT_SECONDS)
        self.connection.close()


class _Processes:
    """The processes of this machine."""

    def __init__(self, source: ModelSource, devices: tuple[str, ...], threads: int) -> None:
        self._source, self._devices, self._threads = source, devices, threads

    def places(self) -> Sequence[str]:
        return [f"{number} on {device}" for number, device in enumerate(self._devices)]

    def hire(self, place: int, expected: dict[str, str]) -> _Process:
        return _Process(Setup(self._source, self._devices[place], self._threads, expected))

    def wait(self, members: Sequence[_Process], seconds: float) -> Sequence[_Process]:
        by_connection = {member.connection: member for member in members}
        return [
            by_connection[each]
            for each in wait(list(by_connection), seconds)
            if each in by_connection
        ]

    def close(self) -> None:
        """Do nothing: each process has been ended."""


def _serve(connection: Connection, setup: Setup) -> None:
    """Answer calls until the driver ends. It runs in the worker."""
    # Ctrl-C reaches every process of a terminal; the driver ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_driver, daemon=True).start()
    worker = Worker(setup)
    with suppress(EOFError, OSError):
        while True:
            connection.send(worker.call(connection.recv()))


def _end_with_driver() -> None:
    """End this process when the driver is gone, even if it was killed while a job was being done."""
    driver = multiprocessing.parent_process()
    if driver is not None:
        driver.join()
        os._exit(1)


def _end_of(code: int | None) -> str:
    if code is None:
        return "it does not answer"
    if code < 0:
        return f"killed by signal {-code}, {signal.Signals(-code).name}"
    return f"it ended with exit code {code}"
