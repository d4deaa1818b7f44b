"""What a null control leaves on disk: `null.json`, read and checked value by value, and its figures in words."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynadepth.errors import LabelError
from dynadepth.files import read_versioned_json
from dynadepth_search.files.stored import Stored
from dynadepth_search.storage.label_manifest import Manifest, read_manifest

__all__ = ["REPORT", "SCHEMA_VERSION", "check_control_of", "luck_text", "read_null"]

REPORT = "null.json"
SCHEMA_VERSION = 1

_KINDS = ("raw", "confirmed")


def read_null(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the figures of a null control.

    Args:
        folder: The folder that `search null` wrote.

    Returns:
        The content of `null.json`.

    Raises:
        FileNotFoundError: There is none: nothing was searched there, or the control is unfinished.
        LabelError: It is damaged, or of another schema version.
    """
    path = Path(folder) / REPORT
    content = read_versioned_json(
        path,
        SCHEMA_VERSION,
        error=LabelError,
        make_again="run `dynadepth search null` again in a new folder",
        missing="`dynadepth search null` writes it once its search has finished",
    )
    stored = Stored(content, str(path), "delete it and run `dynadepth search null` again")
    names = ["schema_version", "prompts", "seed", "own_answers", "evaluations_per_label"]
    found = stored.fields([*names, "real", "null", "luck"])
    prompts = found["prompts"].whole(1)
    found["seed"].whole()
    found["own_answers"].whole(0, prompts)
    for each in found["evaluations_per_label"].fields(["real", "null"]).values():
        each.number(0)
    for side in ("real", "null"):
        part = found[side].fields(["base_wrong", *_KINDS])
        wrong = part["base_wrong"].whole(0, prompts)
        for kind in _KINDS:
            fixes = part[kind].fields(["fixes", "rate"])
            fixes["fixes"].whole(0, wrong)
            fixes["rate"].optional(_check_interval)
    for share in found["luck"].fields(_KINDS).values():
        share.optional(_check_interval)
    return content


def check_control_of(labels: Manifest, control: str | os.PathLike[str], holder: str) -> None:
    """Check that a null control is one of these labels.

    Args:
        labels: What the labels were made with.
        control: The folder of the control.
        holder: What messages call the labels, such as "the labels in labels".

    Raises:
        FileNotFoundError: The control's labels are missing.
        LabelError: It is the control of other labels.
    """
    null = read_manifest(Path(control))
    ours, theirs = (
        {
            "base_model": each.base_model,
            "search": each.search,
            "depth_penalty": each.depth_penalty,
            "prior": each.prior.to_dict(),
            "shortcuts": each.shortcuts,
            "task.prompts": each.task["prompts"],
            "task.scoring": each.task["scoring"],
        }
        for each in (labels, null)
    )
    different = [name for name in ours if ours[name] != theirs[name]]
    if different:
        raise LabelError(
            f"the null control in {control} is not one of {holder}: it was made with another {', '.join(different)}; "
            "give the control that `dynadepth search null` made of these labels"
        )


def luck_text(found: Mapping[str, Any], kind: str) -> str:
    """Say in a line how many fixes there are, and which share of them luck explains.

    Args:
        found: Content of `null.json`.
        kind: `raw` or `confirmed`.
    """
    rates = [
        f"{found[side][kind]['fixes']} of {found[side]['base_wrong']} fixed"
        for side in ("real", "null")
    ]
    luck = found["luck"][kind]
    share = "undefined"
    if luck is not None:
        ends = [
            "unbounded" if luck[end] is None else f"{luck[end]:.2f}"
            for end in ("mean", "low", "high")
        ]
        share = f"{ends[0]} [{ends[1]}, {ends[2]}]"
    return f"{rates[0]}, with shuffled answers {rates[1]}; share that luck explains: {share}"


def _check_interval(stored: Stored) -> None:
    found = stored.fields(["mean", "low", "high", "n"])
    found["mean"].number()
    found["n"].whole(1)
    for end in ("low", "high"):
        # None: unbounded.
        found[end].optional(Stored.number)
