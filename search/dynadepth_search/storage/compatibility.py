"""Whether a folder was made with the settings that are requested again, and how files describe a model and a task."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dynadepth.errors import LabelError
from dynadepth_search.data.tasks import ChatForm, Task

__all__ = ["chat_form", "check_asked", "dtype_name", "stored_hashes", "task_fields"]


def check_asked(path: Path, asked: dict[str, Any], stored: dict[str, Any]) -> None:
    """Refuse to continue a run that was started with other settings.

    Args:
        path: The file or folder of the run.
        asked: The settings requested now, as values that JSON can hold.
        stored: The settings that it was started with.

    Raises:
        LabelError: They differ; the message names the first field that does.
    """
    for name, given, known in _differences(asked, stored):
        raise LabelError(
            f"{path} was made with {name} = {known}, but now it is {given}; results of different searches do not "
            "mix: ask for the same, or use another folder"
        )


def task_fields(task: Task) -> dict[str, Any]:
    """Return what identifies a task, as values that JSON can hold; its name is left out, since a file may move."""
    fields: dict[str, Any] = {
        "kind": task.kind,
        "scoring": task.scoring,
        "prompts": len(task.examples),
        "sha256": task.sha256,
    }
    if task.chat is not None:
        fields["chat"] = {"template": task.chat.template, "system": task.chat.system}
    return fields


def chat_form(fields: Mapping[str, Any]) -> ChatForm | None:
    """Return the chat form of a task from its `task_fields`.

    Raises:
        LabelError: The fields are damaged.
    """
    stored = fields.get("chat")
    if stored is None:
        return None
    if (
        not isinstance(stored, Mapping)
        or set(stored) != {"template", "system"}
        or not isinstance(stored["template"], str)
        or not isinstance(stored["system"], str | None)
    ):
        raise LabelError(
            f"the task's chat form is {stored!r}; expected the texts `template` and `system`: make the folder again"
        )
    return ChatForm(template=stored["template"], system=stored["system"])


def stored_hashes(content: Mapping[str, Any], key: str) -> tuple[str, ...] | None:
    """Return the hashes of prompts that a file holds under a key; None if an older version wrote the file without them.

    Raises:
        LabelError: The value is not a list of texts.
    """
    known = content.get(key)
    if known is None:
        return None
    if not isinstance(known, list) or not all(isinstance(each, str) for each in known):
        raise LabelError(
            f"{key} is {str(known)[:60]!r}; expected a list of texts: make the folder again"
        )
    return tuple(known)


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
