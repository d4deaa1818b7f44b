"""The runner that needs nothing: this process, with the model that it has."""

from collections.abc import Iterable, Iterator
from typing import Any

from dynadepth_search.runners.work import Job, Loaded, Work

__all__ = ["LocalRunner"]


class LocalRunner:
    """Does jobs in this process, in their order."""

    def run(self, work: Work, jobs: Iterable[Job], loaded: Loaded) -> Iterator[tuple[int, Any]]:
        """Do jobs, as for `Runner`.

        Args:
            work: The settings.
            jobs: The jobs.
            loaded: What this process has loaded.
        """
        do = None
        for number, content in jobs:
            do = do or work.start(loaded)
            yield number, do(content)

    def close(self) -> None:
        """Do nothing: there are no workers."""
