"""share_weights: two models, one set of weights."""

import copy

import numpy as np
import pytest
import torch

from dynadepth import bake, share_weights, unwrap_model, wrap_model
from tests.tiny import FAMILIES, random_batch, tiny_model

PLAN = np.array([1, 0, 2, 1], dtype=np.uint8)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_model_reads_the_same_tensors_and_shares_nothing_else(family):
    base = tiny_model(family)
    twin = share_weights(base)
    own = dict(base.named_parameters(remove_duplicate=False)) | dict(base.named_buffers())
    others = dict(twin.named_parameters(remove_duplicate=False)) | dict(twin.named_buffers())
    assert own.keys() == others.keys()
    assert all(own[name] is others[name] for name in own)
    assert not {id(m) for m in base.modules()} & {id(m) for m in twin.modules()}
    assert twin.config is not base.config
    assert twin.generation_config is not base.generation_config


def test_tied_weights_stay_tied():
    base = tiny_model("llama")
    base.lm_head.weight = base.model.embed_tokens.weight
    twin = share_weights(base)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight is base.lm_head.weight


def test_one_is_wrapped_and_the_other_is_not():
    base = tiny_model("llama")
    ids, mask = random_batch([9, 6])
    before = base(ids, attention_mask=mask).logits
    baked = bake(base, PLAN)(ids, attention_mask=mask).logits
    routed = wrap_model(share_weights(base), plan=PLAN)
    assert torch.equal(base(ids, attention_mask=mask).logits, before)
    assert torch.equal(routed(ids, attention_mask=mask).logits, baked)
    assert "dynadepth" not in base.__dict__
    assert not torch.equal(before, baked)
    # A change of a weight is seen by both: there is one tensor.
    with torch.no_grad():
        base.lm_head.weight.mul_(2)
    assert torch.equal(routed(ids, attention_mask=mask).logits, 2 * baked)


def test_the_base_of_a_model_that_is_wrapped_already():
    model = tiny_model("llama")
    ids, mask = random_batch([9, 6])
    before = model(ids, attention_mask=mask).logits
    wrap_model(model, plan=PLAN)
    routed = model(ids, attention_mask=mask).logits
    twin = share_weights(model)
    assert twin.dynadepth is not model.dynadepth
    with twin.dynadepth.plans([1, 1, 1, 1]):
        assert torch.equal(twin(ids, attention_mask=mask).logits, before)
        assert torch.equal(model(ids, attention_mask=mask).logits, routed)
    base = unwrap_model(twin)
    assert torch.equal(base(ids, attention_mask=mask).logits, before)
    assert torch.equal(model(ids, attention_mask=mask).logits, routed)


def test_it_costs_no_second_copy_of_the_weights():
    base = tiny_model("llama")
    models = [share_weights(base) for _ in range(3)]
    assert len({p.data_ptr() for model in models for p in model.parameters()}) == len(
        list(base.parameters())
    )
    assert len({p.data_ptr() for m in (base, copy.deepcopy(base)) for p in m.parameters()}) == 2 * (
        len(list(base.parameters()))
    )
