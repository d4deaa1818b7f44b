"""Laws of introspection, for any plans of a batch: events, totals and bytes tell the same story as the plans."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dynadepth.plans import plan_depth
from dynadepth.wrapping.wrap import wrap_model
from tests.tiny import random_batch, tiny_model

LAYERS = 4


@pytest.fixture(scope="module")
def model():
    return wrap_model(tiny_model(num_layers=LAYERS), plan="0-3")


@st.composite
def plan_batches(draw):
    rows = draw(st.integers(1, 4))
    plans = draw(arrays.arrays(np.uint8, (rows, LAYERS), elements=st.integers(0, 2)))
    plans[plans.sum(axis=1) == 0, draw(st.integers(0, LAYERS - 1))] = 1
    return plans


@given(plans=plan_batches(), steps=st.integers(0, 3))
def test_events_totals_and_bytes_agree_with_the_plans(model, plans, steps):
    ids, mask = random_batch([5] * len(plans))
    controller, events = model.dynadepth, []
    controller.reset_totals()
    with torch.no_grad(), controller.plans(plans), controller.watch(events.append):
        cache = model(ids, attention_mask=mask).past_key_values
        for _ in range(steps):
            model(ids[:, :1], past_key_values=cache)
    seen = np.zeros_like(plans, dtype=np.int64)
    for event in events:
        seen[list(event.rows), event.layer_idx] += 1
        assert all(plans[row, event.layer_idx] > event.visit for row in event.rows)
    assert (seen == plans.astype(np.int64) * (1 + steps)).all()
    totals = controller.totals
    assert (totals.prefill_forwards, totals.decode_forwards) == (1, steps)
    assert totals.visits == seen.sum()
    assert totals.plain_visits == plans.size * (1 + steps)
    assert totals.mean_depth == pytest.approx(plan_depth(plans).mean())
    assert controller.last_mean_depth == pytest.approx(plan_depth(plans).mean())
    # With full attention every visit of a row holds the same.
    kv = controller.last_kv
    assert kv.held == cache.state_bytes
    assert kv.held * plans.size == kv.plain * int(plans.sum())
