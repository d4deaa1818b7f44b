"""What a comparison of configurations holds: how like the base model's their answers are, and the answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynadepth_search.comparing.comparing import read_comparison
from dynadepth_search.inspecting.inspection import (
    Inspection,
    Table,
    interval_text,
    percent_text,
    time_text,
)

__all__ = ["inspect_comparison", "see_comparison"]

# New tokens of the base model's text at which a table says how it is agreed with.
_PLACES = (1, 2, 4, 8, 16, 32, 64)
# Where an answer parts from the base model's.
_PARTS = " ▸ "


def inspect_comparison(folder: Path) -> Inspection:
    """Inspect a comparison.

    Args:
        folder: Where it was written.

    Raises:
        ConfigError: It is damaged or of another version.
        FileNotFoundError: There is none.
    """
    return see_comparison(read_comparison(folder))


def see_comparison(content: Mapping[str, Any]) -> Inspection:
    """Return the tables of a comparison.

    Args:
        content: What `compare` returned.
    """
    rows = content["rows"]
    best = max(rows, key=lambda row: row["identical"]["mean"])
    said = [
        f"Of {content['task']['prompts']} answers {best['name']} gives {percent_text(best['identical']['mean'])} % as "
        "the base model does, to the last token: the most of all."
    ]
    said += [
        f"{number} of the prompts took part in {name}, so they say little of others."
        for name, number in content["took_part"].items()
        if number
    ]
    places = [row for row in rows if row["by_place"] is not None]
    parts = [_likeness(rows)]
    if places:
        parts.append(_places(places))
    parts.append(_answers(content))
    return Inspection(
        kind="comparison",
        title=f"{content['model'] or 'a model'} on {content['task']['name']}, in {len(rows)} ways",
        said=said,
        figures={"comparison": content},
        parts=parts,
        facts={},
    )


def _likeness(rows: Sequence[Mapping[str, Any]]) -> Table:
    head = ["configuration", "depth or passes", "identical answers, %", "common beginning, median"]
    head += ["mean", "kept, %", "time over the base's"]
    return Table(
        title="How like the base model's",
        head=head,
        rows=[
            [
                row["name"],
                f"{row['passes']:.3f}",
                interval_text(row["identical"]),
                f"{row['common']['median']:.0f}",
                f"{row['common']['mean']:.1f}",
                "" if row["kept"] is None else interval_text(row["kept"]),
                time_text(row["time"]),
            ]
            for row in rows
        ],
        note="Identical: the whole answer, to the last token. Common beginning: tokens up to the first that differs. "
        "Kept: new tokens, but the first, that are the base model's own choice after the same text. Time: of a new "
        "token, one prompt at a time; median and range of the turns.",
    )


def _places(rows: Sequence[Mapping[str, Any]]) -> Table:
    longest = max(len(row["by_place"]["agreement"]) for row in rows)
    shown = [place for place in _PLACES if place <= longest]
    return Table(
        title="On the base model's own text",
        head=["configuration", *(f"token {place}" for place in shown)],
        rows=[[row["name"], *(_at(row["by_place"], place) for place in shown)] for row in rows],
        note="Agreement in % (and divergence in nats) at single tokens of the base model's own answers, given to read "
        "(teacher forcing). Late exits are left out: they differ where a token leaves, and nowhere else.",
    )


def _at(found: Mapping[str, Any], place: int) -> str:
    if place > len(found["agreement"]):
        return ""
    agreement, divergence = (found[name][place - 1] for name in ("agreement", "divergence"))
    return (
        f"{percent_text(agreement)} ({'overflows' if divergence is None else f'{divergence:.2f}'})"
    )


def _answers(content: Mapping[str, Any]) -> Table:
    names = [row["name"] for row in content["rows"]]
    return Table(
        title="Answers",
        head=["prompt", "base model", *names],
        rows=[
            [
                answer["prompt"],
                answer["base"],
                *(
                    f"{beginning}{_PARTS}{rest}"
                    if rest or beginning != answer["base"]
                    else "the same"
                    for beginning, rest in answer["answers"]
                ),
            ]
            for answer in content["answers"]
        ],
        note=f"Where an answer parts from the base model's stands {_PARTS.strip()}.",
        texts=tuple(range(2 + len(names))),
        shown=2,
    )
