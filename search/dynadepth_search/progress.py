"""How long work tells where it is."""

from collections.abc import Callable

__all__ = ["Progress", "silent"]

# Stage of the work, finished steps, all steps.
Progress = Callable[[str, int, int], None]


def silent(_stage: str, _done: int, _total: int) -> None:
    """Tell nobody."""
