"""Rewards of the scorer against one unpadded forward of the baked model for each answer, in float64."""

import numpy as np
import pytest
import torch

from dynadepth.plans import identity_plan
from dynadepth.wrapping.bake import bake
from dynadepth_search.data.encoding import prompt_text
from dynadepth_search.data.tasks import Example
from dynadepth_search.scoring.scorer import Scorer
from tests.tiny import tiny_model
from tests.tiny_text import word_tokenizer

TOLERANCE = 1e-9
BAKED = {}
TABLES = {}
NUM_LAYERS = 4
CHOICES = [
    # Answers that share their beginning, one that begins another, one of one token, a long prompt.
    Example("Is it so", ("yes", "yesterday", "no"), 1),
    Example("Which letter comes first in the alphabet?", ("b", "a"), 1),
    Example("Line\n", ("up", "upon it all"), 0),
    Example("x", ("one two three", "one two", "four", "five"), 3),
]
COMPLETIONS = [
    Example("a b c d", completion="e f"),
    Example("Say", completion="x"),
    Example("p\n", completion="qrs"),
]
PROMPTS = [Example("Once upon a time"), Example("x"), Example("def main(): return")]


def reference_log_probs(model, plan, ids):
    plan_key, key = (model, bytes(plan)), (model, bytes(plan), tuple(ids))
    if plan_key not in BAKED:
        BAKED[plan_key] = bake(model, plan)
    if key not in TABLES:
        with torch.no_grad():
            logits = BAKED[plan_key](torch.tensor([ids])).logits[0]
        TABLES[key] = torch.log_softmax(logits.double(), dim=-1)
    return TABLES[key]


def ids_of(tokenizer, text, answer):
    prompt = tokenizer(text)["input_ids"]
    joined = answer if text[-1].isspace() else " " + answer
    return prompt, tokenizer(joined, add_special_tokens=False)["input_ids"]


def answer_log_prob(model, plan, prompt, tail):
    table = reference_log_probs(model, plan, prompt + tail)
    here = [table[len(prompt) - 1 + i] for i in range(len(tail))]
    greedy = all(int(row.argmax()) == token for row, token in zip(here, tail, strict=True))
    return float(sum(row[token] for row, token in zip(here, tail, strict=True))), greedy


def log_softmax(values):
    return torch.log_softmax(torch.tensor(values, dtype=torch.float64), dim=0).numpy()


def pairs(examples, *, seed=0, count=30):
    generator = np.random.default_rng(seed)
    plans = generator.choice([0, 1, 1, 2], size=(count, NUM_LAYERS)).astype(np.uint8)
    plans[plans.sum(axis=1) == 0] = 1
    plans[:2] = 1
    return plans, generator.integers(len(examples), size=count)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(bos=True)


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3"])
def model(request):
    return tiny_model(request.param, num_layers=NUM_LAYERS)


@pytest.mark.parametrize("scoring", ["raw", "normalized", "letter"])
@pytest.mark.parametrize(
    "limits", [{}, {"max_logit_bytes": 4 * 97 * 40}, {"max_tokens": 150}, {"sweep_tokens": 1}]
)
def test_choices(model, tokenizer, scoring, limits):
    plans, example = pairs(CHOICES)
    out = Scorer(model, tokenizer, scoring, **limits).outcomes(CHOICES, plans, example)

    def scores_of(item, plan):
        text = prompt_text(item, scoring)
        answers = list("ABCD")[: len(item.choices)] if scoring == "letter" else item.choices
        scores = [answer_log_prob(model, plan, *ids_of(tokenizer, text, one))[0] for one in answers]
        if scoring == "normalized":
            scores = [score / len(one.encode()) for score, one in zip(scores, answers, strict=True)]
        return np.array(scores)

    for n, (plan, index) in enumerate(zip(plans, example, strict=True)):
        item = CHOICES[index]
        scores, base = scores_of(item, plan), scores_of(item, identity_plan(NUM_LAYERS))
        np.testing.assert_allclose(out.scores[n], scores, rtol=0, atol=TOLERANCE)
        log_probs, base_log_probs = log_softmax(scores), log_softmax(base)
        assert out.reward[n] == pytest.approx(log_probs[item.answer], abs=TOLERANCE)
        divergence = (np.exp(base_log_probs) * (base_log_probs - log_probs)).sum()
        assert out.preserve[n] == pytest.approx(-divergence, abs=TOLERANCE)
        assert out.answer[n] == scores.argmax()
        assert out.correct[n] == (scores.argmax() == item.answer)
        assert out.agrees[n] == (scores.argmax() == base.argmax())
        assert out.agreement[n] == out.agrees[n]
        assert out.divergence[n] == -out.preserve[n]
        variation = np.abs(np.exp(base_log_probs) - np.exp(log_probs)).sum() / 2
        assert out.total_variation[n] == pytest.approx(variation, abs=TOLERANCE)
    assert len(set(out.agrees.tolist())) == len(set(out.correct.tolist())) == 2


@pytest.mark.parametrize("limits", [{}, {"max_logit_bytes": 1, "max_base_bytes": 1}])
def test_completions(model, tokenizer, limits):
    plans, example = pairs(COMPLETIONS)
    # What the model itself would say, so that greedy decoding is right for some plan.
    prompt = tokenizer("a b c d")["input_ids"]
    said = [int(reference_log_probs(model, identity_plan(NUM_LAYERS), prompt)[-1].argmax())]
    said.append(
        int(reference_log_probs(model, identity_plan(NUM_LAYERS), prompt + said)[-1].argmax())
    )
    own = tokenizer.decode(said)
    examples = list(COMPLETIONS)
    if own.startswith(" "):
        examples[0] = Example("a b c d", completion=own[1:])
    out = Scorer(model, tokenizer, **limits).outcomes(examples, plans, example)
    for n, (plan, index) in enumerate(zip(plans, example, strict=True)):
        item = examples[index]
        prompt, tail = ids_of(tokenizer, item.prompt, item.completion)
        total, greedy = answer_log_prob(model, plan, prompt, tail)
        assert out.scores[n].shape == (1,)
        assert out.scores[n][0] == out.reward[n]
        assert out.reward[n] == pytest.approx(total / len(tail), abs=TOLERANCE)
        assert out.correct[n] == greedy
        check_next_token(out, n, model, plan, prompt)
        check_differences(out, n, model, plan, prompt, tail)
    assert len(np.unique(out.agreement)) > 2


@pytest.mark.parametrize("limits", [{}, {"max_logit_bytes": 1, "max_base_bytes": 1}])
def test_prompts_alone(model, tokenizer, limits):
    plans, example = pairs(PROMPTS)
    out = Scorer(model, tokenizer, **limits).outcomes(PROMPTS, plans, example)
    for n, (plan, index) in enumerate(zip(plans, example, strict=True)):
        prompt = tokenizer(PROMPTS[index].prompt)["input_ids"]
        check_next_token(out, n, model, plan, prompt)
        check_differences(out, n, model, plan, prompt, [])
        assert out.scores[n].size == 0
        assert np.isnan(out.reward[n])
        assert out.correct[n] == out.agrees[n]
    assert len(set(out.agrees.tolist())) == 2


def check_next_token(out, n, model, plan, prompt):
    base = reference_log_probs(model, identity_plan(NUM_LAYERS), prompt)[-1]
    given = reference_log_probs(model, plan, prompt)[-1]
    assert out.preserve[n] == pytest.approx(
        -float((base.exp() * (base - given)).sum()), abs=TOLERANCE
    )
    assert out.answer[n] == int(given.argmax())
    assert out.agrees[n] == (int(given.argmax()) == int(base.argmax()))


def check_differences(out, n, model, plan, prompt, tail):
    """Compare what is averaged over the answer's tokens: the vocabulary before each of them."""
    places = slice(len(prompt) - 1, len(prompt) - 1 + max(1, len(tail)))
    base = reference_log_probs(model, identity_plan(NUM_LAYERS), prompt + tail)[places]
    given = reference_log_probs(model, plan, prompt + tail)[places]
    divergence = (base.exp() * (base - given)).sum(dim=1).mean()
    assert out.divergence[n] == pytest.approx(float(divergence), abs=TOLERANCE)
    variation = (base.exp() - given.exp()).abs().sum(dim=1).mean() / 2
    assert out.total_variation[n] == pytest.approx(float(variation), abs=TOLERANCE)
    agreement = (base.argmax(dim=1) == given.argmax(dim=1)).double().mean()
    assert out.agreement[n] == pytest.approx(float(agreement), abs=1e-15)


def test_the_identity_is_exact_and_free_when_known(model, tokenizer):
    scorer = Scorer(model, tokenizer)
    ones = np.ones((len(CHOICES), NUM_LAYERS), dtype=np.uint8)
    first = scorer.outcomes(CHOICES, ones, np.arange(len(CHOICES)))
    assert (first.preserve == 0).all()
    assert (first.divergence == 0).all()
    assert (first.total_variation == 0).all()
    assert (first.agreement == 1).all()
    assert not np.signbit(first.preserve).any()
    assert first.agrees.all()
    assert first.executed_visits == first.naive_visits > 0
    again = scorer.base(CHOICES)
    assert again.executed_visits == again.naive_visits == 0
    np.testing.assert_array_equal(first.reward, again.reward)
    scorer.forget()
    assert scorer.base(CHOICES).executed_visits == first.executed_visits


def test_bfloat16_is_normalised_in_float32(tokenizer):
    model = tiny_model(num_layers=NUM_LAYERS, dtype=torch.bfloat16)
    example = Example("Is it so", ("yes", "no"), 0)
    out = Scorer(model, tokenizer).base([example])
    for index, choice in enumerate(example.choices):
        prompt, tail = ids_of(tokenizer, example.prompt, choice)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tail])).logits[0]
        table = torch.log_softmax(logits.float(), dim=-1)
        total = sum(float(table[len(prompt) - 1 + i, token]) for i, token in enumerate(tail))
        # A padded batch moves bfloat16 logits; a norm in bfloat16 would be off by 0.03 for each token.
        assert out.scores[0][index] == pytest.approx(total, abs=0.25)
