"""The interface between a long work and whoever does it: a work, its jobs, and a runner that finishes them.

A job is a fixed block of prompts, or one prompt, done by itself: its result depends on its content and the work alone.
So it does not matter which worker does a job, or when. Only the driver, the process that asks a runner, writes to disk.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from dynadepth.shortcuts.maps import Shortcuts

__all__ = ["Job", "Loaded", "Runner", "Work"]

# The number of a job, and what it is about: plain data that can be sent to another process.
Job = tuple[int, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """What a process has loaded.

    Args:
        model: The base model, in evaluation mode and not wrapped.
        tokenizer: Its tokenizer.
        shortcuts: What states take in place of layers that a plan skips; None: nothing.
    """

    model: Any
    tokenizer: Any
    shortcuts: Shortcuts | None = None


class Work(Protocol):
    """Settings of a work, as plain data that can be sent to another process."""

    def start(self, loaded: Loaded) -> Callable[[Any], Any]:
        """Return what does a job: it takes the job's content and returns its result, both plain data.

        It is called once in each process that takes part.
        """


class Runner(Protocol):
    """Does the jobs of works. Whoever made it closes it; until then its workers keep their models."""

    def run(self, work: Work, jobs: Iterable[Job], loaded: Loaded) -> Iterator[tuple[int, Any]]:
        """Do jobs, and yield the number and the result of each one when it is finished, in any order.

        Args:
            work: The settings.
            jobs: The jobs; they are taken one after the other as workers become free.
            loaded: What this process has loaded; workers elsewhere must load the same.

        Raises:
            DynadepthError: A job failed; the error is the one that it raised.
            RunnerError: Workers died, or do not run what this process runs.
        """

    def close(self) -> None:
        """End all workers."""
