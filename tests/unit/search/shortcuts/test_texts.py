"""The model's own continuations: what they are, where they end, and that a killed run goes on to the same ones."""

import itertools
import json

import numpy as np
import pytest
import torch

from dynadepth.errors import LabelError
from dynadepth_search.progress import silent
from dynadepth_search.shortcuts import texts as texts_module
from dynadepth_search.shortcuts.spec import ShortcutSpec
from dynadepth_search.scoring.own_text import continue_prompts
from dynadepth_search.shortcuts.texts import TextFile, batches_of
from tests.tiny import VOCAB_SIZE, tiny_model

SPEC = ShortcutSpec(new_tokens=6, batch_size=2)


class Killed(BaseException):
    """Stands for a signal."""


def random_prompts(lengths, *, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCAB_SIZE, length) for length in lengths]


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


def as_lists(texts):
    return [(text.prompt, text.ids.tolist()) for text in texts]


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


class TestBatches:
    def test_rows_of_similar_length_share_one(self):
        assert batches_of([5, 2, 9, 3, 1], 2) == [[4, 1], [3, 0], [2]]
        assert batches_of([3, 3, 3], 2) == [[0, 1], [2]]
        assert batches_of([], 2) == []


class TestJournal:
    @pytest.fixture
    def expected(self, model, tmp_path):
        texts = TextFile(tmp_path / "calm.jsonl").continued(model, PROMPTS, SPEC)
        return as_lists(texts), (tmp_path / "calm.jsonl").read_bytes()

    def test_it_holds_every_continuation(self, expected):
        texts, data = expected
        lines = [json.loads(line) for line in data.splitlines()]
        assert sorted(line["prompt"] for line in lines) == list(range(len(PROMPTS)))
        for line in lines:
            prompt, ids = texts[line["prompt"]]
            assert ids[prompt:] == line["continuation"]

    def test_what_is_there_is_not_made_again(self, model, tmp_path, expected, monkeypatch):
        monkeypatch.setattr(texts_module, "continue_prompts", None)
        again = TextFile(tmp_path / "calm.jsonl").continued(model, PROMPTS, SPEC)
        assert as_lists(again) == expected[0]
        assert (tmp_path / "calm.jsonl").read_bytes() == expected[1]

    @pytest.mark.parametrize("written", range(11))
    def test_a_kill_after_any_line_goes_on_to_the_same_bytes(
        self, model, tmp_path, expected, monkeypatch, written
    ):
        file = TextFile(tmp_path / "killed.jsonl")
        append, counter = texts_module.Journal.append, itertools.count()

        def killed(self, row):
            if next(counter) == written:
                raise Killed
            append(self, row)

        with monkeypatch.context() as patched:
            patched.setattr(texts_module.Journal, "append", killed)
            if written < len(PROMPTS):
                with pytest.raises(Killed):
                    file.continued(model, PROMPTS, SPEC)
        made = []

        def counted(model, prompts, **how):
            made.append(len(prompts))
            return continue_prompts(model, prompts, **how)

        monkeypatch.setattr(texts_module, "continue_prompts", counted)
        assert as_lists(file.continued(model, PROMPTS, SPEC)) == expected[0]
        assert (tmp_path / "killed.jsonl").read_bytes() == expected[1]
        # Whole batches, of which four prompts share one, and finished ones not again.
        if written < len(PROMPTS):
            assert made == [4, 4, 2][written // 4 :]

    @pytest.mark.parametrize("cut", [1, 5, 20, 60, 150])
    def test_a_torn_last_line_is_made_again(self, model, tmp_path, expected, cut):
        file = tmp_path / "torn.jsonl"
        file.write_bytes(expected[1][:-cut])
        assert as_lists(TextFile(file).continued(model, PROMPTS, SPEC)) == expected[0]
        assert file.read_bytes() == expected[1]

    @pytest.mark.parametrize(
        "line",
        [
            "{}",
            "[]",
            "nonsense",
            '{"prompt": 0}',
            '{"prompt": "0", "continuation": []}',
            '{"prompt": -1, "continuation": []}',
            '{"prompt": 0, "continuation": 5}',
            '{"prompt": 0, "continuation": [1.5]}',
            '{"prompt": 0, "continuation": [true]}',
            '{"prompt": 0, "continuation": [-2]}',
            '{"prompt": 0, "continuation": [], "more": 1}',
        ],
    )
    def test_an_altered_line_is_named(self, model, tmp_path, expected, line):
        file = tmp_path / "altered.jsonl"
        file.write_bytes(line.encode() + b"\n" + expected[1])
        with pytest.raises(LabelError, match=r"altered.jsonl, line 1.*delete the file and fit aga"):
            TextFile(file).continued(model, PROMPTS, SPEC)

    @pytest.mark.parametrize(
        "line",
        [
            f'{{"prompt": {len(PROMPTS)}, "continuation": []}}',
            f'{{"prompt": 0, "continuation": [{VOCAB_SIZE}]}}',
            f'{{"prompt": 0, "continuation": {[5] * 7}}}',
        ],
    )
    def test_a_line_that_cannot_be_of_this_fit_is_named(self, model, tmp_path, expected, line):
        file = tmp_path / "altered.jsonl"
        file.write_bytes(line.encode() + b"\n" + expected[1])
        with pytest.raises(LabelError, match=r"altered.jsonl.*delete the file and fit again"):
            TextFile(file).continued(model, PROMPTS, SPEC)

    def test_progress(self, model, tmp_path):
        said = []
        TextFile(tmp_path / "new.jsonl").continued(
            model, PROMPTS, SPEC, lambda *what: said.append(what)
        )
        assert said == [("continuing prompts", done, 10) for done in (0, 4, 8, 10)]
        TextFile(tmp_path / "other.jsonl").continued(model, PROMPTS, SPEC, silent)
