"""Folds and parts: equal prompts are never on both sides, and nothing is lost."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dynadepth.evaluation.folds import draw_folds, draw_parts, hold_out

names_lists = st.lists(st.sampled_from("abcdefghijkl"), min_size=1, max_size=40)
seeds = st.integers(0, 2**32 - 1)


@given(names=names_lists, count=st.integers(1, 6), seed=seeds)
def test_equal_names_share_a_fold_and_folds_are_even(names, count, seed):
    folds = draw_folds(names, count, np.random.default_rng(seed))
    fold_of = {}
    for name, fold in zip(names, folds.tolist(), strict=True):
        assert 0 <= fold < count
        assert fold_of.setdefault(name, fold) == fold
    sizes = np.bincount(list(fold_of.values()), minlength=count)
    assert sizes.max() - sizes.min() <= 1
    np.testing.assert_array_equal(folds, draw_folds(names, count, np.random.default_rng(seed)))


@given(names=names_lists, share=st.floats(0, 1), seed=seeds)
def test_a_share_of_the_names_is_held_out_whole(names, share, seed):
    held = hold_out(names, share, np.random.default_rng(seed))
    inside = {name for name, is_held in zip(names, held, strict=True) if is_held}
    outside = {name for name, is_held in zip(names, held, strict=True) if not is_held}
    assert not inside & outside
    assert len(inside) == round(share * len(set(names)))


@given(names=names_lists, sizes=st.lists(st.integers(0, 15), min_size=1, max_size=3), seed=seeds)
def test_parts_share_no_name_and_keep_their_sizes(names, sizes, seed):
    parts = draw_parts(names, sizes, np.random.default_rng(seed))
    rows = np.concatenate(parts)
    assert len(set(rows.tolist())) == len(rows)
    seen = [{names[row] for row in part.tolist()} for part in parts]
    for index, part in enumerate(parts):
        assert len(part) <= sizes[index]
        for name in seen[index]:
            assert names.count(name) == sum(names[row] == name for row in part.tolist())
        assert all(not seen[index] & other for other in seen[index + 1 :])


def test_different_names_fill_every_part():
    parts = draw_parts(range(100), [30, 50], np.random.default_rng(0))
    assert [len(part) for part in parts] == [30, 50]
    # In a drawn order: the head of a part is a fair sample of it.
    assert parts[0].tolist() != sorted(parts[0].tolist())
