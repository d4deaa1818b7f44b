"""Static caches: one slot of fixed length for each visit, adopted in place, exact under every plan."""

import copy

import pytest
import torch
from transformers import CompileConfig, GenerationConfig, StaticCache

from dynadepth.errors import UnsupportedModelError
from dynadepth.plans import identity_plan
from dynadepth.wrapping.bake import bake
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from tests.parity.drivers import baked_rows, drive, mixed_plans, positions_of
from tests.parity.recompute import CACHE, generated, plans_alone, prompts_of
from tests.parity.test_generate import POLICIES
from tests.tiny import MECHANISMS, VOCAB_SIZE, random_batch, tiny_model

# Outside of generate the alibi of bloom is as long as the mask, not as the cache, so the base model itself cannot.
STATIC = tuple(name for name in MECHANISMS if name != "bloom")
NEW = 7
TOLERANCE = 1e-9


def continued(side, lengths=(9, 5, 7, 12), seed=5):
    """Return padded prompts with NEW more tokens for every row, and the prompts' width."""
    ids, mask = random_batch(list(lengths), seed=seed, side=side)
    generator = torch.Generator().manual_seed(seed + 1)
    more = torch.randint(2, VOCAB_SIZE, (len(lengths), NEW), generator=generator)
    return torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1), ids.shape[1]


def static(model, length=32):
    return StaticCache(config=model.config, max_cache_len=length)


def gap(logits, ids, mask, expected):
    """Return the largest difference to the reference on real tokens."""
    return max(
        (logits[row][mask[row].bool()] - reference).abs().max().item()
        for row, reference in enumerate(expected)
    )


class TestParity:
    @pytest.mark.parametrize("mode", ["steps", "chunks"])
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("family", STATIC)
    def test_mixed_padded_batch_equals_baked_rows(self, family, attention, side, mode):
        model = tiny_model(family, attention=attention)
        plans = mixed_plans(4, 4, seed=3)
        ids, mask, width = continued(side)
        expected = baked_rows(model, plans, ids, mask, padded=side == "right")
        wrap_model(model, plan=identity_plan(4))
        # Exactly long enough, and longer.
        for length in (ids.shape[1], 40):
            with model.dynadepth.plans(plans):
                logits = drive(model, ids, mask, width, mode, static(model, length))
            assert gap(logits, ids, mask, expected) < TOLERANCE, length

    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize("family", STATIC)
    def test_random_plans_of_one_row_and_without_a_mask(self, family, seed):
        """No mask and inferred positions: what transformers reads off the cache itself."""
        model = tiny_model(family, seed=seed)
        plans = mixed_plans(4, 1, seed=40 + seed)
        ids, mask = random_batch([16], seed=seed)
        (expected,) = baked_rows(model, plans, ids, mask, padded=False)
        wrap_model(model, plan=plans[0])
        cache, logits, begin = static(model), [], 0
        with torch.no_grad():
            for end in (4, 5, 6, 9, 10, 16):
                logits.append(model(ids[:, begin:end], **{CACHE: cache}, use_cache=True).logits)
                begin = end
        assert (torch.cat(logits, 1)[0] - expected).abs().max() < TOLERANCE

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("family", STATIC)
    def test_one_plan_is_bit_equal_to_the_baked_model_in_the_same_batch(self, family, dtype):
        base = tiny_model(family, dtype=dtype)
        ids, mask, width = continued("left")
        for plan in ([1, 1, 1, 1], [2, 0, 1, 2], [0, 0, 2, 0]):
            baked = bake(base, plan)
            model = wrap_model(copy.deepcopy(base), plan=plan)
            for mode in ("steps", "chunks"):
                assert torch.equal(
                    drive(model, ids, mask, width, mode, static(model)),
                    drive(baked, ids, mask, width, mode, static(baked)),
                ), (plan, mode)


class TestAdoption:
    def test_it_is_the_same_object_and_still_a_static_cache(self):
        model = wrap_model(tiny_model("gemma3"), plan=[0, 2, 1, 1])
        cache = static(model)
        output = model(random_batch([9])[0], **{CACHE: cache}, use_cache=True)
        assert getattr(output, CACHE) is cache
        assert isinstance(cache, StaticCache)
        assert cache.is_compileable
        assert cache.get_seq_length() == cache.get_seq_length(3) == 9
        assert cache.get_max_length() == 32

    def test_a_slot_holds_the_rows_that_make_its_visit_and_no_other(self):
        model = wrap_model(tiny_model("gemma3"), plan=identity_plan(4))
        cache = static(model)
        with model.dynadepth.plans([[0, 2, 1, 1], [0, 0, 1, 2]]):
            model(random_batch([9, 9])[0], **{CACHE: cache}, use_cache=True)
        # Layers 0 and 2 see a window of 6 tokens.
        assert {key: tuple(slot.keys.shape) for key, slot in cache.slots.items()} == {
            (1, 0): (1, 2, 32, 8),
            (1, 1): (1, 2, 32, 8),
            (2, 0): (2, 2, 6, 8),
            (3, 0): (2, 2, 32, 8),
            (3, 1): (1, 2, 32, 8),
        }
        assert cache.state_bytes == 2 * 8 * 2 * 8 * (32 * 5 + 6 * 2)

    def test_a_reset_cache_plans_the_next_prompt_anew(self):
        base, policy = tiny_model("llama", num_layers=6), POLICIES["menu"]()
        prompts = [prompts_of([length], seed=length) for length in (9, 5, 12)]
        plans = plans_alone(base, policy, [rows[0] for *_, rows in prompts])
        assert len({plan.tobytes() for plan in plans.values()}) > 1
        model = wrap_model(copy.deepcopy(base), policy=policy)
        cache = static(model)
        for ids, mask, (prompt,) in prompts:
            cache.reset()
            with torch.no_grad():
                logits = model(ids, **{CACHE: cache}, use_cache=True).logits
            (expected,) = baked_rows(base, plans[prompt][None], ids, mask, padded=False)
            assert (logits[0] - expected).abs().max() < TOLERANCE

    def test_what_does_not_fit_is_refused_before_anything_is_written(self):
        base = tiny_model("gemma3")
        plans = mixed_plans(4, 2, seed=2)
        ids, mask = random_batch([16, 16], seed=3)
        expected = baked_rows(base, plans, ids, mask, padded=False)
        model = wrap_model(copy.deepcopy(base), plan=identity_plan(4))
        cache = static(model, 16)
        text = "room for 16 tokens and holds 10; 7 more do not fit: .* larger max_cache_len"
        with torch.no_grad(), model.dynadepth.plans(plans):
            first = model(ids[:, :10], **{CACHE: cache}, use_cache=True).logits
            with pytest.raises(UnsupportedModelError, match=text):
                model(random_batch([7, 7])[0], **{CACHE: cache}, use_cache=True)
            logits = torch.cat([first, model(ids[:, 10:], **{CACHE: cache}).logits], 1)
        assert gap(logits, ids, mask, expected) < TOLERANCE

    def test_refused_caches(self):
        model = tiny_model("llama")
        ids, _ = random_batch([6])
        filled, short = static(model), static(tiny_model("llama", num_layers=3))
        model(ids, **{CACHE: filled}, use_cache=True)
        used = static(model)
        wrap_model(model, plan=[1, 0, 1, 2])
        with pytest.raises(UnsupportedModelError, match="holds 6 tokens of the unwrapped model"):
            model(ids, **{CACHE: filled})
        with pytest.raises(UnsupportedModelError, match="for 3 layers, but the model has 4"):
            model(ids, **{CACHE: short})

        class Mine(StaticCache):
            pass

        with pytest.raises(UnsupportedModelError, match=r"is a Mine; .* StaticCache \(cache_impl"):
            model(ids, **{CACHE: Mine(config=model.config, max_cache_len=32)})
        model(ids, **{CACHE: used}, use_cache=True)
        unwrap_model(model)
        with pytest.raises(UnsupportedModelError, match="states of a wrapped model"):
            model(ids, **{CACHE: used})


class TestRows:
    @pytest.mark.parametrize("how", ["reorder", "select", "repeat"])
    @pytest.mark.parametrize("family", STATIC)
    def test_rows_are_reordered_chosen_and_repeated(self, family, how):
        model = tiny_model(family)
        plans = mixed_plans(4, 4, seed=3)
        ids, mask, width = continued("left")
        rows = {"reorder": [3, 1, 1, 0], "select": [2, 0], "repeat": [0, 0, 1, 1, 2, 2, 3, 3]}[how]
        ids, mask = ids[rows], mask[rows]
        expected = baked_rows(model, plans[rows], ids, mask, padded=False)
        wrap_model(model, plan=identity_plan(4))
        cache = static(model)
        first, first_mask, _ = continued("left")
        with torch.no_grad():
            with model.dynadepth.plans(plans):
                model(
                    first[:, :width],
                    attention_mask=first_mask[:, :width],
                    position_ids=positions_of(first_mask)[:, :width],
                    **{CACHE: cache},
                )
            if how == "reorder":
                cache.reorder_cache(torch.tensor(rows))
            elif how == "select":
                cache.batch_select_indices(torch.tensor(rows))
            else:
                cache.batch_repeat_interleave(2)
            logits = model(
                ids[:, width:],
                attention_mask=mask,
                position_ids=positions_of(mask)[:, width:],
                **{CACHE: cache},
            ).logits
        for row, reference in enumerate(expected):
            assert (logits[row] - reference[-NEW:]).abs().max() < TOLERANCE

    @pytest.mark.parametrize("family", STATIC)
    def test_dropped_tokens_leave_no_trace(self, family):
        model = tiny_model(family)
        plans = mixed_plans(4, 2, seed=2)
        ids, mask = random_batch([12, 12], seed=3)
        expected = baked_rows(model, plans, ids, mask, padded=False)
        wrap_model(model, plan=identity_plan(4))
        cache = static(model)
        with torch.no_grad(), model.dynadepth.plans(plans):
            # Within gemma3's window of 6 tokens.
            model(ids[:, :3], **{CACHE: cache})
            model(ids[:, 5:8], **{CACHE: cache})
            cache.crop(-3)
            assert cache.get_seq_length() == 3
            logits = model(ids[:, 3:], **{CACHE: cache}).logits
            assert gap(logits, ids, mask[:, 3:], [row[3:] for row in expected]) < TOLERANCE
            # More than there are: none is left, and the rows keep their plans.
            if family != "gemma3":
                cache.crop(-100)
                assert cache.get_seq_length() == 0
        with torch.no_grad():
            if family == "gemma3":
                with pytest.raises(
                    UnsupportedModelError, match="window of 6 tokens has been exceeded"
                ):
                    cache.crop(-1)
            else:
                logits = model(ids, **{CACHE: cache}).logits
                assert gap(logits, ids, mask, expected) < TOLERANCE


class TestCompiling:
    """On an accelerator, generate compiles by itself if the cache is static; not the forward of a wrapped model."""

    def seen(self, monkeypatch, model):
        """Return the list of what every generation says about compiling."""
        says = []
        asks = type(model)._valid_auto_compile_criteria

        def record(self, kwargs, config):
            says.append(config.disable_compile)
            return asks(self, kwargs, config)

        monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", record)
        return says

    def test_generate_of_a_wrapped_model_never_compiles(self, monkeypatch):
        model = tiny_model("llama")
        says = self.seen(monkeypatch, model)
        ids, mask, _ = prompts_of([6, 4])
        settings = {"cache_implementation": "static", "max_new_tokens": 2, "do_sample": False}
        generated(model, ids, mask, **settings)
        assert says
        assert not any(says), "the unwrapped model may compile"
        wrap_model(model, plan=[1, 0, 1, 2])
        config = GenerationConfig(**settings)
        before = config.to_dict()
        for arguments in (
            ((ids,), settings),
            ((ids,), {"generation_config": config}),
            ((ids, config), {}),
        ):
            says.clear()
            model.generate(*arguments[0], attention_mask=mask, **arguments[1])
            assert says
            assert all(says)
        assert config.to_dict() == before
        unwrap_model(model)
        says.clear()
        generated(model, ids, mask, **settings)
        assert not any(says)

    @pytest.mark.parametrize(
        "settings", [{"disable_compile": False}, {"compile_config": CompileConfig()}], ids=str
    )
    def test_a_wish_to_compile_is_refused(self, settings):
        model = wrap_model(tiny_model("llama"), plan=[1, 0, 1, 2])
        with pytest.raises(UnsupportedModelError, match="asked to compile .* bake"):
            model.generate(random_batch([6])[0], max_new_tokens=2, **settings)


def test_settings_that_a_given_config_leaves_open_come_from_the_models_own():
    model = tiny_model("llama", num_layers=6)
    model.generation_config.prefill_chunk_size = 3
    wrap_model(model, policy=POLICIES["menu"]())
    with pytest.raises(
        UnsupportedModelError, match="prefill_chunk_size=3 shows the policy only a part"
    ):
        model.generate(random_batch([9])[0], GenerationConfig(max_new_tokens=2))
    # What is said in the call counts first, None too.
    ids, mask = random_batch([9])
    found = generated(model, ids, mask, prefill_chunk_size=None, max_new_tokens=2)
    assert len(found.tokens[0]) == 2
