"""Which plan becomes the label: by all that was measured, accepted by what the search did not see."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynadepth.plans import plan_depth
from dynadepth.tree_search.forest import Evaluated
from dynadepth_search.storage.choice import Candidate, best_plans, choose_label, plan_visits

IDENTITY = "1111"
PLANS = ("1111", "0111", "1011", "2110", "0011", "1112")
rewards = st.floats(-3, 3).map(lambda number: round(number, 3))


def candidate(plan, reward, *variants, price=0.0, right=()):
    return Candidate(plan, reward, tuple(variants), price, ("said",) * len(right), tuple(right))


@st.composite
def candidates(draw):
    others = draw(st.lists(st.sampled_from(PLANS[1:]), unique=True, max_size=4))
    count = draw(st.integers(0, 3))
    return [
        candidate(plan, draw(rewards), *(draw(rewards) for _ in range(count)), price=0.1)
        for plan in draw(st.permutations([IDENTITY, *others]))
    ]


def test_the_mean_of_all_chooses_among_candidates():
    lucky = candidate("0111", 3.0, 0.5)
    steady = candidate("1011", 2.0, 2.0)
    base = candidate(IDENTITY, 1.0, 0.2)
    assert choose_label([lucky, steady, base], margin=0.0) is steady


def test_what_variants_do_not_confirm_becomes_the_identity():
    lucky = candidate("0111", 9.0, -0.1)
    base = candidate(IDENTITY, 0.0, 0.0)
    assert choose_label([lucky, base], margin=0.0) is base


def test_a_label_beats_the_identity_on_every_variant():
    letter = candidate("0111", 5.0, 9.0, -0.1)
    base = candidate(IDENTITY, 0.0, 0.0, 0.0)
    assert choose_label([letter, base], margin=0.0) is base
    assert letter.margin_over(base) == -0.1


@pytest.mark.parametrize(("margin", "plan"), [(0.4, "0111"), (0.6, IDENTITY)])
def test_a_label_is_better_than_the_identity_by_the_margin(margin, plan):
    found = [candidate("0111", 1.0, 1.0, price=0.5), candidate(IDENTITY, 1.0, 1.0, price=1.0)]
    assert choose_label(found, margin=margin).plan == plan


def test_ties_go_to_the_lower_depth_and_then_to_the_lower_plan():
    found = [candidate(plan, 1.0, 1.0) for plan in (IDENTITY, "1011", "0111", "0011")]
    assert choose_label(found, margin=0.0).plan == "0011"
    assert choose_label(found[:3], margin=0.0).plan == "0111"


@given(candidates(), st.floats(0, 1))
def test_a_label_is_the_identity_or_the_best_that_beats_it(found, margin):
    label = choose_label(found, margin=margin)
    base = next(item for item in found if item.plan == IDENTITY)
    best = max(item.value for item in found)
    if label is not base:
        assert label.value == best
        assert label.margin_over(base) >= margin
    assert choose_label(list(reversed(found)), margin=margin) is label


@st.composite
def answered(draw):
    """Candidates that answered the prompt and its variants."""
    found = draw(candidates())
    count = 1 + len(found[0].variant_rewards)
    flags = st.lists(st.booleans(), min_size=count, max_size=count)
    return [replace(item, answers=("said",) * count, right=tuple(draw(flags))) for item in found]


def test_a_plan_that_is_wrong_where_the_identity_is_right_is_no_label():
    better = candidate("0111", 5.0, 5.0, right=[False, True])
    base = candidate(IDENTITY, 0.0, 0.0, right=[True, False])
    assert choose_label([better, base], margin=0.0) is base
    kept = candidate("1011", 1.0, 1.0, right=[True, False])
    assert choose_label([better, kept, base], margin=0.0) is kept


def test_a_fix_is_a_label_whatever_its_value():
    fix = candidate("0111", -5.0, -5.0, right=[True, True])
    half = candidate("1011", 5.0, 5.0, right=[True, False])
    base = candidate(IDENTITY, 0.0, 0.0, right=[False, False])
    assert choose_label([half, fix, base], margin=9.0) is fix
    # Right in one form only may be luck: then its value has to say so too.
    assert choose_label([half, base], margin=9.0) is base
    assert choose_label([half, base], margin=1.0) is half


@given(answered(), st.floats(0, 1))
def test_being_right_comes_before_any_value(found, margin):
    label = choose_label(found, margin=margin)
    base = next(item for item in found if item.plan == IDENTITY)
    assert all(own or not its for own, its in zip(label.right, base.right, strict=True))
    if any(all(item.right) for item in found):
        assert all(label.right)
    if label is not base:
        assert all(label.right) > all(base.right) or label.margin_over(base) >= margin
        sound = [item for item in found if item.keeps(base)]
        assert sum(label.right) == max(sum(item.right) for item in sound)
        assert label.value == max(
            item.value for item in sound if sum(item.right) == sum(label.right)
        )
    assert choose_label(list(reversed(found)), margin=margin) is label


@given(candidates(), st.booleans(), st.floats(0, 1))
def test_answers_that_are_all_alike_change_nothing(found, right, margin):
    flags = (right,) * (1 + len(found[0].variant_rewards))
    alike = [replace(item, right=flags) for item in found]
    assert choose_label(alike, margin=margin).plan == choose_label(found, margin=margin).plan


@given(st.data())
def test_the_best_plans_are_those_of_highest_value_and_the_identity(data):
    plans = data.draw(st.permutations(PLANS))
    rows = np.array([[int(digit) for digit in plan] for plan in plans], dtype=np.uint8)
    given_rewards = np.array(data.draw(st.lists(rewards, min_size=6, max_size=6)))
    evaluated = Evaluated(rows, given_rewards, plan_depth(rows), rows.sum(axis=1).astype(np.uint32))
    count = data.draw(st.integers(1, 6))
    values = given_rewards - 0.3 * plan_depth(rows)
    best = best_plans(evaluated, 0.3, count)
    assert plans.index(IDENTITY) in best
    ranked = sorted(range(6), key=lambda row: (-values[row], plan_visits(plans[row]), plans[row]))
    assert best[:count].tolist() == ranked[:count]
    assert len(best) == count + (plans.index(IDENTITY) not in ranked[:count])
