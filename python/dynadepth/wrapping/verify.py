"""Compare one short forward of a wrapped model with the one before wrapping, on the model's own device and kernels."""

from typing import Any

import torch

from dynadepth.errors import UnsupportedModelError
from dynadepth.models.structure import text_config_of
from dynadepth.plans import identity_plan

__all__ = ["check_identity", "short_forward"]

_TOKENS = 8


def short_forward(model: Any) -> torch.Tensor:
    """Return the model's logits for a few tokens. Shape (1, tokens, vocabulary), model dtype and device."""
    embedding = model.get_input_embeddings().weight
    tokens = (
        torch.arange(_TOKENS, device=embedding.device) % text_config_of(model.config).vocab_size
    )
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


def check_identity(model: Any, before: torch.Tensor) -> None:
    """Refuse a wrapped model whose identity plan does not give the logits that it gave before wrapping.

    Raises:
        UnsupportedModelError: They differ.
    """
    controller = model.dynadepth
    with controller.plans(identity_plan(controller.num_layers)[None]):
        after = short_forward(model)
    # NaN equals itself here: a model may give it before and after.
    if not torch.equal(after.nan_to_num(), before.nan_to_num()):
        difference = float((after.float() - before.float()).abs().max())
        raise UnsupportedModelError(
            f"with the plan of every layer once, this {type(model).__name__} differs from its own forward by "
            f"{difference:.3g} in a logit; it has been unwrapped. Its tiny copy was exact, so look at what a copy does "
            "not have: its kernels, quantised weights or devices"
        )
