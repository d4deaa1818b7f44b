"""Intervals, mixtures and fronts on arrays whose answer is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynadepth.errors import BudgetError
from dynadepth.evaluation.intervals import interval_of_means, mean_interval, paired_difference
from dynadepth.evaluation.mixtures import (
    best_under_depth,
    bracket_depth,
    concave_hull,
    mix_by_kind,
    mix_to_depth,
    pareto_front,
)

_floats = st.floats(-10, 10).map(lambda number: round(number, 3))


@st.composite
def _plans(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Depths on the grid that plans of 20 layers have, and a quality for each."""
    size = draw(st.integers(1, 12))
    visits = draw(st.lists(st.integers(1, 24), min_size=size, max_size=size))
    qualities = draw(st.lists(_floats, min_size=size, max_size=size))
    return np.array(visits) / 20, np.array(qualities)


@given(_plans(), st.floats(0, 1))
def test_a_mixture_has_the_depth_asked_for_and_odds(
    plans: tuple[np.ndarray, np.ndarray], where: float
) -> None:
    depths, qualities = plans
    wanted = depths.min() + where * (depths.max() - depths.min())
    mixture = mix_to_depth(depths, qualities, wanted)
    assert 0.0 <= mixture.weight <= 1.0
    mixed = (1 - mixture.weight) * depths[mixture.low] + mixture.weight * depths[mixture.high]
    assert mixed == pytest.approx(wanted, abs=1e-9)
    assert mixture.depth == pytest.approx(wanted, abs=1e-9)


@given(_plans(), st.floats(0, 1), st.data())
def test_no_pair_of_plans_mixes_to_a_higher_quality(
    plans: tuple[np.ndarray, np.ndarray], where: float, data: st.DataObject
) -> None:
    depths, qualities = plans
    wanted = depths.min() + where * (depths.max() - depths.min())
    mixture = mix_to_depth(depths, qualities, wanted)
    ours = (1 - mixture.weight) * qualities[mixture.low] + mixture.weight * qualities[mixture.high]
    low = data.draw(st.sampled_from(np.flatnonzero(depths <= wanted).tolist()))
    high = data.draw(st.sampled_from(np.flatnonzero(depths >= wanted - 1e-12).tolist()))
    span = depths[high] - depths[low]
    weight = (wanted - depths[low]) / span if span > 0 else 1.0
    assert ours >= (1 - weight) * qualities[low] + weight * qualities[high] - 1e-6


@st.composite
def _kinds(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Depths, qualities of two kinds, the kinds' shares, and a depth within reach."""
    depths, first = draw(_plans())
    second = np.array(draw(st.lists(_floats, min_size=len(depths), max_size=len(depths))))
    share = draw(st.integers(1, 9)) / 10
    wanted = depths.min() + draw(st.floats(0, 1)) * (depths.max() - depths.min())
    return depths, np.stack([first, second]), np.array([share, 1 - share]), float(wanted)


@given(_kinds())
def test_mixtures_by_kind_are_the_best_of_their_depth(
    drawn: tuple[np.ndarray, np.ndarray, np.ndarray, float],
) -> None:
    depths, qualities, shares, wanted = drawn
    mixtures = mix_by_kind(depths, qualities, shares, wanted)
    assert shares @ [mixture.depth for mixture in mixtures] == pytest.approx(wanted, abs=1e-9)
    ours = sum(
        share * mixture.expected(row[:, None])[0]
        for share, mixture, row in zip(shares, mixtures, qualities, strict=True)
    )
    # Splits of the depth between the two kinds on a grid, and the even one, so that there always is one.
    hulls = [concave_hull(depths, row) for row in qualities]
    first = np.append(np.linspace(depths.min(), depths.max(), 201), wanted)
    second = (wanted - shares[0] * first) / shares[1]
    possible = (second >= depths.min() - 1e-12) & (second <= depths.max() + 1e-12)
    split = [
        shares[0] * np.interp(first, depths[hulls[0]], qualities[0][hulls[0]]),
        shares[1] * np.interp(second, depths[hulls[1]], qualities[1][hulls[1]]),
    ]
    assert ours >= np.max(sum(split)[possible]) - 1e-6


@given(_plans(), st.floats(0, 1))
def test_the_mixture_by_kind_of_one_kind_is_the_mixture(
    plans: tuple[np.ndarray, np.ndarray], where: float
) -> None:
    depths, qualities = plans
    wanted = depths.min() + where * (depths.max() - depths.min())
    (mixture,) = mix_by_kind(depths, qualities[None], [1.0], wanted)
    known = mix_to_depth(depths, qualities, wanted)
    assert mixture.depth == pytest.approx(known.depth, abs=1e-9)
    ours, other = (each.expected(qualities[:, None])[0] for each in (mixture, known))
    # A plan within the slack of a depth is taken for it.
    assert ours == pytest.approx(other, abs=1e-6)


def test_pieces_of_almost_one_slope_keep_the_depth() -> None:
    for seed in range(300):
        rng = np.random.default_rng(seed)
        depths = np.sort(rng.random(24))
        # Lines, so that rounding says which of the steeper kind's pieces comes first.
        qualities = np.outer([3.0, 1.0], depths) + rng.normal(size=(2, 1))
        for wanted in (depths[-1], depths.mean()):
            mixtures = mix_by_kind(depths, qualities, [0.5, 0.5], float(wanted))
            mean = np.mean([mixture.depth for mixture in mixtures])
            assert mean == pytest.approx(wanted, abs=1e-9)


def test_kinds_that_lose_less_are_run_shallower() -> None:
    depths, qualities = [1.0, 0.5], [[0.0, -1.0], [0.0, -3.0]]
    cheap, dear = mix_by_kind(depths, qualities, [0.5, 0.5], 0.75)
    assert (cheap.depth, dear.depth) == (0.5, 1.0)
    with pytest.raises(BudgetError, match="from 0.5000 to 1.0000"):
        mix_by_kind(depths, qualities, [0.5, 0.5], 0.4)


def test_a_mixture_of_a_known_front() -> None:
    depths, qualities = [1.0, 0.9, 0.8, 0.7], [0.0, -0.5, -0.2, -1.0]
    assert concave_hull(depths, qualities).tolist() == [3, 2, 0]  # 0.9 lies under the chord
    mixture = mix_to_depth(depths, qualities, 0.95)
    assert (mixture.low, mixture.high) == (2, 0)
    assert mixture.weight == pytest.approx(0.75)
    assert mixture.expected([[1, 0], [9, 9], [0, 4], [9, 9]]) == pytest.approx([0.75, 1.0])


@pytest.mark.parametrize(
    ("layers", "prompts", "visits"), [(10, 18, 9), (30, 100, 24), (28, 200, 25)]
)
def test_a_mean_depth_a_rounding_away_from_a_plan_is_that_plan(
    layers: int, prompts: int, visits: int
) -> None:
    depths = np.arange(1, layers + 1) / layers
    depth = float(np.full(prompts, visits / layers).mean())
    mixture = bracket_depth(depths, depth, np.arange(layers))
    assert (mixture.low, mixture.high, mixture.weight) == (visits - 1, visits - 1, 1.0)
    assert mixture.depth == depths[visits - 1]


@given(st.integers(1, 60), st.integers(1, 300), st.data())
def test_prompts_of_one_depth_are_mixed_of_one_plan(
    layers: int, prompts: int, data: st.DataObject
) -> None:
    visits = data.draw(st.integers(1, layers))
    depths = np.arange(1, layers + 1) / layers
    for depth in (
        float(np.full(prompts, visits / layers).mean()),
        float(np.nextafter(visits / layers, 0.0)),
        float(np.nextafter(visits / layers, 2.0)),
    ):
        mixture = bracket_depth(depths, depth, np.arange(layers))
        assert mixture.low == mixture.high == visits - 1


def test_a_depth_outside_the_plans_is_an_error_that_names_their_range() -> None:
    message = r"mean depth 0\.5; the static plans are from 0\.8000 to 1\.0000"
    with pytest.raises(BudgetError, match=message):
        mix_to_depth([1.0, 0.8], [0.0, -1.0], 0.5)
    with pytest.raises(BudgetError, match="mean depth nan"):
        mix_to_depth([1.0, 0.8], [0.0, -1.0], float("nan"))
    with pytest.raises(BudgetError, match="no depth at all"):
        mix_to_depth([], [], 0.5)


@given(st.lists(st.tuples(_floats, _floats), min_size=1, max_size=40), st.integers(0, 9))
def test_a_paired_difference_changes_sign_with_its_order(
    pairs: list[tuple[float, float]], seed: int
) -> None:
    first, second = np.array(pairs).T
    one = paired_difference(first, second, seed=seed, resamples=200)
    other = paired_difference(second, first, seed=seed, resamples=200)
    assert one.mean == pytest.approx(-other.mean, abs=1e-9)
    assert one.low == pytest.approx(-other.high, abs=1e-9)
    assert one.high == pytest.approx(-other.low, abs=1e-9)
    assert one.low <= one.high
    assert one.n == len(pairs)


@given(st.lists(_floats, min_size=2, max_size=40), _floats)
def test_a_constant_shift_is_found_without_noise(values: list[float], shift: float) -> None:
    found = paired_difference(np.array(values) + shift, values, resamples=100)
    assert [found.mean, found.low, found.high] == pytest.approx([shift] * 3, abs=1e-9)


def test_the_interval_covers_a_planted_effect_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    effect, trials, covered, seen = 0.3, 300, 0, 0
    for trial in range(trials):
        reference = rng.normal(0, 3, 100)  # prompts differ much, which pairing removes
        values = reference + effect + rng.normal(0, 1, 100)
        found = paired_difference(values, reference, seed=trial, resamples=400)
        covered += found.low <= effect <= found.high
        seen += found.low > 0
    assert 0.90 <= covered / trials <= 0.98
    assert seen / trials > 0.7


def test_pairing_narrows_the_interval() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(0, 3, 200)
    values = reference + rng.normal(0, 0.1, 200)
    paired = paired_difference(values, reference)
    shuffled = paired_difference(values, rng.permutation(reference))
    assert paired.high - paired.low < 0.1 * (shuffled.high - shuffled.low)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = np.random.default_rng(1).normal(size=50)
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    assert mean_interval(values, seed=3) != mean_interval(values, seed=4)


def test_many_prompts_are_resampled_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).normal(size=50)
    whole = mean_interval(values, resamples=100)
    monkeypatch.setattr("dynadepth.evaluation.intervals._BLOCK", 500)
    assert mean_interval(values, resamples=100) == whole


@pytest.mark.parametrize(
    ("values", "reference", "message"),
    [
        ([], [], "at least one"),
        ([1.0, 2.0], [1.0], "values has 2 prompts and reference 1"),
        ([1.0, float("nan")], [1.0, 1.0], "values is nan at prompt 1"),
        ([[1.0]], [[1.0]], "expected one number for each prompt"),
    ],
)
def test_outcomes_that_cannot_be_compared(values: list, reference: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_difference(values, reference)


def test_a_function_of_means_resamples_all_columns_together() -> None:
    rng = np.random.default_rng(5)
    part, whole = rng.random(40), rng.random(40) + 1.0
    one = interval_of_means([part], lambda mean: mean)
    assert one == mean_interval(part)
    # Twice a column over the column itself is 2 in every resample only if both are resampled together.
    ratio = interval_of_means([2.0 * whole, whole], np.divide)
    assert ratio.low == pytest.approx(2.0, abs=1e-12) == ratio.high
    ratio = interval_of_means([part, whole], np.divide)
    assert ratio.mean == pytest.approx(part.mean() / whole.mean())
    assert ratio.low < ratio.mean < ratio.high


def test_a_ratio_over_something_rare_is_unbounded() -> None:
    rare = np.zeros(30)
    rare[0] = 1.0
    found = interval_of_means([np.ones(30), rare], np.divide)
    # A third of the resamples miss the one prompt.
    assert found.mean == pytest.approx(30.0)
    assert (found.low, found.high) == (pytest.approx(30 / 4, rel=0.4), np.inf)
    assert np.isnan(interval_of_means([np.zeros(3), np.zeros(3)], np.divide).mean)


@pytest.mark.parametrize("columns", [[[1.0], [1.0, 2.0]], [[]], [[np.nan]], []])
def test_columns_that_are_not_of_the_same_prompts(columns: list) -> None:
    with pytest.raises(ValueError, match="expected"):
        interval_of_means(columns, lambda *means: means[0])


@given(_plans())
def test_a_pareto_front_is_what_nothing_dominates(plans: tuple[np.ndarray, np.ndarray]) -> None:
    depths, qualities = plans
    front = set(pareto_front(depths, qualities).tolist())
    for point in range(depths.size):
        beaten = (
            (depths <= depths[point])
            & (qualities >= qualities[point])
            & ((depths < depths[point]) | (qualities > qualities[point]))
        ).any()
        twin = ((depths == depths[point]) & (qualities == qualities[point]))[:point].any()
        assert (point in front) == (not beaten and not twin)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 100), st.floats(0, 1))
def test_an_oracle_fits_its_depth_and_no_worse_than_any_one_plan(
    num_plans: int, num_prompts: int, seed: int, where: float
) -> None:
    rng = np.random.default_rng(seed)
    depths = np.repeat(rng.integers(1, 20, (num_plans, 1)) / 20, num_prompts, axis=1)
    qualities = rng.normal(size=(num_plans, num_prompts))
    limit = depths.min() + where * (depths.max() - depths.min())
    columns = np.arange(num_prompts)
    chosen = best_under_depth(qualities, depths, limit)
    assert depths[chosen, columns].mean() <= limit + 1e-9
    shallowest = depths[:, 0] == depths.min()
    assert qualities[chosen, columns].mean() >= qualities[shallowest].mean(axis=1).max() - 1e-9
    free = best_under_depth(qualities, depths, 1.0)
    assert qualities[free, columns] == pytest.approx(qualities.max(axis=0))


def test_an_oracle_cannot_be_shallower_than_its_plans() -> None:
    with pytest.raises(BudgetError, match=r"mean depth 0\.1; the shallowest plans have 0\.5000"):
        best_under_depth([[1.0]], [[0.5]], 0.1)
