"""What an evaluation of late exits holds: what became of each promise, and answers by where their tokens stopped."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynadepth_search.evaluation.metrics import listed
from dynadepth_search.exits.judging.evaluating import read_exit_evaluation
from dynadepth_search.inspecting.inspection import (
    Inspection,
    Passage,
    Picture,
    Table,
    interval_text,
    percent_text,
    time_text,
)
from dynadepth_search.report.plots import fidelity_plot

__all__ = ["inspect_exit_evaluation", "see_exit_evaluation"]


def inspect_exit_evaluation(folder: Path) -> Inspection:
    """Inspect an evaluation of late exits.

    Args:
        folder: Where it was written.

    Raises:
        ConfigError: It is damaged or of another version.
        FileNotFoundError: There is none.
    """
    return see_exit_evaluation(read_exit_evaluation(folder))


def see_exit_evaluation(content: Mapping[str, Any]) -> Inspection:
    """Return the tables, the plot and the answers of an evaluation of late exits.

    Args:
        content: What `evaluate_exits` returned.
    """
    rows = content["rows"]
    layers = listed([f"layer {layer}" for layer in content["exit_layers"]])
    said = [
        _verdict(rows[0]),
        f"New tokens may leave before {layers} of {content['num_layers']}; prompts are read in full. "
        f"{content['answers']} of {content['task']['prompts']} answers have more than one token; the figures are means "
        "over these, each counting once.",
        *(f"Not measured: {text}" for text in content["refused"]),
        *content["notes"],
    ]
    return Inspection(
        kind="exit evaluation",
        title=f"late exits of {content['model'] or 'a model'} on {content['task']['name']}",
        said=said,
        figures={"exit_evaluation": content},
        parts=[
            _promises(rows),
            *_others(rows),
            *_answered(rows),
            Picture(
                title="Fidelity against passes and time",
                svg=fidelity_plot(rows),
                note="Bars: 95 % intervals of the mean over prompts.",
            ),
            *_answers(content),
        ],
        facts={},
    )


def _verdict(row: Mapping[str, Any]) -> str:
    kept, static = row["kept"], row["static"]
    said = (
        f"At {_promise(row)}, {percent_text(kept['mean'])} % of the new tokens ({percent_text(kept['low'])} to "
        f"{percent_text(kept['high'])}) are the base model's own choice after the same text, at "
        f"{row['passes']['mean']:.3f} passes; {100 * row['identical']['mean']:.0f} % of the answers are identical"
    )
    if row["time"] is not None:
        said += f"; a new token takes {row['time']['median']:.2f} of the base model's time"
    if static is not None:
        said += (
            f". The best static mixture of as many passes keeps {percent_text(static['kept'])} %"
        )
    for name, found in row["against"].items():
        if found is not None:
            said += f", {name} {percent_text(found['kept'])} %"
    return f"{said}."


def _promises(rows: Sequence[Mapping[str, Any]]) -> Table:
    head = ["promise", "passes", "kept, %", "by its own audits, %", "identical answers, %"]
    head += ["common beginning", "time over the base's"]
    return Table(
        title="Promises",
        head=head,
        rows=[
            [
                _promise(row),
                f"{row['passes']['mean']:.3f}",
                interval_text(row["kept"]),
                "" if row["audited"] is None else percent_text(row["audited"]),
                f"{100 * row['identical']['mean']:.0f}",
                f"{row['common']:.0f}",
                time_text(row["time"]),
            ]
            for row in rows
        ],
        note="Kept: new tokens that are the base model's own choice after the same text. Passes: layer calls per new "
        "token over the layers, each answer decoded alone. Common beginning: tokens up to the first that differs from "
        "the base model's answer, median. Time: of a new token, one prompt at a time; median and range of the turns.",
    )


def _others(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return the table of those that were compared, if any could be."""
    lines = []
    for row in rows:
        for name, found in {"static mixture": row["static"], **row["against"]}.items():
            if found is not None:
                time = "" if found["time"] is None else f"{found['time']:.3f}"
                lines.append(
                    [
                        _promise(row),
                        name,
                        f"{found['passes']:.3f}",
                        f"{percent_text(found['kept'])} (exits {percent_text(row['kept']['mean'])})",
                        f"{100 * found['identical']:.0f} (exits {100 * row['identical']['mean']:.0f})",
                        time,
                    ]
                )
    if not lines:
        return []
    return [
        Table(
            title="Static plans and policies of as many passes",
            head=["at", "who", "passes", "kept, %", "identical answers, %", "time over the base's"],
            rows=lines,
            note="They write from the same prompts and are read again in the same way. A static mixture gives each of "
            "two plans to a share of the prompts, and was chosen on other prompts.",
        )
    ]


def _answered(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return the table of prompts that are answered with one token, if these could be judged."""
    judged = [(_promise(row), row["answers"]) for row in rows if row["answers"] is not None]
    if not judged:
        return []
    return [
        Table(
            title="Prompts answered with one token",
            head=[
                "promise",
                "depth",
                "kept, %",
                "static mixture keeps, %",
                "gain, points",
                "others keep, %",
            ],
            rows=[[promise, *_answered_row(found)] for promise, found in judged],
            note="Choices where the task has them, else the next token. A prompt leaves before an exit layer if its "
            "router is sure, and the layers after it never run. Depth: share of the layers that ran, mean over "
            "prompts. Kept: answers that are the base model's own. Static mixture: of the same mean depth.",
        )
    ]


def _answered_row(found: Mapping[str, Any]) -> list[str]:
    if "refused" in found:
        return ["", found["refused"], "", "", ""]
    kept, gain = found["kept"], found["gain"]
    return [
        f"{found['depth']['mean']:.3f}",
        interval_text(kept),
        "" if found["static"] is None else percent_text(found["static"]["kept"]),
        ""
        if gain is None
        else f"{100 * gain['mean']:+.1f} ({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})",
        ", ".join(
            f"{name} {percent_text(other['kept']['mean'])} at {other['depth']['mean']:.3f}"
            for name, other in found["against"].items()
            if other is not None
        ),
    ]


def _answers(content: Mapping[str, Any]) -> list[Passage]:
    found = []
    for number, example in enumerate(content["examples"], start=1):
        for row, pieces in zip(content["rows"], example["answers"], strict=True):
            found.append(
                Passage(
                    title=f"Answer {number} at {_promise(row)}",
                    before=(("prompt", example["prompt"]), ("base model", example["base"])),
                    pieces=[(text, layers) for text, layers in pieces],
                    whole=content["num_layers"],
                )
            )
    return found


def _promise(row: Mapping[str, Any]) -> str:
    return f"{row['dial']} {row['value']:g}"
