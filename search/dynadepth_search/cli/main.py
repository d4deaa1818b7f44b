"""The verbs that `dynadepth-search` adds to the command line `dynadepth`, and the demo.

Progress goes to stderr, results to stdout.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from dynadepth_search.cli.compare_verbs import compare_configurations
from dynadepth_search.cli.options import (
    Json,
    Objective,
    Scoring,
    Seed,
    display,
    print_depths,
    print_evaluation,
    quiet,
)
from dynadepth_search.cli.plan_verbs import score, search_null, search_prompts, search_static
from dynadepth_search.cli.policy_verbs import evaluate_policy, inspect_run, report, train
from dynadepth_search.cli.shortcut_verbs import fit_shortcuts, fold
from dynadepth_search.cli.tune_verbs import apply_study, tune_menu, tune_search

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    search = typer.Typer(no_args_is_help=True, help="Search plans for all prompts, or for each.")
    search.command("static")(search_static)
    search.command("prompts")(search_prompts)
    search.command("null")(search_null)
    app.add_typer(search, name="search")
    app.command("shortcuts")(fit_shortcuts)
    app.command("fold")(fold)
    app.command("score")(score)
    app.command("train")(train)
    tune = typer.Typer(invoke_without_command=True)
    tune.callback()(apply_study)
    tune.command("menu")(tune_menu)
    tune.command("search")(tune_search)
    app.add_typer(tune, name="tune")
    app.command("eval")(evaluate_policy)
    app.command("compare")(compare_configurations)
    app.command("report")(report)
    app.command("inspect")(inspect_run)
    # All that follows the verb, help too, is the harness' own.
    passed_on = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command("lm-eval", context_settings=passed_on)(_harness)
    app.command("demo")(_demo)


def _harness(context: typer.Context) -> None:
    """Run lm-evaluation-harness, which knows `--model dynadepth --model_args pretrained=...,budget=0.9`."""
    from dynadepth_search.harness.command import run_harness

    run_harness(context.args)


def _demo(
    *,
    out: Annotated[Path, typer.Option("--out", help="Folder of the run")] = Path("runs/demo"),
    model: Annotated[
        str | None,
        typer.Option("--model", help="Folder or Hub id [default: SmolLM2-135M-Instruct]"),
    ] = None,
    task: Annotated[
        Path | None, typer.Option("--task", help="JSON lines [default: prompts of three kinds]")
    ] = None,
    shortcuts: Annotated[
        Path | None,
        typer.Option(
            "--shortcuts", help="Folder that `shortcuts` wrote [default: they are fitted]"
        ),
    ] = None,
    scoring: Scoring = "raw",
    objective: Objective = "preserve",
    prompts: Annotated[
        int | None,
        typer.Option("--prompts", min=40, help="Training prompts [default: 240; quick: 48]"),
    ] = None,
    heldout: Annotated[
        int | None,
        typer.Option("--heldout", min=8, help="Held-out prompts [default: 150; quick: 24]"),
    ] = None,
    evaluations: Annotated[
        int | None,
        typer.Option(
            "--evaluations", min=2, help="Plans evaluated for each labelled prompt, for --full"
        ),
    ] = None,
    seed: Seed = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Smaller in every part, under 2 minutes")
    ] = False,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="Compare with other routers, train late exits, measure accuracy and a learning curve",
        ),
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="Folder of what is fetched [default: the user's cache]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Go the whole way on one small model: shortcuts, search, train, evaluate, generate; goes on if it was killed."""
    from dynadepth_search.cli.demo.answers import show_answers
    from dynadepth_search.cli.demo.config import DemoConfig
    from dynadepth_search.cli.demo.running import run_demo
    from dynadepth_search.data.downloads import default_cache
    from dynadepth_search.inspecting.inspecting import print_inspection
    from dynadepth_search.inspecting.late_exits.judged import see_exit_evaluation
    from dynadepth_search.report.terminal import result_console

    config = DemoConfig(
        out=out,
        cache=default_cache() if cache is None else cache,
        model=model,
        task=task,
        maps=shortcuts,
        scoring=scoring,
        objective=objective,
        prompts=prompts or (48 if quick else 240),
        heldout=heldout or (24 if quick else 150),
        evaluations=evaluations or 24,
        seed=seed,
        quick=quick,
        full=full,
    )
    quiet()
    with display() as progress:
        result = run_demo(config, progress=progress)
    if as_json:
        typer.echo(json.dumps(result, indent=2, sort_keys=True))
        return
    print_depths(result["evaluation"])
    if result["piqa"] is not None:
        typer.echo("\nPIQA, questions with right answers:")
        print_evaluation(result["piqa"], Path(result["report"]), as_json=False)
    if result["exits"] is not None:
        typer.echo("")
        print_inspection(see_exit_evaluation(result["exits"]), result_console())
    typer.echo(f"\n{show_answers(result['answers'])}\n")
    typer.echo(f"report: {result['report']}")
