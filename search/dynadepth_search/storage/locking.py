"""One writer for a folder at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dynadepth.errors import LabelError

__all__ = ["locked"]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a folder; a killed process releases its lock.

    Args:
        folder: The folder; it is made if it is missing. The lock is its file `.lock`.

    Raises:
        LabelError: Another process is writing there, or the file system does not support locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise LabelError(
            f"another process is writing to {folder}; wait for it, or use another folder"
        ) from error
    except (NotImplementedError, OSError) as error:
        raise LabelError(
            f"{folder} cannot be locked ({error}), so that two runs could write to it at once; some network drives "
            "have no locks: use a folder on a local disk"
        ) from error
    try:
        yield
    finally:
        lock.release()
