"""RowPlans: which rows make which visit, before and after rows are selected."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynadepth.caching.row_plans import RowPlans

plans_of_rows = st.integers(1, 5).flatmap(
    lambda layers: st.lists(
        st.lists(st.integers(0, 2), min_size=layers, max_size=layers), min_size=1, max_size=6
    )
)


@given(plans_of_rows)
def test_the_visits_of_all_rows_are_those_of_the_plans(plans):
    array = np.array(plans, dtype=np.uint8)
    rows = RowPlans(array)
    counted = np.zeros_like(array)
    for layer in range(array.shape[1]):
        for visit in (0, 1):
            chosen = rows.rows(layer, visit)
            assert chosen == sorted(set(chosen))
            assert rows.index(layer, visit, torch.device("cpu")).tolist() == chosen
            counted[chosen, layer] += 1
    assert (counted == array).all()
    shared = [set(column) for column in zip(*plans, strict=True)]
    assert rows.shared_actions() == [
        actions.pop() if len(actions) == 1 else None for actions in shared
    ]
    assert rows.is_uniform == all(plan == plans[0] for plan in plans)


@given(plans_of_rows, st.data())
def test_selected_rows_keep_their_plans(plans, data):
    chosen = data.draw(st.lists(st.integers(0, len(plans) - 1), min_size=1, max_size=8))
    selected = RowPlans(np.array(plans, dtype=np.uint8)).select(chosen)
    assert selected.plans.tolist() == [plans[row] for row in chosen]


def test_rows_share_an_action_only_when_it_is_decided():
    rows = RowPlans(np.array([[1, 1, 1], [1, 1, 1]], dtype=np.uint8), num_decided=1)
    assert rows.shared_actions() == [1, None, None]
    rows.decide(1, np.array([[0, 2], [0, 1]], dtype=np.uint8))
    assert rows.shared_actions() == [1, 0, None]


def test_a_repeat_runs_no_row_that_the_first_visit_leaves_out():
    rows = RowPlans(np.array([[0], [1], [2]], dtype=np.uint8))
    assert (rows.rows(0, 0), rows.rows(0, 1)) == ([1, 2], [2])


def test_decisions_are_final_layer_by_layer():
    rows = RowPlans(np.ones((2, 3), dtype=np.uint8), num_decided=0)
    rows.decide(0, np.array([[0], [2]], dtype=np.uint8))
    assert rows.num_decided == 1
    assert rows.rows(0, 0) == [1]
    rows.decide(1, np.array([[0, 1], [2, 0]], dtype=np.uint8))
    assert rows.num_decided == 3
    assert rows.plans.tolist() == [[0, 0, 1], [2, 2, 0]]
