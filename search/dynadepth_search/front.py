"""The static front: nested plans for all prompts, each with one visit fewer than the one before.

Found greedily on training prompts, with the candidates of each step raced, and stored step by step. How a policy walks
the front is `dynadepth.fronts`.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dynadepth.config import check_fields, config_to_dict
from dynadepth.errors import ConfigError, LabelError
from dynadepth.files import read_json, write_json_atomic
from dynadepth.fingerprint import fingerprint, fingerprint_digest
from dynadepth.forest import EditPrior
from dynadepth.plans import Plans, identity_plan, parse_plan, plan_depth, plan_text
from dynadepth_search.locking import locked
from dynadepth_search.progress import Progress, silent
from dynadepth_search.resuming import check_asked, dtype_name, task_fields
from dynadepth_search.scoring import Objective, Scorer, check_answers
from dynadepth_search.tasks import Task

__all__ = ["FRONT", "FrontSpec", "StaticFront", "read_front", "search_front"]

FRONT = "front.json"
SCHEMA_VERSION = 1
# Prompts of the final measurement between two writes.
_CONFIRMED_BLOCK = 32

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontSpec:
    """How a front is searched.

    Args:
        objective: What its plans are chosen by.
        min_depth: The front ends before a plan's depth falls below this.
        seed: Of the choice of prompts.
        num_prompts: Training prompts on which plans are compared; all steps use the same ones, so the rewards of the
            front's plans can be compared.
        num_screened: How many of these every candidate is screened on; each step draws its own.
        num_candidates: Layers that are screened in a step: those whose removal looked best in the step before, or to
            the probe. The first step without a probe screens all.
        num_finalists: Candidates that are compared on all prompts.
        num_confirmed: Further training prompts, which chose nothing, on which the front's plans are measured in the
            end.
        protect: Layers that are never removed.

    Raises:
        ConfigError: A value of the wrong type or out of range.
    """

    objective: Objective = "preserve"
    min_depth: float = 0.7
    seed: int = 0
    num_prompts: int = 32
    num_screened: int = 8
    num_candidates: int = 9
    num_finalists: int = 3
    num_confirmed: int = 160
    protect: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.min_depth <= 1:
            raise ConfigError(
                f"FrontSpec.min_depth is {self.min_depth}; expected more than 0 and at most 1"
            )
        for name in ("num_prompts", "num_screened", "num_candidates", "num_finalists"):
            if getattr(self, name) < 1:
                raise ConfigError(f"FrontSpec.{name} is {getattr(self, name)}; expected 1 or more")
        if self.num_confirmed < 0:
            raise ConfigError(
                f"FrontSpec.num_confirmed is {self.num_confirmed}; expected 0 or more"
            )
        if self.seed < 0:
            raise ConfigError(f"FrontSpec.seed is {self.seed}; expected 0 or more")


@dataclass(frozen=True, slots=True, eq=False)
class StaticFront:
    """Nested plans, and what they are worth on the prompts they were chosen on.

    Args:
        plans: The identity first, then each with one more layer skipped. Shape (K + 1, layers), uint8.
        rewards: Mean reward of each plan, on prompts that took no part in choosing it where the task has any. Shape
            (K + 1,), float64.
        standard_errors: Of the mean change of reward against the identity plan. Shape (K + 1,), float64.
        prompts: Prompts in these means.
        objective: What the reward is.
        seed: Of the choice of prompts.
        evaluations: Plans evaluated to find the front.
    """

    plans: Plans
    rewards: _Floats
    standard_errors: _Floats
    prompts: int
    objective: Objective
    seed: int
    evaluations: int


def read_front(folder: str | os.PathLike[str]) -> StaticFront:
    """Read the front that a search stored in a folder.

    Raises:
        FileNotFoundError: There is none.
        LabelError: It is damaged or unfinished.
    """
    path = Path(folder) / FRONT
    content = _read(path)
    if content.get("complete") is False:
        raise LabelError(f"the search of {path} is unfinished: run it again to go on")
    try:
        steps = content["steps"]
        plans = np.stack([parse_plan(step["plan"], len(steps[0]["plan"])) for step in steps])
        rewards = np.array([step["reward"] for step in steps], dtype=np.float64)
        errors = np.array([step["standard_error"] for step in steps], dtype=np.float64)
        prompts = len(content["prompts"])
        # One row for each prompt, one column for each plan.
        if content["confirmed"]:
            confirmed = np.array(content["confirmed"], dtype=np.float64).reshape(-1, len(steps))
            prompts, rewards = len(confirmed), confirmed.mean(axis=0)
            errors = np.array([_error(column - confirmed[:, 0]) for column in confirmed.T])
        return StaticFront(
            plans=plans,
            rewards=rewards,
            standard_errors=errors,
            prompts=prompts,
            objective=content["asked"]["front"]["objective"],
            seed=content["asked"]["front"]["seed"],
            evaluations=content["evaluations"],
        )
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise LabelError(
            f"{path} is damaged ({error!r}): delete it and search the front again"
        ) from error


def search_front(
    scorer: Scorer,
    task: Task,
    folder: str | os.PathLike[str],
    spec: FrontSpec,
    *,
    prior: EditPrior | None = None,
    progress: Progress | None = None,
) -> StaticFront:
    """Find the static front of a task, or go on with a search that was interrupted.

    From the identity plan down, each step removes the layer whose removal leaves the highest mean reward. Candidates
    are raced: all on a few prompts, the best of them on all prompts. Ties go to the lowest layer. The means that chose
    a plan flatter it, so at the end the front is measured on other prompts of the task.

    Args:
        scorer: Of the base model, with the task's scoring.
        task: Training prompts; a sample of them is used.
        folder: `front.json` goes there; made if it is missing.
        spec: How to search.
        prior: What a probe measured of single edits, to save the first screening of all layers.
        progress: Called with the stage, finished steps and all steps.

    Returns:
        The front.

    Raises:
        LabelError: The folder holds a front that was asked for otherwise, or is in use.
        TaskError: The objective needs answers that the task has not.
        WrapError: The model is wrapped.

    Source:
        Greedy removal as in the search of SLEB (arXiv 2402.09025), by the task's reward in place of perplexity;
        deviation: raced candidates.
    """
    check_answers(task, spec.objective)
    with locked(Path(folder)):
        _FrontSearch(scorer, task, Path(folder) / FRONT, spec).run(prior, progress or silent)
    return read_front(folder)


class _FrontSearch:
    """One run of the search; `_content` is what is on disk."""

    def __init__(self, scorer: Scorer, task: Task, path: Path, spec: FrontSpec) -> None:
        self._scorer, self._path, self._spec = scorer, path, spec
        count = min(spec.num_prompts, len(task.examples))
        order = np.random.default_rng(spec.seed).permutation(len(task.examples))
        self._examples = [task.examples[index] for index in np.sort(order[:count]).tolist()]
        others = np.sort(order[count : count + spec.num_confirmed]).tolist()
        self._others = [task.examples[index] for index in others]
        self._asked = {
            "base_model": fingerprint_digest(fingerprint(scorer.model)),
            "dtype": dtype_name(scorer.model),
            "task": task_fields(task),
            "front": config_to_dict(spec),
        }
        self._content: dict[str, Any] = {}

    def run(self, prior: EditPrior | None, progress: Progress) -> None:
        if self._path.exists():
            self._content = _read(self._path)
            check_asked(self._path, self._asked, self._content.get("asked", {}))
            if self._content["complete"]:
                return
        # Known before any step, so that a resumed step runs the same sweeps.
        self._scorer.forget()
        base = self._scorer.base(self._examples).of(self._spec.objective)
        if not self._content:
            self._open(base, prior)
        fewest = int(np.ceil(self._spec.min_depth * self._scorer.num_layers - 1e-9))
        total = self._scorer.num_layers - fewest
        while len(self._content["steps"]) <= total and self._content["ranking"]:
            progress("front", len(self._content["steps"]) - 1, total)
            self._step(base)
        self._confirm(progress)
        self._content["complete"] = True
        write_json_atomic(self._path, self._content)
        progress("front", total, total)

    def _open(self, base: _Floats, prior: EditPrior | None) -> None:
        num_layers = self._scorer.num_layers
        ranking = [layer for layer in range(num_layers) if layer not in self._spec.protect]
        if prior is not None:
            effect = np.nan_to_num(prior.mean[:num_layers], nan=-np.inf)
            ranking.sort(key=lambda layer: (-effect[layer], layer))
        self._content = {
            "schema_version": SCHEMA_VERSION,
            "asked": self._asked,
            "complete": False,
            "prompts": [item.prompt_id for item in self._examples],
            "evaluations": len(base),
            "screen_all": prior is None,
            # Layers that may be removed, the most promising first.
            "ranking": ranking,
            "steps": [],
            # Rewards of the front's plans on other prompts, a row for each prompt.
            "confirmed": [],
        }
        self._add(identity_plan(num_layers), base, base)

    def _step(self, base: _Floats) -> None:
        spec, content = self._spec, self._content
        number = len(content["steps"])
        plan = parse_plan(content["steps"][-1]["plan"], self._scorer.num_layers)
        ranking: list[int] = content["ranking"]
        screened = ranking if content["screen_all"] else ranking[: spec.num_candidates]
        count = len(self._examples)
        few = np.random.default_rng([spec.seed, number]).permutation(count)[: spec.num_screened]
        rest = np.setdiff1d(np.arange(count), few)
        candidates = sorted(screened)
        on_few = self._rewards(plan, candidates, few)
        # Stable, and the candidates ascend: equal ones stay in the order of layers.
        order = np.argsort(-on_few.mean(axis=1), kind="stable")
        finalists = np.sort(order[: spec.num_finalists])
        rewards = np.empty((len(finalists), count))
        rewards[:, few] = on_few[finalists]
        rewards[:, rest] = self._rewards(plan, [candidates[index] for index in finalists], rest)
        best = int(rewards.mean(axis=1).argmax())
        layer = candidates[finalists[best]]
        left = [layer for layer in ranking if layer not in screened]
        content["ranking"] = [
            candidates[index] for index in order.tolist() if candidates[index] != layer
        ] + left
        content["screen_all"] = False
        self._add(_without(plan, layer), rewards[best], base)

    def _confirm(self, progress: Progress) -> None:
        """Measure the front on prompts that chose nothing."""
        content, confirmed = self._content, self._content["confirmed"]
        plans = np.stack(
            [parse_plan(step["plan"], self._scorer.num_layers) for step in content["steps"]]
        )
        total = len(self._others)
        while len(confirmed) < total:
            progress("front, measured on other prompts", len(confirmed), total)
            block = self._others[len(confirmed) : len(confirmed) + _CONFIRMED_BLOCK]
            # Scored anew, or sweeps would differ from those of a resumed run.
            self._scorer.forget()
            outcomes = self._scorer.outcomes(
                block, np.tile(plans, (len(block), 1)), np.repeat(np.arange(len(block)), len(plans))
            )
            rewards = outcomes.of(self._spec.objective).reshape(len(block), len(plans))
            confirmed.extend(rewards.tolist())
            content["evaluations"] += rewards.size
            write_json_atomic(self._path, content)

    def _rewards(self, plan: Plans, layers: list[int], prompts: npt.NDArray[np.int64]) -> _Floats:
        """Rewards of the plan without each layer. Shape (layers, prompts)."""
        plans = np.stack([_without(plan, layer) for layer in layers])
        examples = [self._examples[index] for index in prompts.tolist()]
        row = np.repeat(np.arange(len(layers)), len(examples))
        outcomes = self._scorer.outcomes(
            examples, plans[row], np.tile(np.arange(len(examples)), len(layers))
        )
        self._content["evaluations"] += len(row)
        return outcomes.of(self._spec.objective).reshape(len(layers), len(examples))

    def _add(self, plan: Plans, rewards: _Floats, base: _Floats) -> None:
        self._content["steps"].append(
            {
                "plan": plan_text(plan),
                "depth": float(plan_depth(plan)),
                "reward": float(rewards.mean()),
                "standard_error": _error(rewards - base),
            }
        )
        write_json_atomic(self._path, self._content)


def _error(changes: _Floats) -> float:
    """Return the standard error of a mean; 0 if it cannot be told."""
    return float(changes.std(ddof=1) / np.sqrt(len(changes))) if len(changes) > 1 else 0.0


def _without(plan: Plans, layer: int) -> Plans:
    changed: Plans = plan.copy()
    changed[layer] = 0
    return changed


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path, LabelError)
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise LabelError(
            f"{path} has schema version {version!r}; this one reads {SCHEMA_VERSION}: delete it and search the front "
            "again, or install the dynadepth-search that wrote it"
        )
    return content
