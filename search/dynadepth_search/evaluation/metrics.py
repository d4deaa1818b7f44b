"""From outcomes to figures and findings: means, paired intervals, and what they allow to say.

Owns the words of a finding, which follow from its interval and from nothing else. Works on arrays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dynadepth.evaluation.intervals import mean_interval, paired_difference
from dynadepth.evaluation.mixtures import Mixture, best_under_depth
from dynadepth.models.compute import PlanCost
from dynadepth.plans import Plans, identity_plan, plan_text

__all__ = [
    "METRIC_LABELS",
    "METRIC_NAMES",
    "SHARES",
    "PolicyRun",
    "action_shares",
    "findings",
    "listed",
    "mix_runs",
    "oracle_run",
    "policy_metrics",
    "show_budget",
    "show_interval",
    "show_number",
    "side_of_zero",
    "unit_of",
]

Kind = Literal["base", "routed", "preset", "static", "plain", "shortgpt", "random", "oracle"]
Floats = npt.NDArray[np.float64]

METRIC_LABELS = {
    "reward": "graded reward (log-prob of the right answer)",
    "preserve": "fidelity (-KL to the base)",
    "agreement": "agreement with the base's own answer (%)",
    "accuracy": "accuracy (%)",
}
# What a sentence calls them.
METRIC_NAMES = {
    "reward": "graded reward",
    "preserve": "fidelity",
    "agreement": "agreement",
    "accuracy": "accuracy",
}
# Shares of prompts, shown in points of a hundred.
SHARES = ("agreement", "accuracy")
# A mean depth that is further from its budget is said so.
_BUDGET_TOLERANCE = 0.02
_ROUNDING = 1e-9
_ONE_PLAN = " One plan for all prompts is itself static: any difference from the mixture is one between static plans."


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRun:
    """What one policy did on the prompts.

    Args:
        name: Shown in tables.
        kind: What sort of policy.
        depth: Depth of each prompt. Shape (prompts,), float64.
        metrics: Outcome of each prompt, by metric. Shape (prompts,) each, float64.
        plans: The plans it chose, however many. Shape (any, num_layers), uint8.
        weights: Share of each of the plans; None counts them equally. Shape (any,), float64.
        budget: The budget that it stands for, if any.
    """

    name: str
    kind: Kind
    depth: Floats
    metrics: Mapping[str, Floats]
    plans: Plans
    weights: Floats | None = None
    budget: float | None = None

    @property
    def mean_depth(self) -> float:
        """Mean over prompts, each counting once."""
        return float(self.depth.mean())


def mix_runs(
    name: str,
    kind: Kind,
    mixture: Mixture,
    plans: Plans,
    metrics: Mapping[str, Floats],
    budget: float | None,
) -> PolicyRun:
    """Return what a mixture of two static plans does to each prompt on average.

    Args:
        name: Of the run.
        kind: Of the run.
        mixture: Counts the rows of `plans` and `metrics`.
        plans: Static plans. Shape (plans, num_layers), uint8.
        metrics: Outcomes of each plan on each prompt. Shape (plans, prompts) each.
        budget: The budget that it stands for.

    Returns:
        The run; its depth is the mixture's for every prompt.
    """
    mixed = {metric: mixture.expected(values) for metric, values in metrics.items()}
    num_prompts = len(next(iter(mixed.values())))
    return PolicyRun(
        name=name,
        kind=kind,
        depth=np.full(num_prompts, mixture.depth),
        metrics=mixed,
        plans=plans[[mixture.low, mixture.high]],
        weights=np.array([1.0 - mixture.weight, mixture.weight]),
        budget=budget,
    )


def oracle_run(
    name: str,
    headline: str,
    depth: float,
    stack: Plans,
    depths: Floats,
    metrics: Mapping[str, Floats],
    budget: float | None,
) -> PolicyRun:
    """Return the best choice among plans whose outcomes are known, at most as deep as given on average.

    Args:
        name: Of the run.
        headline: The metric that is maximised.
        depth: Highest mean depth.
        stack: Plans of each prompt. Shape (sets, prompts, num_layers), uint8.
        depths: Shape (sets, prompts).
        metrics: Shape (sets, prompts) each.
        budget: The budget that it stands for.

    Returns:
        The run of an oracle, which is no policy.
    """
    chosen = best_under_depth(metrics[headline], depths, depth)
    columns = np.arange(depths.shape[1])
    return PolicyRun(
        name=name,
        kind="oracle",
        depth=depths[chosen, columns],
        metrics={metric: values[chosen, columns] for metric, values in metrics.items()},
        plans=stack[chosen, columns],
        budget=budget,
    )


def policy_metrics(
    run: PolicyRun,
    base: PolicyRun,
    static: PolicyRun | None,
    *,
    seed: int,
    cost: PlanCost | None = None,
    heads: float = 0.0,
    time: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the figures of a policy, as they are written and shown.

    Args:
        run: The policy.
        base: The base model on the same prompts.
        static: The static mixture of the same mean depth; None where none reaches it, or where a
            comparison would be one with itself.
        seed: Of the resampling.
        cost: What plans cost; None: it is not known.
        heads: Multiply-adds of the policy's heads, for one token of the prompts.
        time: Wall time against the base, if it was measured.

    Returns:
        JSON data.
    """
    rows = run.plans.shape[0]
    weights = np.full(rows, 1.0 / rows) if run.weights is None else run.weights
    used = run.plans[weights > 0.0]
    identity = (run.plans == identity_plan(run.plans.shape[1])).all(axis=1)
    return {
        "name": run.name,
        "kind": run.kind,
        "budget": run.budget,
        "ranked": run.kind != "oracle",
        "n": len(run.depth),
        "depth": run.mean_depth,
        "compute": None if cost is None else float(weights @ cost.compute(run.plans, heads)),
        "identity_rate": float(weights[identity].sum()),
        "distinct_plans": len(np.unique(used, axis=0)),
        "plans": sorted({plan_text(plan) for plan in used}) if len(used) <= 2 else None,
        "weights": weights.tolist() if run.weights is not None else None,
        "metrics": {
            metric: mean_interval(values, seed=seed).to_dict()
            for metric, values in run.metrics.items()
        },
        "against_base": _against(run, base, seed),
        "against_static": None if static is None else _against(run, static, seed),
        "time": None if time is None else dict(time),
    }


def _against(run: PolicyRun, reference: PolicyRun, seed: int) -> dict[str, Any]:
    return {
        metric: paired_difference(values, reference.metrics[metric], seed=seed).to_dict()
        for metric, values in run.metrics.items()
    }


def action_shares(plans: Plans) -> list[list[float]]:
    """Return how many of the plans skip, execute and repeat each layer, as shares.

    Args:
        plans: Shape (plans, num_layers), uint8.

    Returns:
        One list for each layer: shares of SKIP, EXECUTE and REPEAT.
    """
    shares = np.stack([(plans == action).mean(axis=0) for action in range(3)], axis=1)
    return [[float(share) for share in layer] for layer in shares]


def findings(policies: Sequence[Mapping[str, Any]], headline: str) -> list[str]:
    """Say how each policy that looks at the prompt does against the static mixture of equal depth.

    Args:
        policies: What `policy_metrics` gave.
        headline: The metric named first.

    Returns:
        One line for each such policy and budget, which opens with the policy's name.
    """
    said = []
    for figures in policies:
        if figures["kind"] not in ("routed", "preset"):
            continue
        who = f"{figures['name']} (mean depth {figures['depth']:.3f}, n = {figures['n']})"
        if figures["against_static"] is None:
            verdicts = ["has no static mixture of equal depth to be compared with"]
        else:
            verdicts = _verdicts(figures["against_static"], headline)
        several = figures["distinct_plans"] > 1
        said.append(
            f"{who} {'; '.join(verdicts)}. It uses {figures['distinct_plans'] if several else 'one'} "
            f"plan{'s' if several else ''}, the identity plan for {figures['identity_rate']:.0%} of the prompts."
            f"{'' if several else _ONE_PLAN}{_missed(figures['budget'], figures['depth'])}"
        )
    return said


def _missed(budget: float | None, depth: float) -> str:
    """Return the sentence for a budget that was not kept; empty for one that was."""
    # A distance of exactly the tolerance is not exact to the last bit.
    if budget is None or abs(depth - budget) <= _BUDGET_TOLERANCE + 1e-9:
        return ""
    return (
        f" It missed its budget by more than {_BUDGET_TOLERANCE}: budget {show_budget(budget)}, "
        f"measured {depth:.3f}."
    )


def _verdicts(against_static: Mapping[str, Mapping[str, Any]], headline: str) -> list[str]:
    """Group the metrics by what their intervals say, the headline's group first."""
    words = {
        1: "beats the static mixture of equal depth in",
        0: "does not beat the static mixture of equal depth in",
        -1: "is worse than the static mixture of equal depth in",
    }
    groups: dict[int, list[str]] = {}
    for metric in sorted(against_static, key=lambda name: (name != headline, name)):
        difference = against_static[metric]
        points = " points" if unit_of(metric) else ""
        shown = f"{METRIC_NAMES[metric]} {show_interval(metric, difference)}{points}"
        groups.setdefault(side_of_zero(difference), []).append(shown)
    return [f"{words[side]} {listed(shown)}" for side, shown in groups.items()]


def side_of_zero(interval: Mapping[str, float]) -> int:
    """Return on which side of zero an interval lies: 1 above, -1 below, 0 if it reaches zero.

    What differs from zero by rounding alone reaches it.
    """
    return int(interval["low"] > _ROUNDING) - int(interval["high"] < -_ROUNDING)


def listed(parts: Sequence[str]) -> str:
    """Join parts as a sentence lists them, as in "a, b and c"."""
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)


def unit_of(metric: str) -> str:
    """Return what stands behind a mean in a sentence: a percent sign for shares."""
    return " %" if metric in SHARES else ""


def show_number(metric: str, value: float) -> str:
    """Write a mean as it is shown everywhere: shares in points of a hundred."""
    factor, digits = _format(metric)
    # Adding zero takes the sign off what rounds to nothing.
    return f"{round(factor * value, digits) + 0.0:.{digits}f}"


def show_budget(budget: float) -> str:
    """Write a budget with two decimals if that is exact, else with all it takes to tell it from others."""
    short = f"{budget:.2f}"
    return short if float(short) == budget else str(float(budget))


def show_interval(metric: str, interval: Mapping[str, float]) -> str:
    """Write a difference and its interval, as in "+1.2 [-0.3, +2.7]"."""
    factor, digits = _format(metric)
    mean, low, high = (
        f"{round(factor * interval[key], digits) + 0.0:+.{digits}f}"
        for key in ("mean", "low", "high")
    )
    return f"{mean} [{low}, {high}]"


def _format(metric: str) -> tuple[float, int]:
    """Return the unit of a metric and its digits."""
    return (100.0, 1) if metric in SHARES else (1.0, 4)
