"""The routers folder: saved, found, loaded and checked against its base model.

`router_config.json` and `routers.safetensors` are read strictly. A folder is never written in part, and
files of others are never touched.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dynadepth._core import __version__
from dynadepth.checkpoints.model_card import policy_card
from dynadepth.checkpoints.paths import (
    CARD_NAME,
    CONFIG_NAME,
    WEIGHTS_NAME,
    base_model_name,
    find_routers,
    locate_routers,
    replace_folder,
)
from dynadepth.checkpoints.trained_exits import TrainedExits
from dynadepth.checkpoints.trained_policy import Routers, TrainedMenu, TrainedPolicy
from dynadepth.config import did_you_mean
from dynadepth.errors import CheckpointError, ConfigError, PlanError
from dynadepth.exits.exit_calibration import ExitCalibration
from dynadepth.exits.exit_heads import ExitWeights
from dynadepth.files import lfs_hint, read_versioned_json
from dynadepth.onnx.exit_heads import export_exits_onnx
from dynadepth.onnx.menu_policy import export_menu_onnx
from dynadepth.onnx.router_policy import export_onnx
from dynadepth.plans import NUM_ACTIONS, Action, parse_plan, plan_text
from dynadepth.policies.calibration import Calibration
from dynadepth.policies.menu import Menu
from dynadepth.policies.router_heads import RouterConfig, RouterHeads
from dynadepth.shortcuts.maps import Shortcuts
from dynadepth.shortcuts.save_load import CONFIG_NAME as SHORTCUTS_NAME
from dynadepth.shortcuts.save_load import load_shortcuts, shortcut_files

__all__ = [
    "SCHEMA_VERSION",
    "Routers",
    "TrainedMenu",
    "TrainedPolicy",
    "base_model_name",
    "export_policy",
    "find_routers",
    "load_policy",
    "save_policy",
]

SCHEMA_VERSION = 2
_WINDOWS = "w: tokens floor(w*n/W) up to max(floor(w*n/W)+1, floor((w+1)*n/W)) of the n real ones"
_ACTION_ORDER = [action.name.lower() for action in Action]
_MIX = "sum((t_i + 1) * 1103515245^(i+1)) mod p, times 48271 mod p, / 2^31, cut to 24 bits; p = 2^31 - 1"
_KEYS = (
    "schema_version",
    "dynadepth_version",
    "kind",
    "base_model",
    "windows",
    "protect",
    "calibration",
    "metrics",
    "training",
)
# The additional keys of each kind.
_KIND_KEYS = {
    "routers": ("router", "action_order", "shrinkage"),
    "menu": ("menu", "mix"),
    "exits": ("exits",),
}
_KINDS: dict[str, type | tuple[type, ...]] = {
    "base_model": dict,
    "shrinkage": (int, float),
    "menu": dict,
    "exits": dict,
    "protect": list,
    "metrics": dict,
    "training": dict,
    "shortcuts": str,
}
_JSON_WORDS = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a fraction"}


def save_policy(folder: str | os.PathLike[str], routers: TrainedPolicy) -> Path:
    """Write a routers folder: configuration, weights and model card.

    The folder appears complete or not at all. Earlier routers in it are replaced, including their `routers.onnx`, which
    decides as they did.

    Args:
        folder: The folder to write; it may hold earlier routers, but nothing else.
        routers: The routers or the menu.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder holds other files, or metrics or training notes cannot be written as JSON. Nothing
            was changed.
        ShortcutError: What was measured of its shortcuts cannot be written as JSON. Nothing was changed.
    """
    content = _to_json(routers)
    beside = {} if routers.shortcuts is None else shortcut_files(routers.shortcuts)
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in routers.tensors().items()
    }
    return replace_folder(
        folder,
        {
            WEIGHTS_NAME: save(tensors),
            CONFIG_NAME: (json.dumps(content, indent=2, sort_keys=True) + "\n").encode(),
            CARD_NAME: policy_card(routers).encode(),
            **beside,
        },
    )


def export_policy(routers: TrainedPolicy, path: str | os.PathLike[str]) -> None:
    """Write routers, a menu or exits as one ONNX file, after checking that the file decides as they do.

    Args:
        routers: What to export.
        path: The file; it is written whole or not at all.

    Raises:
        ExportError: A package is missing, or the graph does not decide as the routers do. No file is written then.
    """
    if isinstance(routers, TrainedMenu):
        export_menu_onnx(routers, path)
    elif isinstance(routers, Routers):
        export_onnx(routers, path)
    elif isinstance(routers, TrainedExits):
        export_exits_onnx(routers, path)


def load_policy(
    path_or_hub_id: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    accept_mismatch: bool = False,
    revision: str | None = None,
) -> TrainedPolicy:
    """Load routers, or a menu, from a folder or from the hub.

    Args:
        path_or_hub_id: A routers folder, a folder that contains one called `routers`, or a hub id of
            either.
        model: The base model; if it is given, its fingerprint is checked.
        accept_mismatch: Use the routers although the weights of the base model differ (a fine-tuned
            or quantised one); depth and quality were not measured on it.
        revision: Branch, tag or commit of the hub repository; None: its main branch.

    Returns:
        The routers, on the host.

    Raises:
        CheckpointError: A file is damaged, missing or newer than this dynadepth, or the routers belong to another
            base model.
        ShortcutError: The shortcuts beside the routers are damaged.
        ConfigError: A revision was given for a folder on this machine.
        FileNotFoundError: There is no such folder, locally or on the hub.
    """
    folder = locate_routers(path_or_hub_id, revision=revision)
    routers = _read(folder, accepted=accept_mismatch)
    if model is not None:
        routers.check_model(model)
    return routers


def _to_json(routers: TrainedPolicy) -> dict[str, Any]:
    content = {
        "schema_version": SCHEMA_VERSION,
        "dynadepth_version": __version__,
        "kind": routers.kind,
        "base_model": {
            "name": routers.base_model,
            "revision": routers.revision,
            "fingerprint": dict(routers.fingerprint),
        },
        "windows": _WINDOWS,
        "protect": list(routers.protect),
        "calibration": routers.calibration.to_dict(),
        "metrics": dict(routers.metrics),
        "training": dict(routers.training),
    }
    if routers.shortcuts is not None:
        content["shortcuts"] = routers.shortcuts.digest
    if isinstance(routers, Routers):
        content["router"] = routers.config.to_dict()
        content["action_order"] = _ACTION_ORDER
        content["shrinkage"] = routers.shrinkage
    elif isinstance(routers, TrainedMenu):
        heads = [
            {"layer": head.layer_idx, "num_windows": head.num_windows}
            for head in routers.menu.heads
        ]
        content["menu"] = {
            "plans": [plan_text(plan) for plan in routers.menu.plans],
            "heads": heads,
        }
        content["mix"] = _MIX
    elif isinstance(routers, TrainedExits):
        content["exits"] = {
            "layers": [head.layer_idx for head in routers.heads],
            "num_layers": routers.layers,
            "window": routers.window,
            "promises": routers.promises.to_dict(),
            "answers": None if routers.answers is None else routers.answers.to_dict(),
        }
    try:
        json.dumps(content, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the routers' metrics, training notes or fingerprint cannot be written as JSON: {error}; give plain, "
            "finite values"
        ) from error
    return content


def _read(folder: Path, *, accepted: bool) -> TrainedPolicy:
    file = folder / CONFIG_NAME
    content = read_versioned_json(
        file, SCHEMA_VERSION, error=CheckpointError, make_again="train the routers again"
    )
    _check_content(file, content)
    tensors = _read_tensors(folder / WEIGHTS_NAME)
    base = content["base_model"]
    try:
        common: dict[str, Any] = {
            "calibration": Calibration.from_dict(content["calibration"]),
            "fingerprint": base["fingerprint"],
            "protect": tuple(content["protect"]),
            "base_model": base["name"],
            "revision": base["revision"],
            "metrics": content["metrics"],
            "training": content["training"],
            "folder": folder,
            "accepted": accepted,
            "shortcuts": _read_shortcuts(folder, content.get("shortcuts"), accepted=accepted),
        }
        if content["kind"] == "menu":
            return TrainedMenu(menu=_read_menu(file, content["menu"], tensors), **common)
        if content["kind"] == "exits":
            return TrainedExits(**_read_exits(file, content["exits"], tensors), **common)
        config = RouterConfig.from_dict(content["router"])
        bias = _read_bias(folder / WEIGHTS_NAME, tensors, config)
        return Routers(
            heads=_read_heads(folder / WEIGHTS_NAME, tensors, config),
            bias=bias,
            shrinkage=content["shrinkage"],
            **common,
        )
    except (ConfigError, PlanError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def _read_shortcuts(folder: Path, digest: str | None, *, accepted: bool) -> Shortcuts | None:
    """Return the shortcuts that a policy was calibrated with; without them its budgets would not be kept."""
    if digest is None:
        return None
    if not (folder / SHORTCUTS_NAME).is_file():
        raise CheckpointError(
            f"the policy in {folder} was calibrated with shortcuts {digest}, but there is no {SHORTCUTS_NAME}; copy "
            "the whole folder"
        )
    shortcuts = load_shortcuts(folder, accept_mismatch=accepted)
    if shortcuts.digest != digest:
        raise CheckpointError(
            f"the policy in {folder} was calibrated with shortcuts {digest}, but those beside it are "
            f"{shortcuts.digest}; copy the whole folder, or train the routers again"
        )
    return shortcuts


def _check_content(file: Path, content: Mapping[str, Any]) -> None:
    """Check the keys, types and fixed values of everything that no class checks itself."""
    kind = content.get("kind")
    if kind not in _KIND_KEYS:
        raise CheckpointError(
            f"{file}: kind is {kind!r}; expected one of {', '.join(sorted(_KIND_KEYS))}"
        )
    # A policy that was calibrated without shortcuts says nothing of them.
    optional = ("shortcuts",) if "shortcuts" in content else ()
    _check_keys(file, content, (*_KEYS, *_KIND_KEYS[kind], *optional))
    for name, expected_kind in _KINDS.items():
        if name in content:
            _check_kind(file, name, content[name], expected_kind)
    base = content["base_model"]
    _check_keys(file, base, ("name", "revision", "fingerprint"), "base_model.")
    _check_kind(file, "base_model.name", base["name"], str)
    _check_kind(file, "base_model.revision", base["revision"] or "", str)
    _check_kind(file, "base_model.fingerprint", base["fingerprint"], dict)
    fixed = {"windows": _WINDOWS, "action_order": _ACTION_ORDER, "mix": _MIX}
    for name, expected in fixed.items():
        if name in content and content[name] != expected:
            raise CheckpointError(
                f"{file}: {name} is {content[name]!r}; this dynadepth only knows {expected!r}"
            )


def _check_keys(
    file: Path, content: Mapping[str, Any], keys: tuple[str, ...], where: str = ""
) -> None:
    for key in content:
        if key not in keys:
            raise CheckpointError(
                f"{file} has an unknown key {where + key!r}{did_you_mean(key, keys)}"
            )
    for key in keys:
        if key not in content:
            raise CheckpointError(
                f"{file} lacks the key {where + key!r}; it is damaged: save the routers again"
            )


def _check_kind(file: Path, name: str, value: Any, kind: type | tuple[type, ...]) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        words = " or ".join(_JSON_WORDS[each] for each in kinds)
        raise CheckpointError(f"{file}: {name} is {value!r}; expected {words}")


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; the folder is incomplete: copy or save it again")
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} is damaged ({error}){lfs_hint(file)}; copy or save it again"
        ) from error
    return tensors


def _read_bias(file: Path, tensors: dict[str, Tensor], config: RouterConfig) -> Tensor:
    bias, shape = tensors.pop("bias", None), (config.num_layers, NUM_ACTIONS)
    if bias is None or tuple(bias.shape) != shape or bias.dtype != torch.float32:
        found = "missing" if bias is None else f"{bias.dtype} of shape {tuple(bias.shape)}"
        raise CheckpointError(
            f"{file}: tensor 'bias' is {found}; expected torch.float32 of shape {shape}"
        )
    if not bool(torch.isfinite(bias).all()):
        raise CheckpointError(
            f"{file}: tensor 'bias' holds values that are not finite; train the routers again"
        )
    return bias


def _read_heads(file: Path, tensors: dict[str, Tensor], config: RouterConfig) -> RouterHeads:
    try:
        return RouterHeads.from_state_dict(config, tensors)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _read_menu(file: Path, content: Mapping[str, Any], tensors: dict[str, Tensor]) -> Menu:
    _check_keys(file, content, ("plans", "heads"), "menu.")
    for name in ("plans", "heads"):
        _check_kind(file, f"menu.{name}", content[name], list)
    shapes = []
    for step, head in enumerate(content["heads"]):
        _check_kind(file, f"menu.heads[{step}]", head, dict)
        _check_keys(file, head, ("layer", "num_windows"), f"menu.heads[{step}].")
        for name in ("layer", "num_windows"):
            _check_kind(file, f"menu.heads[{step}].{name}", head[name], int)
        shapes.append((head["layer"], head["num_windows"]))
    plans = content["plans"]
    for text in plans:
        _check_kind(file, "a plan of the menu", text, str)
    if not plans:
        raise CheckpointError(f"{file}: the menu has no plans; save it again")
    rows = np.stack([parse_plan(text, len(plans[0])) for text in plans])
    return Menu.from_state_dict(rows, shapes, tensors)


def _read_exits(
    file: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    # Exits that were trained before answers were calibrated have none.
    content = {"answers": None, **content}
    _check_keys(file, content, ("layers", "num_layers", "window", "promises", "answers"), "exits.")
    for name, kind in (("layers", list), ("num_layers", int), ("window", int), ("promises", dict)):
        _check_kind(file, f"exits.{name}", content[name], kind)
    heads = []
    for layer in content["layers"]:
        _check_kind(file, "a layer of exits.layers", layer, int)
        prefix = f"exits.{layer}."
        own = {
            name[len(prefix) :]: each for name, each in tensors.items() if name.startswith(prefix)
        }
        heads.append(ExitWeights(layer, own))
    answers = content["answers"]
    if answers is not None:
        _check_kind(file, "exits.answers", answers, dict)
    unknown = len(tensors) - sum(len(head.tensors) for head in heads)
    if unknown or not heads:
        raise CheckpointError(
            f"{file} names exits before layers {content['layers']}, but the weights beside it have {unknown} tensors "
            "more; copy the whole folder"
        )
    return {
        "heads": tuple(heads),
        "layers": content["num_layers"],
        "window": content["window"],
        "promises": ExitCalibration.from_dict(content["promises"]),
        "answers": None if answers is None else ExitCalibration.from_dict(answers),
    }
