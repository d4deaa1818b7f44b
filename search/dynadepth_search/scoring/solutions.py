"""Whether a generated answer is the right one: mathematical equality of its final value, not of its wording."""

import threading

from math_verify import parse, verify

from dynadepth.errors import SearchError

__all__ = ["is_right"]

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
    if threading.current_thread() is not threading.main_thread():
        raise SearchError(
            "answers were compared beside the main thread; call it there, since its signals bound the time"
        )
    expected = parse(solution, parsing_timeout=_TIMEOUT)
    if not expected:
        return answer.strip().casefold() == solution.strip().casefold()
    return bool(verify(expected, parse(answer, parsing_timeout=_TIMEOUT), timeout_seconds=_TIMEOUT))
