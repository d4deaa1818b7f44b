"""`dynadepth compare`: several ways to wrap a model, on the same prompts."""

from pathlib import Path
from typing import Annotated

import typer

from dynadepth_search.cli.options import (
    Chat,
    Device,
    Dtype,
    Json,
    Limit,
    Model,
    Scoring,
    display,
    in_chat,
    load,
    show_inspection,
)

__all__ = ["compare_configurations"]


def compare_configurations(
    *,
    model: Model,
    task: Annotated[Path, typer.Option("--task", help="The prompts: JSON lines, or text")],
    ways: Annotated[
        list[str],
        typer.Option(
            "--way",
            help="How the model is wrapped, such as budget=0.9,routers=menu or plan=0-11+14-27; give it several times",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of results and page")],
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=1, help="The most tokens of an answer")
    ] = 64,
    scoring: Scoring = "raw",
    chat: Chat = False,
    limit: Limit = None,
    device: Device = "cpu",
    dtype: Dtype = "fast",
    as_json: Json = False,
) -> None:
    """Let a model answer in several ways, and see how far the answers are its own, side by side."""
    from dynadepth_search.comparing.comparing import compare
    from dynadepth_search.comparing.configurations import Configuration
    from dynadepth_search.data.tasks import read_task
    from dynadepth_search.inspecting.compared_seen import see_comparison
    from dynadepth_search.inspecting.folders import check_free

    check_free(out, "comparison")
    configurations = [Configuration.parse(text) for text in ways]
    prompts = read_task(task, scoring=scoring, limit=limit)
    base, tokenizer = load(model, device, dtype)
    with display() as progress:
        content = compare(
            base,
            tokenizer,
            task=in_chat(prompts, tokenizer, chat=chat),
            configurations=configurations,
            folder=out,
            new_tokens=new_tokens,
            progress=progress,
        )
    show_inspection(see_comparison(content), out, as_json=as_json)
