"""The number that stands for a prompt, by its published formula, and what happens where nothing is known."""

import numpy as np
import pytest
import torch

from dynadepth.errors import ConfigError
from dynadepth.policies.prompt_batch import PromptBatch, prompt_mix

PRIME = 2**31 - 1


def by_hand(ids):
    """The formula, in whole numbers of any size."""
    total = sum((token + 1) * 1103515245 ** (index + 1) for index, token in enumerate(ids)) % PRIME
    return (48271 * total % PRIME >> 7) / 2**24


def one(ids):
    tokens = torch.tensor([ids])
    return float(prompt_mix(tokens, torch.ones_like(tokens, dtype=torch.bool)))


@pytest.mark.parametrize(
    "ids",
    [
        [0],
        [5],
        [151_643],
        [5, 6, 7],
        [2**31 - 3, 2**31 - 2, 2**31 - 1, 2**31],
        list(range(3000)),
    ],
    ids=["zero", "one", "large", "three", "beyond the prime", "long"],
)
def test_the_formula_by_hand(ids):
    assert one(ids) == by_hand(ids)


def test_no_tokens_are_a_number_too():
    tokens, mask = torch.tensor([[7, 7]]), torch.zeros(1, 2, dtype=torch.bool)
    assert prompt_mix(tokens, mask).tolist() == [0.0]
    assert prompt_mix(torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3).bool()).shape == (0,)


def test_order_and_length_matter():
    numbers = {one(ids) for ids in ([1, 2], [2, 1], [1, 2, 0], [0, 1, 2], [1], [2], [0], [0, 0])}
    assert len(numbers) == 8


def test_the_numbers_are_float32_below_one():
    numbers = prompt_mix(torch.arange(4000).unsqueeze(1), torch.ones(4000, 1, dtype=torch.bool))
    assert numbers.dtype == torch.float32
    assert float(numbers.min()) >= 0.0
    assert float(numbers.max()) < 1.0
    # No more bits than float32 holds.
    assert torch.equal(numbers * 2**24, (numbers * 2**24).round())


@pytest.mark.parametrize("kind", ["second differs", "one differs", "lengths", "embeddings"])
def test_many_prompts_are_spread_evenly(kind):
    """A share of a mixture is met by the prompts that there are."""
    count = 4096
    # The first token alone spreads little: most prompts begin with the same one.
    before = 1 if kind == "second differs" else 6
    tokens = torch.full((count, before + 4), 11)
    tokens[:, before] = torch.arange(count)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if kind == "lengths":
        tokens = torch.full((512, 512), 3)
        mask = torch.arange(512).unsqueeze(0) <= torch.arange(512).unsqueeze(1)
    elif kind == "embeddings":
        tokens = torch.randn(count, 3, 8, generator=torch.Generator().manual_seed(0))
        mask = torch.ones(count, 3, dtype=torch.bool)
    numbers = np.sort(prompt_mix(tokens, mask).numpy())
    assert len(np.unique(numbers)) > 0.99 * len(numbers)
    # Kolmogorov's distance from the uniform distribution; 1.95 stands for one in a thousand.
    ranks = (np.arange(len(numbers)) + 0.5) / len(numbers)
    assert np.abs(numbers - ranks).max() < 1.95 / np.sqrt(len(numbers))


def test_embeddings_are_told_apart_by_what_bfloat16_holds():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 4, 6, generator=generator).to(torch.bfloat16)
    mask = torch.ones(2, 4, dtype=torch.bool)
    first, second = prompt_mix(tokens, mask).tolist()
    assert first != second
    assert prompt_mix(tokens.float(), mask).tolist() == [first, second]
    assert prompt_mix(tokens.double(), mask).tolist() == [first, second]
    swapped = tokens.clone()
    swapped[0, 0, [0, 1]] = tokens[0, 0, [1, 0]]
    assert float(prompt_mix(swapped, mask)[0]) != first


def test_the_number_is_made_once_and_needs_tokens():
    mask, plans = torch.ones(2, 3, dtype=torch.bool), np.ones((2, 4), dtype=np.uint8)
    batch = PromptBatch(mask, plans, torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert batch.mix is batch.mix
    assert batch.mix.tolist() == [by_hand([1, 2, 3]), by_hand([4, 5, 6])]
    with pytest.raises(ConfigError, match="neither input_ids nor inputs_embeds .*; pass input_ids"):
        PromptBatch(mask, plans).mix  # noqa: B018
