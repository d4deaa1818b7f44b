"""Evaluation on held-out prompts: the routed model against everything that does not look at the prompt.

Plans come from the real runtime, outcomes from the sweep, and a sample is scored both ways. The result
is the file `evaluation.json`.
"""

import os
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers

from dynadepth._core import __version__
from dynadepth.checkpoints.save_load import base_model_name
from dynadepth.checkpoints.trained_policy import TrainedPolicy
from dynadepth.errors import BudgetError, ConfigError, LabelError, TaskError
from dynadepth.plans import plan_depth
from dynadepth_search.data.splits import check_held_out, prompt_hashes
from dynadepth_search.data.tasks import Task
from dynadepth_search.evaluation.baselines import mean_influence
from dynadepth_search.evaluation.comparison import (
    Comparison,
    Front,
    PlannedPolicy,
    check_preset_names,
)
from dynadepth_search.evaluation.costs import head_multiply_adds, plan_cost, time_runs
from dynadepth_search.evaluation.metrics import (
    action_shares,
    findings,
    policy_metrics,
    show_budget,
)
from dynadepth_search.evaluation.notes import (
    describe,
    drift_notes,
    plan_map,
    unrecorded_notes,
    warm_up_notes,
    who_took_part,
)
from dynadepth_search.evaluation.outcome_cache import OutcomeCache
from dynadepth_search.evaluation.plain_static import PlainStatic, beside_static
from dynadepth_search.files.locking import locked
from dynadepth_search.files.sealed import read_result, write_sealed
from dynadepth_search.progress import Progress, silent
from dynadepth_search.runners.work import Loaded, Runner
from dynadepth_search.scoring.objectives import check_objective, refuse_solutions
from dynadepth_search.scoring.runtime_checks import (
    check_runtime,
    planned,
    wrapped,
)
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.storage.compatibility import check_same_shortcuts, dtype_name

__all__ = [
    "EVALUATION_NAME",
    "EvaluationConfig",
    "check_trained_on",
    "evaluate",
    "read_evaluation",
]

EVALUATION_NAME = "evaluation.json"
OUTCOMES_NAME = "outcomes.jsonl"
PLAIN_OUTCOMES_NAME = "outcomes-plain.jsonl"
SCHEMA_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """The settings of an evaluation.

    Args:
        budgets: Mean depths at which the routed model is evaluated.
        seed: Seed of random plans and of resampling.
        random_draws: Number of draws of random plans for each budget; their mean is reported.
        batch_size: Number of prompts of one forward in planning.
        timing_prompts: Number of prompts whose prefill is timed.
        timing_rounds: Number of rounds of timing.
        check_prompts: Number of prompts that the wrapped model scores as well.
    """

    budgets: tuple[float, ...] = (0.95, 0.9, 0.85, 0.8)
    seed: int = 0
    random_draws: int = 5
    batch_size: int = 16
    timing_prompts: int = 8
    timing_rounds: int = 4
    check_prompts: int = 8

    def __post_init__(self) -> None:
        if not self.budgets:
            raise ConfigError("no budgets to evaluate; give one or more mean depths")
        if len(set(self.budgets)) < len(self.budgets):
            raise ConfigError(f"budgets {list(self.budgets)} name one twice; give each once")


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    heldout: Task,
    train: Task,
    routers: TrainedPolicy,
    front: Front,
    plain_front: Front | None = None,
    objective: str,
    folder: str | os.PathLike[str],
    presets: Mapping[str, TrainedPolicy] | None = None,
    unseen: Task | None = None,
    seen: Mapping[str, Iterable[str] | None] | None = None,
    config: EvaluationConfig | None = None,
    runner: Runner | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Evaluate routers on prompts that took no part in search, training or calibration.

    The outcome of every pair of prompt and plan is kept in `folder`: an interrupted evaluation goes on, and one with
    more budgets, policies or prompts scores what is new alone. Then `evaluation.json` is written there.

    Args:
        model: The unwrapped base model; it is unwrapped again afterwards.
        tokenizer: Tokenizer of the base model.
        heldout: The prompts to evaluate on.
        train: The prompts that the routers were trained on; ShortGPT's influence is measured on
            them.
        routers: The policy to evaluate.
        front: Static plans found on the training prompts, with the shortcuts of the routers if these have any.
        plain_front: Static plans found there without shortcuts, which are then compared too.
        objective: `preserve`, whose headline is agreement, or `reward`, whose headline is the graded reward.
        folder: Folder of the results.
        presets: Other policies to compare it with, by name.
        unseen: Prompts of a kind that the calibration has not seen; their mean depth is reported.
        seen: Hashes of other prompts that took part, such as those that chose the static plans, by the user's name of
            the file that holds them; None for a file that does not record them.
        config: Settings of the evaluation; None: the defaults.
        runner: Who scores plans; its workers load the same model and shortcuts. None: this process. The wrapped model
            plans, and is timed, in this process.
        progress: Called with the stage, the number of finished steps and the number of all steps.

    Returns:
        The content of `evaluation.json`.

    Raises:
        BudgetError: A budget is outside the calibrated range.
        ConfigError: The objective is unknown, or needs answers that the task does not have; or a
            preset has the name of something else in the comparison; or there is a plain front and no shortcuts.
        CheckpointError: A policy's memory of the prompts that trained it is damaged.
        LabelError: The folder is in use, or its outcomes are damaged or of another model, dtype or kind of task.
        RunnerError: The workers of the runner died, or do not run what this process runs.
        ShortcutError: Two policies were calibrated with other shortcuts in place of skipped layers.
        TaskError: A held-out prompt, or one of `unseen`, is also a training prompt, or took part in choosing plans or
            in training a policy to compare; or a prompt cannot be encoded; or the answers are to be generated.
    """
    settings = config or EvaluationConfig()
    check_preset_names(presets or {})
    sources = {routers.kind: routers, **(presets or {})}
    if len(sources) <= len(presets or {}):
        raise ConfigError(
            f"routers to compare are named {routers.kind!r}, like those under test; rename their folder"
        )
    refuse_solutions(heldout, before="an evaluation")
    goal = check_objective(objective)
    headline = "agreement" if goal == "preserve" else "reward"
    if goal == "reward" and heldout.kind == "prompt":
        raise ConfigError(
            f"task {heldout.name!r} has prompts alone, but objective 'reward' needs answers; "
            "use objective 'preserve'"
        )
    shortcuts = routers.shortcuts
    if plain_front is not None and shortcuts is None:
        raise ConfigError(
            "a front without shortcuts was given beside one, but the routers run without shortcuts too; leave it out"
        )
    for name, preset in (presets or {}).items():
        check_same_shortcuts(
            None if preset.shortcuts is None else preset.shortcuts.digest,
            shortcuts,
            what=f"routers {name} were",
            advice="compare policies that skip alike",
        )
    _check_apart(train, heldout)
    took_part = who_took_part(sources, seen or {})
    known = {name: hashes for name, hashes in took_part.items() if hashes is not None}
    check_held_out(heldout.examples, known)
    if unseen is not None:
        known["the training task"] = prompt_hashes(train.examples)
        check_held_out(unseen.examples, known, what="unseen")
    for budget in settings.budgets:
        routers.calibration.penalty_for(budget)
    started = time.perf_counter()
    scorer = Scorer(model, tokenizer, heldout.scoring, chat=heldout.chat, shortcuts=shortcuts)
    # Fail on prompts that cannot be encoded before an hour of work, not after it.
    for example in heldout.examples:
        scorer.encode(example)
    if unseen is not None:
        other = Scorer(model, tokenizer, unseen.scoring, chat=unseen.chat)
        for example in unseen.examples:
            other.encode(example)
    with locked(Path(folder)):
        loaded = Loaded(model, tokenizer, shortcuts)
        outcomes = OutcomeCache(
            scorer, heldout, Path(folder) / OUTCOMES_NAME, runner=runner, loaded=loaded
        )
        planned_policies, arguments, notes = _plan(
            model, scorer, heldout, sources, settings, progress
        )
        drift = [] if unseen is None else _drift(model, tokenizer, unseen, routers, settings)
        progress("measuring block influence", 0, 1)
        # Its prompts are read as they were in training, which the held-out ones need not be.
        reader = Scorer(model, tokenizer, train.scoring, chat=train.chat)
        comparison = Comparison(
            policies=planned_policies,
            front=front,
            influence=mean_influence(
                model,
                (
                    (ids, mask)
                    for _, ids, mask in reader.prompt_batches(train.examples, settings.batch_size)
                ),
                shortcuts,
            ),
            num_prompts=len(heldout.examples),
            random_draws=settings.random_draws,
            seed=settings.seed,
        )
        progress("measuring block influence", 1, 1)
        table = outcomes.score(
            comparison.sets,
            progress=lambda done, total: progress("scoring held-out prompts", done, total),
        )
        compared = list(comparison.compared(table, headline))
        if plain_front is not None:
            plain = PlainStatic(plain_front, planned_policies, len(heldout.examples))
            without = OutcomeCache(
                Scorer(model, tokenizer, heldout.scoring, chat=heldout.chat),
                heldout,
                Path(folder) / PLAIN_OUTCOMES_NAME,
                runner=runner,
                loaded=loaded,
            )
            runs = plain.runs(
                without.score(
                    plain.sets,
                    progress=lambda done, total: progress("scoring plain plans", done, total),
                )
            )
            compared = beside_static(compared, runs)
        tested = {
            policy.name: arguments[policy.name]
            for policy in planned_policies
            if policy.kind == "routed"
        }
        times, base_milliseconds = time_runs(
            model,
            scorer,
            heldout.examples,
            compared,
            tested,
            prompts=settings.timing_prompts,
            rounds=settings.timing_rounds,
            progress=progress,
        )
        base = compared[0].run
        cost, plain_cost = plan_cost(model, shortcuts), plan_cost(model, None)
        tokens = np.mean([len(scorer.encode(item).prompt_ids) for item in heldout.examples])
        policies = [
            policy_metrics(
                item.run,
                base,
                item.static,
                seed=settings.seed,
                cost=plain_cost if item.run.kind == "plain" else cost,
                heads=head_multiply_adds(arguments.get(item.run.name)) / float(tokens),
                time=times.get(item.run.name),
            )
            for item in compared
        ]
        checks = {
            policy.name: check_runtime(
                model,
                scorer,
                heldout.examples[: settings.check_prompts],
                policy.plans[: settings.check_prompts],
                **arguments[policy.name],
            ).to_dict()
            for policy in planned_policies
            if policy.kind == "routed"
        }
        content: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "model": base_model_name(model),
            "task": {
                "name": heldout.name,
                "kind": heldout.kind,
                "scoring": heldout.scoring,
                "sha256": heldout.sha256,
                "heldout_prompts": len(heldout.examples),
                "train_prompts": len(train.examples),
            },
            "headline": headline,
            "num_layers": scorer.num_layers,
            "dtype": dtype_name(model),
            "config": asdict(settings) | {"budgets": list(settings.budgets)},
            "routers": describe(routers),
            "policies": policies,
            "findings": [
                *findings(policies, headline),
                *notes,
                *warm_up_notes(sources),
                *drift_notes(drift),
                *unrecorded_notes([name for name, hashes in took_part.items() if hashes is None]),
            ],
            "drift": drift,
            "actions": [
                {"budget": policy.budget, "shares": action_shares(policy.plans)}
                for policy in planned_policies
                if policy.kind == "routed"
            ],
            "plan_map": [
                {"budget": policy.budget, **plan_map(policy.plans, heldout.examples)}
                for policy in planned_policies
                if policy.kind == "routed"
            ],
            "front": comparison.front_metrics(table),
            "runtime_check": checks,
            "base_prefill_milliseconds": base_milliseconds,
            "versions": _versions(),
            "seconds": round(time.perf_counter() - started, 2),
        }
        write_sealed(Path(folder) / EVALUATION_NAME, content)
        # As every later reader has it.
        return read_evaluation(folder)


def read_evaluation(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `evaluate` wrote.

    Args:
        folder: The folder of the evaluation.

    Returns:
        The content of `evaluation.json`.

    Raises:
        ConfigError: The file is damaged or of another version.
        FileNotFoundError: There is none.
    """
    return read_result(
        Path(folder) / EVALUATION_NAME,
        SCHEMA_VERSION,
        make_again="evaluate again",
        missing="make it with `dynadepth eval`",
    )


def check_trained_on(routers: Mapping[str, TrainedPolicy], task: Mapping[str, Any]) -> None:
    """Refuse routers that were trained on another task than that of the labels.

    Held-out prompts are only compared with the prompts of the labels, and the labels' static front is the
    baseline.

    Args:
        routers: The routers, by the user's name for them.
        task: `name` and `sha256` of the labels' task.

    Raises:
        LabelError: The tasks differ.
    """
    for name, each in routers.items():
        trained = each.training.get("task")
        if not isinstance(trained, Mapping) or "sha256" not in trained:
            continue
        if trained["sha256"] != task["sha256"]:
            raise LabelError(
                f"routers {name} were trained on task {trained.get('name')!r} (sha256 "
                f"{str(trained['sha256'])[:12]}), but the labels are of task {task['name']!r} (sha256 "
                f"{str(task['sha256'])[:12]}); give --labels the folder that these routers were trained "
                "on, or routers that were trained on these labels"
            )


def _drift(
    model: Any,
    tokenizer: Any,
    unseen: Task,
    routers: TrainedPolicy,
    config: EvaluationConfig,
) -> list[dict[str, Any]]:
    """Return the mean depth on prompts of a kind that the calibration has not seen, for each budget."""
    scorer = Scorer(model, tokenizer, unseen.scoring, chat=unseen.chat)
    rows = []
    for budget in config.budgets:
        with wrapped(model, budget=budget, routers=routers):
            plans = planned(model, scorer, unseen.examples, batch_size=config.batch_size)
        depth = float(plan_depth(plans).mean())
        rows.append({"budget": budget, "depth": depth, "n": len(plans), "task": unseen.name})
    return rows


def _check_apart(train: Task, heldout: Task) -> None:
    """Refuse a comparison on prompts that the routers were trained on."""
    seen = {example.prompt.strip() for example in train.examples}
    shared = [example.prompt for example in heldout.examples if example.prompt.strip() in seen]
    if shared:
        raise TaskError(
            f"{len(shared)} of {len(heldout.examples)} held-out prompts are training prompts too, such as "
            f"{shared[0][:60]!r}; give prompts that took no part in search or training"
        )


def _plan(
    model: Any,
    scorer: Scorer,
    task: Task,
    sources: Mapping[str, TrainedPolicy],
    config: EvaluationConfig,
    progress: Progress,
) -> tuple[list[PlannedPolicy], dict[str, dict[str, Any]], list[str]]:
    """Plan the prompts with the real runtime for every source and budget; the first source is the one under test."""
    planned_policies: list[PlannedPolicy] = []
    arguments: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    wanted = [(source, budget) for source in sources for budget in config.budgets]
    first = next(iter(sources))
    for step, (source, budget) in enumerate(wanted):
        progress("planning held-out prompts", step, len(wanted))
        name = f"{source} {show_budget(budget)}"
        try:
            with wrapped(model, budget=budget, routers=sources[source]):
                plans = planned(model, scorer, task.examples, batch_size=config.batch_size)
        except BudgetError as error:
            # The policy under test was checked before; a preset may have a smaller range of budgets.
            notes.append(f"{name} was left out: {error}.")
            continue
        arguments[name] = {"budget": budget, "routers": sources[source]}
        kind: Literal["routed", "preset"] = "routed" if source == first else "preset"
        planned_policies.append(PlannedPolicy(name=name, kind=kind, budget=budget, plans=plans))
    progress("planning held-out prompts", len(wanted), len(wanted))
    return planned_policies, arguments, notes


def _versions() -> dict[str, Any]:
    return {
        "dynadepth": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }
