"""Bake a plan into an ordinary model: its layers are the plan's visits.

The baked model does not need dynadepth, so it is the independent reference of every parity test, and a way to ship
one fixed plan to other inference engines.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dynadepth.errors import ShortcutError, UnsupportedModelError
from dynadepth.execution.executor import check_unwrapped
from dynadepth.files import make_folder_beside
from dynadepth.models.rebuild import rebuild
from dynadepth.plans import check_plans, plan_text
from dynadepth.proving.prove import proved_stack

__all__ = ["bake", "check_new_folder", "check_no_shortcuts", "save_baked", "save_checkpoint"]

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


def save_baked(
    model: PreTrainedModel,
    plan: Any,
    folder: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    shortcuts: Any = None,
) -> None:
    """Bake a plan, save the result as a plain checkpoint, load that again and compare its logits.

    Args:
        model: An unwrapped, supported causal language model; not changed.
        plan: The plan. Shape (num_layers,), uint8.
        folder: Where to write the checkpoint; it must be empty or not exist yet.
        tokenizer: Saved with the checkpoint; None: none is.
        shortcuts: Refused, see `check_no_shortcuts`; None or False: a skipped layer leaves nothing behind.

    Raises:
        FileExistsError: The folder is not empty.
        PlanError: The plan is not one of this model.
        ShortcutError: Shortcuts were given.
        UnsupportedModelError: The saved checkpoint does not give the same logits, because the family has a per-layer
            setting that is unknown here. Nothing is left in `folder` then.
        WrapError: The model is wrapped.
    """
    check_no_shortcuts(shortcuts)
    check_new_folder(folder)
    save_checkpoint(bake(model, plan), folder, plan=plan, tokenizer=tokenizer)


def check_no_shortcuts(shortcuts: Any) -> None:
    """Refuse to put shortcuts into a plain checkpoint.

    Args:
        shortcuts: What the caller gave as shortcuts; None or False: none.

    Raises:
        ShortcutError: There are some.
    """
    if shortcuts is not None and shortcuts is not False:
        raise ShortcutError(
            "a plain checkpoint has no place for shortcuts: each is a map of the residual stream between two layers. "
            "`dynadepth fold` fits maps that can be multiplied into the weights of the layers that stay; or leave "
            "shortcuts out, to bake the plan without them"
        )


def check_new_folder(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that something is in.

    Args:
        folder: Where a checkpoint is to be written.

    Raises:
        FileExistsError: It is not empty, or is no folder.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists already; give a new folder for the baked model")


def save_checkpoint(
    baked: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    plan: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Save a baked model as a plain checkpoint, load that again and compare its logits.

    The folder appears complete or not at all.

    Args:
        baked: What `bake` returned; its weights may have been changed since.
        folder: Where to write the checkpoint; it must be empty or not exist yet.
        plan: The plan that was baked, for the message.
        tokenizer: Saved with the checkpoint; None: none is.

    Raises:
        FileExistsError: The folder is not empty.
        UnsupportedModelError: The saved checkpoint does not give the same logits.
    """
    target = Path(folder)
    check_new_folder(target)
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
                f"in their logits; {baked.config.model_type} has a per-layer setting that bake does not know"
            )
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
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
