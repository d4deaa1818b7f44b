"""The routers folder: saved, found, loaded and checked against its base model.

Owns `router_config.json` and `routers.safetensors` and reads them strictly. Never writes a part of
a folder, and never touches a file that it did not write.
"""

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dynadepth import __version__
from dynadepth.budget import Calibration
from dynadepth.cards import routers_card
from dynadepth.config import RouterConfig, did_you_mean
from dynadepth.errors import CheckpointError, ConfigError, DynadepthWarning
from dynadepth.files import read_json
from dynadepth.fingerprint import compare_fingerprints, fingerprint
from dynadepth.folders import (
    CARD_NAME,
    CONFIG_NAME,
    ONNX_NAME,
    WEIGHTS_NAME,
    base_model_name,
    find_routers,
    locate_routers,
    replace_folder,
)
from dynadepth.onnx import OnnxRouterPolicy
from dynadepth.onnx_graph import build_onnx, routers_digest
from dynadepth.plans import NUM_ACTIONS, Action
from dynadepth.policies import Policy, RouterPolicy
from dynadepth.routers import RouterHeads

__all__ = [
    "SCHEMA_VERSION",
    "Routers",
    "base_model_name",
    "find_routers",
    "load_routers",
    "save_routers",
]

SCHEMA_VERSION = 1
_WINDOWS = "w: tokens floor(w*n/W) up to max(floor(w*n/W)+1, floor((w+1)*n/W)) of the n real ones"
_ACTION_ORDER = [action.name.lower() for action in Action]
_KEYS = (
    "schema_version",
    "dynadepth_version",
    "base_model",
    "router",
    "windows",
    "action_order",
    "shrinkage",
    "protect",
    "calibration",
    "metrics",
    "training",
)
_KINDS: dict[str, type | tuple[type, ...]] = {
    "base_model": dict,
    "shrinkage": (int, float),
    "protect": list,
    "metrics": dict,
    "training": dict,
}
_JSON_WORDS = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a fraction"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routers:
    """Trained routers with everything that makes a policy of them.

    Immutable and free of the base model; safe to share between models and threads.

    Attributes:
        heads: The trained part h.
        bias: The static part b. Shape (num_layers, 3), float32, on the host.
        shrinkage: s in 0..1, how far prompts may deviate from the static part.
        calibration: From budget to penalty.
        protect: Layers that always run once.
        fingerprint: `dynadepth.fingerprint.fingerprint` of the base model.
        base_model: Its name, as `base_model_name` gives it.
        revision: Its hub commit, if known.
        metrics: What was measured, JSON-able; the list of rows under `table` becomes the model
            card's table.
        training: How they were trained, JSON-able.
        folder: Where they were loaded from.
        accepted: The user has accepted that the base model differs from the fingerprint.

    Raises:
        ConfigError: A value of the wrong shape or out of range.
    """

    heads: RouterHeads
    bias: Tensor
    shrinkage: float
    calibration: Calibration
    fingerprint: Mapping[str, Any]
    protect: tuple[int, ...] = ()
    base_model: str = ""
    revision: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    accepted: bool = False

    def __post_init__(self) -> None:
        num_layers = self.config.num_layers
        # The policy checks bias and shrinkage.
        RouterPolicy(self.heads, self.bias, shrinkage=self.shrinkage)
        object.__setattr__(self, "bias", self.bias.detach().to("cpu", torch.float32))
        object.__setattr__(self, "shrinkage", float(self.shrinkage))
        for layer in self.protect:
            if type(layer) is not int or not 0 <= layer < num_layers:
                raise ConfigError(
                    f"protect names layer {layer!r}; expected numbers from 0 to {num_layers - 1}"
                )
        object.__setattr__(self, "protect", tuple(sorted(set(self.protect))))

    @property
    def config(self) -> RouterConfig:
        """Shape of the routers."""
        return self.heads.config

    def policy(self, budget: float, *, backend: Literal["torch", "onnx"] = "torch") -> Policy:
        """Return the policy that keeps a budget.

        Args:
            budget: Mean depth over prompts, each counting once, as a fraction of the layers.
            backend: What computes the decisions. `"onnx"` runs the folder's `routers.onnx`, or a
                graph made on the spot if there is none.

        Raises:
            BudgetError: The budget is not a number or outside the calibrated range.
            CheckpointError: The folder's `routers.onnx` is damaged or was made from other routers.
            ConfigError: An unknown backend, or onnxruntime is not installed.
            ExportError: There is no `routers.onnx` and none can be made.
        """
        if backend not in ("torch", "onnx"):
            raise ConfigError(f"router backend is {backend!r}; expected 'torch' or 'onnx'")
        penalty = self.calibration.penalty_for(budget)
        nearest, step = self.calibration.depth_for(budget), 0.5 / self.config.num_layers
        if abs(nearest - budget) > max(0.02, step + 1e-6):
            message = (
                f"a budget of {budget} gives a mean depth of {nearest:.3f}: these routers reach no depth nearer to it; "
                "calibrate on more prompts, or ask for a depth of their table"
            )
            warnings.warn(message, DynadepthWarning, stacklevel=2)
        if backend == "torch":
            return RouterPolicy(self.heads, self.bias, shrinkage=self.shrinkage, penalty=penalty)
        file = None if self.folder is None else self.folder / ONNX_NAME
        source = file if file is not None and file.is_file() else build_onnx(self)
        return OnnxRouterPolicy(source, budget, digest=routers_digest(self))

    def check_model(self, model: nn.Module) -> None:
        """Check that a model is the one that these routers were trained on.

        Args:
            model: The base model, wrapped or not.

        Raises:
            CheckpointError: It differs and that was not accepted, or the routers do not fit it at
                all.
        """
        given = fingerprint(model)
        shape = given["architecture"]
        fits = (shape["num_hidden_layers"], shape["hidden_size"]) == (
            self.config.num_layers,
            self.config.hidden_size,
        )
        differences = compare_fingerprints(given, self.fingerprint)
        if fits and (self.accepted or not differences):
            return
        if not fits:
            differences.insert(
                0,
                f"the routers read {self.config.num_layers} layers of width "
                f"{self.config.hidden_size}",
            )
        where = f"the routers in {self.folder}" if self.folder else "these routers"
        advice = "use routers trained on this model"
        if fits:
            path = repr(str(self.folder)) if self.folder else "path"
            advice += (
                "; or, if you know that it behaves alike, pass "
                f"routers=load_routers({path}, model=model, accept_mismatch=True)"
            )
        raise CheckpointError(
            f"{where} belong to another base model than this {type(model).__name__}: they were "
            f"trained on {self.base_model or 'a model without a name'}, and here "
            f"{'; '.join(differences)}. To go on, {advice}"
        )


def save_routers(folder: str | os.PathLike[str], routers: Routers) -> Path:
    """Write a routers folder: configuration, weights and model card.

    The folder appears whole or not at all; routers that were there before are replaced whole, their
    `routers.onnx` with them, since it decides as they did.

    Args:
        folder: Where; it may hold earlier routers, but nothing else.
        routers: The routers.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder holds other files, or metrics or training notes are not
            JSON-able. Nothing was changed.
    """
    content = _to_json(routers)
    tensors = {**routers.heads.state_dict(), "bias": routers.bias}
    card = routers_card(
        base_model=routers.base_model,
        config=routers.config,
        shrinkage=routers.shrinkage,
        calibration=routers.calibration,
        protect=routers.protect,
        metrics=routers.metrics,
    )
    return replace_folder(
        folder,
        {
            WEIGHTS_NAME: save(
                {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            ),
            CONFIG_NAME: (json.dumps(content, indent=2, sort_keys=True) + "\n").encode(),
            CARD_NAME: card.encode(),
        },
    )


def load_routers(
    path_or_hub_id: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    accept_mismatch: bool = False,
) -> Routers:
    """Load routers from a folder or from the hub.

    Args:
        path_or_hub_id: A routers folder, a folder that has one called `routers`, or a hub id of
            either.
        model: The base model; its fingerprint is compared if it is given.
        accept_mismatch: Use the routers although the base model differs in its weights (a
            fine-tuned or quantised one), knowing that depth and quality were not measured on it.

    Returns:
        The routers, on the host.

    Raises:
        CheckpointError: A file is damaged, newer than this dynadepth, or the base model is another
            one.
        FileNotFoundError: There is no such folder, locally or on the hub.
    """
    routers = _read(locate_routers(path_or_hub_id), accepted=accept_mismatch)
    if model is not None:
        routers.check_model(model)
    return routers


def _to_json(routers: Routers) -> dict[str, Any]:
    content = {
        "schema_version": SCHEMA_VERSION,
        "dynadepth_version": __version__,
        "base_model": {
            "name": routers.base_model,
            "revision": routers.revision,
            "fingerprint": dict(routers.fingerprint),
        },
        "router": routers.config.to_dict(),
        "windows": _WINDOWS,
        "action_order": _ACTION_ORDER,
        "shrinkage": routers.shrinkage,
        "protect": list(routers.protect),
        "calibration": routers.calibration.to_dict(),
        "metrics": dict(routers.metrics),
        "training": dict(routers.training),
    }
    try:
        json.dumps(content, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the routers' metrics, training notes or fingerprint cannot be written as JSON: {error}; give plain, "
            "finite values"
        ) from error
    return content


def _read(folder: Path, *, accepted: bool) -> Routers:
    file = folder / CONFIG_NAME
    content = read_json(file, CheckpointError)
    version = content.get("schema_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise CheckpointError(
            f"{file} has schema_version {version!r}; expected a whole number from 1 on"
        )
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{file} has schema version {version} (written by dynadepth {content.get('dynadepth_version')}), this "
            f"dynadepth {__version__} reads up to {SCHEMA_VERSION}; update dynadepth"
        )
    _check_content(file, content)
    base = content["base_model"]
    try:
        config = RouterConfig.from_dict(content["router"])
        calibration = Calibration.from_dict(content["calibration"])
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error
    heads, bias = _read_weights(folder / WEIGHTS_NAME, config)
    try:
        return Routers(
            heads=heads,
            bias=bias,
            shrinkage=content["shrinkage"],
            calibration=calibration,
            fingerprint=base["fingerprint"],
            protect=tuple(content["protect"]),
            base_model=base["name"],
            revision=base["revision"],
            metrics=content["metrics"],
            training=content["training"],
            folder=folder,
            accepted=accepted,
        )
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _check_content(file: Path, content: Mapping[str, Any]) -> None:
    """Check keys, kinds and fixed values of everything that no class checks for itself."""
    _check_keys(file, content, _KEYS)
    for name, kind in _KINDS.items():
        _check_kind(file, name, content[name], kind)
    base = content["base_model"]
    _check_keys(file, base, ("name", "revision", "fingerprint"), "base_model.")
    _check_kind(file, "base_model.name", base["name"], str)
    _check_kind(file, "base_model.revision", base["revision"] or "", str)
    _check_kind(file, "base_model.fingerprint", base["fingerprint"], dict)
    for name, expected in (("windows", _WINDOWS), ("action_order", _ACTION_ORDER)):
        if content[name] != expected:
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


def _read_weights(file: Path, config: RouterConfig) -> tuple[RouterHeads, Tensor]:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; the folder is incomplete: copy or save it again")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); copy or save it again") from error
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
    try:
        return RouterHeads.from_state_dict(config, tensors), bias
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error
