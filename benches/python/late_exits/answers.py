"""Prompts answered with one token, by kind: exits beside static plans, and beside saying what the kind mostly says.

Many prompts of a kind begin their answer alike. Who knows the kind can say that without running a layer, so exits have
to keep more than the base model would together with such a guess.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynadepth.checkpoints.trained_exits import TrainedExits
from dynadepth.evaluation.intervals import mean_interval
from dynadepth.evaluation.mixtures import mix_to_depth, pareto_front
from dynadepth.plans import plan_depth
from dynadepth_search.data.tasks import Example
from dynadepth_search.exits.judging.answered import answer_with_exits
from dynadepth_search.exits.judging.opponents import Pool
from dynadepth_search.progress import Progress
from dynadepth_search.scoring.runtime_checks import wrapped
from dynadepth_search.scoring.scorer import Scorer

__all__ = ["answers_by_kind"]


def answers_by_kind(
    model: Any,
    scorer: Scorer,
    examples: Sequence[Example],
    kinds: Sequence[str],
    exits: TrainedExits,
    pool: Pool,
    budgets: Sequence[float],
    *,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Return what exits keep of each kind's answers, and what others of equal depth could have kept.

    The static plans are the best of each depth on other prompts; which two of them are mixed is chosen on the very
    prompts that are compared, kind by kind, so the opponent knows what no policy knows. `guess` runs every layer for
    some prompts, and for the others none and says the kind's most frequent answer, counted on these prompts too.

    Args:
        model: The unwrapped base model; it is unwrapped again afterwards.
        scorer: Scores the prompts under the plans, with the shortcuts that these have.
        examples: The held-out prompts.
        kinds: The kind of each.
        exits: The trained exits of this model.
        pool: The static plans.
        budgets: Mean depths that the exits are asked for.
        progress: Called with the stage, the number of finished steps and of all.
    """
    plans, values = pool
    front = pareto_front(plan_depth(plans), values)
    chosen, count = plans[front], len(examples)
    depths = plan_depth(chosen)
    base = scorer.base(examples).answer
    agrees = np.empty((len(chosen), count))
    for number, plan in enumerate(chosen):
        progress("static plans", number, len(chosen))
        outcomes = scorer.outcomes(examples, np.tile(plan, (count, 1)), np.arange(count))
        agrees[number] = outcomes.agrees
    groups = {"all": np.ones(count, dtype=np.bool_)}
    groups |= {kind: np.array(kinds) == kind for kind in sorted(set(kinds))}
    shares = {
        kind: float(np.unique(base[here], return_counts=True)[1].max() / here.sum())
        for kind, here in groups.items()
        if kind != "all"
    }
    weights = {kind: float(groups[kind].mean()) for kind in shares}
    rows = []
    for number, budget in enumerate(budgets):
        progress("answers with exits", number, len(budgets))
        with wrapped(model, routers=exits, budget=budget) as inner:
            answers = answer_with_exits(inner, scorer, examples)
        kept = (answers.answer == base).astype(np.float64)
        for kind, here in groups.items():
            depth = float(answers.depth[here].mean())
            row: dict[str, Any] = {
                "budget": budget,
                "kind": kind,
                "prompts": int(here.sum()),
                "depth": depth,
                "kept": mean_interval(kept[here]).to_dict(),
                "static": None,
                "gain": None,
                "guess": _guessed(
                    depth,
                    shares if kind == "all" else {kind: shares[kind]},
                    weights if kind == "all" else {kind: 1.0},
                ),
            }
            if depths.min() <= depth <= depths.max():
                mixed = mix_to_depth(depths, agrees[:, here].mean(axis=1), depth)
                static = mixed.expected(agrees[:, here])
                row["static"] = float(static.mean())
                row["gain"] = mean_interval(kept[here] - static).to_dict()
            rows.append(row)
    return rows


def _guessed(depth: float, shares: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Return what is kept at a mean depth if whole prompts are guessed, of the kind first that is guessed best.

    Args:
        depth: Share of the prompts that run every layer; the others run none.
        shares: Of each kind's answers, those that are its most frequent one.
        weights: The share of all prompts that each kind has.
    """
    left, kept = max(0.0, 1.0 - depth), 1.0
    for kind in sorted(shares, key=lambda each: -shares[each]):
        guessed = min(left, weights[kind])
        kept -= guessed * (1.0 - shares[kind])
        left -= guessed
    return kept
