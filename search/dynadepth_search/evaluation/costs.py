"""What an evaluation measures of cost: time in pairs with the base model, and multiply-adds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynadepth.checkpoints.trained_policy import Routers
from dynadepth.models.compute import PlanCost
from dynadepth.models.structure import layer_stack
from dynadepth.plans import Plans, plan_text
from dynadepth.shortcuts.maps import Shortcuts
from dynadepth_search.data.tasks import Example
from dynadepth_search.evaluation.comparison import ComparedRun
from dynadepth_search.evaluation.metrics import PolicyRun
from dynadepth_search.progress import Progress
from dynadepth_search.scoring.runtime_checks import time_prefill
from dynadepth_search.scoring.scorer import Scorer

__all__ = ["head_multiply_adds", "plan_cost", "time_runs"]


def plan_cost(model: Any, shortcuts: Shortcuts | None) -> PlanCost:
    """Return what plans of a model cost.

    Args:
        model: The base model.
        shortcuts: What is in place of skipped layers; None: nothing.
    """
    maps = () if shortcuts is None else shortcuts.maps
    skips = [0.0 if each is None else float(each.multiply_adds) for each in maps]
    return PlanCost.of_model(model, layer_stack(model), skips)


def head_multiply_adds(arguments: Mapping[str, Any] | None) -> float:
    """Return the multiply-adds of a policy's heads for one prompt: every weight once, for each vector that it reads."""
    if arguments is None:
        return 0.0
    routers = arguments["routers"]
    reads = 1
    if isinstance(routers, Routers):
        reads = routers.config.num_windows + int(routers.config.last_token)
    return float(reads * sum(each.numel() for each in routers.tensors().values() if each.dim() > 1))


def time_runs(
    model: Any,
    scorer: Scorer,
    examples: Sequence[Example],
    compared: Sequence[ComparedRun],
    arguments: Mapping[str, Mapping[str, Any]],
    *,
    prompts: int,
    rounds: int,
    progress: Progress,
) -> tuple[dict[str, dict[str, Any]], float]:
    """Time the policies and the plans of their baselines; the time of a mixture is that of its parts.

    A policy under test is timed on prompts that stand for all: shallow and deep plans are as frequent among them.

    Args:
        model: The unwrapped base model; it is unwrapped again afterwards.
        scorer: Encodes the prompts, and knows the shortcuts.
        examples: All prompts.
        compared: The runs of the evaluation.
        arguments: Arguments of `wrap_model` for each policy under test, by its name.
        prompts: Number of prompts that each is timed on.
        rounds: Number of measured rounds.
        progress: Called with the stage, the number of finished steps and the number of all steps.

    Returns:
        What was measured, by the run's name, and the base model's milliseconds for one prompt.
    """
    policies: dict[str, tuple[Mapping[str, Any], Sequence[Example]]] = {
        item.run.name: (
            arguments[item.run.name],
            [examples[row] for row in _spread(item.run.plans, prompts)],
        )
        for item in compared
        if item.run.name in arguments
    }
    mixtures = {
        item.run.name: _timed_parts(item.run)
        for item in compared
        if item.run.kind in ("static", "plain", "shortgpt", "random")
    }
    plain = {item.run.name for item in compared if item.run.kind == "plain"}

    def named(name: str, plan: Plans) -> str:
        return f"{'plain ' if name in plain else ''}{plan_text(plan)}"

    for name, (plans, _) in mixtures.items():
        maps = False if name in plain else scorer.shortcuts
        policies |= {
            named(name, plan): ({"plan": plan, "shortcuts": maps}, examples[:prompts])
            for plan in plans
        }
    progress("timing prefills", 0, 1)
    ratios, base_milliseconds = time_prefill(model, scorer, policies, rounds=rounds)
    progress("timing prefills", 1, 1)
    times = {name: ratios[name].to_dict() for name in arguments}
    for name, (plans, weights) in mixtures.items():
        parts = [ratios[named(name, plan)].to_dict() for plan in plans]
        mixed = {
            key: sum(weight * part[key] for weight, part in zip(weights, parts, strict=True))
            for key in ("median", "low", "high", "milliseconds")
        }
        times[name] = parts[0] | mixed
    return times, base_milliseconds


def _spread(plans: Plans, count: int) -> list[int]:
    """Return prompts at even steps among all, from the shallowest plan to the deepest."""
    order = np.argsort(plans.sum(axis=1), kind="stable")
    count = min(count, len(order))
    chosen: list[int] = order[(2 * np.arange(count) + 1) * len(order) // (2 * count)].tolist()
    return chosen


def _timed_parts(run: PolicyRun) -> tuple[Plans, list[float]]:
    """Return the plans whose times add up to a baseline's, and their shares."""
    if run.weights is not None:
        return run.plans, run.weights.tolist()
    # Random plans have one of two numbers of visits; one plan is timed for each.
    _, first, counts = np.unique(run.plans.sum(axis=1), return_index=True, return_counts=True)
    return run.plans[first], (counts / counts.sum()).tolist()
