"""One writer for a folder at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynadepth.errors import LabelError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["locked"]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other searches out of a folder, where the system can; a killed process leaves no lock.

    Raises:
        LabelError: Another process is writing there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise LabelError(
                    f"another search is writing to {folder}; wait for it, or use another folder"
                ) from error
        yield
