"""Drafts: a routed model that is helped, one that helps its own base, one that looks its drafts up in the prompt."""

import copy

import numpy as np
import pytest
import torch
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from dynadepth.errors import UnsupportedModelError
from dynadepth.models.weight_sharing import share_weights
from dynadepth.plans import identity_plan
from dynadepth.policies.base import Policy
from dynadepth.wrapping.bake import bake
from dynadepth.wrapping.wrap import wrap_model
from tests.parity.recompute import (
    CACHE,
    assert_same,
    difference,
    generated,
    plans_alone,
    prompts_of,
    recomputing,
)
from tests.parity.test_generate import FEW, POLICIES
from tests.tiny import tiny_model

# All actions, layer 0 skipped, the first full-attention layer of gemma3 repeated.
PLANS = [[0, 2, 1, 2], [2, 0, 1, 1], [1, 1, 0, 2]]
LENGTHS = (9, 1, 14)
NEW = 9


def drafting(model, tokens=3):
    """Set how a model drafts: so many tokens at a time, however sure it is."""
    config = model.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = tokens, "constant"
    config.assistant_confidence_threshold = 0.0
    return model


def counting(model):
    """Return the list to which every forward of the model adds its number of tokens."""
    calls = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: calls.append(args[0].shape[1])
    )
    return calls


def expected_of(base, plans, ids, **settings):
    return generated(
        recomputing(base, plans), ids, None, **settings, max_new_tokens=NEW, use_cache=False
    )


class TestRoutedTarget:
    @pytest.mark.parametrize("plan", PLANS, ids=str)
    @pytest.mark.parametrize("family", FEW)
    def test_an_unrouted_draft_changes_nothing(self, family, plan):
        base, draft = tiny_model(family), drafting(tiny_model(family, num_layers=2, seed=5))
        model = wrap_model(copy.deepcopy(base), plan=plan)
        for length in LENGTHS:
            ids, _, (prompt,) = prompts_of([length])
            expected = expected_of(base, {prompt: plan}, ids, do_sample=False)
            found = generated(
                model, ids, None, assistant_model=draft, do_sample=False, max_new_tokens=NEW
            )
            assert_same(found, expected, length)

    @pytest.mark.parametrize("policy", POLICIES)
    @pytest.mark.parametrize("family", FEW)
    def test_tokens_of_the_draft_are_not_the_prompt(self, family, policy):
        """The first forward holds the prompt and drafts; the plan is that of the prompt alone."""
        base, chosen = tiny_model(family, num_layers=6), POLICIES[policy]()
        draft = drafting(tiny_model(family, num_layers=2, seed=5), tokens=5)
        batches = [prompts_of([length], seed=seed) for seed in range(2) for length in LENGTHS]
        plans = plans_alone(base, chosen, [prompts[0] for _, _, prompts in batches])
        assert len({plan.tobytes() for plan in plans.values()}) > 2
        model = wrap_model(copy.deepcopy(base), policy=chosen)
        calls = counting(model)
        for ids, _, (prompt,) in batches:
            calls.clear()
            expected = expected_of(base, {prompt: plans[prompt]}, ids, do_sample=False)
            found = generated(
                model, ids, None, assistant_model=draft, do_sample=False, max_new_tokens=NEW
            )
            assert calls[0] > len(prompt), "the first forward must hold drafts"
            assert model.dynadepth.last_plans.tolist() == [plans[prompt].tolist()]
            assert_same(found, expected, prompt)

    @pytest.mark.parametrize("family", FEW)
    def test_sampling_with_a_seed_gives_what_the_baked_pair_gives(self, family):
        base, plan = tiny_model(family), PLANS[0]
        draft = drafting(tiny_model(family, num_layers=2, seed=5))
        ids, _, _ = prompts_of([9])
        settings = {"assistant_model": draft, "do_sample": True, "temperature": 2.0}
        model = wrap_model(copy.deepcopy(base), plan=plan)
        for seed in range(4):
            expected, found = (
                generated(one, ids, None, seed=seed, **settings, max_new_tokens=NEW)
                for one in (bake(base, plan), model)
            )
            assert_same(found, expected, seed)


class TestRoutedDraft:
    @pytest.mark.parametrize("plan", [[1, 1, 1, 1], *PLANS], ids=str)
    @pytest.mark.parametrize("family", FEW)
    def test_the_base_verifies_drafts_of_its_routed_self_on_the_same_weights(self, family, plan):
        base = tiny_model(family)
        draft = wrap_model(drafting(share_weights(base)), plan=plan)
        calls, drafts = counting(base), counting(draft)
        for length in LENGTHS:
            ids, _, (prompt,) = prompts_of([length])
            expected = expected_of(base, {prompt: identity_plan(4)}, ids, do_sample=False)
            calls.clear(), drafts.clear()
            found = generated(
                base, ids, None, assistant_model=draft, do_sample=False, max_new_tokens=NEW
            )
            assert_same(found, expected, length)
            assert sum(drafts) > length, "the draft must have run"
            if plan == [1, 1, 1, 1]:
                assert len(calls) < NEW / 2, "drafts of the identity plan are all accepted"

    @pytest.mark.parametrize("family", FEW)
    def test_a_routed_draft_drafts_what_the_baked_draft_drafts(self, family):
        """Sampling draws from the draft's scores, so one seed gives one text only if the drafts are equal."""
        base, plan = tiny_model(family), [1, 0, 1, 2]
        ids, _, _ = prompts_of([9])
        for seed in range(4):
            settings = {"do_sample": True, "temperature": 2.0, "seed": seed, "max_new_tokens": NEW}
            expected, found = (
                generated(base, ids, None, assistant_model=drafting(draft), **settings)
                for draft in (bake(base, plan), wrap_model(share_weights(base), plan=plan))
            )
            assert_same(found, expected, seed)

    def test_the_draft_plans_the_prompt_once_and_never_its_continuation(self):
        base = tiny_model("llama")
        policy = Recording()
        draft = wrap_model(drafting(share_weights(base)), policy=policy)
        for length in LENGTHS:
            policy.prompts.clear()
            ids, _, (prompt,) = prompts_of([length])
            generated(base, ids, None, assistant_model=draft, do_sample=False, max_new_tokens=NEW)
            assert policy.prompts == [prompt]

    def test_target_and_draft_are_both_routed_each_by_its_own_plan(self):
        base = tiny_model("gemma3")
        model = wrap_model(copy.deepcopy(base), plan=PLANS[0])
        draft = wrap_model(drafting(share_weights(base)), plan=PLANS[1])
        ids, _, (prompt,) = prompts_of([9])
        expected = expected_of(base, {prompt: PLANS[0]}, ids, do_sample=False)
        settings = {"assistant_model": draft, "do_sample": False, "max_new_tokens": NEW}
        assert_same(generated(model, ids, None, **settings), expected)
        # A block of the target says nothing to the draft, nor the reverse.
        with draft.dynadepth.plans(PLANS[2]):
            assert_same(generated(model, ids, None, **settings), expected)
        with model.dynadepth.plans(PLANS[2]):
            other = expected_of(base, {prompt: PLANS[2]}, ids, do_sample=False)
            assert_same(generated(model, ids, None, **settings), other)
        assert difference(other, expected) > 1e-2

    def test_a_model_drafts_for_itself(self):
        base = tiny_model("llama", num_layers=6)
        policy = POLICIES["menu"]()
        ids, _, (prompt,) = prompts_of([9])
        plans = plans_alone(base, policy, [prompt])
        model = wrap_model(drafting(copy.deepcopy(base)), policy=policy)
        found = generated(
            model, ids, None, assistant_model=model, do_sample=False, max_new_tokens=NEW
        )
        assert_same(found, expected_of(base, plans, ids, do_sample=False))


class Recording(Policy):
    """Runs every layer once; keeps the tokens that it was told are the prompt."""

    num_layers = 4
    decision_layers = (1,)

    def __init__(self):
        self.prompts = []

    def initial_plans(self, num_rows):
        return np.ones((num_rows, 4), dtype=np.uint8)

    def decide(self, layer_idx, hidden_states, prompts):
        self.prompts += [
            tuple(row[real].tolist())
            for row, real in zip(prompts.tokens, prompts.mask, strict=True)
        ]
        return np.ones((len(hidden_states), 3), dtype=np.uint8)


# A prompt that repeats itself, so that looking up finds drafts for the first forward already.
REPEATING = (5, 9, 33, 5, 9, 33, 5, 9, 33, 5, 9)
# Static layers of early transformers cannot give drafts back, so generate refuses them there.
STATIC_CROPS = hasattr(StaticLayer, "crop")


class TestPromptLookup:
    @pytest.mark.parametrize("plan", PLANS, ids=str)
    @pytest.mark.parametrize("family", FEW)
    def test_looking_up_changes_nothing(self, family, plan):
        base, ids = tiny_model(family), torch.tensor([REPEATING])
        model = wrap_model(copy.deepcopy(base), plan=plan)
        calls = counting(model)
        expected = expected_of(base, {REPEATING: plan}, ids, do_sample=False)
        settings = {"prompt_lookup_num_tokens": 3, "max_new_tokens": NEW}
        assert_same(generated(model, ids, None, do_sample=False, **settings), expected)
        assert calls[0] > len(REPEATING), "the first forward must hold drafts"
        for seed in range(3):
            expected, found = (
                generated(one, ids, None, do_sample=True, seed=seed, **settings)
                for one in (bake(base, plan), model)
            )
            assert_same(found, expected, seed)

    @pytest.mark.parametrize("policy", POLICIES)
    def test_what_is_looked_up_is_not_the_prompt(self, policy):
        base, chosen = tiny_model("llama", num_layers=6), POLICIES[policy]()
        repeating = [tuple(range(n, n + 3)) * 3 for n in range(5, 50, 7)]
        plans = plans_alone(base, chosen, repeating)
        assert len({plan.tobytes() for plan in plans.values()}) > 1
        model = wrap_model(copy.deepcopy(base), policy=chosen)
        for prompt in repeating:
            ids = torch.tensor([prompt])
            expected = expected_of(base, {prompt: plans[prompt]}, ids, do_sample=False)
            found = generated(
                model, ids, None, do_sample=False, prompt_lookup_num_tokens=3, max_new_tokens=NEW
            )
            assert_same(found, expected, prompt)

    @pytest.mark.skipif(not STATIC_CROPS, reason="static layers cannot crop in this transformers")
    def test_drafts_are_given_back_by_a_static_cache(self):
        base, ids = tiny_model("llama"), torch.tensor([REPEATING])
        settings = {"prompt_lookup_num_tokens": 3, "do_sample": False, "max_new_tokens": NEW}
        for plan in PLANS:
            model = wrap_model(copy.deepcopy(base), plan=plan)
            cache = StaticCache(config=base.config, max_cache_len=len(REPEATING) + NEW + 3)
            found = generated(model, ids, None, **settings, **{CACHE: cache})
            assert_same(found, expected_of(base, {REPEATING: plan}, ids, do_sample=False), plan)
            # The cache that generate makes by itself has no room for drafts behind the last token.
            with pytest.raises(UnsupportedModelError, match="more do not fit: .* larger max_cache"):
                generated(model, ids, None, **settings, cache_implementation="static")

    @pytest.mark.skipif(not STATIC_CROPS, reason="static layers cannot crop in this transformers")
    def test_a_static_window_that_cannot_give_back_is_refused_as_by_the_base(self):
        base, ids = tiny_model("gemma3"), torch.tensor([REPEATING])
        settings = {"prompt_lookup_num_tokens": 3, "cache_implementation": "static"}
        model = wrap_model(copy.deepcopy(base), plan=PLANS[0])
        for one in (base, model):
            with pytest.raises(ValueError, match="requires a cache that can be cropped"):
                generated(one, ids, None, do_sample=False, **settings, max_new_tokens=NEW)
