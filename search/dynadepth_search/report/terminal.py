"""What a terminal shows of an evaluation: its verdict and one short table, at most 100 columns wide."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from dynadepth_search.report.depth_table import depth_table
from dynadepth_search.report.findings import general_notes
from dynadepth_search.report.tables import outside_summary, summary_table
from dynadepth_search.report.verdict import verdict

__all__ = ["WIDTH", "print_depth_table", "print_summary", "result_console", "text_table"]

WIDTH = 100
# More are in the report.
_SHOWN_NOTES = 3
# Beside texts: the widest other column, the room between columns, and what is left of a text at least.
_OTHERS_WIDTH, _GAP, _FEWEST_LETTERS = 24, 2, 20


def result_console() -> Console:
    """Return a console on stdout, at most 100 columns wide, where brackets in a text are no markup."""
    console = Console(file=sys.stdout, markup=False, highlight=False, emoji=False)
    # A file or a pipe has no width of its own.
    console.width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    return console


def print_summary(evaluation: Mapping[str, Any], console: Console) -> None:
    """Print the verdict, what is to be known of the run, the short table, and what only the report shows.

    Args:
        evaluation: Content of `evaluation.json`.
        console: Where it goes.
    """
    console.print(verdict(evaluation))
    notes = general_notes(evaluation)
    for note in notes[:_SHOWN_NOTES]:
        console.print(f"- {note}")
    if len(notes) > _SHOWN_NOTES:
        console.print(f"- {len(notes) - _SHOWN_NOTES} more notes are in the report.")
    task = evaluation["task"]
    console.print(
        f"\n{evaluation['model'] or 'a model'} on {task['name']}: {task['heldout_prompts']} held-out prompts\n"
    )
    console.print(text_table(*summary_table(evaluation)))
    console.print(f"\n{outside_summary(evaluation)}")


def print_depth_table(evaluation: Mapping[str, Any], console: Console) -> None:
    """Print the verdict, and what is left of the base model at each depth, by who chooses what is skipped.

    Args:
        evaluation: Content of `evaluation.json`.
        console: Where it goes.
    """
    console.print(verdict(evaluation))
    task = evaluation["task"]
    console.print(
        f"\n{evaluation['model'] or 'a model'} on {task['name']}: {task['heldout_prompts']} held-out prompts\n"
    )
    console.print(text_table(*depth_table(evaluation)))


def text_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    texts: Sequence[int] = (),
    width: int = WIDTH,
) -> Table:
    """Return a table; what is too wide for its column goes on in the next line.

    Args:
        head: Titles of the columns.
        rows: Cells.
        texts: Columns of which a beginning is enough: they share the room that the others leave.
        width: Of the terminal.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    others = [column for column in range(len(head)) if column not in texts]
    widest = [
        min(_OTHERS_WIDTH, max(map(cell_len, [head[column], *(row[column] for row in rows)])))
        for column in others
    ]
    room = (width - sum(widest) - _GAP * (len(head) - 1)) // max(1, len(texts))
    for column, name in enumerate(head):
        if column in texts:
            table.add_column(name, no_wrap=True, overflow="ellipsis")
        else:
            most = _OTHERS_WIDTH if texts else None
            justify: JustifyMethod = "right" if column else "left"
            table.add_column(name, justify=justify, overflow="fold", max_width=most)
    for row in rows:
        cells: list[str | Text] = list(row)
        for column in texts:
            cut = Text(row[column])
            cut.truncate(max(room, _FEWEST_LETTERS), overflow="ellipsis")
            cells[column] = cut
        table.add_row(*cells)
    return table
