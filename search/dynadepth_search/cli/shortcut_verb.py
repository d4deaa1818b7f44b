"""The verb shortcuts: maps that rows take in place of layers that they skip, fitted on prompts.

It checks its options, loads what they name and calls a function that Python can call as well. Heavy imports are inside.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from dynadepth_search.cli.options import (
    Chat,
    Device,
    Json,
    Limit,
    Model,
    Seed,
    display,
    in_chat,
    load,
    print_result,
)

__all__ = ["fit_shortcuts"]


def fit_shortcuts(
    *,
    model: Model,
    task: Annotated[
        Path,
        typer.Option(
            "--task", help="The training prompts: JSON lines, or text, one prompt per line"
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", help="Folder of the result; a run that was killed continues in it"),
    ],
    rank: Annotated[
        str | None,
        typer.Option(
            "--rank",
            help="Rank of the maps; 0: a bias alone; full [default: an eighth of the width]",
        ),
    ] = None,
    distil: Annotated[
        int,
        typer.Option(
            "--distil",
            min=0,
            help="Steps of a second stage, which trains the maps through the frozen model",
        ),
    ] = 0,
    new_tokens: Annotated[
        int,
        typer.Option(
            "--new-tokens",
            min=0,
            help="The most tokens by which the model continues each prompt; the maps are fitted on both",
        ),
    ] = 64,
    chat: Chat = False,
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Fit what is left in place of skipped layers: low-rank maps, no gradients, no labels; a killed run continues."""
    from dynadepth_search.data.tasks import read_task
    from dynadepth_search.shortcuts import building
    from dynadepth_search.shortcuts.spec import ShortcutSpec

    spec = ShortcutSpec(rank=_rank(rank), new_tokens=new_tokens, distil_steps=distil, seed=seed)
    prompts = read_task(task, limit=limit)
    base, tokenizer = load(model, device)
    prompts = in_chat(prompts, tokenizer, chat=chat)
    with display() as progress:
        found = building.fit_shortcuts(base, tokenizer, prompts, out, spec, progress=progress)
    mapped = [row for row in found.layers if row["mapped"]]
    result: dict[str, Any] = {
        "shortcuts": str(out),
        "rank": found.rank,
        "layers": f"{len(mapped)} of {found.num_layers}",
        "tokens": found.training["tokens"],
        "heldout_prompts": found.training["heldout_prompts"],
        "divergence_of_one_skip": _mean(mapped, "divergence"),
        "without_shortcut": _mean(mapped, "divergence_without"),
        "digest": found.digest,
    }
    print_result(result, as_json=as_json)


def _rank(given: str | None) -> Any:
    if given is None or given == "full":
        return given
    if not given.isdecimal():
        raise typer.BadParameter(f"--rank is {given!r}; expected a whole number, or full")
    return int(given)


def _mean(rows: list[Any], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None]
    return sum(values) / len(values) if values else None
