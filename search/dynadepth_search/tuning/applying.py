"""What a study came to: its best trial, its Pareto front, its summary, and the policy trained as a trial says."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynadepth.checkpoints.trained_policy import TrainedMenu
from dynadepth.errors import ConfigError, LabelError
from dynadepth.shortcuts.maps import Shortcuts
from dynadepth_search.progress import Progress, silent
from dynadepth_search.scoring.score_table import ScoreTable
from dynadepth_search.storage.compatibility import check_asked
from dynadepth_search.training.menu_fit import fit_trained_menu
from dynadepth_search.tuning.menu_tuning import MenuTuning, table_identity
from dynadepth_search.tuning.space import StudyTrial, Tunable

__all__ = ["chosen_trial", "pareto_trials", "study_summary", "train_trial"]


def pareto_trials(trials: Sequence[StudyTrial]) -> list[StudyTrial]:
    """Return the complete trials that no other one beats in depth and quality, by ascending depth.

    Args:
        trials: Of a study with two goals: a depth, which is better low, and a quality.
    """
    ended = sorted(
        (trial for trial in trials if trial.values is not None),
        key=lambda trial: (_depth(trial), -_quality(trial), trial.number),
    )
    front: list[StudyTrial] = []
    for trial in ended:
        if not front or _quality(trial) > _quality(front[-1]):
            front.append(trial)
    return front


def chosen_trial(
    trials: Sequence[StudyTrial], *, number: int | None = None, at_depth: float | None = None
) -> StudyTrial:
    """Return the trial to use: that of a number, the best, or the one on the Pareto front nearest a depth.

    Args:
        trials: The trials of a study.
        number: Its number; None: it is chosen.
        at_depth: The depth wanted, for a study with two goals; ties go to the lower depth.

    Returns:
        The trial. Ties of the best go to the lowest number.

    Raises:
        ConfigError: There is no such trial, it is not complete, or a depth is missing or does not belong here.
    """
    ended = [trial for trial in trials if trial.values is not None]
    if number is not None:
        found = [trial for trial in ended if trial.number == number]
        if not found:
            raise ConfigError(
                f"the study has no complete trial {number}; it has {len(ended)} complete trials of {len(trials)}"
            )
        return found[0]
    if not ended:
        raise ConfigError("the study has no complete trial yet; run it first")
    two = len(ended[0].values or ()) == 2
    if two and at_depth is None:
        raise ConfigError(
            "the study has two goals, so its best trial depends on the depth; say which (--at-depth) or name a trial "
            "(--trial)"
        )
    if not two and at_depth is not None:
        raise ConfigError(
            f"a depth of {at_depth} was asked for, but the study has one goal and so one best trial; leave "
            "--at-depth out"
        )
    if two and at_depth is not None:
        return min(pareto_trials(ended), key=lambda trial: abs(_depth(trial) - at_depth))
    return max(ended, key=lambda trial: (_quality(trial), -trial.number))


def study_summary(tunable: Tunable, trials: Sequence[StudyTrial], seed: int = 0) -> dict[str, Any]:
    """Return what a study came to, as values that JSON can hold.

    Args:
        tunable: What was tuned.
        trials: Its trials.
        seed: Seed of the study, which is shown.

    Returns:
        Counts, goals, settings, the default's trial, the best trial or the Pareto front, and the findings of
        `tunable` once the default's trial is complete.
    """
    ended = [trial for trial in trials if trial.values is not None]
    default = next((trial for trial in ended if trial.default), None)
    two = len(tunable.goals) == 2
    summary: dict[str, Any] = {
        "kind": tunable.kind,
        "goals": [goal.name for goal in tunable.goals],
        "settings": [setting.to_dict() for setting in tunable.settings],
        "seed": seed,
        "counts": {
            state: sum(trial.state == state for trial in trials)
            for state in ("complete", "pruned", "running", "waiting", "fail")
        },
        "default": None if default is None else default.to_dict(),
        "best": chosen_trial(ended).to_dict() if ended and not two else None,
        "front": [trial.to_dict() for trial in pareto_trials(ended)] if two else [],
        "comparison": None,
        "curve": None,
    }
    return summary if default is None else {**summary, **tunable.findings(ended)}


def train_trial(
    trial: StudyTrial,
    table: ScoreTable,
    study: Mapping[str, Any],
    *,
    folder: str | os.PathLike[str],
    protect: tuple[int, ...] = (),
    shortcuts: Shortcuts | None = None,
    progress: Progress = silent,
) -> TrainedMenu:
    """Train a menu on a whole score table as a trial of its study says, and calibrate its budget.

    Args:
        trial: The trial.
        table: The table that the study was run on.
        study: What `dynadepth_search.tuning.study_files.read_study` returned.
        folder: Folder of the study, for messages.
        protect: Layers that no plan of the menu may edit.
        shortcuts: Those that the table was made with; None: it was made without.
        progress: Called with the stage, the number of finished steps and the number of all steps.

    Returns:
        The menu with its calibration; not yet on disk.

    Raises:
        ConfigError: The study is of another kind, or there are too few prompts.
        LabelError: The table is another one than the study was run on.
        ShortcutError: The table was made with other shortcuts.
    """
    asked = study["asked"]
    if asked["kind"] != MenuTuning.kind:
        raise ConfigError(
            f"the study in {folder} is of kind {asked['kind']!r}, so nothing can be trained by it; expected one of "
            "`tune menu`"
        )
    try:
        check_asked(Path(folder), table_identity(table), asked["table"])
    except LabelError as error:
        raise LabelError(f"the scores are not those of the study: {error}") from error
    tuning = MenuTuning(
        table, objective=asked["objective"], at=asked["objective_at"], seed=asked["fold_seed"]
    )
    trained = fit_trained_menu(
        table,
        plans=table.plans[tuning.plans(trial.params)],
        recipe=tuning.recipe(trial.params),
        objective=asked["objective"],
        protect=protect,
        shortcuts=shortcuts,
        seed=asked["fold_seed"],
        progress=progress,
    )
    tuned = {"trial": trial.number, "values": list(trial.values or ()), "params": trial.params}
    return replace(trained, training={**trained.training, "tuned": tuned})


def _depth(trial: StudyTrial) -> float:
    return trial.values[0] if trial.values is not None else float("inf")


def _quality(trial: StudyTrial) -> float:
    return trial.values[-1] if trial.values is not None else float("-inf")
