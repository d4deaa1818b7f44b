"""Where routers folders are (beside a base model or on the hub), and how one replaces another."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from dynadepth.errors import CheckpointError, ConfigError
from dynadepth.files import make_folder_beside, write_bytes_atomic
from dynadepth.models.names import is_hub_id
from dynadepth.shortcuts import save_load as shortcut_files

__all__ = [
    "CARD_NAME",
    "CONFIG_NAME",
    "FOLDER_NAME",
    "ONNX_NAME",
    "ROUTERS_FILES",
    "WEIGHTS_NAME",
    "base_model_name",
    "find_routers",
    "first_lines",
    "locate_routers",
    "locate_shortcuts",
    "replace_folder",
    "restore_folder",
]

CONFIG_NAME = "router_config.json"
WEIGHTS_NAME = "routers.safetensors"
ONNX_NAME = "routers.onnx"
CARD_NAME = "README.md"
FOLDER_NAME = "routers"
_SHORTCUT_FILES = (shortcut_files.CONFIG_NAME, shortcut_files.WEIGHTS_NAME)
ROUTERS_FILES = (CONFIG_NAME, WEIGHTS_NAME, ONNX_NAME, CARD_NAME, *_SHORTCUT_FILES)


def find_routers(model: nn.Module) -> Path:
    """Find the routers beside a base model, where `from_pretrained` found the model itself.

    On the hub they are taken from the main branch, whatever the revision of the model: transformers does not record it
    (if a configuration has `_commit_hash`, that commit is used). `load_policy` takes a revision.

    Args:
        model: A transformers model.

    Returns:
        The folder, on this machine.

    Raises:
        FileNotFoundError: There is none; the message says what was looked for.
    """
    base = _origin(model)
    advice = "give routers=<folder or hub id>, or train some with `dynadepth train`"
    if not base:
        raise FileNotFoundError(
            f"this {type(model).__name__} does not come from a folder or the hub, so there are no routers beside it; "
            f"{advice}"
        )
    if Path(base).is_dir():
        folder = Path(base) / FOLDER_NAME
        if (folder / CONFIG_NAME).is_file():
            return folder
        raise FileNotFoundError(
            f"there is no {folder / CONFIG_NAME} beside the base model; {advice}"
        )
    if not is_hub_id(base):
        raise FileNotFoundError(
            f"the base model came from {base}, which no longer exists; {advice}"
        )
    folder = _download(
        base, [f"{FOLDER_NAME}/*"], revision=getattr(model.config, "_commit_hash", None)
    )
    folder = folder / FOLDER_NAME
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(
            f"the hub repository {base} has no {FOLDER_NAME}/{CONFIG_NAME}; {advice}"
        )
    return folder


def base_model_name(model: nn.Module) -> str:
    """Return a model's hub id, or the last part of the local path that it came from.

    A full path would reveal details of the machine in a published folder.

    Example:
        >>> base_model_name(nn.Linear(1, 1))
        ''
    """
    origin = _origin(model)
    return origin if is_hub_id(origin) and not Path(origin).exists() else Path(origin).name


def locate_routers(path_or_hub_id: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """Return the routers folder for a path or a hub id; one on the hub is downloaded.

    Args:
        path_or_hub_id: A routers folder, a folder that contains one called `routers`, or a hub id of either.
        revision: Branch, tag or commit of the hub repository; None: its main branch.

    Raises:
        ConfigError: A revision was given for a folder on this machine.
        FileNotFoundError: There is none; the message says what was looked for.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        if revision is not None:
            raise ConfigError(
                f"revision is {revision!r}, but {path} is a folder on this machine, which has none; leave revision "
                "out, or give a hub id that is not a folder here"
            )
    else:
        hub_id = os.fspath(path_or_hub_id)
        if not is_hub_id(path_or_hub_id):
            backup = _backup(path)
            former = (
                f"; an interrupted save left the previous ones in {backup}"
                if backup.is_dir()
                else ""
            )
            raise FileNotFoundError(
                f"there is no folder {path}; expected a routers folder or a hub id like org/name{former}"
            )
        path = _download(hub_id, [*ROUTERS_FILES, f"{FOLDER_NAME}/*"], revision=revision)
    for folder in (path, path / FOLDER_NAME):
        if (folder / CONFIG_NAME).is_file():
            return folder
    raise FileNotFoundError(
        f"{path_or_hub_id} has neither {CONFIG_NAME} nor {FOLDER_NAME}/{CONFIG_NAME}; expected a routers folder as "
        "`dynadepth train` writes it"
    )


def locate_shortcuts(path_or_hub_id: str | os.PathLike[str]) -> Path:
    """Return the folder of shortcuts for a path or a hub id; those on the hub are downloaded.

    Args:
        path_or_hub_id: A folder of shortcuts, a routers folder that carries them, a folder that contains one called
            `shortcuts` or `routers`, or a hub id of any of these.

    Raises:
        FileNotFoundError: There are none; the message says what was looked for.
    """
    path = Path(path_or_hub_id)
    inside = ("", "shortcuts", FOLDER_NAME)
    if not path.is_dir():
        hub_id = os.fspath(path_or_hub_id)
        if not is_hub_id(path_or_hub_id):
            raise FileNotFoundError(
                f"there is no folder {path}; expected what `dynadepth shortcuts` writes, or a hub id like org/name"
            )
        names = [Path(folder, name).as_posix() for folder in inside for name in _SHORTCUT_FILES]
        path = _download(hub_id, names)
    for folder in inside:
        if (path / folder / shortcut_files.CONFIG_NAME).is_file():
            return path / folder
    raise FileNotFoundError(
        f"{path_or_hub_id} has no {shortcut_files.CONFIG_NAME}, neither there nor in shortcuts/ or {FOLDER_NAME}/; "
        "make it with `dynadepth shortcuts`"
    )


def _origin(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    return str(getattr(config, "_name_or_path", None) or getattr(model, "name_or_path", None) or "")


def _download(hub_id: str, patterns: list[str], *, revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    # huggingface_hub, its HTTP client and hf_xet share no base but Exception.
    except Exception as error:
        at = "" if revision is None else f" at revision {revision}"
        raise FileNotFoundError(
            f"there is no folder {hub_id}, and the hub repository of that name cannot be read{at}: {first_lines(error)}"
        ) from error


def first_lines(error: Exception) -> str:
    r"""Return the beginning of an error of the hub in one line; its first line alone is often just a status.

    Example:
        >>> first_lines(OSError("404 Client Error.\n\nRepository Not Found.\nPlease make sure"))
        '404 Client Error. Repository Not Found.'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


def replace_folder(folder: str | os.PathLike[str], files: Mapping[str, bytes]) -> Path:
    """Write a routers folder whole or not at all, replacing an existing one.

    Args:
        folder: The folder to write; it may hold the files of earlier routers, but nothing else.
        files: The content of each file, by name.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder holds other files. Nothing was changed.
    """
    target = Path(folder).resolve()
    restore_folder(target)
    if target.exists():
        _check_replaceable(target)
    temporary = make_folder_beside(target)
    try:
        for name, content in files.items():
            write_bytes_atomic(temporary / name, content)
        _swap(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def _check_replaceable(target: Path) -> None:
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; give a folder for the routers")
    names = {entry.name for entry in target.iterdir()}
    # A README.md on its own need not be a model card.
    others = sorted(names - set(ROUTERS_FILES) if CONFIG_NAME in names else names)
    if others:
        raise CheckpointError(
            f"{target} holds {others[0]!r}{' and more' if others[1:] else ''}, which routers do not; saving replaces "
            "the whole folder, so give one of its own, such as `routers` beside the base model"
        )


def _backup(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def restore_folder(folder: str | os.PathLike[str]) -> None:
    """Put back the routers folder that a replacement had moved away when it was killed between its two renames.

    Only the writer of the folder may call this, since it would disturb a replacement that is running.

    Args:
        folder: Where the routers belong; nothing is done if it exists or if nothing was moved away.
    """
    target = Path(folder).resolve()
    backup = _backup(target)
    if backup.is_dir() and not target.exists():
        backup.rename(target)
    shutil.rmtree(backup, ignore_errors=True)


def _swap(temporary: Path, target: Path) -> None:
    """Move a finished folder to its destination, which is missing only if killed between the two renames."""
    backup = _backup(target)
    if target.exists():
        target.rename(backup)
    try:
        temporary.rename(target)
    except BaseException:
        if backup.is_dir():
            backup.rename(target)
        raise
    shutil.rmtree(backup, ignore_errors=True)
