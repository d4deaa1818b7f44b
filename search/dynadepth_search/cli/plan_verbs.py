"""The commands `search static`, `search prompts`, `search null` and `score`: plans, and what they do to prompts.

Each command checks its options, loads what they name and calls functions that are available from Python too. Heavy
imports are inside the commands.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dynadepth_search.cli.options import (
    Address,
    Chat,
    Device,
    Devices,
    Dtype,
    Json,
    Limit,
    Model,
    Objective,
    Protect,
    RunnerKind,
    Scoring,
    Seed,
    Shortcuts,
    Threads,
    Workers,
    display,
    in_chat,
    layer_numbers,
    load,
    load_shortcuts_for,
    print_result,
    runner_for,
)

__all__ = ["score", "search_null", "search_prompts", "search_static"]

_Task = Annotated[
    Path,
    typer.Option("--task", help="The training prompts: JSON lines, or text, one prompt per line"),
]

_Out = Annotated[
    Path, typer.Option("--out", help="Folder of the result; a run that was killed continues in it")
]


def search_static(
    *,
    model: Model,
    task: _Task,
    out: _Out,
    objective: Objective = "preserve",
    scoring: Scoring = "raw",
    chat: Chat = False,
    from_layer: Annotated[
        int, typer.Option("--from-layer", min=0, help="No plan edits a layer before this one")
    ] = 0,
    min_depth: Annotated[
        float, typer.Option("--min-depth", help="No plan has a lower depth than this")
    ] = 0.75,
    size: Annotated[int, typer.Option("--size", min=2, help="Number of plans on the menu")] = 16,
    beam: Annotated[
        int,
        typer.Option(
            "--beam", min=1, help="Number of plans of each depth that are extended further"
        ),
    ] = 6,
    protect: Protect = "",
    shortcuts: Shortcuts = None,
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "fast",
    as_json: Json = False,
) -> None:
    """Search for plans that suit all prompts, and choose a menu of them; a run that was killed continues."""
    from dynadepth_search.data.tasks import read_task
    from dynadepth_search.scoring.objectives import check_objective
    from dynadepth_search.search import static
    from dynadepth_search.search.static_spec import StaticSpec

    spec = StaticSpec(
        objective=check_objective(objective),
        from_layer=from_layer,
        min_depth=min_depth,
        size=size,
        beam=beam,
        protect=layer_numbers(protect, "--protect"),
        seed=seed,
    )
    prompts = read_task(task, scoring=scoring, limit=limit)
    base, tokenizer = load(model, device, dtype)
    maps = load_shortcuts_for(base, shortcuts)
    prompts = in_chat(prompts, tokenizer, chat=chat)
    with display() as progress:
        found = static.search_static(
            base, tokenizer, prompts, out, spec, shortcuts=maps, progress=progress
        )
    result: dict[str, Any] = {
        "plans": str(out),
        "menu": len(found.menu),
        "static_plans": len(found.front),
        "pool": len(found.pool),
        "evaluations": found.evaluations,
        "measured_on_prompts": found.prompts,
    }
    print_result(result, as_json=as_json)


def search_prompts(
    *,
    model: Model,
    task: _Task,
    out: _Out,
    objective: Objective = "preserve",
    scoring: Scoring = "raw",
    chat: Chat = False,
    evaluations: Annotated[
        int,
        typer.Option(
            "--evaluations",
            min=2,
            help="Maximum number of plans evaluated for each prompt; a search with nothing left to gain stops early",
        ),
    ] = 40,
    probe: Annotated[
        int,
        typer.Option(
            "--probe", min=1, help="Number of prompts on which every single edit is measured first"
        ),
    ] = 8,
    depth_penalty: Annotated[
        float | None,
        typer.Option(
            "--depth-penalty",
            min=0.0,
            help="Price of a depth of 1, in units of the objective [default: chosen by the probe]",
        ),
    ] = None,
    confirm: Annotated[
        int,
        typer.Option(
            "--confirm",
            min=0,
            help="Number of best plans that are scored again on variants of the prompt; 0: no label is confirmed",
        ),
    ] = 2,
    margin: Annotated[
        float,
        typer.Option(
            "--margin",
            min=0.0,
            help="Gain over the identity plan that a label needs, in units of the objective",
        ),
    ] = 0.0,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            "--new-tokens",
            min=1,
            help="The most tokens of an answer, where a task has solutions and labels are confirmed by generated "
            "answers [default: 128]",
        ),
    ] = None,
    protect: Protect = "",
    shortcuts: Shortcuts = None,
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "fast",
    runner: RunnerKind = "local",
    workers: Workers = None,
    devices: Devices = "",
    threads: Threads = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Search for the best plan of each prompt, its label; a run that was killed continues."""
    from dynadepth_search.data.tasks import read_task
    from dynadepth_search.scoring.objectives import check_objective
    from dynadepth_search.search import per_prompt
    from dynadepth_search.search.per_prompt_spec import PromptSearchSpec
    from dynadepth_search.storage.answer_counts import answer_counts
    from dynadepth_search.storage.label_manifest import answers_are_generated
    from dynadepth_search.storage.labels import read_labels

    forest = replace(
        PromptSearchSpec().config,
        max_evaluations=evaluations,
        probe_trees=probe,
        protect=layer_numbers(protect, "--protect"),
        round_size=4,
    )
    spec = PromptSearchSpec(
        config=forest,
        objective=check_objective(objective),
        depth_penalty=depth_penalty,
        confirm=confirm,
        margin=margin,
        seed=seed,
    )
    prompts = read_task(task, scoring=scoring, limit=limit)
    generates = answers_are_generated(prompts.kind, objective, confirm)
    if new_tokens is not None:
        if not generates:
            raise typer.BadParameter(
                "--new-tokens was given, but no answers are generated; that takes a task with `solution`, --objective "
                "reward and --confirm above 0"
            )
        spec = replace(spec, new_tokens=new_tokens)
    who = runner_for(
        runner,
        model,
        dtype,
        shortcuts,
        workers=workers,
        devices=devices,
        threads=threads,
        address=address,
    )
    with who as crew:
        base, tokenizer = load(model, device, dtype)
        maps = load_shortcuts_for(base, shortcuts)
        prompts = in_chat(prompts, tokenizer, chat=chat)
        with display() as progress:
            summary = per_prompt.search_prompts(
                base, tokenizer, prompts, out, spec, shortcuts=maps, runner=crew, progress=progress
            )
    labels = read_labels(out, model=base)
    result: dict[str, Any] = {
        "labels": str(out),
        "prompts": len(labels),
        "searched_now": summary.searched,
        "evaluations_per_label": labels.evaluations,
        "confirmations_per_label": labels.confirmations,
        "confirmed_as_found": labels.kept_rate,
        "sharing_factor": summary.sharing_factor if summary.executed_visits else None,
        "depth_penalty": labels.manifest.depth_penalty,
        "identity_rate": labels.identity_rate,
        "margin_over_identity": float(labels.margins.mean()),
        "mean_depth": float(labels.depths.mean()),
        "seconds": round(summary.probe_seconds + summary.search_seconds, 2),
    }
    if generates:
        result |= answer_counts(labels)
    print_result(result, as_json=as_json)


def search_null(
    *,
    model: Model,
    labels: Annotated[
        Path,
        typer.Option(
            "--labels", help="Folder that `search prompts` wrote, with the objective reward"
        ),
    ],
    out: _Out,
    shortcuts: Shortcuts = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "fast",
    as_json: Json = False,
) -> None:
    """Search again with the answers shuffled between the prompts, to see how many fixes of labels are luck."""
    from dynadepth_search.search.null_control import search_null as search_control
    from dynadepth_search.search.null_files import luck_text

    base, tokenizer = load(model, device, dtype)
    maps = load_shortcuts_for(base, shortcuts)
    with display() as progress:
        control = search_control(
            base, tokenizer, labels, out, shortcuts=maps, seed=seed, progress=progress
        )
    found = control.to_dict()
    if not as_json:
        found = {
            "control": str(out),
            "prompts": found["prompts"],
            "base_wrong": f"{found['real']['base_wrong']} (answers shuffled: {found['null']['base_wrong']})",
            **{f"{kind}_labels": luck_text(found, kind) for kind in ("raw", "confirmed")},
        }
    print_result(found, as_json=as_json)


def score(
    *,
    model: Model,
    task: Annotated[
        Path, typer.Option("--task", help="The prompts: JSON lines, or text, one prompt per line")
    ],
    plans: Annotated[
        Path | None, typer.Option("--plans", help="Folder that `search static` wrote")
    ] = None,
    out: _Out,
    subsets: Annotated[
        str,
        typer.Option(
            "--subsets",
            help="In place of --plans: layers such as 4,9,12, of which all subsets are skipped; for `tune search`",
        ),
    ] = "",
    policy: Annotated[
        Literal["menu", "routers"],
        typer.Option(
            "--policy",
            help="menu: the plans of the menu; routers: those that routers of all layers learn from",
        ),
    ] = "menu",
    scoring: Scoring = "raw",
    chat: Chat = False,
    layers: Annotated[
        str,
        typer.Option(
            "--layers",
            help="Layers whose states are stored, such as 10,14 [default: chosen from the plans]",
        ),
    ] = "",
    windows: Annotated[
        int,
        typer.Option(
            "--windows",
            min=0,
            help="Number of windows stored in addition to the last prompt token's state",
        ),
    ] = 0,
    shortcuts: Shortcuts = None,
    limit: Limit = None,
    device: Device = "cpu",
    dtype: Dtype = "fast",
    runner: RunnerKind = "local",
    workers: Workers = None,
    devices: Devices = "",
    threads: Threads = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Score prompts under plans, to see what each plan does to the base model's answers; a killed run continues."""
    wanted, skipped = layer_numbers(layers, "--layers"), layer_numbers(subsets, "--subsets")
    if (plans is None) == (not skipped):
        raise typer.BadParameter("give one of --plans and --subsets")

    from dynadepth.models.structure import layer_stack
    from dynadepth.training.menu.fit import decision_layers
    from dynadepth_search.data.tasks import read_task
    from dynadepth_search.scoring.score_table import score_prompts
    from dynadepth_search.search.static import read_static
    from dynadepth_search.storage.compatibility import check_same_shortcuts
    from dynadepth_search.training.router_fit import router_plans
    from dynadepth_search.tuning.replay import skip_subsets

    prompts = read_task(task, scoring=scoring, limit=limit)
    who = runner_for(
        runner,
        model,
        dtype,
        shortcuts,
        workers=workers,
        devices=devices,
        threads=threads,
        address=address,
    )
    with who as crew:
        base, tokenizer = load(model, device, dtype)
        maps = load_shortcuts_for(base, shortcuts)
        chosen_on: tuple[str, ...] = ()
        if plans is None:
            rows = skip_subsets(skipped, layer_stack(base).num_layers)
        else:
            found = read_static(plans, model=base)
            check_same_shortcuts(
                found.shortcuts,
                maps,
                what=f"the plans in {plans} were",
                advice="give the same, or search again",
            )
            chosen_on = tuple(found.prompt_hashes or ())
            rows = found.menu if policy == "menu" else router_plans(found.front)
            if not wanted and policy == "menu":
                wanted = decision_layers(found.menu)
        prompts = in_chat(prompts, tokenizer, chat=chat)
        with display() as progress:
            table = score_prompts(
                base,
                tokenizer,
                prompts,
                rows,
                out,
                layers=wanted,
                num_windows=windows,
                shortcuts=maps,
                plan_prompts=chosen_on,
                runner=crew,
                progress=progress,
            )
    print_result(
        {
            "scores": str(out),
            "prompts": len(table),
            "plans": len(table.plans),
            "layers": ", ".join(map(str, wanted)),
            "agreement": float(table.agreement[:, 1:].mean()),
            "total_variation": float(table.total_variation[:, 1:].mean()),
        },
        as_json=as_json,
    )
