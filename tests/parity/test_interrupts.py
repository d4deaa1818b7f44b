"""A forward, a decision or a block that does not end as it should: nothing is kept, and the next try is right."""

import asyncio
import contextvars
import gc
import threading
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

from dynadepth.errors import UnsupportedModelError
from dynadepth.models.structure import layer_stack
from dynadepth.plans import identity_plan
from dynadepth.policies.base import Policy
from dynadepth.wrapping.bake import bake
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from tests.parity.drivers import drive, mixed_plans
from tests.tiny import random_batch, tiny_model

PLAN = np.array([0, 2, 1, 2], dtype=np.uint8)
SKIPS_ONE = np.array([1, 1, 0, 1], dtype=np.uint8)


def module_of(model, place):
    stack = layer_stack(model).stack
    return {
        "embedding": stack.embed_tokens,
        "attention of layer 1": stack.layers[1].self_attn,
        "layer 3": stack.layers[3],
        "norm": stack.norm,
    }[place]


def raising(module, error):
    def raise_it(*_):
        raise error

    return module.register_forward_hook(raise_it)


PLACES = ("embedding", "attention of layer 1", "layer 3", "norm")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, RuntimeError])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("then", ["at once", "after unwrap"])
def test_an_interrupted_forward_keeps_no_states_alive(error, place, then):
    model = wrap_model(tiny_model(), plan=PLAN)
    ids, mask = random_batch([5, 7])
    cache = DynamicCache(config=model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    keys = weakref.ref(cache.states(1)[0].untyped_storage())
    handle = raising(module_of(model, place), error)
    with pytest.raises(error):
        model(ids[:, :1], past_key_values=cache)
    handle.remove()
    alive = weakref.ref(cache)
    if then == "after unwrap":
        unwrap_model(model)
    del cache
    # The exception's own frames form circles.
    gc.collect()
    assert alive() is None
    assert keys() is None


def test_an_interrupted_model_can_be_thrown_away():
    model = wrap_model(tiny_model(), plan=PLAN)
    handle = raising(model.model.norm, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        model(torch.tensor([[5, 6, 7]]))
    handle.remove()
    alive = weakref.ref(model.model.layers[0].mlp)
    del model, handle
    gc.collect()
    assert alive() is None


class FailsOnce(Policy):
    """Decides at two layers; the first decision at one of them fails."""

    num_layers = 4

    def __init__(self, decision_layers, fails_at):
        self.decision_layers, self.fails_at, self.failed = decision_layers, fails_at, False

    def initial_plans(self, num_rows):
        return np.tile(identity_plan(4), (num_rows, 1))

    def decide(self, layer_idx, hidden_states, prompts):
        if layer_idx == self.fails_at and not self.failed:
            self.failed = True
            raise ValueError("the first decision fails")
        end = next((layer for layer in self.decision_layers if layer > layer_idx), 4)
        return np.tile(PLAN[layer_idx:end], (len(hidden_states), 1))


@pytest.mark.parametrize("make_cache", ["dynamic", "static"])
@pytest.mark.parametrize("fails_at", [0, 2])
def test_a_decision_that_failed_is_made_again_on_the_same_cache(fails_at, make_cache):
    model = wrap_model(tiny_model(), policy=FailsOnce((0, 2), fails_at))
    base = bake(tiny_model(), PLAN)
    ids, mask = random_batch([7, 9], seed=1)
    cache = DynamicCache(config=model.config)
    if make_cache == "static":
        cache = StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(ValueError, match="the first decision fails"):
        drive(model, ids, mask, 5, "steps", cache)
    assert model.dynadepth.totals.prompts == model.dynadepth.totals.visits == 0
    found = drive(model, ids, mask, 5, "steps", cache)
    assert (found - drive(base, ids, mask, 5, "steps")).abs().max() < 1e-9
    totals = model.dynadepth.totals
    assert (totals.prompts, totals.planned_visits) == (2, 2 * int(PLAN.sum()))
    assert (totals.prefill_forwards, totals.decode_forwards) == (1, 4)


@pytest.mark.parametrize("place", PLACES)
def test_a_first_forward_that_failed_is_forgotten(place):
    model = wrap_model(tiny_model(), plan=IDENTITY)
    plans = mixed_plans(4, 3, seed=2)
    ids, mask = random_batch([7, 9, 6], seed=1)
    cache = DynamicCache(config=model.config)
    handle = raising(module_of(model, place), RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"), model.dynadepth.plans(PLAN):
        drive(model, ids, mask, 5, "steps", cache)
    handle.remove()
    # Other plans than those of the failed try, and another number of rows.
    with model.dynadepth.plans(plans[:2]):
        found = drive(model, ids[:2], mask[:2], 5, "steps", cache)
    with model.dynadepth.plans(plans[:2]):
        assert torch.equal(found, drive(model, ids[:2], mask[:2], 5, "steps"))
    assert model.dynadepth.totals.prompts == 4


def test_a_later_forward_that_failed_cannot_be_forgotten():
    model = wrap_model(tiny_model(), plan=PLAN)
    ids, mask = random_batch([7, 9], seed=1)
    cache = DynamicCache(config=model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    handle = raising(model.model.norm, RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        model(ids[:, :1], past_key_values=cache)
    handle.remove()
    with pytest.raises(UnsupportedModelError, match=r"did not complete.*cache.reset\(\)"):
        model(ids[:, :1], past_key_values=cache)
    cache.reset()
    assert torch.equal(
        drive(model, ids, mask, 5, "steps", cache), drive(model, ids, mask, 5, "steps")
    )


IDENTITY = "0-3"


def plans_of(model):
    model(torch.tensor([[5, 6, 7]]))
    return model.dynadepth.last_plans[0].tolist()


def streaming(model):
    """Two tokens of a stream, as a server's generator gives them."""
    with model.dynadepth.plans(SKIPS_ONE):
        yield plans_of(model)
        yield plans_of(model)


def close_here(stream, _inside):
    stream.close()


def close_in_a_copied_context(stream, _inside):
    contextvars.copy_context().run(stream.close)


def close_in_an_empty_context(stream, _inside):
    contextvars.Context().run(stream.close)


def close_in_another_thread(stream, _inside):
    errors = []

    def close():
        try:
            stream.close()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=close)
    thread.start()
    thread.join()
    assert errors == []


def exhaust_in_a_task(stream, inside):
    async def rest():
        return list(stream)

    assert asyncio.run(rest()) == [inside]


@pytest.mark.parametrize(
    "close",
    [
        close_here,
        close_in_a_copied_context,
        close_in_an_empty_context,
        close_in_another_thread,
        exhaust_in_a_task,
    ],
)
@pytest.mark.parametrize("block", ["plans", "prompt", "watch"])
def test_a_block_inside_a_generator_ends_wherever_that_is_closed(close, block):
    model, seen = wrap_model(tiny_model(), plan=IDENTITY), []
    opened = {
        "plans": partial(model.dynadepth.plans, SKIPS_ONE),
        "prompt": partial(model.dynadepth.prompt, [1]),
        "watch": partial(model.dynadepth.watch, seen.append),
    }[block]

    def streaming_inside():
        with opened():
            yield plans_of(model)
            yield plans_of(model)

    stream = streaming_inside()
    inside = SKIPS_ONE.tolist() if block == "plans" else [1, 1, 1, 1]
    assert next(stream) == inside
    assert model.dynadepth.knows_lengths() == (block == "prompt")
    assert bool(seen) == (block == "watch")
    close(stream, inside)
    seen.clear()
    assert plans_of(model) == [1, 1, 1, 1]
    assert not model.dynadepth.knows_lengths()
    assert seen == []


def test_a_block_that_another_context_ended_does_not_end_those_around_it():
    model = wrap_model(tiny_model(), plan=IDENTITY)
    with model.dynadepth.plans(PLAN):
        stream = streaming(model)
        assert next(stream) == SKIPS_ONE.tolist()
        close_in_a_copied_context(stream, SKIPS_ONE.tolist())
        assert plans_of(model) == PLAN.tolist()
    assert plans_of(model) == [1, 1, 1, 1]
