"""What the verbs share: options, loading, and how results are shown.

Progress goes to stderr, results to stdout. Heavy imports are inside the functions.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dynadepth.shortcuts.maps import Shortcuts as LoadedShortcuts
    from dynadepth_search.data.tasks import Task
    from dynadepth_search.inspecting.inspection import Inspection
    from dynadepth_search.runners.work import Runner

__all__ = [
    "Address",
    "Chat",
    "Device",
    "Devices",
    "Dtype",
    "Json",
    "Limit",
    "Model",
    "Objective",
    "Protect",
    "RunnerKind",
    "Scoring",
    "Seed",
    "Shortcuts",
    "Threads",
    "Workers",
    "display",
    "in_chat",
    "layer_numbers",
    "load",
    "load_shortcuts_for",
    "print_depths",
    "print_evaluation",
    "print_result",
    "quiet",
    "runner_for",
    "scalar_values",
    "show_inspection",
]

Model = Annotated[str, typer.Option("--model", help="Folder or Hub id of the base model")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Of everything random")]
Scoring = Annotated[
    Literal["raw", "normalized", "letter"],
    typer.Option(
        "--scoring",
        help="How choices are scored: by their tokens, by these for each byte, or by the letters they are listed under",
    ),
]
Objective = Annotated[
    Literal["preserve", "reward"],
    typer.Option(
        "--objective",
        help="preserve: stay with the base model's answers, no labels needed; reward: the right answers",
    ),
]
Device = Annotated[str, typer.Option("--device", help="Where the model runs, as torch names it")]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="fast: the checkpoint's own, or float32 where half precision is slow; auto: its own; or a name",
    ),
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Take the first prompts of the task only")
]
Protect = Annotated[str, typer.Option("--protect", help="Layers that always run once, such as 0,1")]
Shortcuts = Annotated[
    Path | None,
    typer.Option(
        "--shortcuts",
        help="Folder that `shortcuts` wrote: what is left in place of skipped layers [default: nothing]",
    ),
]
RunnerKind = Annotated[
    Literal["local", "processes", "ray"],
    typer.Option(
        "--runner",
        help="Who does the blocks: this process, processes of this machine, or actors of a Ray cluster",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        help="Number of workers [default: one for each GPU; without, ray: one for each machine]",
    ),
]
Devices = Annotated[
    str,
    typer.Option(
        "--devices",
        help="Where workers run: cuda:0,cuda:1 for processes, cuda or cpu for ray [default: all GPUs]",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, help="Threads of each worker [default: those of the machine divided]"
    ),
]
Address = Annotated[
    str | None,
    typer.Option("--address", help="Of a Ray cluster [default: a new one on this machine]"),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Put every prompt into the model's chat template")
]


def layer_numbers(text: str, option: str) -> tuple[int, ...]:
    """Read layer numbers separated by commas.

    Raises:
        typer.BadParameter: The text is something else.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"{option} is {text!r}; expected layer numbers such as 0,1")
    return tuple(sorted({int(part) for part in parts}))


def load(model: str, device: str, dtype: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a base model and its tokenizer.

    Args:
        model: Folder or Hub id.
        device: Where the model runs.
        dtype: As for `load_model`.
    """
    from dynadepth.models.loading import load_model, load_tokenizer

    quiet()
    return load_model(model, device=device, dtype=dtype), load_tokenizer(model)


def load_shortcuts_for(model: "PreTrainedModel", folder: Path | None) -> "LoadedShortcuts | None":
    """Load shortcuts and check that they are those of a model.

    Args:
        model: The base model.
        folder: Their folder, or one that contains it; None: none are asked for.
    """
    from dynadepth.checkpoints.paths import locate_shortcuts
    from dynadepth.shortcuts.save_load import load_shortcuts

    return None if folder is None else load_shortcuts(locate_shortcuts(folder), model=model)


def runner_for(
    kind: str,
    model: str,
    dtype: str,
    shortcuts: Path | None,
    *,
    workers: int | None,
    devices: str,
    threads: int | None,
    address: str | None,
) -> "AbstractContextManager[Runner]":
    """Return the runner that a command line asks for, a context manager that ends its workers.

    Args:
        kind: `local`, `processes` or `ray`.
        model: Folder or Hub id of the base model.
        dtype: As for `load_model`.
        shortcuts: Folder of the shortcuts, or one that contains it; None: there are none.
        workers: Number of workers; None: what suits the runner.
        devices: Where workers run, separated by commas; empty: what suits the runner.
        threads: Number of threads of each worker; None: what suits the runner.
        address: Of a Ray cluster; None: a new one on this machine.
    """
    from contextlib import closing

    from dynadepth_search.runners.choosing import choose_runner
    from dynadepth_search.runners.worker import ModelSource

    source = ModelSource(model, dtype, None if shortcuts is None else str(shortcuts))
    names = tuple(name.strip() for name in devices.split(",") if name.strip())
    return closing(
        choose_runner(
            kind, source, workers=workers, devices=names, threads=threads, address=address
        )
    )


def in_chat(task: "Task", tokenizer: "PreTrainedTokenizerBase", *, chat: bool) -> "Task":
    """Return a task, as turns of a chat if that is asked for.

    Args:
        task: The task as it was read.
        tokenizer: That of the base model, whose chat template the turns take.
        chat: Whether each prompt is the user's turn of a chat.
    """
    from dynadepth_search.data.chat_template import as_chat

    return as_chat(task, tokenizer) if chat else task


def quiet() -> None:
    """Take transformers' own bars off stderr, where ours are."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def display() -> Any:
    """Return the progress display of a verb, a context manager."""
    from dynadepth_search.cli.console import ProgressDisplay

    return ProgressDisplay()


def print_result(result: Mapping[str, Any], *, as_json: bool) -> None:
    """Print a result: a line for each value, or JSON."""
    from dynadepth_search.report.tables import show_value

    if as_json:
        typer.echo(json.dumps(result, indent=2, sort_keys=True, allow_nan=False))
        return
    for name, value in result.items():
        typer.echo(f"{name.replace('_', ' ')}: {show_value(value)}")


def print_evaluation(content: Mapping[str, Any], page: Path, *, as_json: bool) -> None:
    """Print an evaluation: verdict, notes, a short table, and where the page is; or the whole of it as JSON.

    Args:
        content: Content of `evaluation.json`.
        page: The report.
        as_json: Print JSON.
    """
    from dynadepth_search.report.terminal import print_summary, result_console

    if as_json:
        typer.echo(
            json.dumps({"evaluation": content, "report": str(page)}, indent=2, sort_keys=True)
        )
        return
    print_summary(content, result_console())
    typer.echo(f"report: {page}")


def print_depths(content: Mapping[str, Any]) -> None:
    """Print the verdict of an evaluation and what is left of the base model at each depth.

    Args:
        content: Content of `evaluation.json`.
    """
    from dynadepth_search.report.terminal import print_depth_table, result_console

    print_depth_table(content, result_console())


def scalar_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is nested: a report shows plain values."""
    return {key: value for key, value in values.items() if isinstance(value, str | int | float)}


def show_inspection(found: "Inspection", out: Path, *, as_json: bool) -> None:
    """Write the page of what was measured into its folder, and print it or its figures.

    Args:
        found: What was measured.
        out: The folder.
        as_json: Whether the figures are printed as JSON.
    """
    from dynadepth_search.inspecting.inspecting import print_inspection, write_inspection
    from dynadepth_search.report.report import REPORT_NAME
    from dynadepth_search.report.terminal import result_console

    page = write_inspection(found, out / REPORT_NAME)
    if as_json:
        print_result({**found.figures, "report": str(page)}, as_json=True)
        return
    print_inspection(found, result_console())
    typer.echo(f"report: {page}")
