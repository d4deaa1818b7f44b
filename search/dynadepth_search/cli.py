"""The verbs search, train, eval, report and demo of the command line `dynadepth`.

Each verb checks its options, loads what they name and calls one function that Python can call as
well. Heavy imports are inside the verbs. Progress goes to stderr, results to stdout.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["register"]

_Model = Annotated[str, typer.Option("--model", help="Folder or Hub id of the base model")]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object")]
_Seed = Annotated[int, typer.Option("--seed", min=0, help="Of everything random")]
_Scoring = Annotated[
    str,
    typer.Option(
        "--scoring", help="How choices are scored: raw, normalized (for each byte) or letter"
    ),
]
_Objective = Annotated[
    str,
    typer.Option(
        "--objective",
        help="preserve: stay with the base model's answers, no labels needed; reward: the right answers",
    ),
]
_Device = Annotated[str, typer.Option("--device", help="Where the model runs, as torch names it")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command("search")(_search)
    app.command("train")(_train)
    app.command("eval")(_eval)
    app.command("report")(_report)
    app.command("demo")(_demo)


def _search(
    *,
    model: _Model,
    task: Annotated[Path, typer.Option("--task", help="JSON lines: the training prompts")],
    out: Annotated[
        Path, typer.Option("--out", help="Folder of the labels; a search goes on in its own")
    ],
    objective: _Objective = "preserve",
    scoring: _Scoring = "raw",
    evaluations: Annotated[
        int, typer.Option("--evaluations", min=2, help="Plans evaluated for each prompt")
    ] = 24,
    probe: Annotated[
        int,
        typer.Option("--probe", min=1, help="Prompts on which every single edit is measured first"),
    ] = 8,
    depth_penalty: Annotated[
        float | None,
        typer.Option(
            "--depth-penalty",
            min=0.0,
            help="What a depth of 1 costs in units of the objective [default: chosen by the probe]",
        ),
    ] = None,
    min_depth: Annotated[
        float, typer.Option("--min-depth", help="The static plans end above this depth")
    ] = 0.7,
    protect: Annotated[
        str, typer.Option("--protect", help="Layers that always run once, such as 0,1")
    ] = "",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Take the first prompts of the task only")
    ] = None,
    seed: _Seed = 0,
    device: _Device = "cpu",
    as_json: _Json = False,
) -> None:
    """Search plans for the prompts of a task, and static plans for all of them; can be killed and started again."""
    protected = _layers(protect)

    from dynadepth.forest import SearchConfig
    from dynadepth_search.front import FrontSpec, search_front
    from dynadepth_search.labels import read_labels
    from dynadepth_search.scoring import Scorer, check_objective
    from dynadepth_search.search_spec import SearchSpec
    from dynadepth_search.searching import run_search
    from dynadepth_search.tasks import read_task

    goal = check_objective(objective)
    forest = SearchConfig(
        max_evaluations=evaluations, probe_trees=probe, protect=protected, round_size=4
    )
    spec = SearchSpec(config=forest, objective=goal, depth_penalty=depth_penalty, seed=seed)
    static = FrontSpec(objective=goal, min_depth=min_depth, seed=seed, protect=protected)
    prompts = read_task(task, scoring=scoring, limit=limit)
    base, tokenizer = _load(model, device)
    with _display() as progress:
        summary = run_search(base, tokenizer, prompts, out, spec, progress=progress)
        labels = read_labels(out, model=base)
        front = search_front(
            Scorer(base, tokenizer, prompts.scoring),
            prompts,
            out,
            static,
            prior=labels.manifest.prior,
            progress=progress,
        )
    result: dict[str, Any] = {
        "labels": str(out),
        "prompts": len(labels),
        "searched_now": summary.searched,
        "evaluations_per_label": labels.evaluations,
        "sharing_factor": summary.sharing_factor if summary.executed_visits else None,
        "depth_penalty": labels.manifest.depth_penalty,
        "identity_rate": labels.identity_rate,
        "mean_depth": float(labels.depths.mean()),
        "static_plans": len(front.plans),
        "seconds": round(summary.probe_seconds + summary.search_seconds, 2),
    }
    _say(result, as_json=as_json)


def _train(
    *,
    model: _Model,
    labels: Annotated[Path, typer.Option("--labels", help="Folder that `search` wrote")],
    out: Annotated[
        Path, typer.Option("--out", help="Folder of the routers; routers there are replaced")
    ],
    preset: Annotated[
        str, typer.Option("--preset", help="dynadepth, or drllm for the published settings")
    ] = "dynadepth",
    seed: _Seed = 0,
    device: _Device = "cpu",
    as_json: _Json = False,
) -> None:
    """Train routers on labels, calibrate their budget, and export them to ONNX."""
    from dynadepth_search.fitting import fit_routers, write_routers
    from dynadepth_search.front import read_front
    from dynadepth_search.labels import read_labels

    front = read_front(labels)
    base, tokenizer = _load(model, device)
    found = read_labels(labels, model=base)
    with _display() as progress:
        routers = fit_routers(
            base,
            tokenizer,
            found,
            front.plans,
            front_rewards=front.rewards,
            preset=preset,
            seed=seed,
            progress=progress,
        )
        write_routers(out, routers)
    lowest, highest = routers.calibration.range
    result = {
        "routers": str(out),
        "preset": preset,
        "shrinkage": routers.shrinkage,
        "lowest_budget": lowest,
        "highest_budget": highest,
        "train_prompts": routers.training["train_prompts"],
        "validation_prompts": routers.training["validation_prompts"],
    }
    _say(result, as_json=as_json)


def _eval(
    *,
    model: _Model,
    routers: Annotated[Path, typer.Option("--routers", help="Folder of the routers")],
    labels: Annotated[
        Path,
        typer.Option(
            "--labels", help="Folder that `search` wrote: training prompts and static plans"
        ),
    ],
    task: Annotated[Path, typer.Option("--task", help="JSON lines: the held-out prompts")],
    out: Annotated[Path, typer.Option("--out", help="Folder of figures and report")],
    budget: Annotated[
        list[float] | None,
        typer.Option("--budget", help="Mean depth; give it several times [default: 0.9 0.85 0.8]"),
    ] = None,
    preset: Annotated[
        list[Path] | None,
        typer.Option("--against", help="Folder of other routers to compare; give it several times"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Take the first prompts of the task only")
    ] = None,
    seed: _Seed = 0,
    device: _Device = "cpu",
    as_json: _Json = False,
) -> None:
    """Compare routers on held-out prompts with plans that do not look at the prompt; writes a report."""
    from dynadepth.checkpoint import load_routers
    from dynadepth_search.contest import Front
    from dynadepth_search.evaluating import EvaluationConfig, check_trained_on, evaluate
    from dynadepth_search.front import read_front
    from dynadepth_search.labels import read_labels
    from dynadepth_search.report import write_report
    from dynadepth_search.tasks import Task, read_task

    against = _named(preset or [])
    config = EvaluationConfig(budgets=tuple(budget or (0.9, 0.85, 0.8)), seed=seed)
    front = read_front(labels)
    base, tokenizer = _load(model, device)
    found = read_labels(labels, model=base)
    asked = found.manifest.task
    heldout = read_task(task, scoring=asked["scoring"], limit=limit)
    train = Task(asked["name"], found.examples, asked["scoring"])
    given = load_routers(routers, model=base)
    others = {name: load_routers(path, model=base) for name, path in against.items()}
    check_trained_on({str(routers): given}, asked)
    check_trained_on({str(against[name]): each for name, each in others.items()}, asked)
    with _display() as progress:
        content = evaluate(
            base,
            tokenizer,
            heldout=heldout,
            train=train,
            routers=given,
            front=Front(front.plans, front.rewards),
            objective=found.manifest.objective,
            folder=out,
            presets=others,
            config=config,
            progress=progress,
        )
    page = write_report(out, content, {"training": _plain(given.training)})
    _show(content, page, as_json=as_json)


def _report(
    *,
    run: Annotated[Path, typer.Option("--run", help="Folder that `eval` or `demo` wrote")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the report [default: that of --run]")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables in Markdown and write nothing")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Draw the report of an evaluation again, or print its tables."""
    from dynadepth_search.evaluating import EVALUATION_NAME, read_evaluation
    from dynadepth_search.report import read_run, write_report
    from dynadepth_search.tables import as_markdown, evaluation_tables

    inner = run / "evaluation"
    content = read_evaluation(inner if (inner / EVALUATION_NAME).is_file() else run)
    if markdown:
        tables = [as_markdown(*table) for table in evaluation_tables(content)]
        findings = "\n".join(f"- {finding}" for finding in content["findings"])
        typer.echo("\n\n".join([*tables, findings]))
        return
    page = write_report(out or run, content, read_run(run))
    _show(content, page, as_json=as_json)


def _demo(
    *,
    out: Annotated[Path, typer.Option("--out", help="Folder of the run")] = Path("runs/demo"),
    model: Annotated[
        str | None,
        typer.Option("--model", help="Folder or Hub id [default: SmolLM2-135M-Instruct]"),
    ] = None,
    task: Annotated[
        Path | None, typer.Option("--task", help="JSON lines [default: PIQA questions]")
    ] = None,
    scoring: _Scoring = "raw",
    objective: _Objective = "preserve",
    prompts: Annotated[
        int | None,
        typer.Option(
            "--prompts", min=16, help="Training and held-out prompts [default: 200; quick: 32]"
        ),
    ] = None,
    evaluations: Annotated[
        int | None,
        typer.Option(
            "--evaluations", min=2, help="Plans evaluated for each prompt [default: 24; quick: 8]"
        ),
    ] = None,
    seed: _Seed = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Smaller in every part, under 2 minutes")
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="Folder of what is fetched [default: the user's cache]"),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write everything measured into this file")
    ] = None,
) -> None:
    """Go the whole way on one small model: search, train, evaluate, report, generate; goes on if it was killed."""
    from dynadepth.files import write_json_atomic
    from dynadepth_search.assets import default_cache
    from dynadepth_search.demo import DemoConfig, run_demo

    config = DemoConfig(
        out=out,
        cache=default_cache() if cache is None else cache,
        model=model,
        task=task,
        scoring=scoring,
        objective=objective,
        prompts=prompts or (32 if quick else 200),
        evaluations=evaluations or (8 if quick else 24),
        seed=seed,
        quick=quick,
    )
    _quiet()
    with _display() as progress:
        result = run_demo(config, progress=progress)
    if json_path is not None:
        write_json_atomic(json_path, result)
    _show(result["evaluation"], Path(result["report"]), as_json=False)
    answer = result["answer"]
    typer.echo(
        f"\nbudget {answer['budget']:.2f}, depth {answer['depth']:.3f}, plan {answer['plan']}"
    )
    typer.echo(f"{answer['prompt']} {answer['text']}")


def _layers(text: str) -> tuple[int, ...]:
    """Read layer numbers separated by commas."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"--protect is {text!r}; expected layer numbers such as 0,1")
    return tuple(sorted({int(part) for part in parts}))


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


def _load(model: str, device: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    from dynadepth.loading import load_model, load_tokenizer

    _quiet()
    return load_model(model, device=device), load_tokenizer(model)


def _quiet() -> None:
    """Take transformers' own bars off stderr, where ours are."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _display() -> Any:
    from dynadepth_search.console import ProgressDisplay

    return ProgressDisplay()


def _say(result: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result, indent=2, sort_keys=True, allow_nan=False))
        return
    for name, value in result.items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        typer.echo(f"{name.replace('_', ' ')}: {shown}")


def _show(content: Mapping[str, Any], page: Path, *, as_json: bool) -> None:
    """Print an evaluation: the tables, what they say, and where the page is."""
    from dynadepth_search.tables import as_text, evaluation_tables

    if as_json:
        typer.echo(
            json.dumps({"evaluation": content, "report": str(page)}, indent=2, sort_keys=True)
        )
        return
    for table in evaluation_tables(content):
        typer.echo(as_text(*table) + "\n")
    for finding in content["findings"]:
        typer.echo(f"- {finding}")
    typer.echo(f"\nreport: {page}")


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is nested: a report shows plain values."""
    return {key: value for key, value in values.items() if isinstance(value, str | int | float)}
