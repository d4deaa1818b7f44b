"""Variants of an example ask the same: the right answer stays right, and no two are alike."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynadepth.errors import ConfigError
from dynadepth_search.data.encoding import encode_example
from dynadepth_search.data.tasks import Example
from dynadepth_search.data.variants import (
    check_wording,
    continued,
    in_other_orders,
    in_other_words,
)
from tests.tiny_text import word_tokenizer

CHOICES = ("red", "green", "blue", "grey", "black", "white")


@given(st.integers(2, 6), st.integers(0, 9), st.data())
def test_in_other_orders_every_choice_has_another_place(size, count, data):
    answer = data.draw(st.integers(0, size - 1))
    example = Example("Which?", CHOICES[:size], answer)
    variants = in_other_orders(example, count)
    assert len(variants) == min(count, size - 1)
    for variant in variants:
        assert sorted(variant.choices) == sorted(example.choices)
        assert variant.choices[variant.answer] == example.choices[answer]
    places = zip(*(each.choices for each in (example, *variants)), strict=True)
    assert all(len(set(place)) == len(variants) + 1 for place in places)


def test_other_words_stand_around_the_prompt():
    example = Example("How {many}?", completion=" two")
    variant = in_other_words(example, "Read.\n{prompt}")
    assert variant == Example("Read.\nHow {many}?", completion=" two")


@pytest.mark.parametrize(
    "wording", ["", "Read.", "{prompt}", "{prompt} {prompt}", 3, "\ud800{prompt}"]
)
def test_a_wording_that_is_none(wording):
    with pytest.raises(ConfigError, match="wording is"):
        check_wording(wording)


def test_a_continued_prompt_is_read_after_each_token():
    tokenizer = word_tokenizer()
    example = Example("red green", completion=" blue")
    alone = encode_example(tokenizer, Example("red green"), "raw", None)
    encoded = encode_example(tokenizer, continued(example, (5, 7, 9)), "raw", None)
    size = len(alone.prompt_ids)
    row = encoded.rows[0].tolist()
    assert row[:size] == alone.prompt_ids.tolist()
    assert row[size:] == [5, 7, 9]
    assert encoded.places.tolist() == [[0, size], [0, size + 1], [0, size + 2]]
