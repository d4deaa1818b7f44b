"""JSON files of results, whose content is too free to be checked value by value: they carry a hash of themselves.

Whatever was altered since it was written is seen when it is read.
"""

import json
from pathlib import Path
from typing import Any

from dynadepth.errors import ConfigError, DynadepthError
from dynadepth.files import read_json, read_versioned_json, sha256_text, write_json_atomic

__all__ = ["check_seal", "read_result", "read_sealed", "write_sealed"]

_SEAL = "seal"


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write JSON whole or not at all, with its seal.

    Args:
        path: The file to write.
        content: Values that JSON knows; `seal` is no key of it.

    Raises:
        ValueError: The content holds a number that is not finite.
    """
    # As it will be read: keys are texts, and tuples are lists.
    plain = json.loads(json.dumps(content, allow_nan=False))
    write_json_atomic(path, {**plain, _SEAL: _hash(plain)})


def read_sealed(path: Path, error: type[DynadepthError], *, make_again: str) -> dict[str, Any]:
    """Read what `write_sealed` wrote.

    Args:
        path: The file.
        error: Raised if it is not what was written.
        make_again: What the user can do about a damaged file.

    Returns:
        The content. A file that is older than seals is not checked.

    Raises:
        DynadepthError: Of type `error`: the file is no JSON object, or was altered.
        FileNotFoundError: There is none.
    """
    return check_seal(read_json(path, error), path, error, make_again=make_again)


def read_result(path: Path, version: int, *, make_again: str, missing: str) -> dict[str, Any]:
    """Read a sealed file of results that has a `schema_version`.

    Args:
        path: The file.
        version: The version that is known.
        make_again: What the user can do about another version or a damaged file.
        missing: What the user can do if there is none.

    Returns:
        The content, without the seal.

    Raises:
        ConfigError: The file is damaged or of another version.
        FileNotFoundError: There is none.
    """
    content = read_versioned_json(
        path, version, error=ConfigError, make_again=make_again, missing=missing
    )
    return check_seal(content, path, ConfigError, make_again=make_again)


def check_seal(
    content: dict[str, Any], path: Path, error: type[DynadepthError], *, make_again: str
) -> dict[str, Any]:
    """Return the content of a sealed file without the seal, after checking it.

    Args:
        content: What was read.
        path: The file, for the message.
        error: Raised if it is not what was written.
        make_again: What the user can do about a damaged file.

    Returns:
        The content. A file that is older than seals is not checked.

    Raises:
        DynadepthError: Of type `error`: the content was altered.
    """
    rest = {key: value for key, value in content.items() if key != _SEAL}
    if _SEAL in content and content[_SEAL] != _hash(rest):
        raise error(
            f"{path} is damaged (it is not what was written; its seal is broken): {make_again}"
        )
    return rest


def _hash(content: dict[str, Any]) -> str:
    return sha256_text(json.dumps(content, sort_keys=True, separators=(",", ":")))
