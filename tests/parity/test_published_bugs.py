"""Three faults of the published code for per-prompt depth, each shown to go wrong there, and to be exact here.

The naive way patches layers of a plain model as that code does: it runs a layer's own forward twice, or not at all, and
leaves the cache, the rows and the positions to what was made for a model that runs each layer once.
"""

import copy

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from dynadepth.plans import identity_plan
from dynadepth.wrapping.wrap import wrap_model
from tests.parity.drivers import baked_rows, drive, mixed_plans
from tests.parity.recompute import CACHE
from tests.tiny import VOCAB_SIZE, random_batch, tiny_model

FAMILIES = ("llama", "qwen3", "gemma3")
WRONG = 0.05
EXACT = 1e-9


def naive(base, plan):
    """Return a copy whose layers run as often as one plan says, each time with the same index into the cache."""
    model = copy.deepcopy(base)
    for layer, action in zip(model.model.layers, plan, strict=True):

        def forward(states, *args, layer=layer, times=int(action), **kwargs):
            for _ in range(times):
                states = type(layer).forward(layer, states, *args, **kwargs)
            return states

        layer.forward = forward
    return model


def routed(base, plans):
    """Return the wrapped model, and the block in which its rows follow plans of their own."""
    model = wrap_model(copy.deepcopy(base), plan=identity_plan(4))
    return model, model.dynadepth.plans(plans)


def continued(lengths, more=8, seed=5):
    """Return left-padded prompts with more tokens behind them, and the prompts' width."""
    ids, mask = random_batch(lengths, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    tail = torch.randint(2, VOCAB_SIZE, (len(lengths), more), generator=generator)
    return torch.cat([ids, tail], 1), torch.cat([mask, torch.ones_like(tail)], 1), ids.shape[1]


def gap(logits, mask, expected):
    """Return the largest difference on real tokens, as a fraction of the largest logit."""
    return max(
        float((logits[row][mask[row].bool()] - reference).abs().max() / reference.abs().max())
        for row, reference in enumerate(expected)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", range(4))
class TestRepeatWithACache:
    """Published: "repeats share one cache slot", so what was decoded and what is recomputed agree on no token."""

    def plan(self, layer):
        plan = identity_plan(4)
        plan[layer] = 2
        return plan

    def test_without_a_cache_the_naive_way_is_right(self, family, layer):
        """So the reference is what the published code means to compute."""
        base, plan = tiny_model(family), self.plan(layer)
        ids, mask, width = continued([9])
        expected = baked_rows(base, plan[None], ids, mask, padded=False)
        assert gap(drive(naive(base, plan), ids, mask, width, "full"), mask, expected) < EXACT

    def test_the_second_visit_writes_into_the_slot_of_the_first(self, family, layer):
        base, plan = tiny_model(family), self.plan(layer)
        ids, mask, width = continued([9])
        expected = baked_rows(base, plan[None], ids, mask, padded=False)
        try:
            wrong = gap(drive(naive(base, plan), ids, mask, width, "steps"), mask, expected)
        except (RuntimeError, IndexError):
            wrong = float(
                "inf"
            )  # The states are longer than the mask: an error, at least not a silent one.
        assert wrong > WRONG
        model, block = routed(base, plan)
        with block:
            assert gap(drive(model, ids, mask, width, "steps"), mask, expected) < EXACT
            assert gap(drive(model, ids, mask, width, "chunks"), mask, expected) < EXACT


def first_row_decides(base, plans):
    """Return the naive model of a batch: the whole batch runs the plan of row 0."""
    return naive(base, plans[0])


@pytest.mark.parametrize("family", FAMILIES)
class TestPaddedBatch:
    """Published: row 0 decides for all rows, and a padded batch with a repeat crashes."""

    def test_rows_that_ask_for_other_plans_get_that_of_row_0(self, family):
        base, plans = tiny_model(family), mixed_plans(4, 3, seed=3)
        assert len(np.unique(plans, axis=0)) == 3
        ids, mask, width = continued([9, 5, 12])
        expected = baked_rows(base, plans, ids, mask, padded=False)
        logits = drive(first_row_decides(base, plans), ids, mask, width, "full")
        assert gap(logits[:1], mask[:1], expected[:1]) < EXACT
        assert gap(logits[1:2], mask[1:2], expected[1:2]) > WRONG
        assert gap(logits[2:], mask[2:], expected[2:]) > WRONG
        model, block = routed(base, plans)
        with block:
            for mode in ("full", "steps", "chunks"):
                assert gap(drive(model, ids, mask, width, mode), mask, expected) < EXACT, mode

    def test_a_padded_batch_with_a_repeat_crashes_while_it_decodes(self, family):
        base, plan = tiny_model(family), np.array([1, 2, 1, 1], dtype=np.uint8)
        ids, mask, width = continued([9, 5, 12])
        expected = baked_rows(base, np.tile(plan, (3, 1)), ids, mask, padded=False)
        with pytest.raises(RuntimeError):
            drive(naive(base, plan), ids, mask, width, "steps")
        model, block = routed(base, plan)
        with block:
            assert gap(drive(model, ids, mask, width, "steps"), mask, expected) < EXACT


@pytest.mark.parametrize("family", FAMILIES)
class TestSkipOfLayer0:
    """transformers asks the first layer's slot how long the past is; a skipped layer has none."""

    def run(self, model, ids, mask=None):
        """Decode with positions inferred: prompt, one token at a time, then several at once."""
        cache, logits, begin = DynamicCache(config=model.config), [], 0
        with torch.no_grad():
            for end in (9, 10, 11, 14, 17):
                part = None if mask is None else mask[:, :end]
                arguments = {"attention_mask": part, CACHE: cache, "use_cache": True}
                logits.append(model(ids[:, begin:end], **arguments).logits)
                begin = end
        return torch.cat(logits, dim=1)

    def test_positions_begin_again_at_every_step(self, family):
        base, plan = tiny_model(family), np.array([0, 1, 1, 1], dtype=np.uint8)
        ids, mask, _ = continued([9])
        expected = baked_rows(base, plan[None], ids, mask, padded=False)
        assert gap(drive(naive(base, plan), ids, mask, 9, "full"), mask, expected) < EXACT
        try:
            wrong = gap(self.run(naive(base, plan), ids), mask, expected)
        except RuntimeError:
            wrong = float("inf")
        assert wrong > WRONG
        model, block = routed(base, plan)
        with block:
            assert gap(self.run(model, ids), mask, expected) < EXACT

    def test_masks_of_a_padded_batch_are_too_short(self, family):
        base, plan = tiny_model(family), np.array([0, 1, 1, 1], dtype=np.uint8)
        ids, mask, width = continued([9, 5, 12])
        expected = baked_rows(base, np.tile(plan, (3, 1)), ids, mask, padded=False)
        try:
            wrong = gap(drive(naive(base, plan), ids, mask, width, "steps"), mask, expected)
        except RuntimeError:
            wrong = float("inf")
        assert wrong > WRONG
        model, block = routed(base, plan)
        with block:
            assert gap(drive(model, ids, mask, width, "steps"), mask, expected) < EXACT
