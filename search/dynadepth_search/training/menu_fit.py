"""From a score table to a menu that keeps a budget: training, calibration, and the record of both.

The steps themselves are in `dynadepth.training.menu.fit` and `dynadepth.policies.calibration`. No base model is run.
"""

from typing import Any

import numpy as np

from dynadepth.checkpoints.trained_policy import TrainedMenu
from dynadepth.errors import ConfigError
from dynadepth.plans import plan_depth
from dynadepth.policies.calibration import Calibration, calibrate
from dynadepth.shortcuts.maps import Shortcuts
from dynadepth.training.menu.fit import MenuFit, fit_menu, fit_recipe
from dynadepth.training.menu.menu_data import MenuRecipe
from dynadepth_search.data.splits import prompt_hashes
from dynadepth_search.progress import Progress, silent
from dynadepth_search.scoring.objectives import check_objective
from dynadepth_search.scoring.score_table import ScoreTable, menu_data
from dynadepth_search.storage.compatibility import check_same_shortcuts

__all__ = ["calibrate_menu", "fit_trained_menu", "learning_curve"]

# Resolution of the mean depth; penalties closer than this are not distinguished, and depths in between are mixed.
_RESOLUTION = 0.004
_CALIBRATION_PASSES = 400
# A quarter of the tolerance of a budget.
_MOST_SPREAD = 0.0025
# Numbers of distinct prompts at which the learning curve is measured.
_FEWEST_OF_CURVE = 40


def fit_trained_menu(
    table: ScoreTable,
    *,
    plans: Any = None,
    recipe: MenuRecipe | None = None,
    objective: str = "preserve",
    protect: tuple[int, ...] = (),
    shortcuts: Shortcuts | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> TrainedMenu:
    """Train a menu on a score table and calibrate its budget.

    The budget is calibrated on out-of-fold scores: those that each prompt gets from heads trained on other prompts. So
    every prompt is used both for training and for calibration, but never for the same heads.

    Args:
        table: Prompts under the menu's plans, and possibly others.
        plans: The menu's plans, all in the table, the identity first; None: all plans of the table.
        recipe: How the heads are trained, on all plans of the table; None: cross-validation chooses it.
        objective: `preserve` or `reward`, see `dynadepth.training.menu.fit.fit_menu`.
        protect: Layers that no plan of the menu may edit.
        shortcuts: Those that the table was made with; None: it was made without.
        seed: Seed of the folds and the training.
        progress: Called with the stage, the number of finished steps and the number of all steps.

    Returns:
        The menu with its calibration; not yet on disk.

    Raises:
        ConfigError: There are too few prompts, a plan is not in the table or edits a protected layer, or the table has
            no metrics for the objective.
        ShortcutError: The table was made with other shortcuts.
    """
    check_same_shortcuts(
        table.shortcuts, shortcuts, what="the scores were", advice="give the same (--shortcuts)"
    )
    goal = check_objective(objective)
    columns = _columns(table, plans)
    if recipe is None:
        fit = fit_menu(
            menu_data(table, columns),
            objective=goal,
            seed=seed,
            progress=lambda done, total: progress("training the menu", done, total),
        )
    else:
        progress("training the menu", 0, 1)
        fit = fit_recipe(menu_data(table), recipe, columns=columns, objective=goal, seed=seed)
        progress("training the menu", 1, 1)
    progress("calibrating", 0, 1)
    calibration = calibrate_menu(fit)
    progress("calibrating", 1, 1)
    task = table.manifest["asked"]["task"]
    notes: dict[str, Any] = {
        "objective": goal,
        "seed": seed,
        "train_prompts": len(table),
        "validation_prompts": len(table),
        # More than were learned from if the scoring was unfinished.
        "prompts_of_task": task["prompts"],
        "task": {
            "name": table.manifest["task_name"],
            **{key: task[key] for key in ("kind", "scoring", "sha256")},
        },
        "recipe": fit.recipe.to_dict(),
        "cross_validated_gain": fit.gain,
        "trials": [trial.to_dict() for trial in fit.trials],
        "prompt_hashes": prompt_hashes(table.examples),
        "plan_prompt_hashes": list(table.plan_prompt_hashes),
    }
    return TrainedMenu(
        menu=fit.menu,
        calibration=calibration,
        protect=protect,
        fingerprint=table.fingerprint,
        base_model=table.manifest["base_model"]["name"],
        training=notes,
        shortcuts=shortcuts,
    )


def calibrate_menu(fit: MenuFit) -> Calibration:
    """Return the table from budget to penalty, by out-of-fold scores.

    Penalties whose depth depends on the choice of the training prompts are left out; the depths there are mixed.

    Raises:
        ConfigError: The menu has no depth between its shallowest plan and the base model's.
    """
    table = calibrate(
        fit.mean_depth,
        lowest=float(fit.menu.depths.min()),
        highest=1.0,
        resolution=_RESOLUTION,
        max_evaluations=_CALIBRATION_PASSES,
    )
    return table.steady(fit.depth_spread, _MOST_SPREAD)


def learning_curve(
    table: ScoreTable,
    *,
    plans: Any = None,
    objective: str = "preserve",
    seed: int = 0,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Return a menu's gain over the static mixture of equal depth, by the number of training prompts.

    Every gain is cross-validated, that is, measured on prompts that were not trained on.

    Args:
        table: Prompts under the menu's plans; growing numbers of them are used, from the first one on.
        plans: See `fit_trained_menu`.
        objective: See `fit_trained_menu`.
        seed: Seed of the folds and the training.
        progress: Called with the stage, the number of finished steps and the number of all steps.

    Returns:
        For each number of `prompts`: the `gain` of the best recipe, averaged over four depths, and its
        `standard_error`.
    """
    texts = [example.prompt.strip() for example in table.examples]
    counts = [
        count
        for count in (len(table) // part for part in (16, 8, 4, 2, 1))
        if len(set(texts[:count])) >= _FEWEST_OF_CURVE
    ]
    columns = _columns(table, plans)
    points = []
    for step, count in enumerate(counts):
        progress("learning curve", step, len(counts))
        part = table.take(np.arange(count))
        fit = fit_menu(menu_data(part, columns), objective=check_objective(objective), seed=seed)
        error = max(fit.trials, key=lambda trial: trial.gain).standard_error
        points.append({"prompts": count, "gain": fit.gain, "standard_error": error})
    progress("learning curve", len(counts), len(counts))
    return points


def _columns(table: ScoreTable, plans: Any) -> Any:
    if plans is None:
        return None
    known = {plan.tobytes(): row for row, plan in enumerate(table.plans)}
    rows = np.asarray(plans, dtype=np.uint8)
    missing = [plan for plan in rows if plan.tobytes() not in known]
    if missing:
        raise ConfigError(
            f"a plan of depth {float(plan_depth(missing[0])):.3f} of the menu is not in the score table; score the "
            "prompts with this menu"
        )
    return np.array([known[plan.tobytes()] for plan in rows])
