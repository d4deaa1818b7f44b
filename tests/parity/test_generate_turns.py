"""Several generations of one conversation, streamed ones, and ones that end before their time."""

import contextlib
import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from dynadepth.errors import UnsupportedModelError
from dynadepth.plans import identity_plan
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from tests.parity.drivers import mixed_plans
from tests.parity.recompute import (
    CACHE,
    assert_same,
    generated,
    plans_alone,
    prompts_of,
    recomputing,
)
from tests.parity.test_generate import FEW, POLICIES
from tests.tiny import random_batch, tiny_model

CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=64),
}
SAMPLED = {"do_sample": True, "temperature": 1.5}


class Case:
    """A padded batch, a wrapped model, and the plans that the prompts get: fixed ones, or those of a policy."""

    def __init__(self, family, kind):
        self.base = tiny_model(family, num_layers=6)
        self.ids, self.mask, prompts = prompts_of([9, 5, 12, 1])
        self.block = contextlib.nullcontext
        if kind == "fixed":
            plans = mixed_plans(6, 4, seed=9)
            self.plans = dict(zip(prompts, plans, strict=True))
            self.model = wrap_model(copy.deepcopy(self.base), plan=identity_plan(6))
            self.block = lambda: self.model.dynadepth.plans(plans)
        else:
            policy = POLICIES[kind]()
            self.plans = plans_alone(self.base, policy, prompts)
            self.model = wrap_model(copy.deepcopy(self.base), policy=policy)
        assert len({plan.tobytes() for plan in self.plans.values()}) > 1

    def expected(self, ids=None, mask=None, **settings):
        ids, mask = (self.ids, self.mask) if ids is None else (ids, mask)
        return generated(recomputing(self.base, self.plans), ids, mask, use_cache=False, **settings)


def grown(ids, mask, tokens, seed=None):
    """Return the batch with generated tokens behind it, and after them a user's next words."""
    more = torch.tensor(tokens)
    if seed is not None:
        more = torch.cat([more, random_batch([4] * len(more), seed=seed)[0]], 1)
    return torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)


class TestTurns:
    @pytest.mark.parametrize("cache", CACHES)
    @pytest.mark.parametrize("kind", ["fixed", "menu"])
    @pytest.mark.parametrize("family", FEW)
    def test_later_turns_on_one_cache_keep_the_plans_of_the_first(self, family, kind, cache):
        case = Case(family, kind)
        held = CACHES[cache](case.model)
        ids, mask = case.ids, case.mask
        for turn, settings in enumerate(({"do_sample": False}, SAMPLED, {"do_sample": False})):
            # The block of the first turn is enough: the cache keeps the plans.
            with case.block() if turn == 0 else contextlib.nullcontext():
                found = generated(
                    case.model, ids, mask, **settings, max_new_tokens=4, **{CACHE: held}
                )
            assert_same(found, case.expected(ids, mask, **settings, max_new_tokens=4), turn)
            ids, mask = grown(ids, mask, found.tokens, seed=turn)
        assert {key for key, slot in held.slots.items() if slot.keys.numel()} == {
            (layer, visit)
            for plan in case.plans.values()
            for layer, action in enumerate(plan)
            for visit in range(action)
        }

    @pytest.mark.parametrize("cache", CACHES)
    @pytest.mark.parametrize("kind", ["fixed", "menu"])
    def test_two_conversations_take_turns_on_one_model(self, kind, cache):
        """What belongs to a conversation is on its cache, nothing on the model."""
        case = Case("gemma3", kind)
        rows = [slice(0, 2), slice(2, 4)]
        held = [CACHES[cache](case.model) for _ in rows]
        talks = [(case.ids[part], case.mask[part]) for part in rows]
        plans = list(case.plans.values())
        for turn in range(3):
            for who, part in enumerate(rows):
                ids, mask = talks[who]
                block = (
                    case.model.dynadepth.plans(plans[part])
                    if kind == "fixed" and turn == 0
                    else contextlib.nullcontext()
                )
                settings = {"do_sample": False, "max_new_tokens": 3}
                with block:
                    found = generated(case.model, ids, mask, **settings, **{CACHE: held[who]})
                assert_same(found, case.expected(ids, mask, **settings), (turn, who))
                talks[who] = grown(ids, mask, found.tokens, seed=turn + 10 * who)

    @pytest.mark.parametrize("cache", CACHES)
    @pytest.mark.parametrize("kind", ["fixed", "menu"])
    def test_one_prefill_serves_several_continuations(self, kind, cache):
        """A copied cache goes on by itself, and a repeated one serves several rows for each prompt."""
        case = Case("llama", kind)
        held = CACHES[cache](case.model)
        settings = {"do_sample": False, "max_new_tokens": 1}
        with case.block():
            first = generated(case.model, case.ids, case.mask, **settings, **{CACHE: held})
        for seed in range(2):
            ids, mask = grown(case.ids, case.mask, first.tokens, seed=seed)
            twin = copy.deepcopy(held)
            found = generated(case.model, ids, mask, **SAMPLED, max_new_tokens=4, **{CACHE: twin})
            assert_same(found, case.expected(ids, mask, **SAMPLED, max_new_tokens=4), seed)
        ids, mask = grown(case.ids, case.mask, first.tokens, seed=7)
        held.batch_repeat_interleave(3)
        ids, mask = ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0)
        found = generated(case.model, ids, mask, **SAMPLED, max_new_tokens=4, **{CACHE: held})
        assert_same(found, case.expected(ids, mask, **SAMPLED, max_new_tokens=4))
        assert found.tokens[0] != found.tokens[1]


class Listening(BaseStreamer):
    """Keeps what is streamed; raises at a given token."""

    def __init__(self, fails_at=None, error=None):
        self.heard, self.ended = [], False
        self.fails_at, self.error = fails_at, error

    def put(self, value):
        self.heard.append(value.tolist())
        if len(self.heard) - 1 == self.fails_at:
            raise self.error

    def end(self):
        self.ended = True


class StopsAt(StoppingCriteria):
    """Stops all rows when there are so many columns."""

    def __init__(self, columns):
        self.columns = columns

    def __call__(self, input_ids, scores, **_):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.columns)


class UnpluggedError(Exception):
    """Raised on purpose."""


class TestStreaming:
    @pytest.mark.parametrize("kind", ["fixed", "menu"])
    def test_a_streamer_hears_every_token_when_it_is_made(self, kind):
        case = Case("gemma3", kind)
        for settings in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
            streamer = Listening()
            with case.block():
                found = generated(
                    case.model,
                    case.ids,
                    case.mask,
                    do_sample=False,
                    max_new_tokens=5,
                    streamer=streamer,
                    **settings,
                )
            assert_same(found, case.expected(do_sample=False, max_new_tokens=5), settings)
            prompt, *tokens = streamer.heard
            assert streamer.ended
            assert prompt == case.ids.tolist()
            assert [list(row) for row in zip(*tokens, strict=True)] == found.tokens


class TestInterruptions:
    @pytest.mark.parametrize("error", [UnpluggedError(), KeyboardInterrupt()], ids=repr)
    @pytest.mark.parametrize("cache", CACHES)
    @pytest.mark.parametrize("kind", ["fixed", "menu"])
    def test_after_an_exception_between_forwards_the_cache_goes_on(self, kind, cache, error):
        case = Case("gemma3", kind)
        whole = case.expected(do_sample=False, max_new_tokens=7)
        held, streamer = CACHES[cache](case.model), Listening(fails_at=3, error=error)
        settings = {"do_sample": False, CACHE: held}
        with pytest.raises(type(error)), case.block():
            generated(
                case.model, case.ids, case.mask, **settings, max_new_tokens=7, streamer=streamer
            )
        said = [list(row) for row in zip(*streamer.heard[1:], strict=True)]
        assert said == [row[:3] for row in whole.tokens]
        ids, mask = grown(case.ids, case.mask, said)
        found = generated(case.model, ids, mask, **settings, max_new_tokens=4)
        assert found.tokens == [row[3:] for row in whole.tokens]
        # A fresh start knows nothing of what was interrupted.
        with case.block():
            found = generated(case.model, case.ids, case.mask, do_sample=False, max_new_tokens=7)
        assert_same(found, whole)

    @pytest.mark.parametrize("cache", CACHES)
    @pytest.mark.parametrize("kind", ["fixed", "menu"])
    def test_after_a_stop_the_cache_goes_on(self, kind, cache):
        case = Case("gemma3", kind)
        whole = case.expected(do_sample=False, max_new_tokens=7)
        held = CACHES[cache](case.model)
        settings = {"do_sample": False, "max_new_tokens": 7, CACHE: held}
        stops = StoppingCriteriaList([StopsAt(case.ids.shape[1] + 4)])
        with case.block():
            found = generated(case.model, case.ids, case.mask, **settings, stopping_criteria=stops)
        assert found.tokens == [row[:4] for row in whole.tokens]
        ids, mask = grown(case.ids, case.mask, found.tokens)
        found = generated(case.model, ids, mask, **settings | {"max_new_tokens": 3})
        assert found.tokens == [row[4:] for row in whole.tokens]

    # In the first layer nothing but its own slot has been written when it fails.
    @pytest.mark.parametrize(
        ("layer", "error"), [(0, UnpluggedError()), (3, KeyboardInterrupt())], ids=str
    )
    @pytest.mark.parametrize("cache", CACHES)
    @pytest.mark.parametrize("kind", ["fixed", "menu"])
    def test_a_cache_that_was_left_inside_a_forward_is_refused_until_it_is_reset(
        self, kind, cache, error, layer
    ):
        case = Case("gemma3", kind)
        whole = case.expected(do_sample=False, max_new_tokens=4)
        held = CACHES[cache](case.model)
        settings = {"do_sample": False, "max_new_tokens": 4, CACHE: held}
        calls = []

        def fail(*_):
            calls.append(None)
            if len(calls) == 3:
                raise error

        handle = case.model.model.layers[layer].mlp.register_forward_pre_hook(fail)
        with pytest.raises(type(error)), case.block():
            generated(case.model, case.ids, case.mask, **settings)
        handle.remove()
        with (
            pytest.raises(UnsupportedModelError, match="did not complete.*new cache, or"),
            case.block(),
        ):
            generated(case.model, *grown(case.ids, case.mask, [[7]] * 4), **settings)
        # The model itself is as before, and so is the cache once it is reset.
        for again in (CACHES[cache](case.model), held):
            if again is held:
                held.reset()
            with case.block():
                found = generated(case.model, case.ids, case.mask, **settings | {CACHE: again})
            assert_same(found, whole)
        before = copy.deepcopy(case.base)
        expected = generated(before, case.ids, case.mask, do_sample=False, max_new_tokens=4)
        unwrap_model(case.model)
        found = generated(case.model, case.ids, case.mask, do_sample=False, max_new_tokens=4)
        assert_same(found, expected)

    def test_the_block_of_an_interrupted_generation_is_over(self):
        case = Case("llama", "menu")
        streamer = Listening(fails_at=2, error=UnpluggedError())
        with pytest.raises(UnpluggedError), case.model.dynadepth.plans([0, 0, 0, 0, 0, 1]):
            generated(case.model, case.ids, case.mask, max_new_tokens=4, streamer=streamer)
        found = generated(case.model, case.ids, case.mask, do_sample=False, max_new_tokens=4)
        assert_same(found, case.expected(do_sample=False, max_new_tokens=4))
