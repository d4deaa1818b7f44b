"""Whether a generated answer is the right one: mathematical equality of its final value, not of its wording."""

import threading
from collections.abc import Sequence

from math_verify import parse, verify

from dynadepth.errors import SearchError, TaskError
from dynadepth_search.data.tasks import Example, located

__all__ = ["check_solutions", "is_right"]

# Seconds for one step of reading or comparing; the answers of a damaged model may be towers of powers.
_TIMEOUT = 2


def is_right(answer: str, solution: str) -> bool:
    r"""Return whether the value that an answer ends with equals that of the solution, by `math-verify`.

    Numbers are compared by value (`0.5`, `\frac{1}{2}` and `50%` are equal), expressions symbolically; units and words
    around them do not count. What cannot be read within the time is wrong.

    Args:
        answer: What a model generated.
        solution: The right answer, alone or at the end of its derivation.

    Raises:
        SearchError: Called beside the main thread, where the time of a comparison cannot be bounded.
    """
    expected = _value(solution)
    if not expected:
        return answer.strip().casefold() == solution.strip().casefold()
    return bool(verify(expected, parse(answer, parsing_timeout=_TIMEOUT), timeout_seconds=_TIMEOUT))


def check_solutions(examples: Sequence[Example]) -> None:
    """Check that generated answers can be compared with the solutions, before any is generated.

    Args:
        examples: Those without a solution are passed over.

    Raises:
        SearchError: Called beside the main thread.
        TaskError: A solution has no value; the message names the line that it was read from.
    """
    for example in examples:
        with located(example):
            if example.solution is not None and not _value(example.solution):
                raise TaskError(
                    f"`solution` is {example.solution[:60]!r}, which has no value that generated answers could be "
                    "compared with; expected a number or a formula such as 42 or 3/4: give one, or leave `solution` "
                    "out, so that the completion alone is scored"
                )


def _value(text: str) -> list[object]:
    """Return what `math-verify` reads at the end of a text; nothing if there is no value."""
    if threading.current_thread() is not threading.main_thread():
        raise SearchError(
            "answers were compared beside the main thread; call it there, since its signals bound the time"
        )
    found: list[object] = parse(text, parsing_timeout=_TIMEOUT)
    return found
