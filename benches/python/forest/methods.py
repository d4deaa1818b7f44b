"""The searches that are compared: each yields the plans that it evaluates for a prompt, the identity plan first."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from dynadepth.plans import EXECUTE, REPEAT, SKIP
from dynadepth.tree_search.forest import EditPrior, Forest
from forest.oracles import Oracle, edits_of, searched, within

# As many as the forest chooses before it learns from any of them.
ROUND = 4
BEAM = 4
# A plan that no draw finds new is replaced by one at random.
TRIES = 8


def by_forest(
    oracle: Oracle, count: int, seed: int, *, prior: EditPrior | None, **settings: Any
) -> list[np.ndarray]:
    """Return the plans that the forest evaluates for each prompt."""
    given = {"max_evaluations": count, "depth_penalty": oracle.depth_penalty, "probe_trees": 0}
    config = replace(oracle.caps, **{**given, **settings})
    forest = Forest(oracle.num_layers, oracle.num_prompts, config=config, seed=seed, prior=prior)
    searched(oracle.seen, forest)
    return [forest.evaluated(tree).plans for tree in range(oracle.num_prompts)]


class Judge:
    """What a plain search sees of one prompt: each new plan once, within the caps, until its evaluations are spent."""

    def __init__(self, oracle: Oracle, prompt: int, count: int) -> None:
        self.oracle, self.prompt, self.count, self.caps = oracle, prompt, count, oracle.caps
        self.identity = np.full(oracle.num_layers, EXECUTE)
        self.plans: list[np.ndarray] = []
        self.gain: dict[bytes, float] = {}
        self.ask(self.identity)

    @property
    def left(self) -> int:
        return self.count - len(self.plans)

    def ask(self, plan: np.ndarray) -> float | None:
        """Return what a plan seems to gain; None if it breaks a cap or nothing is left."""
        known = self.gain.get(plan.tobytes())
        if known is not None:
            return known
        if not self.left or not within(plan[None], self.caps)[0]:
            return None
        seen = self.oracle.seen(self.prompt, plan[None])
        gain = float(self.oracle.gains(self.prompt, plan[None], seen)[0])
        self.plans.append(plan.copy())
        self.gain[plan.tobytes()] = gain
        return gain

    def edited(self, plan: np.ndarray, edit: int) -> np.ndarray:
        layer, action = edit % len(plan), SKIP if edit < len(plan) else REPEAT
        changed = plan.copy()
        changed[layer] = action
        return changed


def edits_by_prior(oracle: Oracle, prior: EditPrior) -> list[int]:
    """Return the edits that a plan may take, the most promising ones first."""
    num_layers = oracle.num_layers
    step = oracle.depth_penalty / num_layers
    value = np.nan_to_num(prior.mean) + np.repeat([step, -step], num_layers)
    edits = list(oracle.free)
    if oracle.max_repeats:
        edits += list(num_layers + oracle.free)
    return sorted((int(edit) for edit in edits), key=lambda edit: (-value[edit], edit))


def singles_then_union(judge: Judge, prior: EditPrior) -> None:
    """Try single edits with half of the evaluations, the likeliest first; then add the good ones one by one.

    A repeat that is too deep alone is tried beside the best skip.
    """
    edits, half = edits_by_prior(judge.oracle, prior), judge.count // 2
    num_layers = judge.oracle.num_layers
    gains: dict[int, float] = {}
    best_skip: int | None = None
    for edit in edits:
        if len(judge.plans) > half:
            break
        plan, under = judge.edited(judge.identity, edit), 0.0
        if edit >= num_layers and best_skip is not None:
            plan = judge.edited(judge.edited(judge.identity, best_skip), edit)
            under = gains[best_skip]
        gain = None if (plan == SKIP).sum() == 0 else judge.ask(plan)
        if gain is not None:
            gains[edit] = gain - under
            if edit < num_layers and (best_skip is None or gain > gains[best_skip]):
                best_skip = edit
    plan, value = judge.identity, 0.0
    for edit in sorted(gains, key=lambda edit: (-gains[edit], edit)):
        if gains[edit] <= 0 or plan[edit % num_layers] != EXECUTE:
            continue
        gain = judge.ask(judge.edited(plan, edit))
        if gain is not None and gain > value:
            plan, value = judge.edited(plan, edit), gain


def beam(judge: Judge, prior: EditPrior) -> None:
    """Try all children of the best `BEAM` plans of a level, the likeliest edits first; then those of their best."""
    edits = edits_by_prior(judge.oracle, prior)
    level = [judge.identity]
    while judge.left and level:
        children = {}
        for edit in edits:
            for plan in level:
                if plan[edit % len(plan)] == EXECUTE:
                    child = judge.edited(plan, edit)
                    gain = judge.ask(child)
                    if gain is not None:
                        children[child.tobytes()] = (gain, child)
        ranked = sorted(children.values(), key=lambda entry: -entry[0])
        level = [child for _, child in ranked[:BEAM]]


class LinearPosterior:
    """Bayesian linear regression of the gain on the edits, its prior that of the probe."""

    def __init__(self, oracle: Oracle, prior: EditPrior) -> None:
        step = oracle.depth_penalty / oracle.num_layers
        mean = np.nan_to_num(prior.mean) + np.repeat([step, -step], oracle.num_layers)
        variance = np.nan_to_num(prior.variance)
        variance = (variance + variance[variance > 0].mean()) / 2
        self.edits = np.array(edits_by_prior(oracle, prior))
        self.precision = np.diag(1 / variance[self.edits])
        self.moment = self.precision @ mean[self.edits]
        # What interactions and noise leave unexplained.
        self.noise = 0.1 * float(variance[self.edits].mean())

    def learn(self, plan: np.ndarray, gain: float) -> None:
        row = edits_of(plan[None])[0, self.edits]
        self.precision += np.outer(row, row) / self.noise
        self.moment += row * gain / self.noise

    def factor(self) -> tuple[np.ndarray, np.ndarray]:
        covariance = np.linalg.inv(self.precision)
        root = np.linalg.cholesky((covariance + covariance.T) / 2 + 1e-12 * np.eye(len(covariance)))
        return covariance @ self.moment, root


def thompson(judge: Judge, prior: EditPrior, rng: np.random.Generator) -> None:
    """Ask the plan that would be best if effects were those of a draw from the posterior; learn in rounds."""
    posterior = LinearPosterior(judge.oracle, prior)
    while judge.left:
        mean, root = posterior.factor()
        before = len(judge.plans)
        for _ in range(min(ROUND, judge.left)):
            for _ in range(TRIES):
                effects = mean + root @ rng.normal(size=len(mean))
                plan = best_sum(judge, posterior.edits, effects)
                if plan.tobytes() not in judge.gain:
                    break
            else:
                new = (p for p in random_plans(judge.oracle, rng) if p.tobytes() not in judge.gain)
                plan = next(islice(new, 1), judge.identity)
            judge.ask(plan)
        if len(judge.plans) == before:
            break
        for plan in judge.plans[before:]:
            posterior.learn(plan, judge.gain[plan.tobytes()])


def best_sum(judge: Judge, edits: np.ndarray, effects: np.ndarray) -> np.ndarray:
    """Return the plan of positive effects within the caps, the largest first."""
    caps, num_layers = judge.caps, judge.oracle.num_layers
    likely = np.flatnonzero(effects > 0)
    order = edits[likely[np.argsort(-effects[likely])]].tolist()
    most_repeats = min(caps.max_repeats, sum(edit < num_layers for edit in order) - 1)
    actions, skips, repeats = [EXECUTE] * num_layers, 0, 0
    for edit in order:
        layer = edit % num_layers
        if skips + repeats == caps.max_edits:
            break
        if actions[layer] != EXECUTE:
            continue
        if edit == layer and skips < num_layers - 1:
            actions[layer] = SKIP
            skips += 1
        elif edit > layer and repeats < most_repeats:
            actions[layer] = REPEAT
            repeats += 1
    plan = np.array(actions)
    while plan.sum() > caps.max_depth * num_layers:
        plan[np.flatnonzero(plan == REPEAT)[-1]] = EXECUTE
    return plan


def published_walk(oracle: Oracle, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield the plan of each simulation of the published search (Dr.LLM, arXiv 2510.12773), whose tree never branches.

    Each simulation goes to the only leaf and adds a child by one of the leaf's moves, all equally likely: skip one
    visit of the path, skip two in a row, repeat one, or repeat one zero times, which changes nothing. The walk ends
    when no layer is left, and starts again. Deviation: no plan runs a layer three times, so a move that would changes
    nothing either; nor does one that breaks a cap, but for its depth.
    """
    free = oracle.free
    while True:
        plan = np.full(len(free), EXECUTE)
        while plan.any():
            whole = np.full(oracle.num_layers, EXECUTE)
            whole[free] = plan
            yield whole
            path = np.repeat(np.arange(len(free)), plan)
            move, place = divmod(int(rng.integers(4 * len(path) - 1)), len(path))
            if move == 0:
                plan[path[place]] += plan[path[place]] < REPEAT and oracle.max_repeats > 0
            elif move != 1:
                np.subtract.at(plan, path[place : place + move - 1], 1)


def random_plans(oracle: Oracle, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield plans within the caps: first how many edits, then how many of them are repeats."""
    most = min(oracle.caps.max_edits, len(oracle.free) - (len(oracle.free) == oracle.num_layers))
    for _ in range(10_000):
        plan = np.full(oracle.num_layers, EXECUTE)
        edits = rng.integers(1, most + 1)
        repeats = rng.integers(0, min(oracle.max_repeats, edits // 2) + 1)
        layers = rng.permutation(oracle.free)[:edits]
        plan[layers] = SKIP
        plan[layers[:repeats]] = REPEAT
        yield plan


def new_plans(judge: Judge, source: Iterator[np.ndarray]) -> list[np.ndarray]:
    """Return the identity plan and the first new plans of a source; one outside the caps counts, since it was run."""
    plans = {judge.identity.tobytes(): judge.identity}
    for plan in islice(source, 100 * judge.count):
        plans.setdefault(plan.tobytes(), plan)
        if len(plans) == judge.count:
            break
    return list(plans.values())
