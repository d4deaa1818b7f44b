"""Every mode of `generate` gives what plain recomputation of the plans gives, with fixed plans and with policies."""

import copy

import pytest

from dynadepth.plans import identity_plan
from dynadepth.policies.calibration import PenaltyMix
from dynadepth.policies.menu_policy import MenuPolicy
from dynadepth.policies.router_policy import RouterPolicy
from dynadepth.wrapping.wrap import wrap_model
from tests.parity.drivers import mixed_plans
from tests.parity.recompute import (
    assert_same,
    difference,
    generated,
    plans_alone,
    prompts_of,
    recomputing,
)
from tests.tiny import FAMILIES, tiny_model
from tests.tiny_menus import random_menu
from tests.tiny_routers import random_heads, random_routers

LENGTHS = [6, 11, 8, 3]
# One family with full attention only, one with windows shorter than the prompts.
FEW = ("llama", "gemma3")
NEW = 6

MODES = {
    "greedy": {},
    "rows that end early": {"eos_token_id": list(range(20, 40))},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.95},
    "sampled sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams that end early": {
        "num_beams": 3,
        "early_stopping": True,
        "length_penalty": -2.0,
        "eos_token_id": list(range(20, 60)),
    },
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "beam sequences": {"num_beams": 4, "num_return_sequences": 2},
    "guidance": {"guidance_scale": 1.5},
    "a penalty on what was said": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
}
CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}
CHUNKS = {
    "dynamic": {"prefill_chunk_size": 4},
    "static": {"prefill_chunk_size": 4, "cache_implementation": "static"},
}


def expected_of(base, plans, ids, mask, **settings):
    return generated(
        recomputing(base, plans), ids, mask, **settings, max_new_tokens=NEW, use_cache=False
    )


def with_plans(base, plans, ids, mask, **settings):
    model = wrap_model(copy.deepcopy(base), plan=identity_plan(plans.shape[1]))
    with model.dynadepth.plans(plans):
        return generated(model, ids, mask, **settings, max_new_tokens=NEW)


class TestFixedPlans:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("family", FEW)
    def test_rows_with_plans_of_their_own_give_what_recomputation_gives(self, family, mode):
        base, plans = tiny_model(family), mixed_plans(4, len(LENGTHS), seed=9)
        ids, mask, prompts = prompts_of(LENGTHS)
        settings = {"do_sample": False, **MODES[mode]}
        chosen = dict(zip(prompts, plans, strict=True))
        if mode == "guidance":
            # Without a negative prompt it is the prompt's last token, planned as the row is.
            chosen |= {prompt[-1:]: chosen[prompt] for prompt in prompts}
            assert len(chosen) == 2 * len(prompts)
        expected = expected_of(base, chosen, ids, mask, **settings)
        if "eos_token_id" in settings:
            assert any(0 in (*row, *[0] * (NEW - len(row))) for row in expected.tokens), (
                "no row ends early"
            )
        if mode == "greedy":
            other = dict.fromkeys(chosen, identity_plan(4))
            other = expected_of(base, other, ids, mask, **settings)
            assert difference(other, expected) > 1e-2, "plans must matter"
        for cache, kind in CACHES.items():
            assert_same(with_plans(base, plans, ids, mask, **settings, **kind), expected, cache)

    @pytest.mark.parametrize("cache", CHUNKS)
    @pytest.mark.parametrize("mode", ["greedy", "sampling", "beams"])
    @pytest.mark.parametrize("family", FEW)
    def test_prefill_in_chunks_gives_what_recomputation_gives(self, family, mode, cache):
        base, plans = tiny_model(family), mixed_plans(4, len(LENGTHS), seed=9)
        ids, mask, prompts = prompts_of(LENGTHS)
        settings = {"do_sample": False, **MODES[mode]}
        expected = expected_of(base, dict(zip(prompts, plans, strict=True)), ids, mask, **settings)
        assert_same(with_plans(base, plans, ids, mask, **settings, **CHUNKS[cache]), expected)

    @pytest.mark.parametrize("mode", ["greedy", "beams"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_static_cache_gives_what_recomputation_gives(self, family, mode):
        base, plans = tiny_model(family, seed=1), mixed_plans(4, 3, seed=5)
        ids, mask, prompts = prompts_of([6, 11, 8], seed=6)
        settings = {"do_sample": False, **MODES[mode]}
        expected = expected_of(base, dict(zip(prompts, plans, strict=True)), ids, mask, **settings)
        assert_same(with_plans(base, plans, ids, mask, **settings, **CACHES["static"]), expected)

    @pytest.mark.parametrize("cache", CACHES)
    def test_guidance_runs_the_negative_prompt_with_the_plans_of_the_rows(self, cache):
        base, plans = tiny_model("llama"), mixed_plans(4, 3, seed=9)
        ids, mask, prompts = prompts_of([6, 11, 8])
        negative, negative_mask, negatives = prompts_of([5, 9, 12], seed=8)
        settings = {
            "do_sample": False,
            "guidance_scale": 2.0,
            "negative_prompt_ids": negative,
            "negative_prompt_attention_mask": negative_mask,
        }
        chosen = dict(zip(prompts + negatives, [*plans, *plans], strict=True))
        expected = expected_of(base, chosen, ids, mask, **settings)
        plain = expected_of(base, chosen, ids, mask, do_sample=False)
        assert expected.tokens != plain.tokens, "the case must be guided"
        assert_same(with_plans(base, plans, ids, mask, **settings, **CACHES[cache]), expected)


def menu_policy():
    menu = random_menu(layers=(2, 4), windows=(0, 3), inner=(0, 8), hidden_size=32, seed=2).menu
    return MenuPolicy(menu, PenaltyMix(shallow=2.0, deep=-2.0, share=0.5))


def router_policy():
    return RouterPolicy(random_heads(random_routers(num_layers=6).config, seed=3))


POLICIES = {"menu": menu_policy, "routers": router_policy}
POLICY_MODES = {name: MODES[name] for name in MODES if name != "guidance"}


class TestPolicies:
    """A policy plans each prompt as it plans it alone, and what follows is what recomputation of the plans gives."""

    @pytest.mark.parametrize("mode", POLICY_MODES)
    @pytest.mark.parametrize("policy", POLICIES)
    @pytest.mark.parametrize("family", FEW)
    def test_every_mode_and_cache(self, family, policy, mode):
        base, chosen = tiny_model(family, num_layers=6), POLICIES[policy]()
        ids, mask, prompts = prompts_of([9, 5, 12, 1, 8])
        plans = plans_alone(base, chosen, prompts)
        assert len({plan.tobytes() for plan in plans.values()}) > 2, "prompts must be told apart"
        settings = {"do_sample": False, **MODES[mode]}
        expected = expected_of(base, plans, ids, mask, **settings)
        for cache, kind in CACHES.items():
            model = wrap_model(copy.deepcopy(base), policy=chosen)
            found = generated(model, ids, mask, **settings, **kind, max_new_tokens=NEW)
            assert_same(found, expected, cache)

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    @pytest.mark.parametrize("policy", POLICIES)
    def test_guidance_plans_the_negative_prompt_as_a_prompt_of_its_own(self, policy, cache):
        base, chosen = tiny_model("llama", num_layers=6), POLICIES[policy]()
        ids, mask, prompts = prompts_of([9, 5, 12, 1, 8])
        negative, negative_mask, negatives = prompts_of([4, 11, 7, 9, 6], seed=8)
        plans = plans_alone(base, chosen, prompts + negatives)
        assert len({plan.tobytes() for plan in plans.values()}) > 2
        settings = {
            "do_sample": False,
            "guidance_scale": 2.0,
            "negative_prompt_ids": negative,
            "negative_prompt_attention_mask": negative_mask,
        }
        expected = expected_of(base, plans, ids, mask, **settings)
        model = wrap_model(copy.deepcopy(base), policy=chosen)
        found = generated(model, ids, mask, **settings, **CACHES[cache], max_new_tokens=NEW)
        assert_same(found, expected)

    def test_eager_attention_shows_the_policy_the_same_prompts(self, float64_throughout):
        """A static cache hands the layers a mask as long as itself, from which the padding is read."""
        chosen = menu_policy()
        for family in FEW:
            base = tiny_model(family, num_layers=6, attention="eager")
            ids, mask, prompts = prompts_of([9, 5, 12, 1, 8])
            plans = plans_alone(base, chosen, prompts)
            expected = expected_of(base, plans, ids, mask, do_sample=False)
            for cache, kind in CACHES.items():
                model = wrap_model(copy.deepcopy(base), policy=chosen)
                found = generated(model, ids, mask, do_sample=False, max_new_tokens=NEW, **kind)
                assert_same(found, expected, (family, cache))
