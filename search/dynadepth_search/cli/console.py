"""Progress of long commands on stderr: bars on a terminal, a few plain lines elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

__all__ = ["ProgressDisplay"]

# If stderr is not a terminal, the progress of a stage is printed at most this often.
_QUIET_SECONDS = 20.0


class ProgressDisplay:
    """Shows stages of work; it is called with a stage, the number of finished steps and the number of all steps.

    It is used as a context manager. It never mixes with results on stdout.

    Args:
        console: The console to write to; None: stderr.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stderr)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, float] = {}

    def __enter__(self) -> "ProgressDisplay":
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show the progress of a stage.

        Args:
            stage: Name of the stage; a finished stage starts again if it is named again.
            done: Number of finished steps.
            total: Number of all steps.
        """
        if self._console.is_terminal:
            self._draw(stage, done, total)
            return
        now = time.monotonic()
        first = stage not in self._said
        # A stage of a single step needs no second line.
        ended = done >= total and total > 1
        if first or ended or now - self._said[stage] >= _QUIET_SECONDS:
            self._console.print(f"{stage}: {done}/{total}", highlight=False, markup=False)
            self._said[stage] = now
        if done >= total:
            self._said.pop(stage, None)

    def log(self, text: str) -> None:
        """Show a separate line of text."""
        self._console.print(text, highlight=False, markup=False)

    def _draw(self, stage: str, done: int, total: int) -> None:
        task = self._tasks.get(stage)
        if task is None or self._bars.tasks[self._bars.task_ids.index(task)].finished:
            task = self._bars.add_task(stage, total=max(total, 1))
            self._tasks[stage] = task
        self._bars.update(task, completed=done if total else 1, total=max(total, 1))
