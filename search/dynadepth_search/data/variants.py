"""Variants of an example: the same request in another form, or the same prompt read at other places.

A variant is an example too, so it is scored like any other. Which variants a search uses is decided in
`dynadepth_search.search.confirming`.
"""

from dataclasses import dataclass, replace
from typing import Any

from dynadepth.errors import ConfigError
from dynadepth.models.encoding import lone_surrogate
from dynadepth_search.data.tasks import Example

__all__ = [
    "PLACEHOLDER",
    "ContinuedExample",
    "check_wording",
    "continued",
    "in_other_orders",
    "in_other_words",
]

PLACEHOLDER = "{prompt}"


@dataclass(frozen=True, slots=True)
class ContinuedExample(Example):
    """A prompt alone that is read after each token of a continuation, in place of after the prompt.

    Args:
        continuation: Tokens that follow the prompt's, 1 or more.
    """

    continuation: tuple[int, ...] = ()


def in_other_orders(example: Example, count: int) -> tuple[Example, ...]:
    """Return an example with its choices rotated, so that in each variant every choice has another place.

    Args:
        example: Has choices.
        count: Maximum number of variants; there is one fewer than choices.

    Returns:
        The variants; their rotations are spread evenly.

    Example:
        >>> [item.choices for item in in_other_orders(Example("?", ("a", "b", "c"), 0), 1)]
        [('b', 'c', 'a')]
    """
    choices, answer = example.choices or (), example.answer or 0
    size = len(choices)
    most = min(count, size - 1)
    shifts = [number * size // (most + 1) for number in range(1, most + 1)]
    return tuple(
        replace(
            example,
            choices=choices[shift:] + choices[:shift],
            answer=(answer - shift) % size,
        )
        for shift in shifts
    )


def in_other_words(example: Example, wording: str) -> Example:
    """Return an example with its prompt put into a wording.

    Args:
        example: The example.
        wording: A text that contains `{prompt}` once.
    """
    return replace(example, prompt=wording.replace(PLACEHOLDER, example.prompt))


def continued(example: Example, tokens: tuple[int, ...]) -> ContinuedExample:
    """Return the prompt of an example, read after each token of a continuation.

    Args:
        example: The example; its choices and completion are left out.
        tokens: The continuation, 1 token or more.
    """
    return ContinuedExample(example.prompt, where=example.where, continuation=tokens)


def check_wording(wording: str) -> None:
    """Refuse a wording that does not put a prompt into other words.

    Raises:
        ConfigError: The wording does not contain `{prompt}` exactly once, or nothing besides, or is no text.
    """
    given: Any = wording
    if not isinstance(given, str) or given.count(PLACEHOLDER) != 1 or given == PLACEHOLDER:
        raise ConfigError(
            f"wording is {wording!r}; expected a text with {PLACEHOLDER} once and other words around it"
        )
    if lone_surrogate(wording) is not None:
        raise ConfigError(f"wording is {wording!a}; expected complete characters")
