"""Bake a plan into an ordinary model: its layers are the plan's visits.

The baked model does not need dynadepth, so it is the independent reference of every parity test, and a way to ship
one fixed plan to other inference engines.
"""

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from dynadepth.errors import UnsupportedModelError
from dynadepth.execution.executor import check_unwrapped
from dynadepth.files import make_folder_beside
from dynadepth.models.families import layer_stack
from dynadepth.plans import check_plans, plan_text

__all__ = ["bake", "save_baked"]

# Config fields with one entry for each decoder layer. If one is missing here, the check of `save_baked` fails.
_PER_LAYER_FIELDS = ("layer_types", "no_rope_layers")
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
    stack = layer_stack(model)
    visits = [
        layer_idx
        for layer_idx, action in enumerate(
            check_plans(plan, stack.num_layers, num_rows=1)[0].tolist()
        )
        for _ in range(action)
    ]
    baked: PreTrainedModel = copy.deepcopy(model)
    baked_stack = layer_stack(baked)
    seen: set[int] = set()
    layers = []
    for place, layer_idx in enumerate(visits):
        layer = baked_stack.layers[layer_idx]
        if layer_idx in seen:
            layer = copy.deepcopy(layer)
        seen.add(layer_idx)
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = place  # type: ignore[assignment]
        layers.append(layer)
    path = next(
        name for name, module in baked_stack.stack.named_children() if module is baked_stack.layers
    )
    setattr(baked_stack.stack, path, nn.ModuleList(layers))
    _set_config(baked.config, visits, stack.num_layers)
    return baked


def _set_config(config: Any, visits: list[int], num_layers: int) -> None:
    """Make a config describe the visited layers, in that order."""
    for field in _PER_LAYER_FIELDS:
        values = getattr(config, field, None)
        if isinstance(values, (list, tuple)) and len(values) == num_layers:
            setattr(config, field, [values[layer_idx] for layer_idx in visits])
    dense = getattr(config, "mlp_only_layers", None)
    if dense is not None:
        # A config lists the layers without experts or gives their period; after baking they are listed.
        step = config.decoder_sparse_step
        config.mlp_only_layers = [
            place
            for place, layer_idx in enumerate(visits)
            if layer_idx in dense or (layer_idx + 1) % step
        ]
        config.decoder_sparse_step = 1
    config.num_hidden_layers = len(visits)


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
