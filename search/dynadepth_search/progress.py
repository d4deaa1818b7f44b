"""The callback through which long work reports its progress."""

from collections.abc import Callable

__all__ = ["Progress", "silent"]

# Called with the stage of the work, the number of finished steps and the number of all steps.
Progress = Callable[[str, int, int], None]


def silent(_stage: str, _done: int, _total: int) -> None:
    """Report to nobody.

    Args:
        _stage: Name of the stage.
        _done: Number of finished steps.
        _total: Number of all steps.
    """
