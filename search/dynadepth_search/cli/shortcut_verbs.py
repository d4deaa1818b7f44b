"""The verbs shortcuts and fold: what skipped layers leave behind, as maps beside the model or inside its weights.

Each checks its options, loads what they name and calls functions that Python can call as well. Heavy imports are in
the verbs.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynadepth.cli.options import PLAN_HELP
from dynadepth_search.cli.options import (
    Chat,
    Device,
    Dtype,
    Json,
    Limit,
    Model,
    Seed,
    display,
    in_chat,
    load,
    print_result,
)

if TYPE_CHECKING:
    from dynadepth.evaluation.intervals import Interval
    from dynadepth_search.shortcuts.folding import FoldedRun

__all__ = ["fit_shortcuts", "fold"]


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
    dtype: Dtype = "fast",
    as_json: Json = False,
) -> None:
    """Fit what is left in place of skipped layers: low-rank maps, no gradients, no labels; a killed run continues."""
    from dynadepth_search.data.tasks import read_task
    from dynadepth_search.shortcuts import building
    from dynadepth_search.shortcuts.spec import ShortcutSpec

    spec = ShortcutSpec(rank=_rank(rank), new_tokens=new_tokens, distil_steps=distil, seed=seed)
    prompts = read_task(task, limit=limit)
    base, tokenizer = load(model, device, dtype)
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


def fold(
    *,
    model: Model,
    plan: Annotated[str, typer.Option("--plan", help=PLAN_HELP)],
    task: Annotated[
        Path,
        typer.Option("--task", help="Prompts to fit on: JSON lines, or text, one prompt per line"),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            help="Folder to write; new or empty. A run that was killed continues from OUT.work",
        ),
    ],
    new_tokens: Annotated[
        int,
        typer.Option(
            "--new-tokens",
            min=1,
            help="The most tokens by which the model continues each prompt; the maps are fitted on both",
        ),
    ] = 64,
    chat: Chat = False,
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Write a plain checkpoint of one plan, its skipped layers folded into the weights of those before them."""
    import shutil

    from dynadepth.models.loading import load_tokenizer
    from dynadepth.plans import plan_depth, plan_text
    from dynadepth.wrapping.bake import check_new_folder, save_checkpoint
    from dynadepth_search.data.tasks import read_task
    from dynadepth_search.shortcuts.folding import fold_plan
    from dynadepth_search.shortcuts.spec import ShortcutSpec

    check_new_folder(out)
    spec = ShortcutSpec(new_tokens=new_tokens, num_places=new_tokens, seed=seed)
    prompts = read_task(task, limit=limit)
    base, tokenizer = load(model, device, dtype)
    prompts = in_chat(prompts, tokenizer, chat=chat)
    work = out.with_name(f"{out.name}.work")
    with display() as progress:
        found = fold_plan(base, tokenizer, prompts, plan, work, spec, progress=progress)
    # The tokenizer as in its files: the padding that generation needs does not belong into the checkpoint.
    files = load_tokenizer(model, for_generation=False)
    save_checkpoint(found.model, out, plan=found.plan, tokenizer=files)
    shutil.rmtree(work, ignore_errors=True)
    measured = {
        "divergence": found.divergence,
        "divergence_of_plain_bake": found.plain_divergence,
        "less_divergence": found.less_divergence,
        "agreement": found.agreement,
        "agreement_of_plain_bake": found.plain_agreement,
        "more_agreement": found.more_agreement,
    }
    result: dict[str, Any] = {
        "out": str(out),
        "plan": plan_text(found.plan),
        "depth": float(plan_depth(found.plan)),
        "runs": [_run(each, as_json=as_json) for each in found.runs],
        "tokens": found.tokens,
        "heldout_prompts": found.agreement.n,
        **{name: _interval(each, as_json=as_json) for name, each in measured.items()},
    }
    print_result(result, as_json=as_json)


def _run(folded: "FoldedRun", *, as_json: bool) -> Any:
    run = folded.run
    if as_json:
        return {
            "first": run.first,
            "last": run.last,
            "into": None if folded.states is None else run.below,
            "states": folded.states,
            "ridge": folded.ridge,
        }
    layers = f"{run.first}-{run.last}" if run.last > run.first else str(run.first)
    if folded.states is None:
        return f"{layers} left out (no map was better)"
    return (
        f"{layers} into {run.below} (states of the {folded.states} model, ridge {folded.ridge:g})"
    )


def _interval(interval: "Interval | None", *, as_json: bool) -> Any:
    if interval is None or as_json:
        return None if interval is None else interval.to_dict()
    return f"{interval.mean:.4f} [{interval.low:.4f}, {interval.high:.4f}]"
