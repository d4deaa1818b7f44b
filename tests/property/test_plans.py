"""Laws of plans, for any number of layers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dynadepth.errors import PlanError
from dynadepth.plans import (
    check_plans,
    identity_plan,
    parse_plan,
    plan_depth,
    plan_ranges,
    plan_text,
)

_SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 40))


@st.composite
def plan_batches(draw: st.DrawFn) -> np.ndarray:
    """Plans of any shape in which every row runs a layer."""
    rows, num_layers = draw(_SHAPES)
    plans = draw(arrays.arrays(np.uint8, (rows, num_layers), elements=st.integers(0, 2)))
    for row in np.flatnonzero(plans.sum(axis=1) == 0):
        plans[row, draw(st.integers(0, num_layers - 1))] = draw(st.integers(1, 2))
    return plans


@given(plan_batches())
def test_good_plans_pass_unchanged(plans):
    checked = check_plans(plans.astype(np.int64), plans.shape[1], num_rows=len(plans))
    assert np.array_equal(checked, plans)


@given(plan_batches())
def test_text_and_plan_are_inverse(plans):
    for plan in plans:
        text = plan_text(plan)
        assert len(text) == len(plan)
        assert np.array_equal(parse_plan(text, len(plan)), plan)


@given(plan_batches())
def test_ranges_and_plan_are_inverse(plans):
    for plan in plans:
        text = plan_ranges(plan)
        assert np.array_equal(parse_plan(text, len(plan)), plan)
        assert np.array_equal(check_plans([text], len(plan))[0], plan)


@given(plan_batches(), st.data())
def test_any_way_to_cut_the_visits_into_ranges_is_the_same_plan(plans, data):
    plan = plans[0]
    visits = [layer for layer, action in enumerate(plan.tolist()) for _ in range(action)]
    items = []
    while visits:
        joined = 1
        while joined < len(visits) and visits[joined] == visits[joined - 1] + 1:
            joined += 1
        taken = data.draw(st.integers(1, joined))
        low, high = visits[0], visits[taken - 1]
        items.append(str(low) if taken == 1 else f"{low}-{high}")
        visits = visits[taken:]
    # A number alone would be digits.
    text = ",".join(items) if len(items) > 1 or "-" in items[0] else f"{items[0]}-{items[0]}"
    assert np.array_equal(parse_plan(text, len(plan)), plan)


@given(plan_batches())
def test_depth_counts_each_visit_once(plans):
    visits = [plan_text(plan).count("1") + 2 * plan_text(plan).count("2") for plan in plans]
    assert plan_depth(plans) * plans.shape[1] == pytest.approx(visits)


@given(st.integers(1, 200))
def test_the_identity_has_depth_one(num_layers):
    assert float(plan_depth(identity_plan(num_layers))) == 1.0


@given(plan_batches(), st.data())
def test_one_wrong_action_anywhere_is_refused_and_named(plans, data):
    row = data.draw(st.integers(0, len(plans) - 1))
    layer = data.draw(st.integers(0, plans.shape[1] - 1))
    wrong = data.draw(st.integers(-(2**31), 2**31).filter(lambda action: action not in (0, 1, 2)))
    broken = plans.astype(np.int64)
    broken[row, layer] = wrong
    with pytest.raises(PlanError, match=f"plan {row} has action {wrong} at layer {layer};"):
        check_plans(broken, plans.shape[1])


@given(plan_batches(), st.data())
def test_an_empty_plan_anywhere_is_refused_and_named(plans, data):
    row = data.draw(st.integers(0, len(plans) - 1))
    plans[row] = 0
    with pytest.raises(PlanError, match=f"plan {row} skips all {plans.shape[1]} layers"):
        check_plans(plans, plans.shape[1])


def _visits_named(text: str) -> list[int] | None:
    """Read ranges item by item with nothing but `split`; None if the text has another form."""
    visits = []
    for item in text.split(","):
        ends = [end.strip(" ") for end in item.split("-")]
        if len(ends) > 2 or not all(end.isascii() and end.isdigit() for end in ends):
            return None
        visits += range(int(ends[0]), int(ends[-1]) + 1) or [-1]
    return visits


@given(st.text(max_size=30) | st.text("0123,- ", max_size=12), st.integers(1, 30))
def test_any_text_is_a_plan_or_a_plan_error(text, num_layers):
    plan = None
    if "," in text or "-" in text:
        visits = _visits_named(text)
        if (
            visits is not None
            and visits == sorted(visits)
            and set(visits) <= set(range(num_layers))
        ):
            counts = [visits.count(layer) for layer in range(num_layers)]
            plan = counts if max(counts) <= 2 else None
    elif len(text) == num_layers and set(text) <= set("012") and set(text) != {"0"}:
        plan = [int(character) for character in text]
    if plan is not None:
        assert parse_plan(text, num_layers).tolist() == plan
    else:
        with pytest.raises(PlanError):
            parse_plan(text, num_layers)
