"""What an inspection consists of, and how plans are written in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from dynadepth.plans import REPEAT, SKIP

__all__ = [
    "Inspection",
    "Passage",
    "Picture",
    "Table",
    "edits_text",
    "interval_text",
    "percent_text",
    "share_text",
    "time_text",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of texts, for terminal and page alike.

    Args:
        title: What it shows.
        head: Titles of the columns.
        rows: Cells.
        note: How it is to be read.
        texts: Columns that hold prompts or sentences.
        shown: The number of rows that a terminal shows, the first ones; the page shows all.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    texts: Sequence[int] = ()
    shown: int = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A drawing, for the page alone.

    Args:
        title: What it shows.
        svg: An svg element.
        note: How it is to be read.
    """

    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A generated text whose pieces are coloured by the layers that they took, for the page alone.

    Args:
        title: What it shows.
        before: Texts above it, each with its name.
        pieces: What each token adds, and the layers that had run when it was chosen.
        whole: Layers of the model: pieces that took all of them are not coloured.
    """

    title: str
    before: Sequence[tuple[str, str]]
    pieces: Sequence[tuple[str, int]]
    whole: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What a folder holds.

    Args:
        kind: `labels`, `null control`, `scores`, `routers`, `evaluation`, `exit evaluation` or `comparison`.
        title: Names the folder's content.
        said: The most important of it, in sentences; the first one is the verdict.
        figures: Every figure, as values that JSON can hold.
        parts: Tables, pictures and texts, in the order in which they are shown.
        facts: What it was made with, as sections of plain values; for the page alone.
        page: A page that exists already for this kind; empty: one is made of all of the above.
    """

    kind: str
    title: str
    said: Sequence[str]
    figures: Mapping[str, Any]
    parts: Sequence[Table | Picture | Passage]
    facts: Mapping[str, Any] = field(default_factory=dict)
    page: str = ""


def edits_text(plan: str) -> str:
    """Write a plan as what it changes.

    Args:
        plan: The plan, one digit for each layer.

    Example:
        >>> edits_text("110012")
        'skip 2-3, repeat 5'
        >>> edits_text("111")
        'identity'
    """
    parts = []
    for word, action in (("skip", SKIP), ("repeat", REPEAT)):
        layers = [layer for layer, digit in enumerate(plan) if digit == str(int(action))]
        if layers:
            parts.append(f"{word} {_runs(layers)}")
    return ", ".join(parts) or "identity"


def _runs(layers: Sequence[int]) -> str:
    runs = []
    # Consecutive layers have the same distance from their places.
    for _, group in groupby(enumerate(layers), key=lambda item: item[1] - item[0]):
        found = [layer for _, layer in group]
        runs.append(str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}")
    return " ".join(runs)


def percent_text(value: float) -> str:
    """Write a share in percent, to a tenth, without the sign."""
    return f"{100 * value:.1f}"


def interval_text(found: Mapping[str, float]) -> str:
    """Write a mean share and its interval in percent, without the sign."""
    mean, low, high = (percent_text(found[name]) for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def time_text(found: Mapping[str, float] | None) -> str:
    """Write a time over the base model's and its range; empty if nothing was timed."""
    return (
        ""
        if found is None
        else f"{found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
    )


def share_text(share: float) -> str:
    """Write a share in percent; empty for none."""
    if share == 0:
        return ""
    return f"{share:.0%}" if share >= 0.01 else "<1%"
