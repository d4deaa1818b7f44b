"""Compare a short forward of a model, every layer once, with its own: on its own device, kernels and weights."""

from typing import Any

import torch

from dynadepth.errors import UnsupportedModelError
from dynadepth.models.structure import LayerStack, text_config_of
from dynadepth.plans import identity_plan
from dynadepth.proving.driving import FixedPlans

__all__ = ["check_identity"]

_TOKENS = 8


def check_identity(model: Any, stack: LayerStack) -> None:
    """Refuse a model whose identity plan does not give its own logits; leaves it as it was.

    Args:
        model: The model, not wrapped.
        stack: Its layers, proved.

    Raises:
        UnsupportedModelError: They differ.
        WrapError: Another library has replaced a layer's forward.
    """
    before = _short_forward(model)
    with FixedPlans(model, stack, identity_plan(stack.num_layers)[None]):
        after = _short_forward(model)
    # NaN equals itself here: a model may give it both times.
    if not torch.equal(after.nan_to_num(), before.nan_to_num()):
        difference = float((after.float() - before.float()).abs().max())
        raise UnsupportedModelError(
            f"with the plan of every layer once, this {type(model).__name__} differs from its own forward by "
            f"{difference:.3g} in a logit; it was left unwrapped. Its tiny copy was exact, so look at what a copy does "
            "not have: its kernels, quantised weights or devices"
        )


def _short_forward(model: Any) -> torch.Tensor:
    """Return the model's logits for a few tokens. Shape (1, tokens, vocabulary), model dtype and device."""
    device = model.get_input_embeddings().weight.device
    tokens = torch.arange(_TOKENS, device=device) % text_config_of(model.config).vocab_size
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            logits: torch.Tensor = model(
                input_ids=tokens[None], attention_mask=torch.ones_like(tokens)[None]
            ).logits
    finally:
        model.train(training)
    return logits
