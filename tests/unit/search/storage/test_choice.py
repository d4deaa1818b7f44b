"""Which plan becomes the label: by all that was measured, accepted by what the search did not see."""

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


def candidate(plan, reward, *variants, price=0.0):
    return Candidate(plan, reward, tuple(variants), price)


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
