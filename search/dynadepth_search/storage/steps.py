"""Steps of a long run: each is done once, timed, and recorded in the file `steps.json`."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynadepth.errors import LabelError
from dynadepth_search.files.sealed import read_sealed, write_sealed
from dynadepth_search.files.stored import Stored
from dynadepth_search.storage.compatibility import check_asked

__all__ = ["Steps"]


class Steps:
    """The steps that a run has finished.

    A step writes its products to its own files; recorded here are its report and its duration. A run
    that was killed continues with the first unfinished step. The duration is that of the last attempt
    at a step, without the time of attempts that were killed.

    Args:
        path: The file of the steps.
        asked: The settings of the run, as values that JSON can hold.

    Raises:
        LabelError: The file belongs to a run with other settings, or is damaged.
    """

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        self._path = path
        self._content: dict[str, Any] = {"asked": asked, "steps": {}}
        if path.exists():
            self._content = _read(path, asked)

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of each finished step in seconds, of the attempt that finished it."""
        return {name: step["seconds"] for name, step in self._content["steps"].items()}

    def done(self, name: str) -> bool:
        """Say whether a step has finished."""
        return name in self._content["steps"]

    def run(
        self, name: str, work: Callable[[], dict[str, Any]], *, write: bool = True
    ) -> dict[str, Any]:
        """Do a step, unless it is done.

        Args:
            name: Name of the step.
            work: Does the step and returns its report, as values that JSON can hold.
            write: Whether to write the file now. False leaves that to the next step, so that no file
                is left behind if the run turns out to be impossible before that.

        Returns:
            The report of the step, from this run or an earlier one.
        """
        if not self.done(name):
            started = time.perf_counter()
            report = work()
            seconds = round(time.perf_counter() - started, 2)
            self._content["steps"][name] = {"seconds": seconds, "report": report}
            if write:
                write_sealed(self._path, self._content)
        known: dict[str, Any] = self._content["steps"][name]["report"]
        return known


def _read(path: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Return what was remembered."""
    advice = "use another folder, or delete it to run every step again"
    content = read_sealed(path, LabelError, make_again=advice)
    found = Stored(content, str(path), advice).fields(["asked", "steps"])
    found["asked"].mapping()
    check_asked(path, asked, content["asked"])
    for step in found["steps"].mapping().values():
        known = step.fields(["seconds", "report"])
        known["seconds"].number(0.0)
        known["report"].mapping()
    return content
