"""Files written whole or not at all, and their hashes.

A reader of a path sees the old content or the new one, never a part: everything is written beside its destination,
flushed to disk and renamed.
"""

import hashlib
import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynadepth.errors import DynadepthError

__all__ = [
    "check_schema_version",
    "make_folder_beside",
    "parse_json",
    "read_json",
    "read_versioned_json",
    "sha256_bytes",
    "sha256_file",
    "sha256_text",
    "write_bytes_atomic",
    "write_json_atomic",
    "write_text_atomic",
]


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that a kill at any moment leaves the old content or the new one.

    Args:
        path: The file to write; its folder is made if it is missing.
        data: The whole content.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target)
    try:
        # `tempfile` is not used: its files are private whatever the umask says.
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def make_folder_beside(path: str | os.PathLike[str]) -> Path:
    """Make an empty folder beside a destination, to be filled and renamed to it; the umask sets its mode.

    Args:
        path: Where the folder will go; its own folder is made if it is missing.

    Returns:
        The new folder, hidden and with a name of its own.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target)
    temporary.mkdir()
    return temporary


def _beside(target: Path) -> Path:
    """Return an unused name in the same folder: a rename is atomic only within one file system."""
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text as `write_bytes_atomic` does."""
    write_bytes_atomic(path, text.encode())


def write_json_atomic(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON, sorted and indented, as `write_bytes_atomic` does.

    Raises:
        ValueError: The content holds a number that is not finite.
    """
    write_text_atomic(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON as the standard has it: no NaN, no infinity, and no key twice in one object.

    Args:
        text: JSON; bytes are UTF-8.

    Returns:
        The value.

    Raises:
        ValueError: It is not JSON, or not UTF-8.
    """
    try:
        return json.loads(
            text if isinstance(text, str) else text.decode(),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_object,
        )
    except RecursionError as error:
        raise ValueError("lists or objects within each other without end") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is too large for a number")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!a} is given twice")
    return content


def read_json(path: str | os.PathLike[str], error: type[DynadepthError]) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.
        error: Raised if the content is not a JSON object.

    Returns:
        The object.

    Raises:
        FileNotFoundError: There is no such file.
        DynadepthError: Of type `error`: the file is not a JSON object.
    """
    file = Path(path)
    try:
        content = parse_json(file.read_bytes())
    except ValueError as cause:
        raise error(f"{file} is not JSON ({cause}); it is damaged: write it again") from cause
    if not isinstance(content, dict):
        raise error(f"{file} holds a JSON {type(content).__name__}; expected an object")
    return content


def read_versioned_json(
    path: str | os.PathLike[str],
    version: int,
    *,
    error: type[DynadepthError],
    make_again: str,
    missing: str = "",
) -> dict[str, Any]:
    """Read a JSON object of a given `schema_version`.

    Args:
        path: The file.
        version: The schema version that is read here.
        error: Raised if the content is not a JSON object of this version.
        make_again: What to do about a file of an older version, such as "train the routers again".
        missing: How to make the file, for the message if it does not exist.

    Returns:
        The object, `schema_version` included.

    Raises:
        DynadepthError: Of type `error`: the file is not a JSON object, or is of another version.
        FileNotFoundError: There is no such file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}{f'; {missing}' if missing else ''}")
    content = read_json(file, error)
    check_schema_version(content, version, name=str(file), error=error, make_again=make_again)
    return content


def check_schema_version(
    content: Mapping[str, Any],
    version: int,
    *,
    name: str,
    error: type[DynadepthError],
    make_again: str,
) -> None:
    """Check that content has the schema version that is read here.

    Args:
        content: Has `schema_version`, and possibly the `dynadepth_version` that wrote it.
        version: The schema version that is read here.
        name: What messages call the content.
        error: Raised if it is of another version.
        make_again: What to do about content of an older version.

    Raises:
        DynadepthError: Of type `error`: the version is missing, not a whole number of at least 1, newer or older.
    """
    found = content.get("schema_version")
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise error(
            f"{name} has schema_version {found!r}; expected a whole number from 1 on: it is damaged, {make_again}"
        )
    if found == version:
        return
    writer = content.get("dynadepth_version")
    written = f"{name} has schema version {found}" + (
        f" (written by dynadepth {writer})" if writer else ""
    )
    if found > version:
        raise error(f"{written}; this dynadepth reads up to {version}: update dynadepth")
    raise error(f"{written}; this dynadepth reads {version}: {make_again}")


# The start of the small file that Git LFS leaves instead of a large one that was not fetched.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def lfs_hint(source: str | os.PathLike[str] | bytes) -> str:
    """Return the end of a message about a file that cannot be read, for the case that it is a Git LFS pointer.

    Args:
        source: The file, or what it begins with. A folder: the first of its files that is a pointer.

    Returns:
        The hint, or an empty text if it is none.
    """
    if isinstance(source, bytes):
        found = source.startswith(_LFS_POINTER)
        name = "it"
    else:
        place = Path(source)
        files = sorted(place.iterdir()) if place.is_dir() else [place]
        pointers = [file for file in files if file.is_file() and _begins(file) == _LFS_POINTER]
        found, name = bool(pointers), pointers[0].name if pointers else ""
    return (
        f"; {name} is a Git LFS pointer, not the file itself: run `git lfs pull`" if found else ""
    )


def _begins(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(len(_LFS_POINTER))
    except OSError:
        return b""


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_text(text: str) -> str:
    """Return the SHA-256 of UTF-8 text in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file in hexadecimal; the file is read in pieces."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
