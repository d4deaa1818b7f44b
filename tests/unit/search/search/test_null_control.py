"""The null control: the same search for answers of other prompts, and the share of fixes that it says luck explains."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynadepth.errors import LabelError, TaskError
from dynadepth.plans import plan_text
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.search.null_control import (
    Fixes,
    NullControl,
    search_null,
    shuffle_answers,
)
from dynadepth_search.search.null_files import REPORT, luck_text
from dynadepth_search.search.per_prompt import search_prompts
from dynadepth_search.storage.labels import read_labels
from tests.tiny import tiny_model
from tests.tiny_search import folder_bytes, tiny_spec, tiny_task
from tests.tiny_text import word_tokenizer

COUNT = 12


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float32)


@pytest.fixture(scope="module")
def labels(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    search_prompts(model, word_tokenizer(), task(), folder, tiny_spec(objective="reward"))
    return folder


@pytest.fixture(scope="module")
def control(model, labels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("null")
    return folder, search_null(model, word_tokenizer(), labels, folder)


def task():
    return replace(tiny_task(COUNT), scoring="letter")


def control_of(real_fixed, null_fixed, *, wrong=20, count=40):
    def fixes(fixed):
        flags = np.arange(count) < fixed
        return Fixes(np.arange(count) < wrong, flags, flags)

    return NullControl(fixes(real_fixed), fixes(null_fixed), 0, (8.0, 8.0), 0)


@given(
    st.lists(
        st.integers(2, 4).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))),
        min_size=1,
        max_size=30,
    ),
    st.integers(0, 5),
)
def test_answers_are_shuffled_between_prompts_with_equally_many_choices(drawn, seed):
    examples = tuple(
        Example(f"{row}", tuple("abcd"[:size]), answer) for row, (size, answer) in enumerate(drawn)
    )
    found = shuffle_answers(Task("t", examples, "letter"), seed)
    assert found == shuffle_answers(Task("t", examples, "letter"), seed)
    assert found.scoring == "letter"
    assert [(item.prompt, item.choices) for item in found.examples] == [
        (item.prompt, item.choices) for item in examples
    ]

    def key(items):
        return Counter((len(item.choices), item.answer) for item in items)

    assert key(found.examples) == key(examples)
    assert all(item.answer < len(item.choices) for item in found.examples)


def test_every_answer_is_equally_likely_to_come():
    examples = tuple(Example(f"{row}", ("a", "b", "c"), row % 3) for row in range(30))
    counts = Counter(
        shuffle_answers(Task("t", examples), seed).examples[0].answer for seed in range(300)
    )
    assert all(75 <= counts[answer] <= 125 for answer in range(3))


def test_completions_are_shuffled_too():
    given_task = tiny_task(9, kind="completion")
    found = shuffle_answers(given_task, 0)
    assert Counter(item.completion for item in found.examples) == Counter(
        item.completion for item in given_task.examples
    )
    assert found.examples != given_task.examples


def test_tasks_that_cannot_be_shuffled():
    with pytest.raises(TaskError, match="has prompts alone, and no answers to shuffle"):
        shuffle_answers(tiny_task(3, kind="prompt"), 0)
    twice = (
        Example("a", completion="b"),
        Example("a", completion="c"),
        Example("d", completion="c"),
    )
    # Both prompts "a" get "c".
    seed = next(n for n in range(99) if 0 not in np.random.default_rng(n).permutation(3)[:2])
    with pytest.raises(TaskError, match="get the same completion; give another seed"):
        shuffle_answers(Task("t", twice), seed)


def test_the_control_is_the_same_search_with_other_answers(control, labels):
    folder, _ = control
    real, null = read_labels(labels), read_labels(folder)
    assert null.examples == shuffle_answers(task(), 0).examples
    assert null.manifest.search == real.manifest.search
    assert null.manifest.depth_penalty == real.manifest.depth_penalty
    assert null.manifest.prior.to_dict() == real.manifest.prior.to_dict()
    assert null.manifest.task["name"] == "colours, answers shuffled"
    # A prompt that keeps its answer keeps its search.
    for ours, theirs, tried, again in zip(
        real.examples, null.examples, real.evaluated, null.evaluated, strict=True
    ):
        if ours == theirs:
            np.testing.assert_array_equal(tried.plans, again.plans)


def test_fixes_are_wrong_answers_that_labels_put_right(control, labels, model):
    folder, found = control
    for fixes, place in ((found.real, labels), (found.null, folder)):
        known = read_labels(place)
        scorer = Scorer(model, word_tokenizer(), "letter")
        base = scorer.base(known.examples).correct
        np.testing.assert_array_equal(fixes.wrong, ~base)
        for name, plans in (("raw", known.raw_plans), ("confirmed", known.plans)):
            right = scorer.outcomes(known.examples, plans, np.arange(COUNT)).correct
            np.testing.assert_array_equal(getattr(fixes, name), ~base & right)
    assert found.real.raw.sum() > 0
    same = [
        ours.answer == theirs.answer
        for ours, theirs in zip(task().examples, shuffle_answers(task(), 0).examples, strict=True)
    ]
    assert found.own_answers == sum(same)
    assert json.loads((folder / REPORT).read_text()) == found.to_dict()


def test_fixes_of_generated_answers_are_those_that_the_labels_hold(model, tmp_path, monkeypatch):
    """An answer is right here if its last letter is that of the solution's parity; solutions move with completions."""

    def compare(answer, solution):
        return ord(answer[-1:] or " ") % 2 == int(solution) % 2

    monkeypatch.setattr("dynadepth_search.scoring.generating.is_right", compare)
    problems = tiny_task(COUNT, kind="solution")
    spec = tiny_spec(objective="reward", new_tokens=8, depth_penalty=0.5)
    search_prompts(model, word_tokenizer(), problems, tmp_path / "labels", spec)
    found = search_null(model, word_tokenizer(), tmp_path / "labels", tmp_path / "null")
    shuffled = read_labels(tmp_path / "null")
    assert shuffled.examples == shuffle_answers(problems, 0).examples
    assert {(item.completion, item.solution) for item in shuffled.examples} == {
        (item.completion, item.solution) for item in problems.examples
    }
    for fixes, known in ((found.real, read_labels(tmp_path / "labels")), (found.null, shuffled)):
        right = [{item.plan: item.right[0] for item in each} for each in known.candidates]
        wrong = np.array([not each["1111"] for each in right])
        np.testing.assert_array_equal(fixes.wrong, wrong)
        for name, plans in (("raw", known.raw_plans), ("confirmed", known.plans)):
            good = [each[plan_text(plan)] for each, plan in zip(right, plans, strict=True)]
            np.testing.assert_array_equal(getattr(fixes, name), wrong & np.array(good))
    assert found.real.wrong.any()
    assert found.real.raw.sum() + found.null.raw.sum() > 0


def test_a_control_goes_on_and_another_is_refused(control, labels, model, tmp_path):
    folder, found = control
    before = folder_bytes(folder)
    assert search_null(model, word_tokenizer(), labels, folder).to_dict() == found.to_dict()
    assert folder_bytes(folder) == before
    with pytest.raises(LabelError, match=r"made with task\.sha256"):
        search_null(model, word_tokenizer(), labels, folder, seed=1)
    other = tmp_path / "other"
    spec = tiny_spec(objective="reward", depth_penalty=3.0)
    search_prompts(model, word_tokenizer(), task(), other, spec)
    with pytest.raises(LabelError, match="made with depth_penalty"):
        search_null(model, word_tokenizer(), other, folder)
    assert folder_bytes(folder) == before


def test_a_control_that_was_interrupted_is_the_same_in_the_end(control, labels, model, tmp_path):
    def stop(stage, done, _total):
        if (stage == "search" and done >= 4) or stage.startswith("checking"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_null(model, word_tokenizer(), labels, tmp_path, progress=stop)
    search_null(model, word_tokenizer(), labels, tmp_path)
    assert folder_bytes(tmp_path) == folder_bytes(control[0])


def test_labels_of_the_base_models_own_answers_have_no_fixes(model, tmp_path):
    search_prompts(model, word_tokenizer(), tiny_task(4), tmp_path / "labels", tiny_spec())
    with pytest.raises(TaskError, match="with the objective preserve, which asks for the base"):
        search_null(model, word_tokenizer(), tmp_path / "labels", tmp_path / "null")
    assert not (tmp_path / "null").exists()


def test_the_share_that_luck_explains():
    found = control_of(10, 5)
    assert found.luck("raw").mean == pytest.approx(0.5)
    assert found.luck("raw").low < 0.5 < found.luck("raw").high
    assert found.to_dict()["real"]["raw"]["rate"]["mean"] == pytest.approx(0.5)
    assert "10 of 20 fixed, with shuffled answers 5 of 20 fixed" in luck_text(
        found.to_dict(), "raw"
    )
    # Of nothing there is no share.
    none = control_of(0, 5)
    assert none.to_dict()["luck"] == {"raw": None, "confirmed": None}
    assert luck_text(none.to_dict(), "confirmed").endswith("undefined")
    assert control_of(0, 0, wrong=0).to_dict()["real"]["raw"] == {"fixes": 0, "rate": None}
    assert control_of(1, 5).to_dict()["luck"]["raw"]["high"] is None
