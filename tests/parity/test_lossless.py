"""Lossless decoding gives the base model's own text, whatever its drafts are worth."""

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from dynadepth import unwrap_model, wrap_model
from dynadepth.drafting.pace import Pace
from dynadepth.drafting.prompt_lookup import PromptLookup
from dynadepth.errors import UnsupportedModelError
from dynadepth.execution import few_tokens
from tests.tiny import KINDS, MECHANISMS, random_prompts, tiny_model
from tests.tiny_exits import random_exits

GREEDY = {"do_sample": False, "pad_token_id": 0}


def prompt(seed=0, length=7):
    return torch.from_numpy(random_prompts([length], seed=seed)[0])[None]


def lossless(model, trained, **pace):
    wrap_model(model, fidelity=1.0, routers=trained)
    model.dynadepth.exit_pace = Pace(**(pace or {"measured": False}))
    return model.dynadepth


def drafting(model, trained, ids, **more):
    """Return the text with drafts, and what was drafted."""
    controller = lossless(model, trained)
    try:
        return model.generate(ids, **{**GREEDY, **more}), controller.exit_totals
    finally:
        unwrap_model(model)


@pytest.mark.parametrize(("family", "attention"), KINDS)
def test_the_text_is_the_base_models(family, attention, monkeypatch):
    model = tiny_model(family, attention=attention)
    trained = random_exits(model)
    drafted = kept = looked_up = 0
    for seed in range(4):
        if seed == 2:
            # As on machines where it is faster, for every shape.
            monkeypatch.setattr(few_tokens, "_transposed_is_faster", lambda *_: True)
        if seed == 3:
            # Whatever it drafts, and in every cycle.
            monkeypatch.setattr(PromptLookup, "drafts", lambda lookup: lookup._tokens[-7::2])
        ids = prompt(seed)
        expected = model.generate(ids, max_new_tokens=24, eos_token_id=None, **GREEDY)
        found, totals = drafting(model, trained, ids, max_new_tokens=24, eos_token_id=None)
        assert torch.equal(found, expected)
        drafted, kept = drafted + totals.drafted.drafts, kept + totals.drafted.kept
        looked_up += totals.drafted.looked_up
    # Of random drafts some are wrong, so there was something to roll back.
    assert drafted > kept
    assert looked_up


@pytest.fixture
def no_lookup(monkeypatch):
    """Leave all drafts to exits."""
    monkeypatch.setattr(PromptLookup, "drafts", lambda _: [])


@pytest.fixture
def decided(no_lookup):
    """A model whose later layers change nothing that matters, and exits that leave always and change nothing."""
    model = tiny_model("llama")
    for layer in model.model.layers[1:]:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data *= 1e-9
    trained = random_exits(model)
    for head in trained.heads:
        for name, tensor in head.tensors.items():
            if name.startswith("lens") or name == "router.up":
                tensor.zero_()
        head.tensors["router.bias"].fill_(9.0)
    return model, trained


def test_right_drafts_are_kept_and_save_calls(decided):
    model, trained = decided
    expected = model.generate(prompt(), max_new_tokens=41, eos_token_id=None, **GREEDY)
    found, totals = drafting(model, trained, prompt(), max_new_tokens=41, eos_token_id=None)
    assert torch.equal(found, expected)
    assert totals.drafted.drafts == totals.drafted.kept == 35
    # Seven drafts of one layer and one token of all four give eight tokens.
    assert totals.drafted.cycles == 5
    assert totals.passes == pytest.approx((7 + 4) / (8 * 4))


@pytest.mark.parametrize("new", [1, 2, 3, 9, 10])
def test_it_ends_where_it_has_to(decided, new):
    model, trained = decided
    found, _ = drafting(model, trained, prompt(), max_new_tokens=new, eos_token_id=None)
    expected = model.generate(prompt(), max_new_tokens=new, eos_token_id=None, **GREEDY)
    assert torch.equal(found, expected)


class StopsAfter(StoppingCriteria):
    def __init__(self, length):
        self._length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self._length)


def test_ends_of_all_kinds(decided):
    model, trained = decided
    whole = model.generate(prompt(), max_new_tokens=20, eos_token_id=None, **GREEDY)
    end = int(whole[0, 7 + 5])
    for more in (
        {"eos_token_id": end},
        {"stopping_criteria": StoppingCriteriaList([StopsAfter(7 + 11)])},
        {"repetition_penalty": 1.3, "eos_token_id": None},
        {"suppress_tokens": [end], "eos_token_id": None},
    ):
        expected = model.generate(prompt(), max_new_tokens=20, **GREEDY, **more)
        found, _ = drafting(model, trained, prompt(), max_new_tokens=20, **more)
        assert torch.equal(found, expected), more


class Streamer(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize("family", MECHANISMS)
def test_a_streamer_sees_verified_tokens_once(family):
    model = tiny_model(family)
    streamer = Streamer()
    found, _ = drafting(
        model,
        random_exits(model),
        prompt(),
        max_new_tokens=20,
        eos_token_id=None,
        streamer=streamer,
    )
    assert streamer.tokens == found[0].tolist()
    assert streamer.ended


@pytest.mark.parametrize("family", MECHANISMS)
def test_scores_and_cache_are_the_base_models(family):
    model = tiny_model(family)
    asked = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "max_new_tokens": 16,
        "eos_token_id": None,
    }
    expected = model.generate(prompt(), **GREEDY, **asked)
    lossless(model, random_exits(model))
    found = model.generate(prompt(), **GREEDY, **asked)
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        ours, base = (torch.stack(getattr(each, name)) for each in (found, expected))
        torch.testing.assert_close(ours, base, atol=1e-5, rtol=1e-5)
    # The next turn goes on from the cache.
    longer = torch.cat([expected.sequences, prompt(3, length=4)], dim=1)
    again = model.generate(longer, past_key_values=found.past_key_values, **GREEDY, **asked)
    unwrap_model(model)
    whole = model.generate(longer, **GREEDY, **asked)
    assert torch.equal(again.sequences, whole.sequences)


def test_sampling_is_as_likely_as_the_base_models(decided):
    model, _ = decided
    trained = random_exits(model)
    settings = {"do_sample": True, "top_k": 5, "pad_token_id": 0, "max_new_tokens": 3}
    settings |= {"eos_token_id": None, "temperature": 0.7}
    rows = prompt().repeat(600, 1)
    torch.manual_seed(0)
    plain = model.generate(rows, **settings)[:, 7:].tolist()
    controller = lossless(model, trained)
    torch.manual_seed(1)
    ours = [model.generate(prompt(), **settings)[0, 7:].tolist() for _ in range(600)]
    totals = controller.exit_totals.drafted
    unwrap_model(model)
    assert totals.drafts > totals.kept > 0
    for place in range(3):
        seen = [[row[place] for row in rows_] for rows_ in (plain, ours)]
        tokens = sorted(set(seen[0]) | set(seen[1]))
        shares = [[each.count(token) / 600 for token in tokens] for each in seen]
        apart = sum(abs(a - b) for a, b in zip(*shares, strict=True)) / 2
        # Two samples of 600 from one distribution over k values differ by about sqrt(k / (pi * 600)).
        assert apart < 2 * (len(tokens) / (3.14 * 600)) ** 0.5


def test_what_is_refused(decided):
    model, trained = decided
    lossless(model, trained)
    for ids, more, message in (
        (prompt().repeat(2, 1), {}, "2 rows"),
        (prompt(), {"num_beams": 2}, "rows or beams"),
        (prompt(), {"use_cache": False}, "use_cache=False"),
        (
            prompt(),
            {"return_dict_in_generate": True, "output_hidden_states": True},
            "hidden_states",
        ),
        (prompt(), {"custom_generate": lambda *_, **__: None}, "a loop of its own"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            model.generate(ids, max_new_tokens=4, **GREEDY, **more)
    # By hand, without the loop that verifies, no token leaves.
    output = model(prompt(), use_cache=True)
    model(prompt(1, length=1), past_key_values=output.past_key_values)
    assert not model.dynadepth.exit_totals.left
