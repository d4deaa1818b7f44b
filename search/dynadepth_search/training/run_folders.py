"""The folders that a policy was trained from, as its routers folder names them: `eval` finds them there."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynadepth.checkpoints.trained_policy import TrainedPolicy
from dynadepth.errors import ConfigError

__all__ = ["named_folder", "with_folders"]


def with_folders(
    trained: TrainedPolicy, out: Path, folders: Mapping[str, Path | None]
) -> TrainedPolicy:
    """Return a policy whose training notes name the folders it was trained from.

    Args:
        trained: The policy.
        out: The routers folder that will hold it. The folders are named as they lie from there, so that a run can be
            moved as a whole, and so that a published policy says nothing of the machine.
        folders: By what they hold: `plans`, `scores`; None is left out.

    Returns:
        The same policy with these notes.
    """
    named = {
        name: Path(os.path.relpath(folder, out)).as_posix()
        for name, folder in folders.items()
        if folder is not None
    }
    return replace(trained, training={**trained.training, "folders": named})


def named_folder(trained: TrainedPolicy, name: str) -> Path:
    """Return a folder that a policy was trained from.

    Args:
        trained: The policy, as loaded from its routers folder.
        name: What the folder holds: `plans` or `scores`.

    Raises:
        ConfigError: The routers name none, or it is not there.
    """
    notes: Any = trained.training.get("folders", {})
    said = notes.get(name) if isinstance(notes, Mapping) else None
    if not isinstance(said, str) or trained.folder is None:
        raise ConfigError(
            f"the routers in {trained.folder} do not say where their {name} are; give --{name}"
        )
    folder = Path(os.path.normpath(trained.folder / said))
    if not folder.is_dir():
        raise ConfigError(
            f"the routers in {trained.folder} name {folder} for their {name}, which is not there; give --{name}"
        )
    return folder
