"""Trained exits, with everything that is needed to use them: weights, calibration and the base model they belong to."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dynadepth.checkpoints.trained_policy import Backend, TrainedPolicy, check_backend
from dynadepth.config import plain_number
from dynadepth.errors import ConfigError
from dynadepth.exits.dial import Dial
from dynadepth.exits.exit_calibration import ExitCalibration
from dynadepth.exits.exit_forward import ExitHead, Exits
from dynadepth.exits.exit_heads import ExitWeights, TrainedHead
from dynadepth.exits.prompt_exits import PromptExits
from dynadepth.onnx.exit_graph import build_exits_onnx
from dynadepth.onnx.exit_heads import onnx_exit_heads
from dynadepth.plans import identity_plan
from dynadepth.policies.base import Policy, StaticPolicy

__all__ = ["TrainedExits"]

# Drafts are made at the threshold that keeps nearest to this share of all tokens.
_KEPT_DRAFTS = 0.97


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainedExits(TrainedPolicy):
    """Trained exits. Prompts run every layer; new tokens leave before some layers.

    Of a budget, `calibration` has the passes as depths and the negated thresholds as penalties.

    Attributes:
        heads: The lens and the router before each exit layer, ascending.
        layers: Decoder layers of the model.
        promises: What was kept on held-out prompts at each threshold.
        window: Most tokens of a row that later layers run for in one call of decoding.
        answers: The same of prompts that are answered with one token each, whose passes are their depths; None: nothing
            is known of these.

    Raises:
        ConfigError: A value is out of range, or heads are of different widths or not ascending.
    """

    heads: tuple[ExitWeights, ...]
    layers: int
    promises: ExitCalibration
    window: int = 8
    answers: ExitCalibration | None = None

    def __post_init__(self) -> None:
        TrainedPolicy.__post_init__(self)
        # Checks order and window.
        Exits(tuple(TrainedHead(head, Dial(0.0, fidelity=1.0)) for head in self.heads), self.window)
        widths = {head.hidden_size for head in self.heads}
        if len(widths) > 1 or self.heads[-1].layer_idx >= self.layers:
            raise ConfigError(
                f"exit heads before layers {[head.layer_idx for head in self.heads]} are for states of widths "
                f"{sorted(widths)}; expected one width, and layers below {self.layers}"
            )

    @property
    def kind(self) -> str:
        """`exits`."""
        return "exits"

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model it is for."""
        return self.layers

    @property
    def hidden_size(self) -> int:
        """Width of the states that it reads."""
        return self.heads[0].hidden_size

    def tensors(self) -> dict[str, Tensor]:
        """Return all weights by name."""
        return {
            f"exits.{head.layer_idx}.{name}": tensor
            for head in self.heads
            for name, tensor in head.tensors.items()
        }

    def policy(self, budget: float, *, backend: Backend = "torch") -> Policy:
        """Return the plan of every layer once, after checking the budget; see `TrainedPolicy.policy`."""
        self.calibration.penalty_for(budget)
        check_backend(backend)
        return StaticPolicy(identity_plan(self.layers))

    def exits(self, *, audit: float = 1.0, backend: Backend = "torch", **promise: Any) -> Exits:
        """Return where new tokens may leave, and when.

        Args:
            backend: The library that computes scores and lenses; see `policy`.
            audit: Share of early tokens whose true reading is looked at.
            **promise: As for `turn`.

        Raises:
            BudgetError: As for `turn`.
            CheckpointError: The folder's `routers.onnx` is damaged, or its graph is not the one of these weights.
            ConfigError: The share is no share, or the promise would be kept by audits of which there are none; or an
                unknown backend, or one that is not installed.
            ExportError: As for `policy`.
        """
        dial = Dial(0.0, fidelity=1.0)
        self.turn(dial, **promise)
        if dial.adapt and not dial.verify and not audit:
            raise ConfigError(
                "adapt=True moves the threshold by what audits find, and audit=0 looks at no token; give a share, or "
                "adapt=False"
            )
        return Exits(self._heads_at(dial, backend), self.window, audit, dial)

    def prompt_exits(
        self,
        *,
        fidelity: float | None = None,
        budget: float | None = None,
        backend: Backend = "torch",
    ) -> PromptExits:
        """Return which prompts leave, of those that are answered with one token each.

        Args:
            fidelity: Share of answers that are the base model's own, which held-out prompts prove with 95 %; at 1 no
                prompt leaves; or else
            budget: Mean depth of prompts.
            backend: The library that computes scores and lenses; see `policy`.

        Raises:
            BudgetError: The promise is no number, or outside of what was measured.
            CheckpointError: As for `exits`.
            ConfigError: The exits know nothing of such prompts; or as for `policy`.
            ExportError: As for `policy`.
        """
        if self.answers is None:
            raise ConfigError(
                "these exits have no calibration of prompts that are answered with one token; train them again with "
                "`dynadepth train --policy exits`"
            )
        threshold = float("inf")
        if fidelity is None:
            self.answers.budgets().penalty_for(budget)
            threshold = self.answers.threshold_at(float(budget or 0.0))
        elif not _is_one(fidelity):
            # Nobody sees what the later layers would have said, so nothing moves it.
            threshold = self.answers.threshold_for(fidelity, certain=True)
        dial = Dial(threshold, fidelity=1.0, adapt=False)
        return PromptExits(self._heads_at(dial, backend), self.layers)

    def _heads_at(self, dial: Dial, backend: Backend) -> tuple[ExitHead, ...]:
        check_backend(backend)
        if backend == "torch":
            return tuple(TrainedHead(head, dial) for head in self.heads)
        source, digest = self._graph(build_exits_onnx(self))
        return onnx_exit_heads(source, dial, digest=digest)

    def turn(
        self,
        dial: Dial,
        *,
        fidelity: float | None = None,
        budget: float | None = None,
        adapt: bool = True,
    ) -> None:
        """Set a dial to a promise.

        Args:
            dial: The dial; if this raises, it is not changed.
            fidelity: Share of new tokens that are the base model's own choice after the same text; at 1, early tokens
                are drafts that the base model verifies before they are given out; or else
            budget: Mean passes of new tokens.
            adapt: With a fidelity, whether audits move the threshold from where it begins. Without, it stays where
                held-out prompts prove that it keeps the promise.

        Raises:
            BudgetError: The promise is no number, or outside of what was measured.
        """
        lowest = self.promises.thresholds[-1]
        if fidelity is None:
            self.calibration.penalty_for(budget)
            threshold = self.promises.threshold_at(float(budget or 0.0))
            dial.turn(threshold, fidelity=1.0, lowest=lowest, adapt=False)
            return
        if _is_one(fidelity):
            # Whatever leaves is verified, so this decides about speed alone.
            row = min(range(1, len(self.promises.kept)), key=self._far_from_drafts)
            threshold = self.promises.thresholds[row]
            dial.turn(threshold, fidelity=1.0, lowest=lowest, adapt=False, verify=True)
            return
        threshold = self.promises.threshold_for(fidelity, certain=not adapt)
        dial.turn(threshold, fidelity=float(fidelity), lowest=lowest, adapt=adapt)

    def _far_from_drafts(self, row: int) -> float:
        return abs(self.promises.kept[row] - _KEPT_DRAFTS)


def _is_one(fidelity: Any) -> bool:
    return plain_number(fidelity) == 1 and not isinstance(fidelity, bool)
