"""Bake a plan into an ordinary model: its layers are the plan's visits.

The baked model does not need dynadepth, so it is the independent reference of every parity test, and a way to ship
one fixed plan to other inference engines.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from dynadepth.errors import UnsupportedModelError
from dynadepth.execution.executor import check_unwrapped
from dynadepth.files import make_folder_beside
from dynadepth.models.rebuild import rebuild
from dynadepth.plans import check_plans, plan_text
from dynadepth.proving.prove import proved_stack

__all__ = ["bake", "save_baked"]

# A checkpoint does not record these kernels; the comparison must run the same ones.
_KERNELS = ("_attn_implementation", "_experts_implementation")


def bake(model: PreTrainedModel, plan: Any) -> PreTrainedModel:
    """Return an ordinary model of the same class that always runs one plan.

    Args:
        model: An unwrapped, supported causal language model; not changed.
        plan: The plan. Shape (num_layers,), uint8, or a text that `parse_plan` reads.

    Returns:
        A copy whose decoder layers are the plan's visits, in order, each with its own weights and `layer_idx`.

    Raises:
        PlanError: The plan is not one of this model.
        UnsupportedModelError: The model's family is not supported.
        WrapError: The model is wrapped.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> shape = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **shape))
        >>> bake(model, [1, 0, 2]).config.num_hidden_layers
        3
    """
    check_unwrapped(model, before="bake")
    stack = proved_stack(model)
    actions = check_plans(plan, stack.num_layers, num_rows=1)[0]
    baked: PreTrainedModel = rebuild(model, actions.tolist())
    return baked


def save_baked(model: PreTrainedModel, plan: Any, folder: str | os.PathLike[str]) -> None:
    """Bake a plan, save the result as a plain checkpoint, load that again and compare its logits.

    Args:
        model: An unwrapped, supported causal language model; not changed.
        plan: The plan. Shape (num_layers,), uint8.
        folder: Where to write the checkpoint; it must be empty or not exist yet.

    Raises:
        FileExistsError: The folder is not empty.
        UnsupportedModelError: The saved checkpoint does not give the same logits, because the family has a per-layer
            setting that is unknown here. Nothing is left in `folder` then.
        PlanError: The plan is not one of this model.
        WrapError: The model is wrapped.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists already; give a new folder for the baked model")
    baked = bake(model, plan)
    temporary = make_folder_beside(target)
    try:
        baked.save_pretrained(temporary)
        again = AutoModelForCausalLM.from_pretrained(temporary, dtype=baked.dtype)
        for kernel in _KERNELS:
            if hasattr(baked.config, kernel):
                setattr(again.config, kernel, getattr(baked.config, kernel))
        difference = _logit_difference(baked, again.to(baked.device))
        if difference != 0.0:
            raise UnsupportedModelError(
                f"the model baked with plan {plan_text(plan)} and its reloaded checkpoint differ by {difference:.3g} "
                f"in their logits; {model.config.model_type} has a per-layer setting that bake does not know"
            )
        if target.exists():
            target.rmdir()
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _logit_difference(first: PreTrainedModel, second: PreTrainedModel) -> float:
    tokens = torch.arange(16, device=first.device).remainder(first.config.vocab_size).unsqueeze(0)
    with torch.inference_mode():
        logits = [model.eval()(tokens, use_cache=False).logits for model in (first, second)]
    return float((logits[0] - logits[1]).abs().max())
