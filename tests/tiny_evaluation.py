"""An evaluation whose outcomes are made up."""

from dataclasses import replace
from typing import Any

import numpy as np

from dynadepth.plans import identity_plan
from dynadepth_search.evaluation.comparison import Comparison, Front, PlannedPolicy
from dynadepth_search.evaluation.metrics import (
    action_shares,
    findings,
    policy_metrics,
    show_budget,
)
from dynadepth_search.evaluation.outcome_cache import Table

LAYERS, PROMPTS = 6, 12


def made_up(
    *,
    labels: bool = True,
    name: str = "piqa",
    headline: str = "agreement",
    curve: bool = True,
    budgets: tuple[float, ...] = (0.9, 0.7),
    preset: str | None = None,
) -> dict[str, Any]:
    """Return an evaluation as `evaluation.json` holds it; a preset has the plans of the policy under test."""
    rng = np.random.default_rng(0)
    plans = [identity_plan(LAYERS)]
    for layer in (3, 4, 1):
        plans.append(plans[-1].copy())
        plans[-1][layer] = 0
    planned = []
    for budget in budgets:
        share = 6.0 * (1.0 - budget)
        routed = np.ones((PROMPTS, LAYERS), dtype=np.uint8)
        routed[:, 3] = rng.random(PROMPTS) > share
        routed[:, 4] = rng.random(PROMPTS) > share - 0.9
        name_of = f"menu {show_budget(budget)}"
        planned.append(PlannedPolicy(name=name_of, kind="routed", budget=budget, plans=routed))
    tested = list(planned)
    if preset is not None:
        planned += [
            replace(policy, name=policy.name.replace("menu", preset), kind="preset")
            for policy in tested
        ]
    comparison = Comparison(
        policies=planned,
        front=Front(np.array(plans), np.array([0.0, -0.1, -0.3, -0.6])),
        influence=rng.random(LAYERS),
        num_prompts=PROMPTS,
        random_draws=2,
        seed=0,
    )
    stack = np.stack(list(comparison.sets.values()))
    quality = -((stack == 0) * rng.random((PROMPTS, LAYERS))).sum(axis=-1)
    values = {"preserve": quality, "agreement": (quality > -0.5).astype(float)}
    if labels:
        values |= {"reward": quality - 0.7, "accuracy": (quality > -0.3).astype(float)}
    table = Table(rows={each: row for row, each in enumerate(comparison.sets)}, values=values)
    compared = list(comparison.compared(table, headline))
    time = {"median": 0.9, "low": 0.8, "high": 1.0, "rounds": 3, "prompts": 4, "milliseconds": 5.0}
    policies = [
        policy_metrics(
            item.run,
            compared[0].run,
            item.static,
            seed=0,
            time=time if item.run.kind == "routed" else None,
        )
        for item in compared
    ]
    content = {
        "schema_version": 2,
        "model": "tiny-llama",
        "task": {
            "name": name,
            "kind": "choices",
            "scoring": "raw",
            "sha256": "ab" * 32,
            "heldout_prompts": PROMPTS,
            "train_prompts": 9,
        },
        "headline": headline,
        "num_layers": LAYERS,
        "dtype": "bfloat16",
        "config": {"seed": 0},
        "routers": {
            "kind": "menu",
            "range": [0.5, 1.0],
            "layers": [3],
            "ridge": 100.0,
            "weights": {"agreement": 1.0},
            "shrinkage": 0.25,
        },
        "policies": policies,
        "findings": findings(policies, headline),
        "drift": [],
        "actions": [
            {"budget": policy.budget, "shares": action_shares(policy.plans)} for policy in tested
        ],
        "plan_map": [
            {
                "budget": 0.7,
                "different_plans": 3,
                "rows": [
                    {
                        "plan": "111101",
                        "depth": 5 / 6,
                        "share": 0.75,
                        "examples": ["Is a < b?", f"{name}?"],
                    },
                    {"plan": "111111", "depth": 1.0, "share": 0.25, "examples": []},
                ],
            }
        ],
        "front": comparison.front_metrics(table),
        "runtime_check": {
            "menu 0.70": {
                "prompts": 2,
                "choices": 4,
                "mean_difference": 0.005,
                "max_difference": 0.01,
                "plans_differing": 0,
            }
        },
        "base_prefill_milliseconds": 5.0,
        "versions": {"dynadepth": "0.1.0"},
        "seconds": 1.5,
    }
    if curve:
        content["learning_curve"] = [
            {"prompts": count, "gain": 0.01 * count / 40, "standard_error": 0.02}
            for count in (40, 80, 160)
        ]
    return content
