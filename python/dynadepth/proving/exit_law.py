"""The law of late exits: tokens that go on are the base model's own, whatever left before them.

It is run beside the other laws on the tiny copy. A model that breaks it runs every plan all the same, but no token of
it may leave early.
"""

from typing import Any

import torch

from dynadepth.errors import UnsupportedModelError
from dynadepth.exits.exit_forward import Exits
from dynadepth.models.structure import LayerStack
from dynadepth.plans import identity_plan
from dynadepth.proving.driving import Batch, FixedPlans, run
from dynadepth.proving.tiny_copy import failure

__all__ = ["why_no_exits"]


class _Head:
    """Lets all rows leave twice, then all but the first, then none."""

    layer_idx = 1

    def __init__(self) -> None:
        self.left: list[torch.Tensor] = []

    def leaves(self, states: torch.Tensor) -> torch.Tensor:
        step = len(self.left)
        leaving = torch.full((len(states),), step < 3, dtype=torch.bool, device=states.device)
        if step == 2:
            leaving[0] = False
        self.left.append(leaving)
        return leaving

    def final(self, states: torch.Tensor) -> torch.Tensor:
        return -states


def why_no_exits(
    model: Any, stack: LayerStack, batch: Batch, expected: torch.Tensor, limit: float
) -> str | None:
    """Return why tokens of a model may not leave early.

    Args:
        model: The tiny copy; left as it was.
        stack: Its layers, with their traits.
        batch: A few prompts with four more tokens.
        expected: The base model's logits on it, decoded one token at a time. Shape (rows, tokens, vocabulary).
        limit: How far logits may differ, as a fraction of the largest.

    Returns:
        The reason; None if they may.
    """
    if stack.num_layers < 2:
        return "it has one layer, so there is none before which a token could leave"
    head = _Head()
    plan = identity_plan(stack.num_layers)[None]
    try:
        with FixedPlans(model, stack, plan, exits=Exits((head,))):
            logits = run(model, batch, "one token at a time")
    except UnsupportedModelError as error:
        return str(error)
    except (RuntimeError, IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        return f"layers that run for tokens of several steps fail with {failure(error)}"
    stays = batch.mask.bool()
    stays[:, batch.prefill :] &= ~torch.stack(head.left, dim=1)
    scale = expected[batch.mask.bool()].abs().max().clamp(min=1.0)
    difference = float((logits - expected)[stays].abs().max() / scale)
    if not difference <= limit:
        return (
            f"tokens that go on differ from the base model's by {difference:.2g} of the largest logit, after others "
            f"that left early; expected at most {limit:.2g}"
        )
    return None
