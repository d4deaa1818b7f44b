"""A menu as one ONNX file, and the policy that runs it in onnxruntime."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynadepth.errors import CheckpointError, ConfigError, ExportError, PlanError
from dynadepth.files import write_bytes_atomic
from dynadepth.onnx.graph_builder import INVALID, host_array
from dynadepth.onnx.menu_graph import ExportableMenu, build_menu_onnx, menu_digest
from dynadepth.onnx.session import (
    SessionHolder,
    open_session,
    read_facts,
    source_name,
)
from dynadepth.plans import EXECUTE, Plans, parse_plan
from dynadepth.policies.base import Policy, check_open, decision_step, nan_states_error
from dynadepth.policies.calibration import Calibration
from dynadepth.policies.prompt_batch import PromptBatch

__all__ = ["OnnxMenuPolicy", "export_menu_onnx", "menu_digest"]

_TOLERANCE = 1e-5
_NEEDED_FACTS = ("calibration", "hidden_size", "layers", "num_layers", "plans")


def export_menu_onnx(trained: ExportableMenu, path: str | os.PathLike[str]) -> None:
    """Write a menu as one ONNX file, after checking that the file decides as the menu does.

    Args:
        trained: The menu and its calibration.
        path: The file; it is written whole or not at all.

    Raises:
        ExportError: A package is missing, the graph is too large for one file, or it does not decide as the menu does.
            No file is written then.
    """
    data = build_menu_onnx(trained)
    _verify(trained, data)
    write_bytes_atomic(path, data)


class OnnxMenuPolicy(SessionHolder, Policy):
    """`MenuPolicy`, decided by onnxruntime from an ONNX file.

    Decides on the host: states and the prompts' numbers are copied there. The session has one thread. Safe to share
    between threads; a deep copy shares the session, and unpickling opens the same file again.

    Args:
        source: The file, or its content.
        budget: Mean depth over prompts, as a fraction of the layers.
        providers: Execution providers of onnxruntime, in order of preference.
        digest: `graph_digest` of the graph that the file must hold, if that is known; computing it takes onnx.

    Raises:
        BudgetError: The budget is not a number or outside the calibrated range.
        CheckpointError: The file is damaged, holds no menu, is newer than this dynadepth, or of another menu.
        ConfigError: onnxruntime is not installed.
        FileNotFoundError: There is no such file.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | bytes,
        budget: float,
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        digest: str | None = None,
    ) -> None:
        self._session = self.open(source, budget, providers, digest)
        facts = read_facts(self._session, source, "menu", _NEEDED_FACTS, digest=digest)
        try:
            self.num_layers = int(facts["num_layers"])
            self.decision_layers = tuple(int(layer) for layer in facts["layers"])
            self.plans = np.stack([parse_plan(text, self.num_layers) for text in facts["plans"]])
            self.calibration = Calibration.from_dict(facts["calibration"])
            self._hidden_size = int(facts["hidden_size"])
        except (ConfigError, PlanError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{source_name(source)} has damaged metadata: {error}; export it again"
            ) from error
        mix = self.calibration.mix_for(budget)
        self.budget = float(budget)
        self._mixes = mix.shallow != mix.deep

    def initial_plans(self, num_rows: int) -> Plans:
        """Return the layers that all plans of the menu share, and EXECUTE from the first decision on."""
        plans = np.full((num_rows, self.num_layers), int(EXECUTE), dtype=np.uint8)
        first = self.decision_layers[0]
        plans[:, :first] = self.plans[0, :first]
        return plans

    def known_plans(self) -> Plans:
        """Return the plans of the menu."""
        return self.plans

    def decide(self, layer_idx: int, hidden_states: Tensor, prompts: PromptBatch) -> Plans:
        """Choose a plan for each prompt and return its actions up to the next decision.

        Args:
            layer_idx: One of `decision_layers`.
            hidden_states: States entering that layer. Shape (batch, tokens, hidden), model dtype, any device.
            prompts: The prompts of the batch, with their plans as decided so far.

        Returns:
            Actions, on the host. Shape (batch, layers up to the next of `decision_layers`), uint8.

        Raises:
            ConfigError: The states have another width than the heads, or hold NaN at a prompt's token; or two penalties
                are mixed and the prompts' tokens are not known.
            PlanError: As for `MenuPolicy.decide`.
        """
        if hidden_states.shape[-1] != self._hidden_size:
            raise ConfigError(
                f"layer {layer_idx} has states of width {hidden_states.shape[-1]}; this menu reads width "
                f"{self._hidden_size}"
            )
        step = decision_step(self.decision_layers, layer_idx)
        num_rows = len(hidden_states)
        numbers = prompts.mix if self._mixes else torch.zeros(num_rows)
        agreeing = self._agreeing(layer_idx, prompts.plans)
        check_open(agreeing, layer_idx)
        rows = _run(
            self._session,
            hidden_states=host_array(hidden_states),
            attention_mask=prompts.mask.detach().to("cpu", torch.int64).numpy(),
            budget=self.budget,
            mix=host_array(numbers),
            # Any plan that agrees will do.
            step_and_earlier=(step, agreeing.argmax(axis=1)),
        )[0]
        if (rows == INVALID).any():
            raise nan_states_error(layer_idx)
        end = next((layer for layer in self.decision_layers if layer > layer_idx), self.num_layers)
        decided: Plans = self.plans[rows, layer_idx:end]
        return decided

    def _agreeing(self, layer_idx: int, so_far: Plans) -> npt.NDArray[np.bool_]:
        """Return which plans agree with what was decided before; at the first step, all. Shape (batch, K), bool."""
        layer_idx = layer_idx if layer_idx > self.decision_layers[0] else 0
        same: npt.NDArray[np.bool_] = (
            self.plans[None, :, :layer_idx] == so_far[:, None, :layer_idx]
        ).all(axis=2)
        return same


def _run(
    session: Any,
    *,
    hidden_states: npt.NDArray[np.float32],
    attention_mask: npt.NDArray[np.int64],
    budget: float,
    mix: npt.NDArray[np.float32],
    step_and_earlier: tuple[int, npt.NDArray[np.int64]],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return `plan` and `scores` of the graph."""
    feed: dict[str, Any] = {
        "hidden_states": hidden_states,
        "attention_mask": attention_mask,
        "budget": np.asarray(budget, dtype=np.float32),
        "mix": mix,
        "step": np.asarray(step_and_earlier[0], dtype=np.int64),
        "earlier": np.asarray(step_and_earlier[1], dtype=np.int64),
    }
    # The graph of a menu with one head has neither of the inputs `step` and `earlier`.
    names = [item.name for item in session.get_inputs()]
    plan, scores = session.run(["plan", "scores"], {name: feed[name] for name in names})
    return plan, scores


def _verify(trained: ExportableMenu, data: bytes) -> None:
    """Compare the graph with torch on random states, at each step and at budgets in and out of range."""
    session = open_session(data)
    generator = torch.Generator().manual_seed(0)
    menu, calibration = trained.menu.to("cpu"), trained.calibration
    lowest, highest = calibration.range
    mask = torch.ones(8, 11, dtype=torch.int64)
    mask[1, :4], mask[2, 3:] = 0, 0
    numbers = torch.linspace(0.0, 1.0, 9)[:8]
    earlier = np.arange(8, dtype=np.int64) % len(menu.plans)
    for step, head in enumerate(menu.heads):
        hidden = torch.randn(*mask.shape, menu.hidden_size, generator=generator)
        expected = head.scores(head.read(hidden, mask.bool()))
        given: dict[str, Any] = {
            "hidden_states": hidden.numpy(),
            "attention_mask": mask.numpy(),
            "mix": numbers.numpy(),
            "step_and_earlier": (step, earlier),
        }
        for budget in (lowest, highest, (lowest + highest) / 2.0):
            plans, scores = _run(session, budget=budget, **given)
            mix = calibration.mix_for(budget)
            prices = torch.where(numbers < mix.share, mix.deep, mix.shallow).to(torch.float32)
            priced = expected - prices[:, None] * torch.from_numpy(menu.depths).to(torch.float32)
            closed = torch.from_numpy(~menu.open_plans(step, menu.plans[earlier]))
            priced = priced.masked_fill(closed, -torch.inf)
            # Folding the features' standardisation into the weights can make scores of random states large.
            scale = max(1.0, float(expected.abs().max()), float(prices.abs().max()))
            worst = float(np.abs(scores - host_array(expected)).max())
            # A menu of one plan has no second best.
            ordered = np.sort(np.pad(host_array(priced), ((0, 0), (1, 0)), constant_values=-np.inf))
            first, second = ordered[:, -1], ordered[:, -2]
            clear = first - second > _TOLERANCE * scale
            wrong = plans[clear] != priced.argmax(dim=1).numpy()[clear]
            if not worst <= _TOLERANCE * scale or wrong.any():
                raise ExportError(
                    f"the ONNX graph differs from torch by {worst:.2g} at step {step} (allowed "
                    f"{_TOLERANCE * scale:.2g}), and in {int(wrong.sum())} plans; nothing was written"
                )
        if not np.isnan(_run(session, budget=highest + 1.0, **given)[1]).all():
            raise ExportError("the ONNX graph accepts a budget out of range; nothing was written")
