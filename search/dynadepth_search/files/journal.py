"""An append-only file of JSON lines that survives a kill of its writer.

A line is flushed to disk before `append` returns. A kill in the middle of it leaves a line without an
end; that one is dropped, and cut off before the next line is written. What a line must be is the caller's to say;
what to do about one that is not, and how it is named to the user, is decided here for every journal.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from dynadepth.errors import LabelError
from dynadepth.files import parse_json, write_bytes_atomic
from dynadepth_search.files.stored import Stored

__all__ = ["Journal", "read_journal"]

_T = TypeVar("_T")


def read_journal(path: Path, check: Callable[[Stored], _T], *, advice: str) -> tuple[list[_T], int]:
    """Read all finished lines.

    Args:
        path: The journal; none is an empty one.
        check: Returns what a line means; it refuses a line through what it is given, see `Stored`.
        advice: What the user can do about a line that was altered.

    Returns:
        What the lines mean, and how many bytes they take; what follows is the torn last line.

    Raises:
        LabelError: A line cannot be read and is not the last one, or `check` refuses it; or the file cannot be read.
    """
    try:
        data = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise LabelError(f"{path} cannot be read ({error})") from error
    lines = data.split(b"\n")
    rows: list[_T] = []
    length = 0
    # What follows the last line feed is empty, or the beginning of a line.
    for number, line in enumerate(lines[:-1], start=1):
        where = f"{path}, line {number}"
        try:
            row = _object_in(line)
        except (ValueError, TypeError) as error:
            # After a crash of the machine, the last line may have its length but not its content.
            if number == len(lines) - 1:
                break
            raise LabelError(
                f"{where} cannot be read ({error}); a kill damages only the last line, so the file was altered: "
                f"{advice}"
            ) from error
        rows.append(check(Stored(row, where, advice)))
        length += len(line) + 1
    return rows, length


class Journal:
    """Writes lines to a journal.

    Args:
        path: The file; it is made with the first line.
        length: Bytes that are finished lines, as `read_journal` counts them; the rest is cut off. None: all of them.
    """

    def __init__(self, path: Path, length: int | None = None) -> None:
        self._path = path
        if length is not None and path.exists() and path.stat().st_size > length:
            os.truncate(path, length)

    def append(self, *rows: dict[str, Any]) -> None:
        """Write lines to disk, all at once."""
        with self._path.open("ab") as file:
            file.write(b"".join(_line(row) for row in rows))
            file.flush()
            os.fsync(file.fileno())

    def replace(self, rows: Iterable[dict[str, Any]]) -> None:
        """Replace all lines by these, or remove the file if there are none."""
        data = b"".join(_line(row) for row in rows)
        if data:
            write_bytes_atomic(self._path, data)
        else:
            self._path.unlink(missing_ok=True)


def _object_in(line: bytes) -> dict[str, Any]:
    row = parse_json(line)
    if not isinstance(row, dict):
        raise TypeError(f"a JSON {type(row).__name__}")
    return row


def _line(row: dict[str, Any]) -> bytes:
    return (
        json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"
    )
