"""Trained policies with everything that is needed to use them: weights, calibration and the base model they belong to.

There are two kinds: routers of all layers, and menus. Both can check that a model is the one they were trained on.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dynadepth.checkpoints.paths import ONNX_NAME
from dynadepth.config import plain_number
from dynadepth.errors import CheckpointError, ConfigError, DynadepthWarning
from dynadepth.models.fingerprint import check_base_model
from dynadepth.onnx.menu_graph import build_menu_onnx
from dynadepth.onnx.menu_policy import OnnxMenuPolicy
from dynadepth.onnx.router_graph import build_onnx
from dynadepth.onnx.router_policy import OnnxRouterPolicy
from dynadepth.onnx.session import graph_digest
from dynadepth.policies.base import Policy
from dynadepth.policies.calibration import Calibration
from dynadepth.policies.menu import Menu
from dynadepth.policies.menu_policy import MenuPolicy
from dynadepth.policies.router_heads import RouterConfig, RouterHeads
from dynadepth.policies.router_policy import RouterPolicy
from dynadepth.shortcuts.maps import Shortcuts

__all__ = ["Backend", "Routers", "TrainedMenu", "TrainedPolicy", "check_backend"]

Backend = Literal["torch", "onnx"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainedPolicy(ABC):
    """The content of a routers folder, of either kind.

    Immutable and independent of the base model object; safe to share between models and threads.

    Attributes:
        calibration: The table from budget to penalty.
        fingerprint: `dynadepth.models.fingerprint.fingerprint` of the base model.
        protect: Layers that always run once.
        base_model: The name of the base model, as `base_model_name` returns it.
        revision: The hub commit of the base model, if known.
        metrics: Measurements, as values that JSON can hold; the rows under `table` become the model card's table.
        training: How it was trained, as values that JSON can hold.
        folder: Where it was loaded from; None if it was not.
        accepted: Whether the user has accepted that the base model differs from the fingerprint.
        shortcuts: The maps that were in place of skipped layers when it was calibrated; None: nothing was.

    Raises:
        ConfigError: A value has the wrong shape or is out of range.
    """

    calibration: Calibration
    fingerprint: Mapping[str, Any]
    protect: tuple[int, ...] = ()
    base_model: str = ""
    revision: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    accepted: bool = False
    shortcuts: Shortcuts | None = None

    def __post_init__(self) -> None:
        protect = [plain_number(layer) for layer in self.protect]
        for layer in protect:
            if type(layer) is not int or not 0 <= layer < self.num_layers:
                raise ConfigError(
                    f"protect names layer {layer!r}; expected numbers from 0 to {self.num_layers - 1}"
                )
        object.__setattr__(self, "protect", tuple(sorted(set(protect))))
        if self.shortcuts is not None and self.shortcuts.num_layers != self.num_layers:
            raise ConfigError(
                f"the shortcuts are for {self.shortcuts.num_layers} layers, the policy for {self.num_layers}; give "
                "those that the policy was calibrated with"
            )

    @property
    @abstractmethod
    def kind(self) -> str:
        """The kind of policy, as written in the folder."""

    @property
    @abstractmethod
    def num_layers(self) -> int:
        """Decoder layers of the model it is for."""

    @property
    @abstractmethod
    def hidden_size(self) -> int:
        """Width of the states that it reads."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return all weights by name."""

    @abstractmethod
    def policy(self, budget: float, *, backend: Backend = "torch") -> Policy:
        """Return the policy that keeps a budget.

        Args:
            budget: Mean depth over prompts, each counting once, as a fraction of the layers.
            backend: The library that computes the decisions. `"onnx"` runs the folder's `routers.onnx`, or, if there is
                none, a graph that is built for the purpose.

        Raises:
            BudgetError: The budget is not a number or outside the calibrated range.
            CheckpointError: The folder's `routers.onnx` is damaged, or its graph is not the one of these weights.
            ConfigError: An unknown backend, or onnxruntime is not installed.
            ExportError: onnx is not installed, so the graph of these weights cannot be made.
        """

    def check_model(self, model: nn.Module) -> None:
        """Check that a model is the one that the policy was trained on.

        Args:
            model: The base model, wrapped or not.

        Raises:
            CheckpointError: It differs and that was not accepted, or the shapes do not fit.
        """
        where = f"the routers in {self.folder}" if self.folder else "the routers"
        path = repr(str(self.folder)) if self.folder else "path"
        check_base_model(
            model,
            self.fingerprint,
            holder=where,
            error=CheckpointError,
            made_with=self.base_model or "a model without a name",
            shape=(self.num_layers, self.hidden_size),
            accepted=self.accepted,
            advice="use routers trained on this model",
            how_to_accept=f"pass routers=load_policy({path}, model=model, accept_mismatch=True)",
        )

    def _graph(self, built: bytes) -> tuple[Path | bytes, str | None]:
        """Return the folder's ONNX file with the digest that it must have, or the graph just built if there is none."""
        file = None if self.folder is None else self.folder / ONNX_NAME
        if file is None or not file.is_file():
            return built, None
        return file, graph_digest(built)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routers(TrainedPolicy):
    """Trained routers of all layers, with everything that a `RouterPolicy` needs.

    Attributes:
        heads: The trained part h.
        bias: The static part b. Shape (num_layers, 3), float32, on the host.
        shrinkage: s, how far prompts may deviate from the static part, from 0 to 1.

    Raises:
        ConfigError: A value has the wrong shape or is out of range.
    """

    heads: RouterHeads
    bias: Tensor
    shrinkage: float

    def __post_init__(self) -> None:
        # The policy checks bias and shrinkage.
        RouterPolicy(self.heads, self.bias, shrinkage=self.shrinkage)
        object.__setattr__(self, "bias", self.bias.detach().to("cpu", torch.float32))
        object.__setattr__(self, "shrinkage", float(self.shrinkage))
        # A dataclass with slots is a new class, but `super()` would refer to the original one.
        TrainedPolicy.__post_init__(self)

    @property
    def config(self) -> RouterConfig:
        """Shape of the routers."""
        return self.heads.config

    @property
    def kind(self) -> str:
        """`routers`."""
        return "routers"

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model it is for."""
        return self.config.num_layers

    @property
    def hidden_size(self) -> int:
        """Width of the states that it reads."""
        return self.config.hidden_size

    def tensors(self) -> dict[str, Tensor]:
        """Return all weights by name."""
        return {**self.heads.state_dict(), "bias": self.bias}

    def policy(self, budget: float, *, backend: Backend = "torch") -> Policy:
        """Return the policy whose calibrated mean depth is nearest to the budget; see `TrainedPolicy.policy`."""
        check_backend(backend)
        penalty = self.calibration.penalty_for(budget)
        nearest, step = self.calibration.depth_for(budget), 0.5 / self.config.num_layers
        if abs(nearest - budget) > max(0.02, step + 1e-6):
            message = (
                f"a budget of {budget} gives a mean depth of {nearest:.3f}, the nearest that these routers can reach; "
                "calibrate on more prompts, or ask for a depth of their table"
            )
            warnings.warn(message, DynadepthWarning, stacklevel=2)
        if backend == "torch":
            return RouterPolicy(self.heads, self.bias, shrinkage=self.shrinkage, penalty=penalty)
        source, digest = self._graph(build_onnx(self))
        return OnnxRouterPolicy(source, budget, digest=digest)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainedMenu(TrainedPolicy):
    """A trained menu, with everything that a `MenuPolicy` needs.

    Attributes:
        menu: The plans and the heads that choose among them.

    Raises:
        ConfigError: A value is out of range, or a plan edits a protected layer.
    """

    menu: Menu

    def __post_init__(self) -> None:
        TrainedPolicy.__post_init__(self)
        edited = sorted(set(self.protect) & set(self.menu.edited_layers()))
        if edited:
            raise ConfigError(
                f"plans of the menu edit layers {edited}, which are protected; search a menu with these layers "
                "protected"
            )

    @property
    def kind(self) -> str:
        """`menu`."""
        return "menu"

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model it is for."""
        return self.menu.num_layers

    @property
    def hidden_size(self) -> int:
        """Width of the states that it reads."""
        return self.menu.hidden_size

    def tensors(self) -> dict[str, Tensor]:
        """Return all weights by name."""
        return self.menu.state_dict()

    def policy(self, budget: float, *, backend: Backend = "torch") -> Policy:
        """Return the policy whose calibrated mean depth is the budget; see `TrainedPolicy.policy`."""
        check_backend(backend)
        mix = self.calibration.mix_for(budget)
        if backend == "torch":
            return MenuPolicy(self.menu, mix)
        source, digest = self._graph(build_menu_onnx(self))
        return OnnxMenuPolicy(source, budget, digest=digest)


def check_backend(backend: str) -> None:
    """Refuse a library that computes no decisions.

    Raises:
        ConfigError: It is neither torch nor onnx.
    """
    if backend not in ("torch", "onnx"):
        raise ConfigError(f"router backend is {backend!r}; expected 'torch' or 'onnx'")
