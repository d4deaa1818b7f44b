"""The closed-form fit on random tokens: what it recovers, what it minimises, and what cannot rule it."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynadepth.errors import ConfigError
from dynadepth.shortcuts.fit import explained_variance, fit_shortcut
from dynadepth.shortcuts.maps import LinearShortcut
from dynadepth.shortcuts.moments import Moments

_SEEDS = st.integers(0, 2**31)
_RIDGE = 1e-9
_NAMES = ("weight", "tokens", "mean_h", "mean_u", "hh", "hu", "uu")


class Tokens:
    """Random states of a width, of unequal scales and off the origin, and what a layer might do to them."""

    def __init__(self, seed, width, count=80, noise=0.5):
        self.generator = torch.Generator().manual_seed(seed)
        self.width = width
        turn = torch.linalg.qr(self.normal(width, width))[0]
        spread = torch.linspace(0.3, 2.0, width, dtype=torch.float64)
        self.entering = (self.normal(count, width) * spread) @ turn + self.normal(width)
        self.entering *= torch.exp(self.normal(count, 1))
        self.update = self.entering @ self.normal(width, width) / width**0.5 + self.normal(width)
        self.update += noise * torch.tanh(self.entering) * self.normal(count, width)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def moments(self):
        return moments_of(self.entering, self.update)

    def weights(self):
        return 1 / self.entering.square().mean(dim=1)


def moments_of(entering, update):
    moments = Moments.zero(entering.shape[1])
    moments.add(entering, entering + update)
    return moments


def matrix(shortcut):
    width = shortcut.hidden_size
    if shortcut.A is None:
        return torch.zeros(width, width, dtype=torch.float64)
    return (shortcut.A if shortcut.B is None else shortcut.A @ shortcut.B).double()


def fit(moments, rank, ridge=_RIDGE):
    return fit_shortcut(moments, rank=rank, ridge=ridge, dtype=torch.float64)


@st.composite
def widths_and_ranks(draw):
    width = draw(st.integers(1, 10))
    return width, draw(st.integers(0, width))


@given(_SEEDS, widths_and_ranks())
def test_an_exact_affine_map_of_a_rank_is_recovered(seed, shape):
    width, rank = shape
    tokens = Tokens(seed, width)
    true = tokens.normal(width, rank) @ tokens.normal(rank, width) if rank else torch.zeros(())
    bias = tokens.normal(width)
    update = (tokens.entering @ true if rank else 0) + bias
    shortcut = fit(moments_of(tokens.entering, update.expand_as(tokens.entering)), rank)
    scale = float(update.abs().max())
    assert torch.allclose(
        shortcut(tokens.entering), tokens.entering + update, rtol=0, atol=1e-4 * scale
    )
    if rank:
        assert torch.allclose(matrix(shortcut), true, rtol=0, atol=1e-4 * scale)
        assert (shortcut.A.shape, shortcut.B.shape) == ((width, rank), (rank, width))
    else:
        assert (shortcut.A, shortcut.B) == (None, None)


@given(_SEEDS, st.integers(1, 6), st.lists(st.integers(0, 80), max_size=6))
def test_moments_added_in_pieces_are_those_added_at_once(seed, width, cuts):
    tokens = Tokens(seed, width)
    whole, pieces = tokens.moments(), Moments.zero(width)
    edges = [0, *sorted(cuts), len(tokens.entering)]
    for first, last in pairwise(edges):
        part = tokens.entering[first:last]
        pieces.add(part, part + tokens.update[first:last])
    for name in _NAMES:
        assert torch.allclose(getattr(pieces, name), getattr(whole, name), rtol=1e-11), name
    assert float(pieces.tokens) == len(tokens.entering)


@given(_SEEDS, st.integers(1, 6))
def test_moments_are_the_weighted_sums_of_their_definition(seed, width):
    tokens = Tokens(seed, width)
    moments, weights = tokens.moments(), tokens.weights()
    weighted = weights[:, None] * tokens.entering
    for name, expected in {
        "weight": weights.sum(),
        "mean_h": weighted.sum(dim=0),
        "mean_u": (weights[:, None] * tokens.update).sum(dim=0),
        "hh": weighted.T @ tokens.entering,
        "hu": weighted.T @ tokens.update,
        "uu": (weights[:, None] * tokens.update.square()).sum(),
    }.items():
        assert torch.allclose(getattr(moments, name), expected, rtol=1e-9, atol=1e-9), name


@given(_SEEDS, widths_and_ranks())
def test_the_full_fit_is_the_weighted_least_squares_solution(seed, shape):
    width, _ = shape
    tokens = Tokens(seed, width)
    root = tokens.weights().sqrt()[:, None]
    design = torch.cat([tokens.entering, torch.ones(len(root), 1, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(root * design, root * tokens.update, driver="gelsd").solution
    expected = design @ solution
    found = fit(tokens.moments(), "full", 1e-12)(tokens.entering) - tokens.entering
    assert torch.allclose(root * found, root * expected, rtol=0, atol=1e-4 * float(root.max()))


@given(_SEEDS, widths_and_ranks(), st.sampled_from([1e-9, 1e-4, 1e-2, 1.0]))
def test_no_other_map_of_the_rank_is_nearer_to_the_full_one_on_the_data(seed, shape, ridge):
    """Under the data's weighted metric: neither the truncated SVD nor a random projection, on either side."""
    width, rank = shape
    tokens = Tokens(seed, width)
    moments = tokens.moments()
    whole = matrix(fit(moments, "full", ridge))
    metric = moments.centred()[2]

    def distance(other):
        return float(((whole - other) * (metric @ (whole - other))).sum())

    found = distance(matrix(fit(moments, rank, ridge)))
    left, values, right = torch.linalg.svd(whole)
    others = [left[:, :rank] * values[:rank] @ right[:rank]]
    for _ in range(5):
        basis = torch.linalg.qr(tokens.normal(width, rank))[0] if rank else torch.zeros(width, 0)
        onto = basis.double() @ basis.double().T
        others += [whole @ onto, onto @ whole]
    scale = float((whole * (metric @ whole)).sum())
    assert found <= min(map(distance, others)) * (1 + 1e-8) + 1e-9 * scale
    # Eckart and Young: what the first singular values of the fitted updates leave.
    values = torch.linalg.svdvals(torch.linalg.cholesky(metric).T @ whole)
    assert found == pytest.approx(float(values[rank:].square().sum()), abs=1e-9 * scale)


@given(_SEEDS, st.integers(2, 10))
def test_a_higher_rank_explains_as_much_or_more(seed, width):
    moments = Tokens(seed, width).moments()
    explained = [explained_variance(fit(moments, rank), moments) for rank in range(width + 1)]
    assert np.diff(explained).min() > -1e-7
    # A bias alone is the mean update, by which variance is counted.
    assert explained[0] == pytest.approx(0.0, abs=1e-9)
    assert explained[-1] == pytest.approx(explained_variance(fit(moments, "full"), moments))
    assert explained[-1] <= 1


@given(_SEEDS, widths_and_ranks(), st.booleans())
def test_explained_variance_is_what_tokens_say(seed, shape, full):
    """Of any map on any tokens, not only of the fitted one on its own."""
    width, rank = shape
    fitted, others = Tokens(seed, width), Tokens(seed + 1, width)
    shortcut = fit(fitted.moments(), "full" if full else rank, 1e-2)
    moments, weights = others.moments(), others.weights()[:, None]
    error = others.entering + others.update - shortcut(others.entering)
    mean = (weights * others.update).sum(dim=0) / weights.sum()
    share = 1 - (weights * error.square()).sum() / (
        (weights * (others.update - mean).square()).sum()
    )
    assert explained_variance(shortcut, moments) == pytest.approx(float(share), rel=1e-8, abs=1e-8)


@given(_SEEDS, widths_and_ranks(), st.integers(0, 79))
def test_a_token_scaled_as_a_whole_does_not_rule(seed, shape, giant):
    """All but its part in the bias stays: the fit is nearer to the one without it than 1 part in 50."""
    width, rank = shape
    tokens = Tokens(seed, width)
    kept = torch.arange(80) != giant
    without = fit(moments_of(tokens.entering[kept], tokens.update[kept]), rank, 1e-3)
    moments = moments_of(tokens.entering[kept], tokens.update[kept])
    before = float(moments.uu)
    tokens.entering[giant] *= 1e6
    tokens.update[giant] *= 1e6
    moments.add(tokens.entering[giant, None], (tokens.entering[giant] + tokens.update[giant])[None])
    shortcut = fit(moments, rank, 1e-3)
    # It adds as much as an ordinary token of the same direction.
    ratio = tokens.update[giant].square().mean() / tokens.entering[giant].square().mean()
    assert float(moments.uu) - before == pytest.approx(width * float(ratio), rel=1e-6)
    weights = tokens.weights()[kept, None]

    def error(each):
        missed = tokens.entering[kept] + tokens.update[kept] - each(tokens.entering[kept])
        return float((weights * missed.square()).sum())

    # What an ordinary token could do: its own squared residual, at the most that of leaving the update as it is.
    own = width * float(ratio) + float((matrix(without)).square().sum()) * width
    assert error(shortcut) <= error(without) * (1 + 1e-6) + own


@given(_SEEDS, widths_and_ranks())
def test_a_state_of_zeros_counts_nothing(seed, shape):
    """Some embeddings are zero; by 1 / rms(h) such a token would be all that counts."""
    width, rank = shape
    tokens = Tokens(seed, width)
    moments = tokens.moments()
    zeros = torch.zeros(2, width)
    moments.add(zeros, zeros + 5.0)
    expected = tokens.moments()
    for name in set(_NAMES) - {"tokens"}:
        assert torch.equal(getattr(moments, name), getattr(expected, name)), name
    shortcut, alone = fit(moments, rank), fit(expected, rank)
    assert torch.equal(shortcut.b, alone.b)
    with pytest.raises(ConfigError, match="there are no tokens to fit shortcuts on"):
        fit(moments_of(zeros, zeros + 5.0), rank)


@given(_SEEDS, widths_and_ranks())
def test_fits_are_deterministic_and_signs_are_settled(seed, shape):
    width, rank = shape
    first, second = (fit(Tokens(seed, width).moments(), rank) for _ in range(2))
    for name in ("A", "B", "b"):
        one, other = getattr(first, name), getattr(second, name)
        assert (one is None and other is None) or torch.equal(one, other)
    if rank:
        # Rows of B are orthonormal, the one that changes most first, its largest entry positive.
        assert torch.allclose(first.B @ first.B.T, torch.eye(rank, dtype=torch.float64))
        assert bool((first.B.gather(1, first.B.abs().argmax(dim=1, keepdim=True)) > 0).all())
        metric = Tokens(seed, width).moments().centred()[2]
        changed = (first.A * (metric @ first.A)).sum(dim=0)
        assert bool((changed.diff() <= 1e-9 * changed.max()).all())


@given(_SEEDS, st.integers(1, 8), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_states_of_a_lower_precision_are_taken_as_they_are(seed, width, dtype):
    tokens = Tokens(seed, width)
    entering = tokens.entering.to(dtype)
    leaving = (tokens.entering + tokens.update).to(dtype)
    moments, exact = Moments.zero(width), Moments.zero(width)
    moments.add(entering, leaving)
    exact.add(entering.double(), leaving.double())
    for name in _NAMES:
        one, other = getattr(moments, name), getattr(exact, name)
        assert one.dtype == torch.float64
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max())), name
    shortcut = fit_shortcut(moments, rank=1, ridge=1e-3, dtype=dtype)
    assert {shortcut.A.dtype, shortcut.B.dtype, shortcut.b.dtype} == {dtype}


@given(_SEEDS, st.integers(2, 8), st.integers(1, 3))
def test_fewer_tokens_than_dimensions_are_fitted_too(seed, width, count):
    tokens = Tokens(seed, width, count)
    for rank in (0, 1, "full"):
        shortcut = fit(tokens.moments(), rank, 1e-3)
        assert bool(torch.isfinite(shortcut(tokens.entering)).all())
    if count == 1:
        expected = tokens.entering + tokens.update
        assert torch.allclose(shortcut(tokens.entering), expected, atol=1e-6)


@given(_SEEDS, st.integers(1, 6), st.sampled_from([torch.float32, torch.float64]))
def test_states_that_are_all_alike_leave_a_bias(seed, width, dtype):
    """Their variance is rounding alone, which a map may not blow up."""
    tokens = Tokens(seed, width, 1)
    entering = tokens.entering.to(dtype).expand(9, width)
    leaving = (tokens.entering + tokens.update).to(dtype).expand(9, width)
    moments = Moments.zero(width)
    moments.add(entering, leaving)
    shortcut = fit(moments, "full", 1e-3)
    assert torch.allclose(shortcut(tokens.entering), leaving[:1].double(), rtol=1e-3, atol=1e-3)
    # A map without bound would ruin every other state.
    size = float(tokens.update.norm() / tokens.entering.norm())
    assert float(matrix(shortcut).norm()) <= (1e-6 if dtype == torch.float64 else 100) * size


@pytest.mark.parametrize("rank", [-1, 5])
def test_a_rank_out_of_range_is_refused(rank):
    moments = Tokens(0, 4).moments()
    with pytest.raises(ConfigError, match="rank is .*; expected 0 to 4, the width of the states"):
        fit(moments, rank)


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("inf"), float("nan")])
def test_a_ridge_out_of_range_is_refused(ridge):
    with pytest.raises(ConfigError, match="ridge is .*; expected more than 0"):
        fit(Tokens(0, 4).moments(), 1, ridge)


def test_no_tokens_are_refused():
    nothing = Moments.zero(4)
    with pytest.raises(ConfigError, match="no tokens to fit shortcuts on; give prompts of two"):
        fit(nothing, 1)
    with pytest.raises(ConfigError, match="no tokens to fit shortcuts on"):
        explained_variance(LinearShortcut(None, None, torch.ones(4)), nothing)


def test_updates_that_do_not_vary_are_explained_by_nothing():
    entering = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = moments_of(entering, torch.zeros_like(entering))
    assert explained_variance(LinearShortcut(None, None, torch.zeros(4)), moments) == 0.0


def test_moments_come_back_from_their_tensors():
    moments = Tokens(0, 4).moments()
    again = Moments.from_tensors(moments.tensors())
    assert list(again.tensors()) == list(_NAMES)
    for name in _NAMES:
        assert torch.equal(getattr(again, name), getattr(moments, name))
    tensors = moments.tensors()
    for wrong in (
        {},
        {name: each for name, each in tensors.items() if name != "uu"},
        {**tensors, "more": torch.zeros(())},
        {**tensors, "mean_h": torch.zeros(5)},
        {**tensors, "hh": torch.zeros(4, 5)},
    ):
        with pytest.raises(ConfigError, match="moments have the tensors"):
            Moments.from_tensors(wrong)
