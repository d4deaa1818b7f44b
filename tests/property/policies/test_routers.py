"""Window pooling against a plain loop, for any lengths and any padding."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from dynadepth.policies.pooling import last_token_state, window_means


@st.composite
def padded_batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (B, T, d) and a mask with at least one real token in each row, padding anywhere."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    hidden = torch.randn(rows, width, 3, generator=generator)
    mask = torch.tensor(
        draw(
            st.lists(
                st.lists(st.integers(0, 1), min_size=width, max_size=width).filter(any),
                min_size=rows,
                max_size=rows,
            )
        )
    )
    return hidden, mask


@given(padded_batches(), st.integers(1, 12))
def test_windows_are_those_of_a_plain_loop(batch, num_windows):
    hidden, mask = batch
    means = window_means(hidden, mask, num_windows)
    for row in range(len(hidden)):
        real = [hidden[row, t] for t in range(hidden.shape[1]) if mask[row, t]]
        n = len(real)
        for w in range(num_windows):
            first = math.floor(w * n / num_windows)
            after = max(first + 1, math.floor((w + 1) * n / num_windows))
            expected = torch.stack(real[first:after]).mean(dim=0)
            torch.testing.assert_close(means[row, w], expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(last_token_state(hidden, mask)[row], real[-1])


@given(padded_batches(), st.integers(1, 12), st.integers(0, 5), st.integers(0, 5))
def test_more_padding_changes_nothing(batch, num_windows, left, right):
    hidden, mask = batch
    wide = torch.nn.functional.pad(hidden, (0, 0, left, right), value=7.0)
    wide_mask = torch.nn.functional.pad(mask, (left, right))
    torch.testing.assert_close(
        window_means(wide, wide_mask, num_windows),
        window_means(hidden, mask, num_windows),
        rtol=1e-6,
        atol=1e-6,
    )
    assert torch.equal(last_token_state(wide, wide_mask), last_token_state(hidden, mask))
