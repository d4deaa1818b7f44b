"""Routers and menus for one tiny model, to be pushed to a hub and loaded from it."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from dynadepth import TrainedPolicy, save_policy
from dynadepth.checkpoints.save_load import export_policy
from dynadepth.models.fingerprint import fingerprint
from tests.tiny import tiny_model
from tests.tiny_menus import random_menu
from tests.tiny_routers import random_routers

KINDS = ("routers", "menu")
OWN_FILES = ["README.md", "router_config.json", "routers.onnx", "routers.safetensors"]


def six_layers(**parts: Any) -> PreTrainedModel:
    """Return the model that `trained` makes routers for."""
    return tiny_model(num_layers=6, **parts)


def trained(kind: str, model: PreTrainedModel, **parts: Any) -> TrainedPolicy:
    """Return random routers or a random menu with two heads, for a model of 6 layers."""
    settings = {"hidden_size": 32, "fingerprint": fingerprint(model), "base_model": "org/base"}
    if kind == "menu":
        return random_menu(layers=(2, 4), windows=(0, 2), **{**settings, **parts})
    return random_routers(num_layers=6, **{**settings, **parts})


def save_whole(folder: Path, policy: TrainedPolicy) -> Path:
    """Write a routers folder with its ONNX file."""
    saved = save_policy(folder, policy)
    export_policy(policy, saved / "routers.onnx")
    return saved


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def truncate(path: Path, share: float = 0.6) -> Path:
    """Cut a file's end off."""
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path
