"""Steps of a long run: each is done once, timed, and remembered on disk.

Owns the file `steps.json`. Knows nothing of what the steps do.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynadepth.errors import LabelError
from dynadepth_search.storage.compatibility import check_asked
from dynadepth_search.storage.sealed import read_sealed, write_sealed
from dynadepth_search.storage.stored import Stored

__all__ = ["Steps"]


class Steps:
    """What a run has finished.

    A step leaves its products in files of its own; here is what it reported and how long it took. A
    run that was killed goes on with the first step that had not finished. Seconds are of the last
    attempt at a step: what a killed one took is not counted.

    Args:
        path: Where the steps are remembered.
        asked: What the run was asked for, as values that JSON knows.

    Raises:
        LabelError: The file belongs to a run that was asked for something else, or is damaged.
    """

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        self._path = path
        self._content: dict[str, Any] = {"asked": asked, "steps": {}}
        if path.exists():
            self._content = _read(path, asked)

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of each finished step, of the attempt that finished it."""
        return {name: step["seconds"] for name, step in self._content["steps"].items()}

    def done(self, name: str) -> bool:
        """Say whether a step has finished."""
        return name in self._content["steps"]

    def run(
        self, name: str, work: Callable[[], dict[str, Any]], *, write: bool = True
    ) -> dict[str, Any]:
        """Do a step, unless it is done.

        Args:
            name: Of the step.
            work: Does it, and returns what is to be remembered, as values that JSON knows.
            write: False leaves the writing to the next step, and so leaves no file behind if what
                was asked for turns out to be impossible before that.

        Returns:
            What the step reported, now or then.
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
