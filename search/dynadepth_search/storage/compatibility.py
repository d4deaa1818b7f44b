"""Whether what lies in a folder is what is asked for again.

Owns the comparison, and the words for a model and a task in files. Knows nothing of what the files hold.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dynadepth.errors import LabelError
from dynadepth.files import read_json
from dynadepth_search.data.tasks import Task

__all__ = ["check_asked", "dtype_name", "read_versioned", "task_fields"]


def check_asked(path: Path, asked: dict[str, Any], stored: dict[str, Any]) -> None:
    """Refuse to go on with work that was asked for otherwise.

    Args:
        path: Where the work lies.
        asked: What is asked for now, as values that JSON knows.
        stored: What was asked for then.

    Raises:
        LabelError: They differ; the message names the first field.
    """
    for name, given, known in _differences(asked, stored):
        raise LabelError(
            f"{path} was made with {name} = {known}, but now it is {given}; results of different searches do not "
            "mix: ask for the same, or use another folder"
        )


def read_versioned(path: Path, version: int, *, verb: str, again: str) -> dict[str, Any]:
    """Read a JSON file of ours that says which version wrote it.

    Args:
        path: The file.
        version: Of what is read here.
        verb: The command that makes it.
        again: What to do with a file of another version.

    Raises:
        FileNotFoundError: There is none.
        LabelError: It is no JSON object, or of another version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; make it with `dynadepth {verb}`")
    content = read_json(path, LabelError)
    if content.get("schema_version") != version:
        raise LabelError(
            f"{path} has schema version {content.get('schema_version')!r}; this dynadepth-search reads {version}: "
            f"{again}, or install the version that wrote it"
        )
    return content


def task_fields(task: Task) -> dict[str, Any]:
    """Return what identifies a task, as values that JSON knows; its name does not, since a file may move."""
    return {
        "kind": task.kind,
        "scoring": task.scoring,
        "prompts": len(task.examples),
        "sha256": task.sha256,
    }


def dtype_name(model: Any) -> str:
    """Return the dtype of a model: `bfloat16`, `float32` and so on."""
    return str(model.dtype).removeprefix("torch.")


def _differences(asked: Any, stored: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    if isinstance(asked, dict) and isinstance(stored, dict):
        for key in sorted({*asked, *stored}):
            below = f"{name}.{key}" if name else key
            yield from _differences(asked.get(key), stored.get(key), below)
    elif asked != stored:
        yield name, json.dumps(asked), json.dumps(stored)
