"""Plain recomputation: a model that runs every row alone, unpadded, from its first token, in the plan's baked model.

It knows nothing of dynadepth, and transformers' own `generate` drives it, so every mode of `generate` has a reference.
"""

import copy
import inspect
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from dynadepth.wrapping.bake import bake
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from tests.tiny import random_batch, tiny_model

# Since transformers 5.24 a forward calls its cache so.
CACHE = (
    "cache"
    if "cache" in inspect.signature(type(tiny_model("llama")).forward).parameters
    else "past_key_values"
)


def real_rows(ids: torch.Tensor, mask: torch.Tensor) -> list[tuple[int, ...]]:
    """Return each row's tokens without padding."""
    return [tuple(row[real.bool()].tolist()) for row, real in zip(ids, mask, strict=True)]


def recomputing(base: Any, plans: dict[tuple[int, ...], Any]) -> PreTrainedModel:
    """Return a model whose `generate(..., use_cache=False)` is the reference.

    Args:
        base: An unwrapped model; left as it is.
        plans: The plan of each prompt, by its tokens. A row belongs to the longest prompt that it begins with.
    """
    model = copy.deepcopy(base)
    baked = {prompt: bake(base, plan) for prompt, plan in plans.items()}

    def forward(input_ids=None, attention_mask=None, logits_to_keep=0, use_cache=None, **_):
        assert not use_cache
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = torch.zeros(*input_ids.shape, base.config.vocab_size, dtype=base.dtype)
        for row, tokens in enumerate(real_rows(input_ids, mask)):
            prompt = max((p for p in plans if tokens[: len(p)] == p), key=len)
            with torch.no_grad():
                alone = baked[prompt](torch.tensor([tokens]), use_cache=False).logits[0]
            logits[row, mask[row].bool()] = alone
        return CausalLMOutputWithPast(logits=logits)

    model.forward = forward
    return model


def plans_alone(base: Any, policy: Any, prompts: list[tuple[int, ...]]) -> dict[Any, np.ndarray]:
    """Return the plan that a policy gives each prompt when it comes alone, unpadded, in a plain forward."""
    model = wrap_model(copy.deepcopy(base), policy=policy)
    plans = {}
    for prompt in prompts:
        with torch.no_grad():
            model(torch.tensor([prompt]), use_cache=False)
        plans[prompt] = model.dynadepth.last_plans[0]
    unwrap_model(model)
    return plans


class Generated(NamedTuple):
    """What `generate` gave.

    Attributes:
        tokens: New tokens of each row.
        logits: The raw logits of each step, which tell plans apart where tokens happen to agree. Shape (steps, running
            rows, vocabulary), float32.
    """

    tokens: list[list[int]]
    logits: torch.Tensor


def generated(
    model: Any, ids: torch.Tensor, mask: torch.Tensor | None, *, seed: int = 0, **settings: Any
) -> Generated:
    """Run `generate` with a seed of its own, so that samples compare."""
    torch.manual_seed(seed)
    output = model.generate(
        ids,
        attention_mask=mask,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    return Generated(output.sequences[:, ids.shape[1] :].tolist(), torch.stack(output.logits))


def difference(found: Generated, expected: Generated) -> float:
    """Return the largest difference of two logits, as a fraction of the largest logit."""
    assert found.logits.shape == expected.logits.shape
    gap = (found.logits - expected.logits).abs().max() / expected.logits.abs().max()
    return float(gap)


def assert_same(found: Generated, expected: Generated, case: object = None) -> None:
    """Check that two generations gave the same tokens from the same logits, up to the last digit of float32."""
    assert found.tokens == expected.tokens, case
    assert difference(found, expected) < 1e-6, case


def prompts_of(lengths: list[int], *, seed: int = 4) -> tuple[Any, Any, list[tuple[int, ...]]]:
    """Return left-padded ids, their mask, and each row's tokens."""
    ids, mask = random_batch(lengths, seed=seed)
    return ids, mask, real_rows(ids, mask)
