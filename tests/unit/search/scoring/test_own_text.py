"""Plans judged at every token of a text: each number against a forward of its own, however the work is split."""

import numpy as np
import pytest
import torch

from dynadepth.errors import PlanError, WrapError
from dynadepth.execution.executor import Skipped
from dynadepth.execution.sweep import Sweeper
from dynadepth.proving.prove import proved_stack
from dynadepth.wrapping.bake import bake
from dynadepth.wrapping.skipping import skips_of
from dynadepth.wrapping.wrap import wrap_model
from dynadepth_search.scoring import own_text
from dynadepth_search.scoring.own_text import Text, TextOutcomes, score_texts
from tests.tiny import VOCAB_SIZE, tiny_model
from tests.tiny_shortcuts import random_shortcuts, rebuilt_with_shortcuts

PLANS = np.array(
    [[1, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0], [1, 2, 0, 1], [0, 0, 1, 1], [1, 1, 1, 0]],
    dtype=np.uint8,
)


def random_texts(lengths, *, seed=0):
    """Return texts of these numbers of tokens of prompt and continuation."""
    rng = np.random.default_rng(seed)
    return [Text(rng.integers(2, VOCAB_SIZE, prompt + more), prompt) for prompt, more in lengths]


TEXTS = random_texts([(4, 5), (9, 1), (2, 12), (5, 0), (1, 3), (7, 6)])


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def stack(model):
    return proved_stack(model)


def log_probs(model, text):
    """Of the next token at every place of a text, by a plain forward of its own."""
    with torch.no_grad():
        logits = model(torch.from_numpy(text.ids)[None], use_cache=False).logits[0]
    return torch.log_softmax(logits.double(), dim=-1).numpy()


def expected_outcomes(model, texts, plans, shortcuts):
    """The definition: one forward for each plan and text, of a model that is built as the plan's visits."""
    longest = max(max(1, len(text.ids) - text.prompt) for text in texts)
    divergence = np.full((len(plans), len(texts), longest), np.nan)
    agreement = divergence.copy()
    for number, plan in enumerate(plans):
        other = (
            bake(model, plan)
            if shortcuts is None
            else (rebuilt_with_shortcuts(model, plan, shortcuts))
        )
        for row, text in enumerate(texts):
            base, found = log_probs(model, text), log_probs(other, text)
            # The token after the prompt, and after each token that follows it but the last.
            last = max(text.prompt, len(text.ids) - 1)
            for step, place in enumerate(range(text.prompt - 1, last)):
                p, q = base[place], found[place]
                divergence[number, row, step] = (np.exp(p) * (p - q)).sum()
                agreement[number, row, step] = p.argmax() == q.argmax()
    return divergence, agreement


def assert_equal(found, expected, *, bound=1e-9):
    for one, other in zip((found.divergence, found.agreement), expected, strict=True):
        assert one.shape == other.shape
        assert (np.isnan(one) == np.isnan(other)).all()
        assert np.nanmax(np.abs(one - other)) < bound


@pytest.mark.parametrize(
    ("prompt", "more", "places"),
    [(3, 0, [2]), (3, 1, [2]), (3, 2, [2, 3]), (1, 4, [0, 1, 2, 3]), (1, 0, [0])],
)
def test_which_places_are_compared(prompt, more, places):
    (text,) = random_texts([(prompt, more)])
    assert text.places.tolist() == places


class TestAgainstForwards:
    @pytest.fixture(scope="class", params=["plain", "shortcuts", "one without"])
    def both(self, request, model, stack):
        shortcuts = {
            "plain": None,
            "shortcuts": random_shortcuts(model),
            "one without": random_shortcuts(model, without=(1,)),
        }[request.param]
        skips = skips_of(shortcuts, stack.num_layers)
        return skips, expected_outcomes(model, TEXTS, PLANS, shortcuts)

    @pytest.mark.parametrize("sweep_tokens", [None, 1, 60, 200, 100_000])
    def test_every_number_is_that_of_a_forward(self, model, stack, both, sweep_tokens):
        skips, expected = both
        found = score_texts(model, stack, TEXTS, PLANS, skips=skips, sweep_tokens=sweep_tokens)
        assert_equal(found, expected)
        # The identity plan is the base; 0 and 1 to the last bit.
        assert np.nanmax(found.divergence[1]) < 1e-12
        assert np.nanmin(found.agreement[1]) == 1

    @pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 13, 20, 90])
    def test_however_few_logits_a_sweep_may_have(self, model, stack, both, rows, monkeypatch):
        """Down to less than one plan of one text, of which it must do one at a time."""
        monkeypatch.setattr(own_text, "_LOGIT_BYTES", 4 * VOCAB_SIZE * rows)
        sizes = watch_sweeps(monkeypatch)
        skips, expected = both
        assert_equal(score_texts(model, stack, TEXTS, PLANS, skips=skips), expected)
        for places, plans in sizes:
            # The base and one plan are the least.
            assert places <= rows or plans == 2

    @pytest.mark.parametrize("rows", [1, 2, 5])
    def test_however_few_rows_are_compared_at_once(self, model, stack, both, rows, monkeypatch):
        monkeypatch.setattr(own_text, "_LOGIT_ROWS", rows)
        skips, expected = both
        assert_equal(score_texts(model, stack, TEXTS, PLANS, skips=skips), expected)

    def test_the_order_of_texts_and_plans_is_the_callers(self, model, stack, both):
        skips, expected = both
        texts, plans = [3, 0, 5, 2, 1, 4], [5, 1, 0, 4, 2, 3]
        found = score_texts(
            model,
            stack,
            [TEXTS[row] for row in texts],
            PLANS[plans],
            skips=skips,
            sweep_tokens=150,
        )
        assert_equal(found, [each[plans][:, texts] for each in expected])


def watch_sweeps(monkeypatch):
    """Return a list that gets the scored places, and the plans of the first prompt, of each sweep."""
    sizes, sweep = [], Sweeper.sweep

    def watched(self, input_ids, attention_mask, plans, example, *, score, observer=None):
        sizes.append((len(score), int((np.asarray(example) == 0).sum())))
        return sweep(
            self, input_ids, attention_mask, plans, example, score=score, observer=observer
        )

    monkeypatch.setattr(Sweeper, "sweep", watched)
    return sizes


def test_the_token_limit_decides_how_many_texts_share_a_sweep(model, stack, monkeypatch):
    sizes = watch_sweeps(monkeypatch)
    score_texts(model, stack, TEXTS, PLANS, sweep_tokens=1)
    assert len(sizes) == len(TEXTS)
    sizes.clear()
    monkeypatch.setattr(own_text, "sweep_size", lambda device, most: (most, 100_000))
    score_texts(model, stack, TEXTS, PLANS, sweep_tokens=100_000)
    assert len(sizes) == 1
    assert sizes[0][0] == (len(PLANS) + 1) * sum(len(text.places) for text in TEXTS)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "falcon"])
def test_other_families(family):
    model = tiny_model(family)
    stack, shortcuts = proved_stack(model), random_shortcuts(model)
    found = score_texts(
        model, stack, TEXTS[:4], PLANS[:4], skips=skips_of(shortcuts, 4), sweep_tokens=120
    )
    # Attention of these families computes its softmax in float32.
    expected = expected_outcomes(model, TEXTS[:4], PLANS[:4], shortcuts)
    assert np.nanmax(np.abs(found.divergence - expected[0])) < 1e-4


def test_means_of_a_text_leave_out_what_is_behind_its_end(model, stack):
    found = score_texts(model, stack, TEXTS, PLANS)
    for measured, means in zip((found.divergence, found.agreement), found.by_text(), strict=True):
        for row, text in enumerate(TEXTS):
            count = len(text.places)
            assert np.isnan(measured[:, row, count:]).all()
            assert np.allclose(means[:, row], measured[:, row, :count].mean(axis=1))


@pytest.mark.parametrize("everywhere", [False, True])
def test_what_overflows_is_not_averaged_away(model, stack, everywhere):
    """A map whose logits overflow at one token of many is as useless as one that overflows everywhere."""

    def overflowing(states):
        broken = states.clone()
        broken[..., slice(None) if everywhere else -3, :] = float("nan")
        return broken

    skips = [Skipped(overflowing)] * 4
    found = score_texts(model, stack, TEXTS[2:3], PLANS[[5, 1]], skips=skips)
    assert np.isinf(found.divergence[0, 0]).sum() == (12 if everywhere else 1)
    divergence, _ = found.by_text()
    assert divergence[0, 0] == np.inf
    assert divergence[1, 0] < 1e-12


def test_outcomes_are_not_nan_where_the_base_excludes_tokens(model, stack):
    """A head that gives a token minus infinity, as some do for padding of the vocabulary."""
    head = model.get_output_embeddings()

    def excluded(_module, _args, output):
        output = output.clone()
        output[..., 5] = -float("inf")
        return output

    handle = head.register_forward_hook(excluded)
    try:
        found = score_texts(model, stack, TEXTS, PLANS)
    finally:
        handle.remove()
    assert np.isfinite(np.concatenate([each.ravel() for each in found.by_text()])).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions(dtype):
    model = tiny_model(dtype=dtype)
    stack = proved_stack(model)
    found = score_texts(model, stack, TEXTS, PLANS)
    assert {found.divergence.dtype, found.agreement.dtype} == {np.dtype(np.float64)}
    assert np.nanmin(found.divergence) >= 0
    assert np.nanmax(found.divergence[1]) < 1e-9
    assert set(np.unique(found.agreement[~np.isnan(found.agreement)])) <= {0.0, 1.0}


def test_the_model_is_left_as_it_was_also_after_an_error(model, stack):
    (text,) = TEXTS[:1]
    before, classes = log_probs(model, text), [type(each) for each in model.modules()]

    def failing(_states):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        score_texts(model, stack, [text], PLANS, skips=[Skipped(failing)] * 4)
    assert [type(each) for each in model.modules()] == classes
    assert (log_probs(model, text) == before).all()
    assert isinstance(score_texts(model, stack, [text], PLANS), TextOutcomes)


def test_what_is_refused(stack, model):
    with pytest.raises(PlanError):
        score_texts(model, stack, TEXTS, np.ones((2, 5), dtype=np.uint8))
    with pytest.raises(PlanError):
        score_texts(model, stack, TEXTS, np.full((1, 4), 3))
    wrapped = tiny_model()
    own = proved_stack(wrapped)
    wrap_model(wrapped, plan="0-2")
    with pytest.raises(WrapError):
        score_texts(wrapped, own, TEXTS, PLANS)
