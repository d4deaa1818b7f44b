"""`generate` with tokens that leave early gives what recomputation gives, in every mode and with every cache."""

import copy
from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from dynadepth.errors import ConfigError, UnsupportedModelError
from dynadepth.exits.exit_forward import Exits
from dynadepth.models.structure import layer_stack
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from tests.parity.recompute import CACHE, Generated, assert_same, generated, prompts_of, real_rows
from tests.parity.test_generate import CACHES, FEW, LENGTHS, MODES, NEW
from tests.tiny import MECHANISMS, tiny_model


@dataclass
class Head:
    """Leaves for a share of all states that follows from the state alone."""

    layer_idx: int
    share: float = 0.6

    def leaves(self, states):
        weights = torch.linspace(-1.0, 1.0, states.shape[-1], dtype=states.dtype)
        return (states @ weights * 3.0).frac().abs() < self.share

    def final(self, states):
        return 0.5 * states.flip(-1)


HEADS = (Head(1), Head(3, share=0.3))


def recomputing(base, heads, prompts):
    """Return a model that runs every row alone, from its first token; new tokens are read through their heads."""
    model, inner = copy.deepcopy(base), copy.deepcopy(base)
    layers = layer_stack(inner).layers
    entering, given = {}, []

    def note(layer_idx):
        def hook(_module, args, kwargs):
            entering[layer_idx] = args[0] if args else kwargs["hidden_states"]

        return hook

    def replace(_module, _args, output):
        if not given:
            return None
        return (given[0], *output[1:]) if isinstance(output, tuple) else given[0]

    for layer_idx, layer in enumerate(layers):
        layer.register_forward_pre_hook(note(layer_idx), with_kwargs=True)
    layers[-1].register_forward_hook(replace)

    def alone(tokens):
        prompt = max((p for p in prompts if tokens[: len(p)] == p), key=len)
        ids = torch.tensor([tokens])
        with torch.no_grad():
            logits = inner(ids, use_cache=False).logits[0].clone()
            before = {head.layer_idx: entering[head.layer_idx] for head in heads}
            open_rows = torch.arange(len(tokens)) >= len(prompt)
            for head in heads:
                leaving = head.leaves(before[head.layer_idx][0]) & open_rows
                open_rows &= ~leaving
                given[:] = [head.final(before[head.layer_idx])]
                logits[leaving] = inner(ids, use_cache=False).logits[0][leaving]
                given.clear()
        return logits

    def forward(input_ids=None, attention_mask=None, logits_to_keep=0, use_cache=None, **_):
        assert not use_cache
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = torch.zeros(*input_ids.shape, base.config.vocab_size, dtype=base.dtype)
        for row, tokens in enumerate(real_rows(input_ids, mask)):
            logits[row, mask[row].bool()] = alone(tokens)
        return CausalLMOutputWithPast(logits=logits)

    model.forward = forward
    return model


def wrapped(base, heads=HEADS, **more):
    return wrap_model(copy.deepcopy(base), exits=Exits(heads, **more))


def until_ends(found, ends):
    """Return a generation without the logits that rows have after their ends, which nobody chooses from."""
    logits = found.logits.clone()
    for row, tokens in enumerate(found.tokens):
        end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        logits[end + 1 :, row] = 0.0
    return Generated(found.tokens, logits)


class TestModes:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("family", FEW)
    def test_every_mode_gives_what_recomputation_gives(self, family, mode):
        base = tiny_model(family)
        ids, mask, prompts = prompts_of(LENGTHS)
        if mode == "guidance":
            prompts = [*prompts, *(prompt[-1:] for prompt in prompts)]
        settings = {"do_sample": False, **MODES[mode], "max_new_tokens": NEW}
        reference = recomputing(base, HEADS, prompts)
        expected = generated(reference, ids, mask, **settings, use_cache=False)
        for cache in ("dynamic", "static"):
            model = wrapped(base)
            found = generated(model, ids, mask, **settings, **CACHES[cache])
            if mode == "rows that end early":
                found, expected = (
                    until_ends(each, settings["eos_token_id"]) for each in (found, expected)
                )
            assert_same(found, expected, cache)
            assert 0 < model.dynadepth.exit_totals.share < 1

    @pytest.mark.parametrize("family", MECHANISMS)
    def test_families_that_are_called_otherwise(self, family):
        base = tiny_model(family)
        ids, mask, prompts = prompts_of([5, 5, 5])
        settings = {"do_sample": False, "max_new_tokens": 12}
        reference = recomputing(base, HEADS, prompts)
        expected = generated(reference, ids, mask, **settings, use_cache=False)
        assert_same(generated(wrapped(base), ids, mask, **settings), expected)

    def test_without_a_cache_nobody_leaves(self):
        base = tiny_model()
        ids, mask, _ = prompts_of(LENGTHS)
        settings = {"do_sample": False, "max_new_tokens": NEW, "use_cache": False}
        model = wrapped(base)
        assert_same(generated(model, ids, mask, **settings), generated(base, ids, mask, **settings))
        assert model.dynadepth.exit_totals.steps == 0

    def test_drafts_of_another_model(self):
        base = tiny_model()
        ids, _, _ = prompts_of([6])
        settings = {"do_sample": False, "max_new_tokens": NEW}
        plain = generated(base, ids, None, **settings)
        model = wrapped(base, (Head(2, share=0.0),))
        found = generated(model, ids, None, **settings, assistant_model=tiny_model(seed=3))
        assert found.tokens == plain.tokens


class TestStates:
    @pytest.mark.parametrize("family", FEW)
    def test_several_turns_on_one_cache(self, family):
        base = tiny_model(family)
        ids, mask, _ = prompts_of([6, 6])
        model, cache = wrapped(base), DynamicCache(config=base.config)
        settings = {"do_sample": False, "max_new_tokens": 5}
        first = generated(model, ids, mask, **settings, **{CACHE: cache})
        said = torch.cat([ids, torch.tensor(first.tokens), ids[:, :3]], dim=1)
        second = generated(model, said, torch.ones_like(said), **settings, **{CACHE: cache})
        # What the first turn left early was written by the base model all the same.
        longer = [tuple(row) for row in said.tolist()]
        reference = recomputing(base, HEADS, longer)
        expected = generated(reference, said, torch.ones_like(said), **settings, use_cache=False)
        assert_same(second, expected)

    def test_a_returned_cache_owes_nothing(self):
        model = wrapped(tiny_model(), (Head(1, share=2.0),))
        ids, mask, _ = prompts_of([6, 4])
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=5,
            return_dict_in_generate=True,
            do_sample=False,
        )
        assert len(output.past_key_values.owed) == 0

    def test_states_and_attentions_are_those_of_all_layers(self):
        base = tiny_model(attention="eager")
        ids, mask, _ = prompts_of([6, 6])
        settings = {"do_sample": False, "max_new_tokens": 4, "use_cache": True}
        asked = {"output_hidden_states": True, "output_attentions": True}
        found = wrapped(base, (Head(1, share=2.0),)).generate(
            ids, attention_mask=mask, return_dict_in_generate=True, **settings, **asked
        )
        expected = base.generate(
            ids, attention_mask=mask, return_dict_in_generate=True, **settings, **asked
        )
        for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    def test_a_cache_that_owes_says_so_when_its_model_is_unwrapped(self):
        model = wrapped(tiny_model(), (Head(1, share=2.0),))
        ids, mask, _ = prompts_of([6])
        cache = DynamicCache(config=model.config)
        model.generate(ids, attention_mask=mask, max_new_tokens=4, **{CACHE: cache})
        unwrap_model(model)
        if len(cache.owed):
            with pytest.raises(UnsupportedModelError, match="settle"):
                cache.states(2)

    def test_undo_leaves_no_trace(self):
        base = tiny_model()
        before = sorted(base.__dict__), type(base.model.layers[0])
        ids, mask, _ = prompts_of([6])
        expected = generated(base, ids, mask, max_new_tokens=4, do_sample=False)
        model = wrap_model(base, exits=Exits(HEADS))
        model.generate(ids, attention_mask=mask, max_new_tokens=4)
        unwrap_model(model)
        assert (sorted(base.__dict__), type(base.model.layers[0])) == before
        assert_same(generated(base, ids, mask, max_new_tokens=4, do_sample=False), expected)


class TestCounts:
    def test_passes_count_what_ran(self):
        model = wrapped(tiny_model(), (Head(1, share=2.0),), window=3)
        ids, mask, _ = prompts_of([6, 6])
        calls = []
        with model.dynadepth.watch(calls.append):
            model.generate(ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8)
        totals = model.dynadepth.exit_totals
        # The prompt's last token decides the first new token, at full depth: seven steps of decoding remain.
        assert (totals.steps, totals.tokens, totals.left) == (7, 14, {1: 14})
        assert totals.layer_calls == sum(call.num_tokens < 6 for call in calls)
        assert totals.passes == totals.layer_calls / 28 < 0.6

    def test_unwatched_calls_count_the_same(self):
        ids, mask, _ = prompts_of([6, 4])
        counted = []
        for watch in (True, False):
            model = wrapped(tiny_model())
            settings = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
            if watch:
                with model.dynadepth.watch(lambda _: None):
                    model.generate(ids, **settings)
            else:
                model.generate(ids, **settings)
            counted.append(model.dynadepth.exit_totals)
        assert counted[0] == counted[1]

    def test_a_copy_counts_for_itself(self):
        model = wrapped(tiny_model())
        ids, mask, _ = prompts_of([6])
        model.generate(ids, attention_mask=mask, max_new_tokens=4)
        other = copy.deepcopy(model)
        before = model.dynadepth.exit_totals
        other.generate(ids, attention_mask=mask, max_new_tokens=4)
        assert model.dynadepth.exit_totals == before != other.dynadepth.exit_totals
        other.dynadepth.reset_totals()
        assert other.dynadepth.exit_totals.steps == 0
        assert other.dynadepth.exit_totals.passes is None


class TestRefusals:
    @pytest.mark.parametrize(
        ("heads", "window", "wrong"),
        [
            ((), 8, "one or more"),
            ((Head(0),), 8, "from layer 1 on"),
            ((Head(2), Head(1)), 8, "ascending"),
            ((Head(2), Head(2)), 8, "each before another layer"),
            ((Head(1),), 0, "at least 1"),
            ((Head(1),), True, "at least 1"),
        ],
    )
    def test_exits_that_cannot_be(self, heads, window, wrong):
        with pytest.raises(ConfigError, match=wrong):
            Exits(heads, window)

    def test_wrapping_says_what_does_not_go_together(self):
        model = tiny_model()
        for arguments, wrong in (
            ({"exits": Exits((Head(4),))}, "layers are 0 to 3"),
            ({"exits": [Head(1)]}, "exits is a list"),
            ({"exits": Exits(HEADS), "plan": "0-3"}, "exactly one"),
            ({"exits": Exits(HEADS), "shortcuts": "folder"}, "leave shortcuts out"),
        ):
            with pytest.raises(ConfigError, match=wrong):
                wrap_model(model, **arguments)
            assert "dynadepth" not in model.__dict__

    def test_plans_and_chunks_are_refused(self):
        model = wrapped(tiny_model())
        ids, mask, _ = prompts_of([6])
        with pytest.raises(ConfigError, match="every layer once"), model.dynadepth.plans("0,2-3"):
            model.generate(ids, attention_mask=mask, max_new_tokens=4)
        with pytest.raises(UnsupportedModelError, match="prefill_chunk_size"):
            model.generate(ids, attention_mask=mask, max_new_tokens=4, prefill_chunk_size=3)


@dataclass
class Never:
    layer_idx: int = 1

    def leaves(self, states):
        return torch.zeros(len(states), dtype=torch.bool)

    def final(self, states):
        raise AssertionError("nothing left")


@dataclass
class Always(Never):
    def leaves(self, states):
        return torch.ones(len(states), dtype=torch.bool)

    def final(self, states):
        return 0.5 * states.flip(-1)


def test_a_prompt_that_ends_with_an_end_ends_no_row():
    model = tiny_model("llama")
    for length in (1, 6):
        ids = torch.full((1, length), 5)
        given = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 5, "pad_token_id": 0}
        expected = model.generate(ids, **given)
        wrap_model(model, exits=Exits((Never(),)))
        assert torch.equal(model.generate(ids, **given), expected)
        unwrap_model(model)


def test_what_a_row_pads_with_is_counted_nowhere():
    model = tiny_model("llama")
    ids = torch.tensor([[7, 8, 9], [11, 12, 13]])
    given = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    wrap_model(model, exits=Exits((Always(),), window=4))
    free = model.generate(ids, eos_token_id=None, **given)[:, 3:].tolist()
    model.dynadepth.reset_totals()
    end = next(token for token in free[0][3:9] if token not in free[1] and token not in free[0][:3])
    found = model.generate(ids, eos_token_id=end, **given)[:, 3:].tolist()
    own = free[0].index(end) + 1
    assert found[0] == free[0][:own] + [0] * (16 - own)
    assert found[1] == free[1]
    totals = model.dynadepth.exit_totals
    # The prompt gives the first token of each row, and an end is no token to go on from.
    assert totals.tokens == (own - 1) + 15
    assert totals.audited.tokens <= totals.tokens
    unwrap_model(model)


def test_audits_find_what_the_base_model_would_have_chosen():
    model = tiny_model("llama")
    ids = torch.tensor([[7, 8, 9]])
    given = {"max_new_tokens": 41, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wrap_model(model, exits=Exits((Head(1),)))
    found = model.generate(ids, return_dict_in_generate=True, **given)
    run, totals = model.dynadepth.last_layers_run[0], model.dynadepth.exit_totals
    unwrap_model(model)
    with torch.no_grad():
        choices = model(found.sequences).logits[0, 2:-1].argmax(dim=-1)
    new = found.sequences[0, 3:]
    early = torch.from_numpy(run < model.config.num_hidden_layers)
    changed = (choices != new)[1:] & early
    assert totals.left == {1: int(early.sum())}
    assert totals.audited.tokens == 40
    assert (totals.audited.early, totals.audited.read) == (int(early.sum()), int(early.sum()))
    assert totals.audited.changed == int(changed.sum()) > 0
    assert not (choices != new)[1:][~early].any()


def test_hidden_states_in_the_middle_settle_first():
    model = tiny_model("llama")
    ids = torch.tensor([[7, 8, 9, 10, 11, 12]])
    with torch.no_grad():
        expected = model(ids).logits
        wrap_model(model, exits=Exits((Always(),)))
        output = model(ids[:, :3], use_cache=True)
        for place in (3, 4):
            output = model(ids[:, place : place + 1], **{CACHE: output[CACHE]})
        assert len(output[CACHE].owed) == 2
        output = model(ids[:, 5:], **{CACHE: output[CACHE]}, output_hidden_states=True)
    assert [each.shape[1] for each in output.hidden_states] == [1] * 5
    torch.testing.assert_close(output.logits[:, 0], expected[:, 5], atol=1e-9, rtol=0)
    unwrap_model(model)
