"""One writer for a folder at a time."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from dynadepth.errors import LabelError

__all__ = ["locked"]

_LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a folder; a killed process releases its lock.

    What was made for the lock alone, and holds nothing else in the end, is removed again: so a run that is refused
    leaves no trace.

    Args:
        folder: The folder; it is made if it is missing. The lock is its file `.lock`.

    Raises:
        LabelError: Another process is writing there, or the folder cannot be made, or the file system has no locks.
    """
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    unused = not (folder / _LOCK).exists()
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        while not (folder / _LOCK).exists():
            # The run before this one left nothing, and took its lock's file away while this one was opening it.
            lock.release()
            lock.acquire()
    except Timeout as error:
        raise LabelError(
            f"another process is writing to {folder}; wait for it, or use another folder"
        ) from error
    except (FileExistsError, NotADirectoryError) as error:
        raise LabelError(f"{folder} is no folder ({error}); name a folder") from error
    except (NotImplementedError, OSError) as error:
        raise LabelError(
            f"{folder} cannot be locked ({error}), so that two runs could write to it at once; some network drives "
            "have no locks: use a folder on a local disk"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):
            if unused and [file.name for file in folder.iterdir()] == [_LOCK]:
                (folder / _LOCK).unlink()
        lock.release()
        for place in new:
            with suppress(OSError):
                place.rmdir()
