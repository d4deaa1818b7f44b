"""Inspection of a folder of any kind, and how it is shown: in a terminal, and as one page that needs nothing else."""

import os
from html import escape
from pathlib import Path

from rich.console import Console

from dynadepth.errors import ConfigError
from dynadepth.files import write_text_atomic
from dynadepth_search.inspecting.compared_seen import inspect_comparison
from dynadepth_search.inspecting.evaluation_seen import inspect_evaluation
from dynadepth_search.inspecting.folders import kind_of
from dynadepth_search.inspecting.inspection import Inspection, Passage, Picture, Table
from dynadepth_search.inspecting.labels_seen import inspect_labels
from dynadepth_search.inspecting.late_exits.judged import inspect_exit_evaluation
from dynadepth_search.inspecting.routers_seen import inspect_routers
from dynadepth_search.inspecting.scores_seen import inspect_scores
from dynadepth_search.report.report import card, html_page, html_table, note, sections
from dynadepth_search.report.terminal import text_table

__all__ = ["inspect_folder", "inspection_html", "print_inspection", "write_inspection"]

# Sentences that a terminal shows; an evaluation may have more notes.
_SAID = 6
# Of pieces of text, from the earliest exit to the latest.
_SHADES = ("#b7e4c7", "#bde0fe", "#fff3bf", "#e5d4ef")


def inspect_folder(
    folder: str | os.PathLike[str], *, control: str | os.PathLike[str] | None = None
) -> Inspection:
    """Find out what a folder holds, and return its figures, tables and pictures; no model is loaded.

    Args:
        folder: Labels, a score table, routers or an evaluation; what is unfinished is shown as far as it is.
        control: The folder of a null control, for labels; None: none is shown.

    Returns:
        What was found.

    Raises:
        CheckpointError: The routers are damaged.
        ConfigError: The folder holds nothing of these kinds, or a control was given for something else than labels; or
            the evaluation is damaged.
        FileNotFoundError: There is no such folder, or no control in the other one.
        LabelError: The labels or scores are damaged or empty, or the control is one of other labels.
        ShortcutError: The shortcuts beside routers are damaged.
    """
    kind, place = kind_of(folder)
    if control is not None and kind != "labels":
        raise ConfigError(
            f"{place} holds {kind}, and a null control ({control}) is one of labels; leave --null out, or inspect the "
            "labels that it belongs to"
        )
    if kind == "labels":
        return inspect_labels(place, None if control is None else Path(control))
    if kind == "scores":
        return inspect_scores(place)
    if kind == "routers":
        return inspect_routers(place)
    if kind == "comparison":
        return inspect_comparison(place)
    if kind == "exit evaluation":
        return inspect_exit_evaluation(place)
    return inspect_evaluation(place, Path(folder))


def inspection_html(found: Inspection) -> str:
    """Return the page: no script, and nothing that a browser would have to fetch.

    Args:
        found: The inspection.
    """
    if found.page:
        return found.page
    first, *others = found.said
    parts = [
        f"<h1>{escape(found.title)}</h1>",
        f'<p class="verdict">{escape(first)}</p>',
        *(note(text) for text in others),
    ]
    for part in found.parts:
        parts.append(f"<h2>{escape(part.title)}</h2>")
        if isinstance(part, Passage):
            parts.append(_passage(part))
            continue
        if isinstance(part, Picture):
            parts.append(card(part.svg))
        else:
            parts.append(html_table(part.head, part.rows, texts=part.texts))
        parts.append(note(part.note) if part.note else "")
    if found.facts:
        parts += ["<h2>What it was made with</h2>", *sections(found.facts)]
    return html_page(f"dynadepth: {found.title}", parts)


def _passage(part: Passage) -> str:
    """Return a coloured text; a reader who sees no colours sees in a title what each piece took."""
    early = sorted({layers for _, layers in part.pieces if layers < part.whole})
    shades = {layers: _SHADES[min(at, len(_SHADES) - 1)] for at, layers in enumerate(early)}
    spans = "".join(
        f'<span style="background:{shades[layers]}" title="before layer {layers}">{escape(text)}</span>'
        if layers in shades
        else escape(text)
        for text, layers in part.pieces
    )
    above = "".join(f"{note(name)}<pre>{escape(text)}</pre>" for name, text in part.before)
    legend = ", ".join(
        f'<span style="background:{shade}">before layer {layers}</span>'
        for layers, shade in shades.items()
    )
    legend = legend or "no token left early"
    return card(f'{above}<p class="note">with exits: {legend}</p><pre>{spans}</pre>')


def write_inspection(found: Inspection, page: str | os.PathLike[str]) -> Path:
    """Write the page, whole or not at all.

    Args:
        found: The inspection.
        page: The file.

    Returns:
        The file.
    """
    path = Path(page)
    write_text_atomic(path, inspection_html(found))
    return path


def print_inspection(found: Inspection, console: Console) -> None:
    """Print what was found: the most important in sentences, then the tables, the long ones cut.

    Args:
        found: The inspection.
        console: Where it goes.
    """
    console.print(found.title)
    for text in found.said[:_SAID]:
        console.print(f"- {text}")
    if len(found.said) > _SAID:
        console.print(f"- on the page: {len(found.said) - _SAID} more")
    for part in found.parts:
        if isinstance(part, Table) and part.rows:
            console.print(f"\n{part.title}\n")
            shown = part.rows[: part.shown]
            console.print(text_table(part.head, shown, texts=part.texts, width=console.width))
            hidden = len(part.rows) - part.shown
            if hidden > 0:
                console.print(f"on the page: {hidden} more")
