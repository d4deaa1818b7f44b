"""The verbs train, eval, report and inspect: policies from what was scored, what they are worth, what there is.

Each verb checks its options, loads what they name and calls functions that Python can call as well. Heavy imports are
inside the verbs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dynadepth_search.cli.exit_verbs import evaluate_exits, train_exits
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
    print_evaluation,
    print_result,
    runner_for,
    scalar_values,
    show_inspection,
)

if TYPE_CHECKING:
    pass

__all__ = ["evaluate_policy", "inspect_run", "report", "train"]

_BUDGETS = (0.95, 0.9, 0.85, 0.8)


def train(
    *,
    model: Model,
    scores: Annotated[
        Path | None, typer.Option("--scores", help="Folder that `score` wrote")
    ] = None,
    plans: Annotated[
        Path | None,
        typer.Option(
            "--plans",
            help="Folder that `search static` wrote; routers need it, and `eval` finds it",
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option("--labels", help="Folder that `search prompts` wrote, for --policy drllm"),
    ] = None,
    task: Annotated[
        Path | None,
        typer.Option(
            "--task",
            help="The training prompts, for --policy exits: JSON lines, or text, one prompt per line",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", help="Folder of the routers; routers there are replaced")
    ],
    policy: Annotated[
        Literal["menu", "routers", "drllm", "exits"],
        typer.Option(
            "--policy",
            help="menu: one of a few plans for each prompt; routers: one router for each layer; drllm: the published "
            "routers, which imitate labels; exits: new tokens leave where they are decided",
        ),
    ] = "menu",
    objective: Objective = "preserve",
    protect: Protect = "",
    shortcuts: Shortcuts = None,
    accept_partial: Annotated[
        bool,
        typer.Option(
            "--accept-partial", help="Learn from what an unfinished scoring or search has so far"
        ),
    ] = False,
    exit_layers: Annotated[
        str,
        typer.Option(
            "--exit-layers",
            help="Layers before which tokens may leave, such as 9,15 [default: chosen by held-out passes]",
        ),
    ] = "",
    new_tokens: Annotated[
        int,
        typer.Option(
            "--new-tokens",
            min=2,
            help="The most tokens by which each prompt is continued, for --policy exits",
        ),
    ] = 64,
    chat: Chat = False,
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "fast",
    as_json: Json = False,
) -> None:
    """Train a policy, calibrate its budget, and export it to ONNX."""
    needed = {"menu": {"--scores": scores}, "drllm": {"--labels": labels}}
    needed["routers"] = {"--scores": scores, "--plans": plans}
    needed["exits"] = {"--task": task}
    missing = [option for option, value in needed[policy].items() if value is None]
    if missing:
        raise typer.BadParameter(f"--policy {policy} needs {' and '.join(missing)}")
    protected = layer_numbers(protect, "--protect")
    if policy == "exits" and task is not None:
        _refuse_given(
            {"--protect": protected, "--shortcuts": shortcuts}, "--policy exits skips no layer"
        )
        train_exits(
            model,
            task,
            out,
            layers=layer_numbers(exit_layers, "--exit-layers"),
            new_tokens=new_tokens,
            chat=chat,
            limit=limit,
            seed=seed,
            device=device,
            dtype=dtype,
            as_json=as_json,
        )
        return

    from dynadepth.checkpoints.trained_policy import TrainedPolicy
    from dynadepth_search.scoring.score_table import read_scores
    from dynadepth_search.search.static import read_static
    from dynadepth_search.storage.compatibility import check_same_shortcuts
    from dynadepth_search.storage.labels import read_labels
    from dynadepth_search.training.menu_fit import fit_trained_menu
    from dynadepth_search.training.router_fit import fit_imitation, fit_routers, write_routers
    from dynadepth_search.training.run_folders import with_folders

    base, tokenizer = load(model, device, dtype)
    maps = load_shortcuts_for(base, shortcuts)
    if scores is not None and policy != "drllm":
        table = read_scores(scores, model=base, accept_partial=accept_partial)
    with display() as progress:
        trained: TrainedPolicy
        if policy == "drllm" and labels is not None:
            found = read_labels(labels, model=base, accept_partial=accept_partial)
            trained = fit_imitation(
                base, tokenizer, found, shortcuts=maps, seed=seed, progress=progress
            )
        elif policy == "routers" and scores is not None and plans is not None:
            static = read_static(plans, model=base)
            check_same_shortcuts(
                static.shortcuts,
                maps,
                what=f"the plans in {plans} were",
                advice="give the plans that the scores are of",
            )
            trained = fit_routers(
                base,
                tokenizer,
                table,
                static.front,
                objective=objective,
                protect=protected,
                shortcuts=maps,
                seed=seed,
                progress=progress,
            )
        elif scores is not None:
            trained = fit_trained_menu(
                table,
                objective=objective,
                protect=protected,
                shortcuts=maps,
                seed=seed,
                progress=progress,
            )
        folders = {"plans": plans, "scores": scores}
        write_routers(out, with_folders(trained, out, folders))
    lowest, highest = trained.calibration.range
    result: dict[str, Any] = {
        "routers": str(out),
        "policy": policy,
        "lowest_budget": lowest,
        "highest_budget": highest,
        "train_prompts": trained.training["train_prompts"],
        "validation_prompts": trained.training["validation_prompts"],
        "prompts_of_task": trained.training["prompts_of_task"],
    }
    recipe = trained.training.get("recipe", {})
    if policy == "menu":
        result |= {key: recipe[key] for key in ("layers", "rank", "ridge", "shrinkage", "inner")}
    print_result(result, as_json=as_json)


def evaluate_policy(
    *,
    model: Model,
    routers: Annotated[Path, typer.Option("--routers", help="Folder of the routers")],
    task: Annotated[Path, typer.Option("--task", help="The held-out prompts")],
    out: Annotated[Path, typer.Option("--out", help="Folder of results and report")],
    plans: Annotated[
        Path | None,
        typer.Option(
            "--plans",
            help="Folder that `search static` wrote: the static plans [default: where the routers say]",
        ),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            "--scores",
            help="Folder that `score` wrote: the training prompts [default: where the routers say]",
        ),
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(
            "--budget", help="Mean depth; give it several times [default: 0.95 0.9 0.85 0.8]"
        ),
    ] = None,
    fidelity: Annotated[
        list[float] | None,
        typer.Option(
            "--fidelity",
            help="For exits: the share of new tokens to keep; give it several times [default: 0.99 0.98 0.95]",
        ),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=2, help="For exits: the most tokens of an answer")
    ] = 64,
    against: Annotated[
        list[Path] | None,
        typer.Option("--against", help="Folder of other routers to compare; give it several times"),
    ] = None,
    shortcuts: Shortcuts = None,
    unseen: Annotated[
        Path | None,
        typer.Option("--unseen", help="Prompts of another kind, whose mean depth is reported"),
    ] = None,
    scoring: Scoring = "raw",
    chat: Chat = False,
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
    """Compare policies on held-out prompts with plans that do not look at the prompt; writes a report."""
    from dynadepth.checkpoints.save_load import load_policy
    from dynadepth.checkpoints.trained_exits import TrainedExits
    from dynadepth_search.data.tasks import Task, read_task
    from dynadepth_search.evaluation.comparison import Front
    from dynadepth_search.evaluation.evaluating import EvaluationConfig, check_trained_on, evaluate
    from dynadepth_search.report.report import write_report
    from dynadepth_search.scoring.score_table import read_scores
    from dynadepth_search.search.static import read_static
    from dynadepth_search.storage.compatibility import chat_form, check_same_shortcuts
    from dynadepth_search.training.run_folders import named_folder

    others = _named(against or [])
    given = load_policy(routers)
    if isinstance(given, TrainedExits):
        unfit = {
            "--scores": scores,
            "--unseen": unseen,
            "--runner": None if runner == "local" else runner,
        }
        _refuse_given(unfit, f"the policy in {routers} is exits, which nobody scores")
        prompts = read_task(task, scoring=scoring, limit=limit)
        evaluate_exits(
            model,
            given,
            prompts,
            out,
            plans=plans,
            shortcuts=shortcuts,
            against=others,
            fidelities=fidelity or (),
            budgets=budget or (),
            new_tokens=new_tokens,
            chat=chat,
            device=device,
            dtype=dtype,
            as_json=as_json,
        )
        return
    _refuse_given({"--fidelity": fidelity}, f"the policy in {routers} plans prompts")
    plans = plans or named_folder(given, "plans")
    scores = scores or named_folder(given, "scores")
    config = EvaluationConfig(budgets=tuple(budget or _BUDGETS), seed=seed)
    heldout = read_task(task, scoring=scoring, limit=limit)
    other = None if unseen is None else read_task(unseen)
    # Routers carry the shortcuts that they were calibrated with.
    who = runner_for(
        runner,
        model,
        dtype,
        None if given.shortcuts is None and shortcuts is None else routers,
        workers=workers,
        devices=devices,
        threads=threads,
        address=address,
    )
    with who as crew:
        base, tokenizer = load(model, device, dtype)
        static = read_static(plans, model=base)
        # Prompts that are not scored yet trained nothing, and the table knows them all.
        table = read_scores(scores, model=base, accept_partial=True)
        heldout = in_chat(heldout, tokenizer, chat=chat)
        other = None if other is None else in_chat(other, tokenizer, chat=chat)
        asked = {"name": table.manifest["task_name"], **table.manifest["asked"]["task"]}
        given.check_model(base)
        own = given.shortcuts
        if shortcuts is not None:
            own = load_shortcuts_for(base, shortcuts)
            check_same_shortcuts(
                None if given.shortcuts is None else given.shortcuts.digest,
                own,
                what=f"the routers in {routers} were",
                advice="leave --shortcuts out: the routers carry theirs",
            )
        for what, digest in (("plans", static.shortcuts), ("scores", table.shortcuts)):
            check_same_shortcuts(
                digest,
                own,
                what=f"the {what} were",
                advice=f"give the --{what} that these routers were trained on",
            )
        presets = {name: load_policy(path, model=base) for name, path in others.items()}
        check_trained_on({str(routers): given}, asked)
        with display() as progress:
            content = evaluate(
                base,
                tokenizer,
                heldout=heldout,
                train=Task(asked["name"], table.examples, asked["scoring"], chat_form(asked)),
                routers=given,
                front=Front(static.pool, static.pool_values),
                objective=static.objective,
                folder=out,
                presets=presets,
                unseen=other,
                seen={
                    f"the plans in {plans}": static.prompt_hashes,
                    f"the scores in {scores}": table.prompt_hashes,
                    f"the plans scored in {scores}": table.plan_prompt_hashes,
                },
                config=config,
                runner=crew,
                progress=progress,
            )
    page = write_report(out, content, {"training": scalar_values(given.training)})
    print_evaluation(content, page, as_json=as_json)


def _refuse_given(given: Mapping[str, Any], why: str) -> None:
    """Refuse options that were given and mean nothing here."""
    names = [name for name, value in given.items() if value]
    if names:
        raise typer.BadParameter(f"{why}; leave out {' and '.join(names)}")


def report(
    *,
    run: Annotated[Path, typer.Option("--run", help="Folder that `eval` or `demo` wrote")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the report [default: that of --run]")
    ] = None,
    markdown: Annotated[
        bool,
        typer.Option(
            "--markdown",
            help="Print the verdict, all tables and all findings in Markdown and write nothing",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Draw the report of an evaluation again and print its summary, or print its tables."""
    from dynadepth_search.evaluation.evaluating import EVALUATION_NAME, read_evaluation
    from dynadepth_search.exits.judging.evaluating import EXIT_EVALUATION_NAME
    from dynadepth_search.inspecting.late_exits.judged import inspect_exit_evaluation
    from dynadepth_search.report.report import read_run, report_markdown, write_report

    if (run / EXIT_EVALUATION_NAME).is_file():
        _refuse_given({"--markdown": markdown}, f"{run} holds an evaluation of late exits")
        show_inspection(inspect_exit_evaluation(run), out or run, as_json=as_json)
        return

    inner = run / "evaluation"
    content = read_evaluation(inner if (inner / EVALUATION_NAME).is_file() else run)
    if markdown:
        typer.echo(report_markdown(content))
        return
    page = write_report(out or run, content, read_run(run))
    print_evaluation(content, page, as_json=as_json)


def inspect_run(
    folder: Annotated[
        Path,
        typer.Argument(help="Folder of labels, scores, routers or an evaluation, finished or not"),
    ],
    *,
    null: Annotated[
        Path | None,
        typer.Option("--null", help="Folder that `search null` wrote: the control of these labels"),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html", help="File of the page [default: inspect-FOLDER.html where you stand]"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a folder holds, as tables and as one page: depth, gains, layers, plans, the hardest prompts."""
    page = Path(f"inspect-{folder.resolve().name}.html") if html is None else html
    if page.suffix.lower() not in (".html", ".htm") or page.is_dir():
        raise typer.BadParameter(f"--html {page} is no page; name a file that ends in .html")

    from dynadepth_search.inspecting.inspecting import (
        inspect_folder,
        print_inspection,
        write_inspection,
    )
    from dynadepth_search.report.terminal import result_console

    found = inspect_folder(folder, control=null)
    write_inspection(found, page)
    if as_json:
        print_result({"kind": found.kind, **found.figures, "page": str(page)}, as_json=True)
        return
    print_inspection(found, result_console())
    typer.echo(f"page: {page}")


def _named(folders: list[Path]) -> dict[str, Path]:
    """Name routers after their folders, which have to differ in that."""
    from dynadepth.errors import ConfigError

    named: dict[str, Path] = {}
    for folder in folders:
        name = folder.name or folder.resolve().name  # `.` has none
        if name in named:
            raise ConfigError(
                f"--against gives {named[name]} and {folder}, which a report would both call {name!r}; "
                "give folders with different names"
            )
        named[name] = folder
    return named
