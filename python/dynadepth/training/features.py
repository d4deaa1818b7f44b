"""What training and static baselines read of a model: pooled states under a plan, and block influence.

One pass under given plans yields the features of a prompt, so that training never runs the base model again.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dynadepth.execution.executor import check_unwrapped
from dynadepth.models.structure import layer_stack, position_arguments
from dynadepth.plans import Plans, check_plans
from dynadepth.policies.base import Policy
from dynadepth.policies.pooling import last_token_state, window_means
from dynadepth.policies.prompt_batch import PromptBatch
from dynadepth.shortcuts.maps import Shortcuts
from dynadepth.wrapping.skipping import skips_of
from dynadepth.wrapping.wrap import unwrap_model, wrap_model

__all__ = ["block_influence", "prompt_features"]


class _TeacherPolicy(Policy):
    """Runs given plans and keeps what a router would read."""

    def __init__(self, plans: Plans, num_windows: int) -> None:
        self.num_layers = int(plans.shape[1])
        self.decision_layers = tuple(range(self.num_layers))
        self.pooled: list[Tensor] = []
        self._plans, self._num_windows = plans, num_windows

    def initial_plans(self, num_rows: int) -> Plans:
        plans: Plans = self._plans[:num_rows].copy()
        return plans

    def decide(self, layer_idx: int, hidden_states: Tensor, prompts: PromptBatch) -> Plans:
        means = window_means(hidden_states, prompts.mask, self._num_windows)
        last = last_token_state(hidden_states, prompts.mask).unsqueeze(1)
        self.pooled.append(torch.cat([means, last], dim=1).cpu())
        return self._plans[:, layer_idx : layer_idx + 1]


def prompt_features(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    plans: Any,
    *,
    num_windows: int,
    shortcuts: Shortcuts | None = None,
) -> Tensor:
    """Return what routers would read of prompts that run given plans.

    Args:
        model: An unwrapped, supported model; unwrapped again afterwards.
        input_ids: Prompt tokens only. Shape (rows, tokens), int64.
        attention_mask: 1 for real tokens. Shape (rows, tokens).
        plans: The plan of each row. Shape (rows, num_layers), uint8.
        num_windows: Number of windows per prompt.
        shortcuts: What rows take in place of layers that they skip; None: nothing.

    Returns:
        For the states that enter each layer: their means over the windows, then the state of the last token. Shape
        (rows, num_layers, num_windows + 1, hidden), float32, on the host.

    Raises:
        PlanError: A plan does not fit this model, or there is not one for each row.
        ShortcutError: The shortcuts belong to another base model.
        WrapError: The model is wrapped.
    """
    stack = layer_stack(model)
    teacher = _TeacherPolicy(
        check_plans(plans, stack.num_layers, num_rows=len(input_ids)), num_windows
    )
    wrap_model(model, policy=teacher, shortcuts=shortcuts)
    try:
        with torch.inference_mode():
            _forward(stack.stack, input_ids, attention_mask)
    finally:
        unwrap_model(model)
    return torch.stack(teacher.pooled, dim=1)


def block_influence(
    model: Any, input_ids: Tensor, attention_mask: Tensor, shortcuts: Shortcuts | None = None
) -> npt.NDArray[np.float64]:
    """Return how much each layer changes the direction of the states, beyond what its shortcut does.

    Args:
        model: An unwrapped, supported model; not changed.
        input_ids: Prompt tokens. Shape (rows, tokens), int64.
        attention_mask: 1 for real tokens. Shape (rows, tokens).
        shortcuts: What states take in place of a layer that is skipped; None: nothing.

    Returns:
        1 - cosine similarity of a layer's output and of what skipping it leaves, its input or what its shortcut makes
        of it, averaged over the real tokens of each row, then over rows. Shape (num_layers,), float64.

    Raises:
        WrapError: The model is wrapped.

    Source:
        ShortGPT (arXiv 2403.03853), equation 1; deviations: every prompt counts once, whatever its length, and
        a layer with a shortcut is compared with that, so that the order it gives is of what is lost.
    """
    check_unwrapped(model, before="block_influence")
    stack = layer_stack(model)
    influence = np.zeros(stack.num_layers)
    weights = attention_mask.to(torch.float32)
    weights = weights / weights.sum(dim=1, keepdim=True) / len(weights)
    skips = skips_of(shortcuts, stack.num_layers)

    def record(layer_idx: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # Some families return more than the states.
            states = output[0] if isinstance(output, (tuple, list)) else output
            left = skips[layer_idx].through(args[0])
            cosine = nn.functional.cosine_similarity(left.float(), states.float(), dim=-1)
            influence[layer_idx] = float(((1 - cosine) * weights.to(cosine.device)).sum())

        return hook

    handles = [
        layer.register_forward_hook(record(layer_idx))
        for layer_idx, layer in enumerate(stack.layers)
    ]
    try:
        with torch.inference_mode():
            _forward(stack.stack, input_ids, attention_mask)
    finally:
        for handle in handles:
            handle.remove()
    return influence


def _forward(stack: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> None:
    """Run the decoder layers on left- or right-padded prompts, without the output head."""
    given = position_arguments(stack, attention_mask)
    stack(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **given)
