"""Policies that a demo saved, as a later step reads them."""

from pathlib import Path
from typing import Any

from dynadepth.checkpoints.paths import restore_folder
from dynadepth.checkpoints.save_load import TrainedPolicy, load_policy

__all__ = ["policy_of_run"]


def policy_of_run(out: Path, name: str, model: Any) -> TrainedPolicy:
    """Load a policy of a run, also after a kill in the middle of its saving.

    Args:
        out: Folder of the run.
        name: Of the policy's folder in it.
        model: The base model.
    """
    restore_folder(out / name)
    return load_policy(out / name, model=model)
