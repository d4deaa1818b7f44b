"""Prompts of three kinds: how many of each there are, and that no text is on both sides."""

import hashlib
import json
import zipfile
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynadepth.errors import TaskError
from dynadepth_search.data.downloads import Wheel
from dynadepth_search.data.kinds import KINDS, fetch_kinds
from dynadepth_search.data.questions import QUESTION_SETS

PASSAGES = 40
QUESTIONS_OF_A_PASSAGE = 3


@pytest.fixture(scope="module")
def fetch_some(tmp_path_factory):
    """Call `fetch_kinds` on a wheel made here, whose passages have three questions each."""
    folder = tmp_path_factory.mktemp("kinds")
    choice = {"options": "A. up\nB. down", "answer": "B. down"}
    sets = {
        "CommonsenseQA": [
            {"question": f"Where do you put number {number}?", **choice} for number in range(60)
        ],
        "PIQA": [{"question": f"Make thing number {number}.", **choice} for number in range(50)],
        "BoolQ": [
            {
                "passage": " ".join(f"w{passage}x{word}" for word in range(20)),
                "question": f"is {question} right",
                "answer": True,
            }
            for passage in range(PASSAGES)
            for question in range(QUESTIONS_OF_A_PASSAGE)
        ],
    }
    source = folder / "source.whl"
    with zipfile.ZipFile(source, "w") as archive:
        for name, lines in sets.items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            archive.writestr(QUESTION_SETS[name], text)
    wheel = Wheel(
        project="things",
        version="1.0",
        filename="things-1.0-py3-none-any.whl",
        sha256=hashlib.sha256(source.read_bytes()).hexdigest(),
        member="things/nothing.jsonl",
    )

    def put(wheel, place):
        (place / wheel.filename).write_bytes(source.read_bytes())

    def fetched(**sizes):
        return fetch_kinds(folder / "cache", wheel=wheel, fetch=put, **sizes)

    return fetched


@settings(max_examples=30, deadline=None)
@given(train=st.integers(1, 60), heldout=st.integers(1, 60), seed=st.integers(0, 5))
def test_kinds_are_equally_frequent_and_no_text_is_on_both_sides(fetch_some, train, heldout, seed):
    parts = fetch_some(train=train, heldout=heldout, seed=seed)
    texts = []
    for part, count in zip(parts, (train, heldout), strict=True):
        frequencies = Counter(part.kinds)
        assert sum(frequencies.values()) == len(part.task.examples) == count
        most = max(frequencies.values())
        assert most - min(frequencies[kind] for kind in KINDS) <= 1
        texts += [example.prompt for example in part.task.examples]
    assert len(set(texts)) == len(texts)


def test_a_passage_that_several_questions_share_is_one_prompt(fetch_some):
    parts = fetch_some(train=75, heldout=60)
    passages = [
        example.prompt.split("x")[0]
        for part in parts
        for example, kind in zip(part.task.examples, part.kinds, strict=True)
        if kind == "passage"
    ]
    assert len(passages) == len(set(passages)) == PASSAGES
    # The question below the passage is no part of the prompt.
    assert not any("right" in example.prompt for part in parts for example in part.task.examples)


def test_prompts_look_like_their_kind(fetch_some):
    part, _ = fetch_some(train=9, heldout=9)
    by_kind = dict(zip(part.kinds, part.task.examples, strict=True))
    assert by_kind["question"].prompt.startswith("Question: Where do you put number ")
    assert by_kind["question"].prompt.endswith("?\nAnswer:")
    assert by_kind["instruction"].prompt.endswith(".\nSteps:\n1.")
    words = by_kind["passage"].prompt.split(" ")
    assert 10 <= len(words) < 20
    assert all(example.choices is None for example in part.task.examples)


def test_a_seed_draws_the_same_prompts_again_and_another_draws_others(fetch_some):
    first, again, other = (fetch_some(train=30, heldout=30, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first[0].task.examples != other[0].task.examples


@pytest.mark.parametrize(("train", "heldout", "what"), [(30, 500, "heldout"), (500, 30, "train")])
def test_more_prompts_than_there_are_is_an_error(fetch_some, train, heldout, what):
    with pytest.raises(
        TaskError,
        match=f"{train} training and {heldout} held-out prompts wanted, but there are only .*for {what}; ask",
    ):
        fetch_some(train=train, heldout=heldout)
