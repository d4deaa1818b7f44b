"""An append-only file of JSON lines that survives a kill of its writer.

A line is flushed to disk before `append` returns. A kill while it is being written leaves a line
without an end, which is ignored, and cut off before the next line is written.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dynadepth.errors import LabelError
from dynadepth.files import write_bytes_atomic

__all__ = ["Journal", "read_journal"]


def read_journal(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read all complete lines.

    Args:
        path: The journal; if it does not exist, it counts as empty.

    Returns:
        The lines, and how many bytes they take; what follows is an incomplete last line.

    Raises:
        LabelError: A line other than the last cannot be read. Its cause is the ValueError of a line that is not JSON,
            or the TypeError of one that is not an object.
    """
    data = path.read_bytes() if path.exists() else b""
    lines = data.split(b"\n")
    rows: list[dict[str, Any]] = []
    length = 0
    # What follows the last line feed is empty, or the beginning of a line.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise TypeError(f"a JSON {type(row).__name__}")  # noqa: TRY301 (handled as any other damaged line)
        except (ValueError, TypeError) as error:
            # After a crash of the machine, the last line may have its length but not its content.
            if number == len(lines) - 1:
                break
            raise LabelError(
                f"{path}, line {number} cannot be read ({error}); a kill damages only the last line, so the "
                "file was altered: remove that line and run the same search again; only its prompt is "
                "searched again"
            ) from error
        rows.append(row)
        length += len(line) + 1
    return rows, length


class Journal:
    """Writes lines to a journal.

    Args:
        path: The file; it is created with the first line.
        length: Number of bytes of complete lines, as `read_journal` returns it; the rest is cut off.
    """

    def __init__(self, path: Path, length: int) -> None:
        self._path = path
        if path.exists() and path.stat().st_size > length:
            os.truncate(path, length)

    def append(self, row: dict[str, Any]) -> None:
        """Write a line to disk."""
        with self._path.open("ab") as file:
            file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())

    def replace(self, rows: Iterable[dict[str, Any]]) -> None:
        """Replace all lines by these, or remove the file if there are none."""
        data = b"".join(_line(row) for row in rows)
        if data:
            write_bytes_atomic(self._path, data)
        else:
            self._path.unlink(missing_ok=True)


def _line(row: dict[str, Any]) -> bytes:
    return (
        json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"
    )
