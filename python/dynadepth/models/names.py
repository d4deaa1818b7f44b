"""Whether a name means a folder on this machine or a repository on the Hugging Face hub."""

import os
import re
from pathlib import Path

__all__ = ["HUB_ID", "is_hub_id", "is_path_like"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_path_like(name: str | os.PathLike[str]) -> bool:
    """Say whether a name can only be a path on this machine, whether or not something is there.

    The hub must not be asked for a mistyped path: whatever a stranger has published under that name would be run.

    Args:
        name: What the user gave.

    Returns:
        True for a `Path`; for text that is absolute, begins with a dot or tilde, has a backslash, ends with a slash, or
        has two slashes; and for `a/b` if there is a folder `a` here.

    Example:
        >>> [is_path_like(name) for name in ("org/name", "./name", "runs/demo/menu", "gpt2")]
        [False, True, True, False]
    """
    if not isinstance(name, str):
        return True
    first, slash, rest = name.partition("/")
    return (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or Path(name).is_absolute()
        or "/" in rest
        or (bool(slash) and (not rest or Path(first).is_dir()))
    )


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Say whether a name may be a repository on the hub, `org/name`, rather than a path.

    Args:
        name: What the user gave.

    Example:
        >>> is_hub_id("org/name"), is_hub_id("gpt2"), is_hub_id("org/name/")
        (True, False, False)
    """
    return isinstance(name, str) and bool(HUB_ID.fullmatch(name)) and not is_path_like(name)
