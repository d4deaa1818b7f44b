"""Works for runners that need no forest: they write down what they do, fail, and die."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynadepth.errors import SearchError
from dynadepth_search.runners.work import Loaded


@dataclass(frozen=True)
class LoggedWork:
    """Returns what it is given and the size of the model, and writes every job that it begins into a file.

    Args:
        log: The file.
        deadly: Jobs in which the worker dies.
        deaths: How many workers die of each of them.
        failing: Jobs that fail.
        seconds: How long a job takes.
    """

    log: str
    deadly: tuple[int, ...] = ()
    deaths: int = 1
    failing: tuple[int, ...] = ()
    seconds: float = 0.0

    def start(self, loaded: Loaded) -> Callable[[int], Any]:
        size = loaded.model.config.hidden_size

        def do(content: int) -> tuple[int, int]:
            with Path(self.log).open("a") as file:
                file.write(f"{content}\n")
            time.sleep(self.seconds)
            if content in self.deadly and self.begun().count(content) <= self.deaths:
                os.kill(os.getpid(), signal.SIGKILL)
            if content in self.failing:
                raise SearchError(f"job {content} failed")
            return content, size

        return do

    def begun(self) -> list[int]:
        """Return every job that was begun, as often as it was."""
        return [int(line) for line in Path(self.log).read_text().splitlines()]
