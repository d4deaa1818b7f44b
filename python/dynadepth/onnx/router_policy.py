"""Routers as one ONNX file, and the policy that runs it in onnxruntime.

The file holds everything a decision needs (pooling, the heads of all layers, protected layers, the
calibration of the budget), so that a runtime without Python makes the same decisions.
"""

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynadepth.errors import ConfigError, ExportError
from dynadepth.files import write_bytes_atomic
from dynadepth.onnx.graph_builder import INVALID, host_array
from dynadepth.onnx.router_graph import ExportableRouters, build_onnx
from dynadepth.onnx.session import SessionHolder, open_session, read_facts
from dynadepth.plans import NUM_ACTIONS, Plans
from dynadepth.policies.base import LayerwisePolicy, actions_of, nan_states_error
from dynadepth.policies.calibration import Calibration
from dynadepth.policies.prompt_batch import PromptBatch
from dynadepth.policies.router_heads import pool

__all__ = ["OnnxRouterPolicy", "export_onnx"]

_TOLERANCE = 1e-5
_NEEDED_FACTS = ("calibration", "hidden_size", "num_layers", "shrinkage", "varying_layers")


def export_onnx(routers: ExportableRouters, path: str | os.PathLike[str]) -> None:
    """Write routers as one ONNX file, after checking that the file decides as they do.

    Args:
        routers: The routers.
        path: The file; it is written whole or not at all.

    Raises:
        ExportError: A package is missing, the graph is too large for one file, or it does not decide
            as the routers do. No file is written then.
    """
    data = build_onnx(routers)
    _verify(routers, data)
    write_bytes_atomic(path, data)


class OnnxRouterPolicy(SessionHolder, LayerwisePolicy):
    """`RouterPolicy`, decided by onnxruntime from an ONNX file.

    Decides on the host: states are copied there. The session has one thread, since a decision takes
    microseconds. Safe to share between threads; a deep copy shares the session, and unpickling
    opens the same file again.

    Args:
        source: The file, or its content.
        budget: Mean depth over prompts, as a fraction of the layers.
        providers: Execution providers of onnxruntime, in order of preference.
        digest: `graph_digest` of the graph that the file must hold, if that is known; computing it takes onnx.

    Raises:
        BudgetError: The budget is not a number or outside the calibrated range.
        CheckpointError: The file is damaged, no routers file, newer than this dynadepth, or of
            other routers.
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
        facts = read_facts(self._session, source, "routers", _NEEDED_FACTS, digest=digest)
        self.calibration = Calibration.from_dict(facts["calibration"])
        self.calibration.penalty_for(budget)
        self.budget = float(budget)
        self._hidden_size = int(facts["hidden_size"])
        state = np.zeros((1, 1, self._hidden_size), dtype=np.float32)
        mask = np.ones((1, 1), dtype=np.int64)
        fixed = [self._run(layer, state, mask)[0] for layer in range(int(facts["num_layers"]))]
        super().__init__(
            np.asarray(fixed, dtype=np.uint8),
            tuple(facts["varying_layers"]) if facts["shrinkage"] > 0 else (),
        )

    def actions_at(self, layer_idx: int, hidden_states: Tensor, prompts: PromptBatch) -> Plans:
        """Return the actions of one layer.

        Args:
            layer_idx: One of `decision_layers`.
            hidden_states: States entering that layer. Shape (batch, tokens, hidden), model dtype, any device.
            prompts: The prompts of the batch.

        Returns:
            Actions, on the host. Shape (batch,), uint8.

        Raises:
            ConfigError: The states have another width than the routers, or hold NaN at a prompt's
                token.
        """
        if hidden_states.shape[-1] != self._hidden_size:
            raise ConfigError(
                f"layer {layer_idx} has states of shape {tuple(hidden_states.shape)}; these routers read "
                f"(batch, tokens, {self._hidden_size})"
            )
        mask = prompts.mask.detach().to("cpu", torch.int64).numpy()
        actions = self._run(layer_idx, host_array(hidden_states), mask)
        if (actions == INVALID).any():
            raise nan_states_error(layer_idx)
        decided: Plans = actions.astype(np.uint8)
        return decided

    def _run(
        self, layer_idx: int, hidden_states: npt.NDArray[np.float32], mask: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        feed = {
            "hidden_states": hidden_states,
            "attention_mask": mask,
            "layer": np.asarray(layer_idx, dtype=np.int64),
            "budget": np.asarray(self.budget, dtype=np.float32),
        }
        actions: npt.NDArray[np.int64] = self._session.run(["action"], feed)[0]
        return actions


def _verify(routers: ExportableRouters, data: bytes) -> None:
    """Compare the graph with torch on random states, at each layer and at budgets in and out of range."""
    session = open_session(data)
    generator = torch.Generator().manual_seed(0)
    config, calibration = routers.config, routers.calibration
    lowest, highest = calibration.range
    hidden = torch.randn(3, 11, config.hidden_size, generator=generator)
    mask = torch.ones(3, 11, dtype=torch.int64)
    mask[1, :4], mask[2, 3:] = 0, 0
    views = pool(hidden, mask, config)
    for layer in range(config.num_layers):
        budget = (lowest, highest, (lowest + highest) / 2.0)[layer % 3]
        feed = {
            "hidden_states": hidden.numpy(),
            "attention_mask": mask.numpy(),
            "layer": np.asarray(layer, dtype=np.int64),
            "budget": np.asarray(budget, dtype=np.float32),
        }
        logits, actions = session.run(["logits", "action"], feed)
        penalty = calibration.penalty_for(budget)
        unpriced = routers.bias[layer] + routers.shrinkage * routers.heads.logits(layer, views)
        expected = host_array(unpriced - penalty * torch.arange(NUM_ACTIONS, dtype=torch.float32))
        wanted = actions_of(unpriced, penalty).numpy()
        # Folding the features' standardisation into the weights can make logits of random states
        # large.
        allowed = _TOLERANCE * max(1.0, float(np.abs(expected).max()))
        worst = float(np.abs(logits - expected).max())
        ordered = np.sort(expected, axis=1)
        clear = (ordered[:, -1] - ordered[:, -2] > allowed) & (layer not in routers.protect)
        if not worst <= allowed or (actions[clear] != wanted[clear]).any():
            raise ExportError(
                f"the ONNX graph differs from torch by {worst:.2g} at layer {layer} (allowed {allowed:.2g}); "
                "nothing was written"
            )
    feed["budget"] = np.asarray(highest + 1.0, dtype=np.float32)
    if not np.isnan(session.run(["logits"], feed)[0]).all():
        raise ExportError("the ONNX graph accepts a budget out of range; nothing was written")
