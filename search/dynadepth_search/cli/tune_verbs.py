"""The verbs tune menu, tune search and tune --apply: studies of settings, and the policy that one of them found.

Each verb checks its options, loads what they name and calls functions that Python can call as well. Heavy imports are
inside the verbs.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dynadepth_search.cli.options import (
    Json,
    Objective,
    Protect,
    Seed,
    Shortcuts,
    display,
    layer_numbers,
    print_result,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from dynadepth_search.progress import Progress
    from dynadepth_search.tuning.space import Tunable

__all__ = ["apply_study", "tune_menu", "tune_search"]

_Scores = Annotated[Path, typer.Option("--scores", help="Folder that `score` wrote")]
_Study = Annotated[
    Path,
    typer.Option("--study", help="Folder of the study; the same command again goes on in it"),
]
_Trials = Annotated[
    int,
    typer.Option("--trials", min=1, help="Trials of the study in the end, over all runs of it"),
]
_Timeout = Annotated[
    float | None,
    typer.Option("--timeout", help="Seconds after which no trial is started [default: no limit]"),
]
_Storage = Annotated[
    str | None,
    typer.Option(
        "--storage", help="URL as Optuna takes it [default: a journal in the study's folder]"
    ),
]
_Partial = Annotated[
    bool,
    typer.Option("--accept-partial", help="Take what an unfinished scoring has so far"),
]


def tune_menu(
    *,
    scores: _Scores,
    study: _Study,
    objective: Objective = "preserve",
    at: Annotated[
        float | None,
        typer.Option(
            "--objective-at",
            help="One goal: the quality at this mean depth [default: two goals, low depth and high quality]",
        ),
    ] = None,
    trials: _Trials = 100,
    timeout: _Timeout = None,
    storage: _Storage = None,
    sampler: Annotated[
        Literal["tpe", "nsga2", "random"],
        typer.Option("--sampler", help="How trials are drawn; nsga2 for two goals"),
    ] = "tpe",
    accept_partial: _Partial = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Tune the training of a menu on a score table, by cross-validation."""
    from dynadepth_search.scoring.score_table import read_scores
    from dynadepth_search.tuning.menu_tuning import MenuTuning

    table = read_scores(scores, accept_partial=accept_partial)
    _run(
        lambda progress: MenuTuning(
            table, objective=objective, at=at, seed=seed, progress=progress
        ),
        study,
        scores,
        as_json=as_json,
        trials=trials,
        timeout=timeout,
        storage=storage,
        sampler=sampler,
        seed=seed,
    )


def tune_search(
    *,
    scores: Annotated[Path, typer.Option("--scores", help="Folder that `score --subsets` wrote")],
    study: _Study,
    objective: Objective = "preserve",
    evaluations: Annotated[
        int,
        typer.Option(
            "--evaluations",
            min=4,
            help="Plans evaluated for each prompt, its share of the probe included",
        ),
    ] = 24,
    for_prompts: Annotated[
        int,
        typer.Option("--for-prompts", min=1, help="Prompts of the task that share the probe"),
    ] = 240,
    round_size: Annotated[
        int,
        typer.Option(
            "--round-size", min=1, help="Plans of a prompt that are chosen before one is evaluated"
        ),
    ] = 4,
    trials: _Trials = 100,
    timeout: _Timeout = None,
    storage: _Storage = None,
    sampler: Annotated[
        Literal["tpe", "random"], typer.Option("--sampler", help="How trials are drawn")
    ] = "tpe",
    accept_partial: _Partial = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Tune the search for each prompt on one half of a replayed table, and compare with the default on the other."""
    from dynadepth_search.scoring.score_table import read_scores
    from dynadepth_search.tuning.replay import ReplayTable
    from dynadepth_search.tuning.search_tuning import SearchTuning

    table = ReplayTable.from_scores(read_scores(scores, accept_partial=accept_partial), objective)
    tunable = SearchTuning(
        table,
        evaluations=evaluations,
        task_prompts=for_prompts,
        round_size=round_size,
        seed=seed,
    )
    _run(
        lambda _progress: tunable,
        study,
        scores,
        as_json=as_json,
        trials=trials,
        timeout=timeout,
        storage=storage,
        sampler=sampler,
        seed=seed,
    )


def apply_study(
    context: typer.Context,
    *,
    study: Annotated[
        Path | None,
        typer.Option("--apply", help="Folder of a study of `tune menu`: train as its trial says"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the routers; routers there are replaced"),
    ] = None,
    trial: Annotated[
        int | None, typer.Option("--trial", min=0, help="Number of the trial [default: the best]")
    ] = None,
    at_depth: Annotated[
        float | None,
        typer.Option(
            "--at-depth",
            help="With two goals: take the trial of the Pareto front nearest this depth",
        ),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option("--scores", help="Where the scores are now [default: where the study says]"),
    ] = None,
    protect: Protect = "",
    shortcuts: Shortcuts = None,
    storage: _Storage = None,
    accept_partial: _Partial = False,
    as_json: Json = False,
) -> None:
    """Tune settings by studies: of a menu's training, or of the search for each prompt; or apply what one found."""
    if context.invoked_subcommand is not None:
        if study is not None or out is not None:
            raise typer.BadParameter("--apply and --out stand without `menu` and `search`")
        return
    if study is None or out is None:
        raise typer.BadParameter("name what to tune (menu, search), or give --apply and --out")
    protected = layer_numbers(protect, "--protect")

    from dynadepth.checkpoints.paths import locate_shortcuts
    from dynadepth.shortcuts.save_load import load_shortcuts
    from dynadepth_search.scoring.score_table import read_scores
    from dynadepth_search.training.router_fit import write_routers
    from dynadepth_search.training.run_folders import with_folders
    from dynadepth_search.tuning.applying import chosen_trial, train_trial
    from dynadepth_search.tuning.studies import stored_trials
    from dynadepth_search.tuning.study_files import input_folder, read_study

    content = read_study(study)
    _, found = stored_trials(study, content["asked"], storage)
    chosen = chosen_trial(found, number=trial, at_depth=at_depth)
    scores = scores or input_folder(study, content, "scores")
    table = read_scores(scores, accept_partial=accept_partial)
    maps = None if shortcuts is None else load_shortcuts(locate_shortcuts(shortcuts))
    with display() as progress:
        trained = train_trial(
            chosen,
            table,
            content,
            folder=study,
            protect=protected,
            shortcuts=maps,
            progress=progress,
        )
        write_routers(out, with_folders(trained, out, {"scores": scores}))
    lowest, highest = trained.calibration.range
    result: dict[str, Any] = {
        "routers": str(out),
        "trial": chosen.number,
        "default_settings": chosen.default,
        "plans": len(trained.menu.plans),
        "lowest_budget": lowest,
        "highest_budget": highest,
        "train_prompts": trained.training["train_prompts"],
    }
    print_result({**result, **chosen.params, "plans": result["plans"]}, as_json=as_json)


def _run(
    make: "Callable[[Progress], Tunable]",
    folder: Path,
    scores: Path,
    *,
    as_json: bool,
    **options: Any,
) -> None:
    """Run a study, write its report, and print what it came to."""
    from dynadepth_search.report.study_page import study_verdict, write_study_report
    from dynadepth_search.tuning.applying import study_summary
    from dynadepth_search.tuning.studies import run_study
    from dynadepth_search.tuning.study_files import read_study

    with display() as progress:
        tunable, inputs = make(progress), {"scores": scores}
        study, trials = run_study(folder, tunable, inputs=inputs, progress=progress, **options)
        progress("what it came to", 0, 1)
        summary = study_summary(tunable, trials, options["seed"])
        stored = read_study(folder)
        asked = {
            name: value
            for name, value in stored["asked"].items()
            if isinstance(value, str | int | float)
        }
        page = write_study_report(
            folder, study, summary, {"study": asked, "versions": stored["versions"]}
        )
        progress("what it came to", 1, 1)
    result: dict[str, Any] = {"study": str(folder), "verdict": study_verdict(summary)}
    if summary["best"] is not None:
        result |= {"best_trial": summary["best"]["number"], **summary["best"]["params"]}
    result |= {"pareto_front": len(summary["front"])} if summary["front"] else {}
    found = summary["comparison"] or {}
    result |= {name: found[name] for name in ("default", "tuned") if name in found}
    if found:
        gap = found["difference"]
        result |= {f"difference_{end}": gap[end] for end in ("mean", "low", "high")}
    print_result({**result, **summary["counts"], "report": str(page)}, as_json=as_json)
