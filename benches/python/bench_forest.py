"""The forest against the published search and plain baselines, on models whose best plans are known.

    python benches/python/bench_forest.py --make-table          (once; SmolLM2, ten minutes; goes on when killed)
    python benches/python/bench_forest.py --json forest.json    (no model; a few minutes)
    python benches/python/bench_forest.py --also exploration=2.5,interaction=0.1    (other settings beside ours)

Synthetic oracles (see forest/oracles.py) and a replay of the table that `--make-table` keeps in the cache: the rewards
of all 1,024 sets of skips of ten layers of SmolLM2-135M for 64 prompts. Every search evaluates the identity plan first;
what it has found is the plan that looks best among those evaluated, judged by its true value. Regret is what that
misses of the achievable gain, as a share of the mean achievable gain; the second figure of a cell is the share of
prompts for which 95 % of the gain are found. The prior comes from a probe of 16 other prompts, whose evaluations are
not counted; Thompson sampling, the beam and the union have it too. The published walk is Dr.LLM's (arXiv 2510.12773),
re-implemented from its description.

Then two tables on what is learned across prompts: the evaluations that the prior saves at equal regret, and how many
evaluations a label takes with the settings of `dynadepth search prompts`, which stop early.
"""

import argparse
import json
import sys
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from forest.figures import (
    BUDGETS,
    METHODS,
    OURS,
    Column,
    Method,
    at_budgets,
    found,
    measured,
    other_settings,
    rows_of,
    shown,
    verdicts,
)
from forest.methods import by_forest
from forest.oracles import KINDS, Oracle, Replay, draw
from forest.table import Table, default_folder, make_table

import dynadepth
from dynadepth.tree_search.forest import SearchConfig
from dynadepth_search.search.per_prompt_spec import PromptSearchSpec

LAYERS = (12, 28, 32, 80)
# Beyond this many layers only columns whose optimum branch and bound proves.
MOST_LAYERS = {"additive": 80}
# How `dynadepth search prompts` ends a search.
_SPEC = PromptSearchSpec().config
LABELS = {"max_evaluations": _SPEC.max_evaluations, "stop_at": _SPEC.stop_at}


def synthetic(
    kind: str, num_layers: int, options: argparse.Namespace, methods: dict[str, Method]
) -> Column:
    """Measure one column over several draws of the shared effects."""
    columns = [
        measured(draw(kind, num_layers, options.prompts, seed), kind, seed, methods)
        for seed in range(options.seed, options.seed + options.draws)
    ]
    return reduce(Column.joined, columns)


def saved(oracle: Oracle, seed: int) -> list[tuple[int, int | None]]:
    """Return, for each budget, after how many evaluations the prior has the regret of the flat prior there."""
    prior = oracle.prior(seed)
    curves = []
    for given in (prior, None):
        searches = by_forest(oracle, max(BUDGETS), seed, prior=given)
        rows = [found(oracle, *each) for each in enumerate(searches)]
        longest = [np.pad(row, (0, max(BUDGETS) - len(row)), mode="edge") for row in rows]
        curves.append(np.mean(longest, axis=0))
    with_prior, flat = curves
    reached = [int((with_prior < flat[count - 1] - 1e-12).sum()) + 1 for count in BUDGETS]
    return [
        (count, needed if needed <= max(BUDGETS) else None)
        for count, needed in zip(BUDGETS, reached, strict=True)
    ]


def stopped(name: str, oracle: Oracle, seed: int) -> dict[str, Any]:
    """Return how many evaluations labels take, and what they find of what 240 evaluations find."""
    prior = oracle.prior(seed)
    searches = by_forest(oracle, 0, seed, prior=prior, **LABELS)
    counts = np.array([len(plans) for plans in searches])
    gains = np.array([found(oracle, *each)[-1] for each in enumerate(searches)])
    long = by_forest(oracle, max(BUDGETS), seed, prior=prior)
    most = np.array([at_budgets(found(oracle, *each))[-1] for each in enumerate(long)])
    return {
        "oracle": name,
        "evaluations": float(counts.mean()),
        "tenth": float(np.quantile(counts, 0.1)),
        "ninetieth": float(np.quantile(counts, 0.9)),
        "share": float(gains.mean() / most.mean()) if most.any() else None,
    }


def half_hopeless(prompts: int, seed: int) -> Oracle:
    """Draw an oracle in which nothing can be gained on every other prompt."""
    oracle = draw("shared", 28, prompts, seed)
    effect = oracle.effect.copy()
    effect[::2] = -np.abs(effect[::2]) - 0.02
    return replace(oracle, effect=effect)


def learning(table: Table | None, options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the prior and stopping early save."""
    seed, prompts = options.seed, options.prompts * options.draws
    oracles: dict[str, Oracle] = {
        "shared, L = 28": draw("shared", 28, prompts, seed),
        "additive, L = 28": draw("additive", 28, prompts, seed),
        "nothing to gain on half of the prompts": half_hopeless(prompts, seed),
        "nothing to gain": draw("nothing", 28, prompts, seed),
        "few can be skipped": draw("few", 28, prompts, seed),
    }
    if table is not None:
        oracles["replay"] = Replay.of(table)
    equal = {
        name: saved(oracle, seed)
        for name, oracle in oracles.items()
        if name.startswith(("shared", "additive", "replay"))
    }
    return {
        "saved": equal,
        "stopped": [stopped(name, oracle, seed) for name, oracle in oracles.items()],
    }


def show_learning(figures: dict[str, Any]) -> None:
    print("Evaluations with the prior for the regret that the flat prior has after\n")
    print(f"| oracle | {' | '.join(map(str, BUDGETS))} |")
    print(f"|---|{'---:|' * len(BUDGETS)}")
    for name, pairs in figures["saved"].items():
        cells = [f"> {max(BUDGETS)}" if needed is None else str(needed) for _, needed in pairs]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\nLabels at {LABELS}\n")
    print("| oracle | evaluations, mean | 10 % | 90 % | share of the gain of 240 |")
    print("|---|---:|---:|---:|---:|")
    for row in figures["stopped"]:
        print(
            f"| {row['oracle']} | {row['evaluations']:.1f} | {row['tenth']:.0f} | {row['ninetieth']:.0f} "
            f"| {'nothing' if row['share'] is None else format(row['share'], '.3f')} |"
        )


def columns_of(options: argparse.Namespace) -> list[tuple[str, int]]:
    if options.quick:
        return [("shared", 12), ("noisy", 12)]
    wanted = [
        (kind, layers) for kind in KINDS for layers in LAYERS if layers <= MOST_LAYERS.get(kind, 32)
    ]
    return [*wanted, ("few", 28)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="first of the seeds")
    parser.add_argument("--draws", type=int, default=3, help="draws of the shared effects")
    parser.add_argument("--prompts", type=int, default=12, help="prompts for each draw")
    parser.add_argument(
        "--table", type=Path, help="folder of the table to replay; by default that in the cache"
    )
    parser.add_argument("--make-table", action="store_true", help="score the table, and end")
    parser.add_argument(
        "--also",
        type=other_settings,
        action="append",
        default=[],
        metavar="NAME=NUMBER,...",
        help="the forest with these settings too, compared with ours; may be given more than once",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help="a small run that only shows that the bench works"
    )
    options = parser.parse_args()
    if options.make_table:
        make_table(options.table or default_folder())
        return
    if options.quick:
        options.draws, options.prompts = 1, 3
    path = options.table or (None if options.quick else default_folder())
    if options.table is not None and not options.table.exists():
        parser.error(f"there is no table {options.table}")
    table = Table.load(path) if path is not None and path.exists() else None
    others = dict(options.also)
    methods = METHODS | others
    columns = []
    for kind, layers in columns_of(options):
        columns.append(synthetic(kind, layers, options, methods))
        print(shown(columns[-1]), flush=True)
    if table is not None:
        columns.append(measured(Replay.of(table), "replay", options.seed, methods))
        print(shown(columns[-1]), flush=True)
    elif not options.quick:
        sys.stderr.write(f"no replay: there is no table {path}; make it with --make-table\n")
    for other in others:
        print(verdicts(columns, other), flush=True)
    figures = learning(table, options)
    show_learning(figures)
    report = {
        "dynadepth": dynadepth.__version__,
        "numpy": np.__version__,
        "seed": options.seed,
        "draws": options.draws,
        "prompts": options.prompts,
        "settings": SearchConfig().to_dict(),
        "ours": OURS,
        "table": None if table is None else table.made_of,
        "columns": [
            {
                "column": column.title,
                "prompts": len(column.achievable),
                "proved": column.proved,
                "achievable": float(column.achievable.mean()),
            }
            for column in columns
        ],
        "rows": [row for column in columns for row in rows_of(column)],
        "learning": figures,
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
