"""Prompt lookup drafts what followed the newest tokens the last time that they stood in the text."""

from hypothesis import given
from hypothesis import strategies as st

from dynadepth.drafting.prompt_lookup import PromptLookup


def searched(tokens: list[int], most: int) -> list[int]:
    """The definition, by a search of the whole text."""
    for size in (3, 2):
        for place in range(len(tokens) - 1, size - 1, -1):
            if len(tokens) >= size and tokens[place - size : place] == tokens[-size:]:
                return tokens[place : place + most]
    return []


@given(
    st.lists(st.integers(0, 3), max_size=40),
    st.lists(st.integers(0, 40), max_size=4),
    st.integers(1, 8),
)
def test_it_finds_what_a_search_finds(tokens: list[int], cuts: list[int], most: int) -> None:
    lookup = PromptLookup(most)
    # However the text comes in, and whenever it is asked.
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(tokens)], strict=True):
        lookup.extend(tokens[begin:end])
        assert lookup.drafts() == searched(tokens[:end], most)


def test_new_tokens_have_nothing_to_follow() -> None:
    lookup = PromptLookup(4)
    assert lookup.drafts() == []
    lookup.extend([1, 2, 3, 2])
    assert lookup.drafts() == []
    lookup.extend([3])
    assert lookup.drafts() == [2, 3]
