"""Callbacks that are called before and after every visit, and the event that they receive."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["VisitCallback", "VisitCallbacks", "VisitEvent"]


@dataclass(frozen=True, slots=True)
class VisitEvent:
    """One visit of a decoder layer in one forward.

    Attributes:
        layer_idx: Which decoder layer.
        visit: 0 for the first execution, 1 for the repeat.
        rows: Rows of the batch that make the visit, ascending.
        num_tokens: Tokens of each row in this forward, padding included: the prompt's width in a prefill, 1 in a step
            of decoding.
    """

    layer_idx: int
    visit: int
    rows: tuple[int, ...]
    num_tokens: int


VisitCallback = Callable[[VisitEvent], object]


class VisitCallbacks:
    """The callbacks of one forward pass, outermost context first.

    Args:
        before: Called before each visit.
        after: Called after each visit that did not raise.
    """

    def __init__(self, before: Sequence[VisitCallback], after: Sequence[VisitCallback]) -> None:
        self._before, self._after = before, after

    def before(self, event: VisitEvent) -> None:
        """Call every `before` callback."""
        for callback in self._before:
            callback(event)

    def after(self, event: VisitEvent) -> None:
        """Call every `after` callback."""
        for callback in self._after:
            callback(event)
