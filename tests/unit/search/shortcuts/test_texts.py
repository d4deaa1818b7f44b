"""The model's own continuations: what they are, where they end, and that a killed run goes on to the same ones."""

import itertools
import json

import pytest

from dynadepth.errors import LabelError
from dynadepth_search.progress import silent
from dynadepth_search.scoring.generating import continue_prompts
from dynadepth_search.shortcuts import texts as texts_module
from dynadepth_search.shortcuts.texts import TextFile
from tests.tiny import VOCAB_SIZE, random_prompts, tiny_model
from tests.tiny_text import as_lists

HOW = {"new_tokens": 6, "batch_size": 4}


class Killed(BaseException):
    """Stands for a signal."""


PROMPTS = random_prompts([5, 2, 9, 3, 1, 7, 4, 4, 6, 2])


@pytest.fixture
def model():
    return tiny_model()


class TestJournal:
    @pytest.fixture
    def expected(self, model, tmp_path):
        texts = TextFile(tmp_path / "calm.jsonl").continued(model, PROMPTS, **HOW)
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
        again = TextFile(tmp_path / "calm.jsonl").continued(model, PROMPTS, **HOW)
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
                    file.continued(model, PROMPTS, **HOW)
        made = []

        def counted(model, prompts, **how):
            made.append(len(prompts))
            return continue_prompts(model, prompts, **how)

        monkeypatch.setattr(texts_module, "continue_prompts", counted)
        assert as_lists(file.continued(model, PROMPTS, **HOW)) == expected[0]
        assert (tmp_path / "killed.jsonl").read_bytes() == expected[1]
        # Whole batches, of which four prompts share one, and finished ones not again.
        if written < len(PROMPTS):
            assert made == [4, 4, 2][written // 4 :]

    @pytest.mark.parametrize("cut", [1, 5, 20, 60, 150])
    def test_a_torn_last_line_is_made_again(self, model, tmp_path, expected, cut):
        file = tmp_path / "torn.jsonl"
        file.write_bytes(expected[1][:-cut])
        assert as_lists(TextFile(file).continued(model, PROMPTS, **HOW)) == expected[0]
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
            TextFile(file).continued(model, PROMPTS, **HOW)

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
            TextFile(file).continued(model, PROMPTS, **HOW)

    def test_progress(self, model, tmp_path):
        said = []
        TextFile(tmp_path / "new.jsonl").continued(
            model, PROMPTS, **HOW, progress=lambda *what: said.append(what)
        )
        assert said == [("continuing prompts", done, 10) for done in (0, 4, 8, 10)]
        TextFile(tmp_path / "other.jsonl").continued(model, PROMPTS, **HOW, progress=silent)
