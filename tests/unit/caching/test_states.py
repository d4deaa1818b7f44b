"""What a wrapped model's cache tells of its states."""

import copy
import io

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

from dynadepth.errors import PlanError, UnsupportedModelError
from dynadepth.wrapping.bake import bake
from dynadepth.wrapping.wrap import wrap_model
from tests.parity.drivers import drive
from tests.tiny import random_batch, tiny_model

PLANS = np.array([[1, 0, 2, 1], [1, 1, 1, 0], [2, 0, 1, 0]], dtype=np.uint8)


def filled_cache(**settings):
    model = wrap_model(tiny_model(**settings), plan="0-3")
    ids, mask = random_batch([7, 7, 7], seed=1)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), model.dynadepth.plans(PLANS):
        model(ids, attention_mask=mask, past_key_values=cache)
    return model, ids, cache


def test_the_states_of_a_visit_are_those_of_the_baked_model():
    _, ids, cache = filled_cache()
    for row, plan in enumerate(PLANS):
        plain = DynamicCache()
        bake(tiny_model(), plan)(ids[row : row + 1], past_key_values=plain)
        visits = [(layer, visit) for layer, action in enumerate(plan) for visit in range(action)]
        for layer, (layer_idx, visit) in zip(plain.layers, visits, strict=True):
            keys, values, rows = cache.states(layer_idx, visit)
            place = rows.index(row)
            assert (keys[place] - layer.keys[0]).abs().max() < 1e-9
            assert (values[place] - layer.values[0]).abs().max() < 1e-9


def test_a_visit_that_nobody_makes_has_no_states():
    _, _, cache = filled_cache()
    assert cache.states(1)[2] == [1]
    assert cache.states(3)[2] == [0]
    assert cache.states(3, 1) is None
    cache.reset()
    assert cache.states(0) is None


@pytest.mark.parametrize("asked", [(4,), (-1,), (0, 2)])
def test_a_visit_that_cannot_be_is_refused(asked):
    _, _, cache = filled_cache()
    with pytest.raises(PlanError, match="expected visit 0 or 1 of a layer from 0 to 3"):
        cache.states(*asked)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("name", ["keys", "values"])
def test_states_asked_of_a_layer_are_refused_by_name(kind, family, name):
    model = wrap_model(tiny_model(family), plan="0-1,3")
    settings = {} if kind is DynamicCache else {"max_cache_len": 16}
    cache = kind(config=model.config, **settings)
    ids, mask = random_batch([5], seed=1)
    drive(model, ids, mask, 5, "steps", cache)
    for layer in cache.layers:
        with pytest.raises(UnsupportedModelError, match=rf"`{name}`.*cache\.states\(layer_idx"):
            getattr(layer, name)


def test_a_copy_of_a_cache_goes_on_by_itself():
    model, ids, cache = filled_cache()
    stored = io.BytesIO()
    torch.save(cache, stored)
    stored.seek(0)
    twins = [copy.deepcopy(cache), torch.load(stored, weights_only=False)]
    before = [states.clone() for states in cache.states(0)[:2]]
    expected = None
    for twin in twins:
        logits = model(ids[:, :2], past_key_values=twin).logits
        assert expected is None or torch.equal(logits, expected)
        expected = logits
        assert twin.get_seq_length() == 9
        assert twin.states(0)[0].shape[2] == 9
    assert cache.get_seq_length() == 7
    assert all(map(torch.equal, before, cache.states(0)[:2]))
    assert torch.equal(model(ids[:, :2], past_key_values=cache).logits, expected)
