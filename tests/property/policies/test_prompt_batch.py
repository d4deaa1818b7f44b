"""A prompt's number depends on its real tokens, and on nothing that stands around them."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dynadepth.policies.prompt_batch import prompt_mix

_PRIME = 2**31 - 1
_PROMPTS = st.lists(
    st.lists(st.integers(0, 2**32), min_size=1, max_size=12), min_size=1, max_size=6
)


def padded(prompts, places, filler):
    """Return tokens and mask of prompts whose real tokens stand at given columns, with anything between them."""
    width = max(max(columns) for columns in places) + 1
    tokens = torch.tensor(
        [[filler + row * width + c for c in range(width)] for row in range(len(prompts))]
    )
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (prompt, columns) in enumerate(zip(prompts, places, strict=True)):
        tokens[row, columns] = torch.tensor(prompt)
        mask[row, columns] = True
    return tokens, mask


@st.composite
def batches(draw):
    prompts = draw(_PROMPTS)
    places = [
        sorted(
            draw(
                st.lists(
                    st.integers(0, 20), min_size=len(prompt), max_size=len(prompt), unique=True
                )
            )
        )
        for prompt in prompts
    ]
    return prompts, places, draw(st.integers(0, 1000))


def alone(prompt):
    total = sum(
        (token + 1) * pow(1103515245, index + 1, _PRIME) for index, token in enumerate(prompt)
    )
    return (48271 * (total % _PRIME) % _PRIME >> 7) / 2**24


@given(batches())
def test_padding_and_batch_do_not_matter(batch):
    prompts = batch[0]
    numbers = prompt_mix(*padded(*batch)).tolist()
    assert numbers == [alone(prompt) for prompt in prompts]
    assert all(0 <= number < 1 for number in numbers)


@given(batches(), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_embeddings_are_as_free_of_padding_and_batch(batch, hidden, seed):
    tokens, mask = padded(*batch)
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(*tokens.shape, hidden, generator=generator)
    numbers = prompt_mix(states, mask).tolist()
    for row, number in enumerate(numbers):
        real = states[row, mask[row]].unsqueeze(0)
        assert prompt_mix(real, torch.ones(real.shape[:2], dtype=torch.bool)).tolist() == [number]
        assert 0 <= number < 1
