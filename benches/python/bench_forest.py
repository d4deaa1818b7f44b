"""The forest against the published search and random plans, on synthetic models whose best plans are known.

    python benches/python/bench_forest.py --json forest.json       (no model; about a minute)

Two tables, means over seeds with their standard errors:

* The share of the achievable gain after some evaluations. An edit (skip or repeat one of 28 layers) changes the reward
  by an effect that prompts share (mean -0.5, sd 0.7) plus the prompt's own (sd 0.5); one pair of edits in twenty
  interacts (sd 0.4). A gain is a plan's value minus the identity plan's, at a depth penalty of 0.5; the achievable gain
  is exact, by branch and bound over all plans within the forest's caps.
* How often 50 simulations find a plan that is shorter and no worse, if 10, 25 or 50 % of a prompt's layers can be
  skipped at no loss. Which layers they are differs from prompt to prompt, so a prior cannot help.

The published search (Dr.LLM, arXiv 2510.12773) gives each node one child, so its rule of descent never has a choice and
it walks at random: the row `published walk`. The rows `drllm rule` give that rule, with c = 1.8 and a random child in
one step of ten as published, to the forest, which branches; lambda is the depth penalty for all. The prior comes from a
probe of 16 other prompts, whose evaluations are not counted.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import dynadepth
from dynadepth.plans import EXECUTE, REPEAT, SKIP
from dynadepth.tree_search.forest import EditPrior, Forest, SearchConfig

NUM_LAYERS = 28
NUM_PROBED = 16
EVALUATIONS = (20, 40, 80, 240)
SKIPPABLE = (0.1, 0.25, 0.5)
SIMULATIONS = 50
# The caps of every search here: the forest's own, which no plan may break that counts.
CAPS = SearchConfig()
PUBLISHED_RULE: dict[str, Any] = {"selection": "drllm", "exploration": 1.8, "random_child": 0.1}


Plans = Iterator[np.ndarray]
Source = Callable[[np.random.Generator], Plans]


class Oracle(Protocol):
    """Judges plans of prompts; the last `NUM_PROBED` prompts are there to be probed."""

    depth_penalty: float

    @property
    def num_prompts(self) -> int: ...

    def reward(self, prompt: int, plans: np.ndarray) -> np.ndarray: ...


@dataclass
class SharedOracle:
    """Effects of edits that prompts share in part, with sparse interactions of pairs of edits.

    Edit l skips layer l; edit num_layers + l repeats it.

    Args:
        effect: Shape (prompts, edits), float64.
        pairs: Symmetric, zero between the two edits of one layer. Shape (prompts, edits, edits), float64.
    """

    effect: np.ndarray
    pairs: np.ndarray
    depth_penalty = 0.5

    @classmethod
    def draw(cls, num_prompts: int, seed: int, num_layers: int = NUM_LAYERS) -> "SharedOracle":
        rng = np.random.default_rng(seed)
        edits = 2 * num_layers
        total = num_prompts + NUM_PROBED
        effect = rng.normal(-0.5, 0.7, edits) + rng.normal(0.0, 0.5, (total, edits))
        shape = (total, edits, edits)
        pairs = np.triu((rng.random(shape) < 0.05) * rng.normal(0.0, 0.4, shape), 1)
        layer = np.arange(edits) % num_layers
        pairs[:, layer[:, None] == layer] = 0.0
        return cls(effect, pairs + pairs.transpose(0, 2, 1))

    @property
    def num_prompts(self) -> int:
        return len(self.effect) - NUM_PROBED

    def reward(self, prompt: int, plans: np.ndarray) -> np.ndarray:
        edits = np.concatenate([plans == SKIP, plans == REPEAT], axis=1).astype(np.float64)
        together = np.einsum("ni,ij,nj->n", edits, self.pairs[prompt], edits) / 2
        return np.asarray(edits @ self.effect[prompt] + together)

    def best_gain(self, prompt: int) -> float:
        """Return the highest gain of any plan within the caps, exactly.

        Branch and bound, one layer after the other: what an undecided edit may still add is its gain beside the edits
        taken, plus half of all that undecided edits might add to it.
        """
        num_layers = self.effect.shape[1] // 2
        step = self.depth_penalty / num_layers
        alone = self.effect[prompt] + np.repeat([step, -step], num_layers)
        pairs, helpful = self.pairs[prompt], np.maximum(self.pairs[prompt], 0.0)
        hopes = np.maximum(alone + helpful.sum(axis=1), 0.0).reshape(2, num_layers).max(axis=0)
        order = np.argsort(-hopes)
        plans = np.full((1, num_layers), EXECUTE)
        gains, marginal, best = np.zeros(1), alone[None], 0.0
        for place, layer in enumerate(order):
            edits = (layer, num_layers + layer)
            gains = np.concatenate([gains, *(gains + marginal[:, edit] for edit in edits)])
            marginal = np.concatenate([marginal, *(marginal + pairs[edit] for edit in edits)])
            plans = np.tile(plans, (3, 1))
            plans[:, layer] = np.repeat([EXECUTE, SKIP, REPEAT], len(plans) // 3)
            best = max(best, gains[within_caps(plans)].max(initial=0.0))
            rest = np.concatenate([order[place + 1 :], num_layers + order[place + 1 :]])
            more = marginal[:, rest] + helpful[np.ix_(rest, rest)].sum(axis=1) / 2
            skips, repeats = np.split(np.maximum(more, 0.0), 2, axis=1)
            edits_left = CAPS.max_edits - (plans != EXECUTE).sum(axis=1)
            repeats_left = CAPS.max_repeats - (plans == REPEAT).sum(axis=1)
            bound = gains + highest(skips, edits_left) + highest(repeats, repeats_left)
            kept = (edits_left >= 0) & (repeats_left >= 0) & (bound > best)
            plans, gains, marginal = plans[kept], gains[kept], marginal[kept]
        return float(best)


@dataclass
class SkippableOracle:
    """Some layers of each prompt can be skipped at no loss; any other skip, and any repeat, harms.

    Args:
        harm: What skipping each layer costs. Shape (prompts, layers), float64.
        repeat_harm: What repeating it costs. Shape (prompts, layers), float64.
    """

    harm: np.ndarray
    repeat_harm: np.ndarray
    depth_penalty = 1.0

    @classmethod
    def draw(cls, num_prompts: int, seed: int, fraction: float) -> "SkippableOracle":
        rng = np.random.default_rng(seed)
        shape = (num_prompts + NUM_PROBED, NUM_LAYERS)
        harm = rng.uniform(0.2, 2.0, shape)
        for row in harm:
            row[rng.choice(NUM_LAYERS, round(fraction * NUM_LAYERS), replace=False)] = 0.0
        return cls(harm, rng.uniform(0.0, 1.0, shape))

    @property
    def num_prompts(self) -> int:
        return len(self.harm) - NUM_PROBED

    def reward(self, prompt: int, plans: np.ndarray) -> np.ndarray:
        lost = (plans == SKIP) @ self.harm[prompt] + (plans == REPEAT) @ self.repeat_harm[prompt]
        return np.asarray(-lost)


def highest(numbers: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the sum of the `counts[row]` highest numbers of each row."""
    ranked = np.sort(numbers, axis=1)[:, ::-1]
    chosen = np.arange(numbers.shape[1]) < counts[:, None]
    return np.asarray(np.where(chosen, ranked, 0.0).sum(axis=1))


def within_caps(plans: np.ndarray) -> np.ndarray:
    visits = plans.sum(axis=1)
    return np.asarray(
        (visits >= 1)
        & (visits <= CAPS.max_depth * plans.shape[1])
        & ((plans == REPEAT).sum(axis=1) <= CAPS.max_repeats)
        & ((plans != EXECUTE).sum(axis=1) <= CAPS.max_edits)
    )


# From an oracle, a number of evaluations and a seed to the plans evaluated for each prompt.
Method = Callable[[Oracle, int, int], list[np.ndarray]]


def searched(oracle: Oracle, forest: Forest, first: int = 0) -> Forest:
    """Drive a forest to its end; its trees are the prompts from `first` on."""
    while not forest.finished:
        batch = forest.ask(1 << 16)
        rewards = np.empty(len(batch))
        for tree in np.unique(batch.tree):
            rows = batch.tree == tree
            rewards[rows] = oracle.reward(first + int(tree), batch.plans[rows])
        forest.tell(batch.ticket, rewards)
    return forest


def probed(oracle: Oracle, seed: int) -> EditPrior:
    """Return what single edits do on average over the prompts that no search is judged by."""
    config = replace(CAPS, max_evaluations=1, probe_trees=NUM_PROBED)
    forest = Forest(NUM_LAYERS, NUM_PROBED, config=config, seed=seed)
    return searched(oracle, forest, first=oracle.num_prompts).prior()


def by_forest(
    oracle: Oracle, count: int, seed: int, *, with_prior: bool, **rule: Any
) -> list[np.ndarray]:
    config = replace(
        CAPS,
        max_evaluations=count,
        depth_penalty=oracle.depth_penalty,
        probe_trees=0,
        **rule,
    )
    prior = probed(oracle, seed) if with_prior else None
    forest = Forest(NUM_LAYERS, oracle.num_prompts, config=config, seed=seed, prior=prior)
    searched(oracle, forest)
    return [forest.evaluated(tree).plans for tree in range(oracle.num_prompts)]


def published_walk(rng: np.random.Generator) -> Plans:
    """Yield the plan of each simulation of the published search, whose tree never branches.

    Each simulation goes to the only leaf and adds a child by one of the leaf's moves, all equally likely: skip one
    visit of the path, skip two in a row, repeat one, or repeat one zero times, which changes nothing. The walk ends
    when no layer is left. Deviation: no plan runs a layer three times, so a move that would changes nothing either.
    """
    plan = np.full(NUM_LAYERS, EXECUTE)
    while plan.any():
        yield plan.copy()
        path = np.repeat(np.arange(NUM_LAYERS), plan)
        move, place = divmod(int(rng.integers(4 * len(path) - 1)), len(path))
        if move == 0:
            plan[path[place]] += plan[path[place]] < REPEAT
        elif move != 1:
            np.subtract.at(plan, path[place : place + move - 1], 1)


def random_plans(rng: np.random.Generator) -> Plans:
    """Yield the identity plan, then plans within the caps: first how many edits, then how many of them are repeats."""
    yield np.full(NUM_LAYERS, EXECUTE)
    while True:
        plan = np.full(NUM_LAYERS, EXECUTE)
        edits = rng.integers(1, CAPS.max_edits + 1)
        repeats = rng.integers(0, min(CAPS.max_repeats, edits // 2) + 1)
        layers = rng.permutation(NUM_LAYERS)[:edits]
        plan[layers] = SKIP
        plan[layers[:repeats]] = REPEAT
        yield plan


def simulations(source: Source, rng: np.random.Generator) -> Plans:
    return source(rng)


def evaluations(source: Source, rng: np.random.Generator) -> Plans:
    """Leave out plans that came before, since only new ones cost an evaluation; when a source ends, start it again."""
    seen = set()
    while True:
        for plan in source(rng):
            if plan.tobytes() not in seen:
                seen.add(plan.tobytes())
                yield plan


def by_chance(
    oracle: Oracle,
    count: int,
    seed: int,
    *,
    source: Source,
    counted: Callable[[Source, np.random.Generator], Plans],
) -> list[np.ndarray]:
    return [
        np.stack(list(islice(counted(source, np.random.default_rng([seed, prompt])), count)))
        for prompt in range(oracle.num_prompts)
    ]


def methods(counted: Callable[[Source, np.random.Generator], Plans]) -> dict[str, Method]:
    """Return the searches by name.

    Args:
        counted: What counts of the plans drawn at random, `evaluations` or `simulations`. A forest never asks a plan
            twice, so both are the same to it.
    """
    return {
        "forest, prior": partial(by_forest, with_prior=True),
        "forest, no prior": partial(by_forest, with_prior=False),
        "drllm rule, prior": partial(by_forest, with_prior=True, **PUBLISHED_RULE),
        "drllm rule, no prior": partial(by_forest, with_prior=False, **PUBLISHED_RULE),
        "published walk": partial(by_chance, source=published_walk, counted=counted),
        "random plans": partial(by_chance, source=random_plans, counted=counted),
    }


def shares_of_gain(seed: int, prompts: int) -> dict[str, list[float]]:
    """Return each method's mean share of the achievable gain after each of `EVALUATIONS`."""
    oracle = SharedOracle.draw(prompts, seed)
    achievable = np.array([oracle.best_gain(prompt) for prompt in range(prompts)])
    found = {}
    for name, method in methods(evaluations).items():
        gains = np.empty((prompts, len(EVALUATIONS)))
        for prompt, plans in enumerate(method(oracle, max(EVALUATIONS), seed)):
            saved = 1 - plans.sum(axis=1) / NUM_LAYERS
            gain = oracle.reward(prompt, plans) + oracle.depth_penalty * saved
            best = np.maximum.accumulate(np.where(within_caps(plans), gain, 0.0))
            gains[prompt] = [best[count - 1] for count in EVALUATIONS]
        found[name] = (gains / achievable[:, None]).mean(axis=0).tolist()
    return found


def rates_of_shorter(seed: int, prompts: int) -> dict[str, list[float]]:
    """Return how often each method finds a shorter plan of equal reward, for each of `SKIPPABLE`."""
    found: dict[str, list[float]] = {name: [] for name in methods(simulations)}
    for fraction in SKIPPABLE:
        oracle = SkippableOracle.draw(prompts, seed, fraction)
        for name, method in methods(simulations).items():
            hits = [
                bool(((plans.sum(axis=1) < NUM_LAYERS) & (oracle.reward(prompt, plans) >= 0)).any())
                for prompt, plans in enumerate(method(oracle, SIMULATIONS, seed))
            ]
            found[name].append(float(np.mean(hits)))
    return found


def summarised(
    runs: list[dict[str, list[float]]], columns: tuple[float, ...], column: str, figure: str
) -> list[dict[str, str | float]]:
    """Return one row for each method and column: the mean over runs, and its standard error."""
    rows: list[dict[str, str | float]] = []
    for name in runs[0]:
        table = np.array([run[name] for run in runs])
        error = table.std(axis=0, ddof=1) / np.sqrt(len(runs))
        for index, at in enumerate(columns):
            mean = float(table[:, index].mean())
            entry = {figure: mean, "standard_error": float(error[index])}
            rows.append({"method": name, column: at, **entry})
    return rows


def show(rows: list[dict[str, str | float]], heads: list[str], figure: str) -> None:
    lines = [f"| method | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for start in range(0, len(rows), len(heads)):
        entries = rows[start : start + len(heads)]
        cells = [f"{row[figure]:.3f} ± {row['standard_error']:.3f}" for row in entries]
        lines.append(f"| {entries[0]['method']} | {' | '.join(cells)} |")
    sys.stdout.write("\n".join(lines) + "\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="first of the seeds")
    parser.add_argument("--seeds", type=int, default=20, help="how many, at least 2")
    parser.add_argument("--prompts", type=int, default=100, help="prompts for each seed")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help="a small run that only shows that the bench works"
    )
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.prompts = 2, 4
    if options.seeds < 2:
        parser.error("a standard error needs at least 2 seeds")
    seeds = range(options.seed, options.seed + options.seeds)
    gains = [shares_of_gain(seed, options.prompts) for seed in seeds]
    rates = [rates_of_shorter(seed, options.prompts) for seed in seeds]
    share_rows = summarised(gains, EVALUATIONS, "evaluations", "share")
    rate_rows = summarised(rates, SKIPPABLE, "skippable", "rate")
    show(share_rows, [f"share at {count}" for count in EVALUATIONS], "share")
    show(rate_rows, [f"found, {fraction:.0%} skippable" for fraction in SKIPPABLE], "rate")
    report = {
        "dynadepth": dynadepth.__version__,
        "numpy": np.__version__,
        "seeds": list(seeds),
        "prompts": options.prompts,
        "layers": NUM_LAYERS,
        "simulations": SIMULATIONS,
        "gain": share_rows,
        "shorter": rate_rows,
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
