"""Whether what lies in a folder is what is asked for again.

Owns the comparison, and the form and the checks of what every file says of its base model and its task.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from dynadepth.config import config_from_dict
from dynadepth.errors import ConfigError, LabelError, ShortcutError, TaskError
from dynadepth.shortcuts.maps import Shortcuts
from dynadepth_search.data.tasks import ChatForm, Kind, Scoring, Task
from dynadepth_search.files.sealed import read_sealed, write_sealed
from dynadepth_search.files.stored import Stored

__all__ = [
    "chat_form",
    "check_asked",
    "check_same_shortcuts",
    "check_stored_fingerprint",
    "check_stored_task",
    "dtype_name",
    "mark_asked",
    "shortcut_fields",
    "stored_config",
    "stored_hashes",
    "task_fields",
]

_Config = TypeVar("_Config")


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


def mark_asked(path: Path, asked: dict[str, Any], *, advice: str) -> None:
    """Write down what a run was asked for; where that is done already, check that the same is asked for now.

    Args:
        path: The file.
        asked: The settings requested now, as values that JSON can hold.
        advice: What the user can do about a damaged file.

    Raises:
        LabelError: The settings differ, or the file is damaged.
    """
    if path.exists():
        check_asked(path, asked, read_sealed(path, LabelError, make_again=advice))
    else:
        write_sealed(path, asked)


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


def shortcut_fields(shortcuts: Shortcuts | None) -> dict[str, str]:
    """Return what identifies the shortcuts of a run, as values that JSON can hold; nothing if there were none.

    Results with and without shortcuts, or with others, are those of different models, and never mix.
    """
    return {} if shortcuts is None else {"shortcuts": shortcuts.digest}


def check_same_shortcuts(
    stored: str | None, shortcuts: Shortcuts | None, *, what: str, advice: str
) -> None:
    """Refuse to use what was made with other shortcuts than are used now.

    Args:
        stored: The digest of the shortcuts that it was made with; None: it was made without.
        shortcuts: Those that are used now; None: none.
        what: What was made so, for the message.
        advice: What the user can do.

    Raises:
        ShortcutError: They differ.
    """
    now = None if shortcuts is None else shortcuts.digest
    if stored != now:
        said = [
            "without shortcuts" if each is None else f"with shortcuts {each}"
            for each in (stored, now)
        ]
        raise ShortcutError(f"{what} made {said[0]}, but now it is {said[1]}; {advice}")


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


def check_stored_fingerprint(stored: Stored) -> None:
    """Check that a value has the form of what `dynadepth.models.fingerprint.fingerprint` returns.

    Raises:
        LabelError: It has not.
    """
    found = stored.fields(["scheme", "architecture", "quantization", "weights"])
    found["scheme"].whole(1)
    for item in found["architecture"].mapping().values():
        if item.value is not None and not isinstance(item.value, str | list):
            item.whole()
    found["quantization"].optional(Stored.text)
    for item in found["weights"].mapping().values():
        item.text()


def check_stored_task(stored: Stored, *, named: bool) -> None:
    """Check that a value has the form of `task_fields`.

    Args:
        stored: The value.
        named: Whether it has the task's name besides.

    Raises:
        LabelError: It has not that form.
    """
    needed = ["kind", "scoring", "prompts", "sha256", *(["name"] if named else [])]
    found = stored.fields(needed, ["chat"])
    found["kind"].one_of(get_args(Kind))
    found["scoring"].one_of(get_args(Scoring))
    found["prompts"].whole(1)
    found["sha256"].hexadecimal(64)
    if named:
        found["name"].text()
    if "chat" in found:
        chat = found["chat"].fields(["template", "system"])
        chat["template"].text()
        chat["system"].optional(Stored.text)


def stored_config(stored: Stored, config_class: type[_Config], **others: Any) -> _Config:
    """Return settings that a file holds.

    Args:
        stored: The settings as `config_to_dict` wrote them.
        config_class: Of the settings.
        others: Settings that the file leaves out.

    Raises:
        LabelError: A setting is unknown, of the wrong type or out of range.
    """
    stored.mapping()
    try:
        return config_from_dict(config_class, {**stored.value, **others})
    except (ConfigError, TaskError, TypeError, ValueError, OverflowError) as error:
        stored.damaged(f"{stored.name}: {error}")


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
