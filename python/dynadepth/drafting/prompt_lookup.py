"""Prompt lookup: what followed the last time that the newest tokens stood in the text."""

from collections.abc import Iterable

__all__ = ["PromptLookup"]

# Tokens that have to be the same, most first: one alone is followed by too many different things.
_SIZES = (3, 2)


class PromptLookup:
    """Remembers where each few tokens of one text stood last; a look takes the same time however long the text is.

    Args:
        most: Tokens that are drafted at most.

    Source:
        Saxena, prompt lookup decoding (2023). Deviation: the latest place counts, not the first, and single tokens do
        not. transformers' own searches the whole text in every step and drafts behind single tokens.

    Example:
        >>> lookup = PromptLookup(most=2)
        >>> lookup.extend([5, 6, 7, 8, 9, 5, 6])
        >>> lookup.drafts()
        [7, 8]
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._tokens: list[int] = []
        self._followed: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens to the text."""
        for token in tokens:
            for size in _SIZES:
                if len(self._tokens) >= size:
                    self._followed[tuple(self._tokens[-size:])] = len(self._tokens)
            self._tokens.append(token)

    def drafts(self) -> list[int]:
        """Return what may come next; nothing if the newest tokens are new to the text."""
        for size in _SIZES:
            place = self._followed.get(tuple(self._tokens[-size:]))
            if place is not None:
                return self._tokens[place : place + self._most]
        return []
