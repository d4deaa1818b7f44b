"""The files of shortcuts: `shortcuts.safetensors` and `shortcut_config.json`, read strictly."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dynadepth._core import __version__
from dynadepth.errors import ConfigError, ShortcutError
from dynadepth.files import lfs_hint, read_versioned_json, write_bytes_atomic
from dynadepth.shortcuts.maps import LinearShortcut, Rank, Shortcuts

__all__ = [
    "CONFIG_NAME",
    "SCHEMA_VERSION",
    "WEIGHTS_NAME",
    "load_shortcuts",
    "save_shortcuts",
    "shortcut_files",
]

SCHEMA_VERSION = 1
CONFIG_NAME = "shortcut_config.json"
WEIGHTS_NAME = "shortcuts.safetensors"
_AGAIN = "fit the shortcuts again"
_KEYS: dict[str, type | tuple[type, ...]] = {
    "base_model": dict,
    "digest": str,
    "rank": (int, str),
    "layers": list,
    "training": dict,
}


def shortcut_files(shortcuts: Shortcuts) -> dict[str, bytes]:
    """Return the content of both files, by name.

    Args:
        shortcuts: What they hold.

    Raises:
        ShortcutError: What was measured, or how they were fitted, cannot be written as JSON.
    """
    content = {
        "schema_version": SCHEMA_VERSION,
        "dynadepth_version": __version__,
        "base_model": {
            "name": shortcuts.base_model,
            "revision": shortcuts.revision,
            "fingerprint": dict(shortcuts.fingerprint),
        },
        "digest": shortcuts.digest,
        "rank": shortcuts.rank,
        "layers": [dict(layer) for layer in shortcuts.layers] or [{} for _ in shortcuts.maps],
        "training": dict(shortcuts.training),
    }
    try:
        text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ShortcutError(
            f"what was measured of the shortcuts cannot be written as JSON: {error}; give plain, finite values"
        ) from error
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in shortcuts.tensors().items()
    }
    return {WEIGHTS_NAME: save(tensors), CONFIG_NAME: text.encode()}


def save_shortcuts(folder: str | os.PathLike[str], shortcuts: Shortcuts) -> Path:
    """Write both files into a folder; the one that names the other's digest comes last.

    Args:
        folder: The folder; it is made if it is missing.
        shortcuts: What to write.

    Returns:
        The folder.

    Raises:
        ShortcutError: What was measured cannot be written as JSON. Nothing was written.
    """
    place = Path(folder)
    for name, data in shortcut_files(shortcuts).items():
        write_bytes_atomic(place / name, data)
    return place


def load_shortcuts(
    folder: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    accept_mismatch: bool = False,
) -> Shortcuts:
    """Load shortcuts from a folder.

    Args:
        folder: What `dynadepth shortcuts` wrote, or a routers folder that carries them.
        model: The base model; if it is given, its fingerprint is checked.
        accept_mismatch: Use the shortcuts although the weights of the base model differ; their harm was not measured
            on it.

    Returns:
        The shortcuts, on the host.

    Raises:
        FileNotFoundError: There are none.
        ShortcutError: A file is damaged, of another version or not of the other file, or the shortcuts belong to
            another base model.
    """
    place = Path(folder)
    content = read_versioned_json(
        place / CONFIG_NAME,
        SCHEMA_VERSION,
        error=ShortcutError,
        make_again=_AGAIN,
        missing="make it with `dynadepth shortcuts`",
    )
    _check_content(place / CONFIG_NAME, content)
    tensors, base = _read_tensors(place / WEIGHTS_NAME), content["base_model"]
    try:
        shortcuts = Shortcuts(
            maps=_maps(tensors, len(content["layers"])),
            fingerprint=base["fingerprint"],
            rank=_rank(content["rank"]),
            base_model=base["name"],
            revision=base["revision"],
            layers=content["layers"],
            training=content["training"],
            folder=place,
            accepted=accept_mismatch,
        )
    except ConfigError as error:
        raise ShortcutError(f"{place / WEIGHTS_NAME}: {error}") from error
    if shortcuts.digest != content["digest"]:
        raise ShortcutError(
            f"{place / WEIGHTS_NAME} has digest {shortcuts.digest}, but {CONFIG_NAME} describes {content['digest']}; "
            f"copy both files together, or {_AGAIN}"
        )
    if model is not None:
        shortcuts.check_model(model)
    return shortcuts


def _check_content(file: Path, content: Mapping[str, Any]) -> None:
    names = {"schema_version", "dynadepth_version", *_KEYS}
    if set(content) != names:
        wrong = sorted(set(content) ^ names)[0]
        raise ShortcutError(
            f"{file} {'has an unknown' if wrong in content else 'lacks the'} key {wrong!r}; expected "
            f"{', '.join(sorted(names))}: it is damaged, {_AGAIN}"
        )
    base = content["base_model"]
    wrong_kinds = [
        name
        for name, kind in _KEYS.items()
        if isinstance(content[name], bool) or not isinstance(content[name], kind)
    ]
    if (
        wrong_kinds
        or set(base) != {"name", "revision", "fingerprint"}
        or not isinstance(base["name"], str)
        or not isinstance(base["revision"], str | None)
        or not isinstance(base["fingerprint"], dict)
        or not all(isinstance(layer, dict) for layer in content["layers"])
    ):
        name = wrong_kinds[0] if wrong_kinds else "base_model or layers"
        raise ShortcutError(f"{file}: {name} has a wrong form; it is damaged, {_AGAIN}")


def _rank(value: Any) -> Rank:
    if value == "full":
        return "full"
    if isinstance(value, int) and value >= 0:
        return value
    raise ConfigError(f"rank is {value!r}; expected a whole number of 0 or more, or 'full'")


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ShortcutError(
            f"{file} is missing; the folder is incomplete: copy it again, or {_AGAIN}"
        )
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ShortcutError(
            f"{file} is damaged ({error}){lfs_hint(file)}; copy it again, or {_AGAIN}"
        ) from error
    return tensors


def _maps(tensors: dict[str, Tensor], num_layers: int) -> list[LinearShortcut | None]:
    maps: list[LinearShortcut | None] = []
    left = dict(tensors)
    for layer in range(num_layers):
        down, up, bias = (left.pop(f"layers.{layer}.{name}", None) for name in ("A", "B", "b"))
        if bias is None and (down is not None or up is not None):
            raise ConfigError(f"tensor 'layers.{layer}.b' is missing; {_AGAIN}")
        maps.append(None if bias is None else LinearShortcut(down, up, bias))
    if left:
        raise ConfigError(
            f"tensor {sorted(left)[0]!r} is unknown; expected layers 0 to {num_layers - 1}: {_AGAIN}"
        )
    return maps
