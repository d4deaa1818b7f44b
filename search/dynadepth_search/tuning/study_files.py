"""The folder of a study: `study.json`, which says what is tuned and on what; the trials are in its storage."""

import json
import os
import uuid
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from dynadepth.errors import ConfigError, LabelError
from dynadepth.files import read_versioned_json, sha256_text
from dynadepth_search.files.sealed import check_seal, write_sealed
from dynadepth_search.storage.compatibility import check_asked

__all__ = ["JOURNAL", "STUDY_NAME", "begin_study", "input_folder", "read_study", "study_name"]

JOURNAL = "journal.log"
STUDY_NAME = "study.json"

_SCHEMA_VERSION = 1
_BEGIN = ".begin.lock"


def begin_study(
    folder: Path,
    asked: Mapping[str, Any],
    inputs: Mapping[str, Path | None],
    *,
    own_journal: bool,
) -> str:
    """Write what a study asks into its folder, or check that the folder's study asks the same.

    Args:
        folder: Folder of the study; it is made if it is missing.
        asked: What identifies the study, as values that JSON can hold.
        inputs: Folders that the work was read from, by name; None is left out.
        own_journal: Whether the trials are in a journal in the folder.

    Returns:
        The name of this folder among those that share a storage.

    Raises:
        ConfigError: The folder's trials are in another storage.
        LabelError: The folder holds another study, is damaged, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise LabelError(f"{folder} is no folder ({error}); name a folder") from error
    plain = json.loads(json.dumps(asked))
    with FileLock(folder / _BEGIN):
        if (folder / STUDY_NAME).exists():
            stored = read_study(folder)
            check_asked(folder / STUDY_NAME, plain, stored["asked"])
            if stored["own_journal"] != own_journal:
                here = "its own journal" if stored["own_journal"] else "another storage"
                raise ConfigError(
                    f"the trials of {folder} are in {here}; give --storage as it was given at first, or use another "
                    "folder"
                )
            return str(stored["folder_id"])
        mark = uuid.uuid4().hex
        named = {
            name: Path(os.path.relpath(each, folder)).as_posix()
            for name, each in inputs.items()
            if each is not None
        }
        content = {
            "schema_version": _SCHEMA_VERSION,
            "asked": plain,
            "own_journal": own_journal,
            "folder_id": mark,
            # As they lie from here, so that a run can be moved as a whole.
            "inputs": named,
            "versions": {name: version(name) for name in ("dynadepth", "numpy", "optuna", "torch")},
        }
        write_sealed(folder / STUDY_NAME, content)
        return mark


def read_study(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what a study asks.

    Args:
        folder: Folder of the study.

    Returns:
        The content of `study.json`.

    Raises:
        FileNotFoundError: There is no study.
        LabelError: The file is damaged, or of another version.
    """
    path = Path(folder) / STUDY_NAME
    advice = "remove the folder and run the study again"
    content = read_versioned_json(
        path,
        _SCHEMA_VERSION,
        error=LabelError,
        make_again=advice,
        missing="name a folder that `tune menu` or `tune search` wrote",
    )
    return check_seal(content, path, LabelError, make_again=advice)


def study_name(asked: Mapping[str, Any]) -> str:
    """Return the name of a study in a storage; equal studies have equal names on every machine."""
    digest = sha256_text(json.dumps(json.loads(json.dumps(asked)), sort_keys=True))[:16]
    return f"dynadepth-{asked['kind']}-{digest}"


def input_folder(folder: Path, content: Mapping[str, Any], name: str) -> Path:
    """Return a folder that a study was run on.

    Args:
        folder: Folder of the study.
        content: What `read_study` returned.
        name: What the folder holds, such as `scores`.

    Raises:
        ConfigError: The study names none, or it is not there.
    """
    said = content["inputs"].get(name)
    if said is None:
        raise ConfigError(f"the study in {folder} does not say where its {name} are; give --{name}")
    found = Path(os.path.normpath(folder / said))
    if not found.is_dir():
        raise ConfigError(
            f"the study in {folder} names {found} for its {name}, which is not there; give --{name}"
        )
    return found
