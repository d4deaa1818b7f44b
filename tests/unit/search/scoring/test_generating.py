"""What a model says greedily: where its answers end, and that each prompt's is that of its own plan."""

import numpy as np
import pytest
import torch

from dynadepth.errors import PlanError
from dynadepth.plans import identity_plan
from dynadepth.wrapping.bake import bake
from dynadepth_search.scoring.generating import (
    answers_under_plans,
    continue_prompts,
    judge_answers,
)
from dynadepth_search.scoring.scorer import Scorer
from tests.tiny import VOCAB_SIZE, random_prompts, tiny_model
from tests.tiny_search import tiny_task
from tests.tiny_text import as_lists, word_tokenizer

PROMPTS = random_prompts([5, 2, 9, 3, 1, 7, 4, 4, 6, 2])


@pytest.fixture
def model():
    return tiny_model()


def greedy(model, prompt, new_tokens, ends=()):
    """Return the continuation of one prompt, a forward for each token."""
    ids = prompt.tolist()
    for _ in range(new_tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


class TestContinuations:
    def test_they_are_greedy_and_in_the_order_of_the_prompts(self, model):
        texts = continue_prompts(model, PROMPTS, new_tokens=5)
        for prompt, text in zip(PROMPTS, texts, strict=True):
            assert text.prompt == len(prompt)
            assert text.ids.tolist() == [*prompt.tolist(), *greedy(model, prompt, 5)]
            assert text.ids.dtype == np.int64

    def test_none_are_asked_for(self, model, monkeypatch):
        monkeypatch.setattr(model, "generate", None)
        texts = continue_prompts(model, PROMPTS, new_tokens=0)
        assert as_lists(texts) == [(len(prompt), prompt.tolist()) for prompt in PROMPTS]

    @pytest.mark.parametrize("several", [False, True])
    def test_an_answer_ends_with_the_token_that_ends_it(self, model, several):
        long = [greedy(model, prompt, 8) for prompt in PROMPTS]
        ends = [long[0][3], long[2][0]] if several else [long[0][3]]
        model.generation_config.eos_token_id = ends if several else ends[0]
        texts = continue_prompts(model, PROMPTS, new_tokens=8)
        lengths = set()
        for prompt, text in zip(PROMPTS, texts, strict=True):
            answer = text.ids[text.prompt :].tolist()
            assert answer == greedy(model, prompt, 8, ends)
            lengths.add(len(answer))
        assert len(lengths) > 1

    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.parametrize(
        "settings",
        [
            {"do_sample": True, "temperature": 5.0, "top_k": 3},
            {"repetition_penalty": 9.0},
            {"num_beams": 3},
            {"return_dict_in_generate": True},
            {"return_dict_in_generate": True, "output_scores": True},
            {"no_repeat_ngram_size": 1},
            {"min_new_tokens": 5},
            {"max_length": 4},
            {"suppress_tokens": list(range(50))},
            {"bad_words_ids": [[token] for token in range(50)]},
            {"use_cache": False},
        ],
    )
    def test_the_models_own_settings_of_generation_do_not_hold(self, model, settings):
        """Texts are what the model says, not what its publisher thinks of repetition."""
        end = greedy(model, PROMPTS[0], 5)[1]
        model.generation_config.eos_token_id = end
        expected = as_lists(continue_prompts(model, PROMPTS, new_tokens=5))
        model.generation_config.update(**settings)
        before = model.generation_config.to_dict()
        assert as_lists(continue_prompts(model, PROMPTS, new_tokens=5)) == expected
        assert model.generation_config.to_dict() == before

    @pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
    def test_no_text_is_longer_than_the_model_has_positions(self, family):
        model = tiny_model(family)
        assert model.config.max_position_embeddings == 128
        long, short, full = random_prompts([125, 4, 128])
        texts = continue_prompts(model, [long, short], new_tokens=6)
        assert [len(text.ids) for text in texts] == [128, 7]
        texts = continue_prompts(model, [full, short], new_tokens=6)
        assert as_lists(texts) == [(128, full.tolist()), (4, short.tolist())]

    def test_the_models_settings_come_back_after_an_error(self, model):
        own = model.generation_config
        with pytest.raises(IndexError):
            continue_prompts(model, [np.array([VOCAB_SIZE])], new_tokens=2)
        assert model.generation_config is own


class TestUnderPlans:
    PLANS = np.array([[1, 1, 1, 1], [0, 1, 2, 1], [1, 0, 1, 1]], dtype=np.uint8)

    def test_each_pair_is_answered_as_the_baked_model_answers_it(self, model):
        """Pairs of one plan share batches, of several lengths, and come back in their order."""
        tokenizer = word_tokenizer()
        scorer, examples = Scorer(model, tokenizer), tiny_task(5, kind="prompt").examples
        example = np.array([0, 1, 2, 3, 4, 0, 1, 2, 4, 3])
        plans = self.PLANS[[0, 1, 2, 0, 1, 1, 2, 0, 2, 1]]
        answers = answers_under_plans(scorer, examples, plans, example, new_tokens=6, batch_size=2)
        for index, plan, answer in zip(example, plans, answers, strict=True):
            ids = greedy(bake(model, plan), scorer.encode(examples[index]).prompt_ids, 6)
            said = tokenizer.decode(ids, skip_special_tokens=True)
            assert answer == said.lstrip().partition("\n\n")[0]
        assert len(set(answers)) > 5
        assert not hasattr(model, "dynadepth")

    def test_plans_of_few_pairs_share_batches_and_equal_pairs_are_answered_once(
        self, model, monkeypatch
    ):
        batches = []

        def count(wrapped, prompts, *, new_tokens):
            batches.append(len(prompts))
            return continue_prompts(wrapped, prompts, new_tokens=new_tokens)

        monkeypatch.setattr("dynadepth_search.scoring.generating.continue_prompts", count)
        scorer, examples = Scorer(model, word_tokenizer()), tiny_task(5, kind="prompt").examples
        example = np.array([0, 1, 2, 3, 4, 0, 1, 0, 0])
        plans = self.PLANS[[0, 0, 0, 0, 0, 1, 1, 2, 0]]
        answers = answers_under_plans(scorer, examples, plans, example, new_tokens=2, batch_size=3)
        # Three of the first plan's five, then what is left of all three plans.
        assert batches == [3, 3, 2]
        assert answers[8] == answers[0]

    def test_answers_are_compared_with_solutions_each_pair_once(self, model, monkeypatch):
        compared = []

        def compare(answer, solution):
            compared.append((answer, solution))
            return solution == "1"

        monkeypatch.setattr("dynadepth_search.scoring.generating.is_right", compare)
        scorer, examples = Scorer(model, word_tokenizer()), tiny_task(3, kind="solution").examples
        example, plans = np.array([0, 1, 2, 1]), self.PLANS[[0, 1, 2, 1]]
        answers, right = judge_answers(scorer, examples, plans, example, new_tokens=3)
        assert answers == answers_under_plans(scorer, examples, plans, example, new_tokens=3)
        assert right == [False, True, False, True]
        assert compared == list(zip(answers[:3], "012", strict=True))

    def test_nothing_is_asked(self, model):
        none = np.zeros((0, 4), dtype=np.uint8)
        scorer = Scorer(model, word_tokenizer())
        assert answers_under_plans(scorer, [], none, np.zeros(0, dtype=int), new_tokens=2) == []

    def test_the_model_is_unwrapped_after_an_error(self, model, monkeypatch):
        scorer, examples = Scorer(model, word_tokenizer()), tiny_task(2).examples
        with pytest.raises(PlanError):
            answers_under_plans(scorer, examples, [[1, 1, 3, 1]], np.array([0]), new_tokens=2)
        monkeypatch.setattr("dynadepth_search.scoring.generating.continue_prompts", None)
        with pytest.raises(TypeError):
            answers_under_plans(scorer, examples, [identity_plan(4)], np.array([0]), new_tokens=2)
        assert not hasattr(model, "dynadepth")
