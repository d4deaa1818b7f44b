"""A menu policy on a real model and held-out prompts, against the best mixtures of static plans of equal depth: one
for all prompts, and one for each kind of prompts, which shows how much is gained by more than telling kinds apart.

    python benches/python/bench_policy.py --model smollm2 --json smollm2.json (an hour; killed, it goes on)
    python benches/python/bench_policy.py --model qwen --json qwen.json       (several hours)

All of it is done twice, with plans searched anew: a skipped layer leaves nothing behind, and it leaves a shortcut that
was fitted on the training prompts. The last table compares the two at equal depth.

`qwen` is Qwen2.5-Coder-1.5B-Instruct on six sets of questions with lettered answers, as turns of a chat. `smollm2` and
`gemma` are small models on prompts of several kinds without answers, compared over the whole vocabulary; so is
`qwen-kinds`. Everything comes from packages; `--quick` is `smollm2` with few prompts and only shows that the bench
works.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dynadepth.evaluation.intervals import paired_difference
from dynadepth.evaluation.mixtures import concave_hull, mix_to_depth
from dynadepth.models.loading import load_model, load_tokenizer
from dynadepth.plans import Plans, plan_depth, plan_text
from dynadepth.shortcuts.maps import Shortcuts
from dynadepth.training.menu.fit import decision_layers
from dynadepth_search.data.chat_template import as_chat
from dynadepth_search.data.downloads import GEMMA3, QWEN_CODER, SMOLLM2, default_cache, fetch_model
from dynadepth_search.data.kinds import fetch_kinds, in_turns, shuffled
from dynadepth_search.data.questions import QUESTION_SETS, fetch_questions
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.evaluation.menu_outcomes import compare_menu, table_mix
from dynadepth_search.scoring.score_table import ScoreTable, score_prompts
from dynadepth_search.search.static import StaticSpec, search_static
from dynadepth_search.shortcuts.building import fit_shortcuts
from dynadepth_search.shortcuts.spec import ShortcutSpec
from dynadepth_search.training.menu_fit import fit_trained_menu

MODELS = {"qwen": QWEN_CODER, "qwen-kinds": QWEN_CODER, "smollm2": SMOLLM2, "gemma": GEMMA3}
WAYS = ("plain", "shortcuts")
BUDGETS = (0.964, 0.95, 0.929, 0.9, 0.88, 0.87, 0.85, 0.8)
# Long prompts cost time and tell little more.
LONGEST = 700
SYSTEM = "Answer with one letter."


def lettered(
    tokenizer: Any, cache: Path, train: int, heldout: int
) -> tuple[Task, Task, list[str], list[str]]:
    """Return questions of six sets, about equally many of each, and the set of each question."""
    parts: dict[str, list[Example]] = {}
    for name in QUESTION_SETS:
        found = [
            question.example()
            for question in fetch_questions(cache, name)
            if len(question.text) + sum(map(len, question.options)) <= LONGEST
        ]
        parts[name] = shuffled(found, len(parts))
    first, second = {}, {}
    for name, found in parts.items():
        first[name] = found[: train // len(parts)]
        second[name] = found[train // len(parts) :]
    return (
        *(
            _chat_task(tokenizer, title, part, count)
            for title, part, count in (("train", first, train), ("heldout", second, heldout))
        ),
        *(in_turns(part, count)[1] for part, count in ((first, train), (second, heldout))),
    )


def _chat_task(tokenizer: Any, title: str, parts: dict[str, list[Example]], count: int) -> Task:
    examples = tuple(in_turns(parts, count)[0])
    return as_chat(Task(f"six sets, {title}", examples, "letter"), tokenizer, system=SYSTEM)


def several_kinds(
    _tokenizer: Any, cache: Path, train: int, heldout: int
) -> tuple[Task, Task, list[str], list[str]]:
    """Return prompts without answers: questions, passages to go on with, instructions."""
    first, second = fetch_kinds(cache, train=train, heldout=heldout)
    return first.task, second.task, list(first.kinds), list(second.kinds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="smollm2")
    parser.add_argument("--train", type=int, default=1200)
    parser.add_argument("--heldout", type=int, default=2000)
    parser.add_argument("--from-layer", type=int, help="no plan edits a layer before this one")
    parser.add_argument("--min-depth", type=float, default=0.7)
    parser.add_argument("--candidates", type=int, default=16, help="layers that plans may skip")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--rank", help="of the shortcuts [default: an eighth of the width]")
    parser.add_argument("--distil", type=int, default=0, help="steps of the second stage")
    parser.add_argument("--fit", type=int, help="prompts to fit shortcuts on [default: all]")
    parser.add_argument("--size", type=int, default=20, help="plans on the menu")
    parser.add_argument(
        "--out", type=Path, help="folder of the run [default: runs/bench-policy/MODEL]"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stop-after", choices=["search", "train", "heldout"])
    parser.add_argument(
        "--quick", action="store_true", help="a small run that only shows that the bench works"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path("runs/bench-policy") / options.model
        if options.quick:
            folder, options.model = Path(scratch), "smollm2"
            options.train, options.heldout, options.min_depth, options.size = 66, 24, 0.9, 4
        report = run(options, folder)
    if options.json and report is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


_Pair = tuple[ScoreTable, ScoreTable]


class Scored(NamedTuple):
    """Training and held-out prompts under the plans that a search found, and those of them that are on the menu."""

    tables: _Pair
    menu: Plans


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    cache, started = default_cache(), time.perf_counter()
    source = str(fetch_model(cache, source=MODELS[options.model]))
    model, tokenizer = load_model(source, dtype="fast"), load_tokenizer(source)
    material = lettered if options.model == "qwen" else several_kinds
    train, heldout, *kinds = material(tokenizer, cache, options.train, options.heldout)
    tables: dict[str, _Pair] = {}
    report: dict[str, Any] = {"model": source, "ways": {}}
    for way in options.ways:
        place, maps = folder / way, None
        if way == "shortcuts":
            fitted_on = replace(train, examples=train.examples[: options.fit])
            rank = int(options.rank) if (options.rank or "").isdecimal() else options.rank
            spec = ShortcutSpec(rank=rank, distil_steps=options.distil)
            if options.quick:
                spec = ShortcutSpec(new_tokens=8, num_heldout=4, ridges=(1e-3,))
            maps = fit_shortcuts(model, tokenizer, fitted_on, place / "maps", spec, progress=say)
        found = scored(options, model, tokenizer, (train, heldout), place, maps)
        if found is None:
            return None
        tables[way] = found.tables
        report["ways"][way] = compare(found, tokenizer, *kinds, shortcuts=maps)
    if set(tables) == set(WAYS):
        report["static"] = compare_static(tables["plain"], tables["shortcuts"])
    report["seconds"] = round(time.perf_counter() - started, 1)
    show(report)
    return report


def scored(
    options: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    tasks: tuple[Task, Task],
    folder: Path,
    maps: Shortcuts | None,
) -> Scored | None:
    """Search plans anew, and score both tasks under the menu and the plans that are best for all prompts."""
    from_layer = options.from_layer
    if from_layer is None:
        from_layer = 20 if options.model == "qwen" else 0
    spec = StaticSpec(
        from_layer=from_layer,
        min_depth=options.min_depth,
        size=options.size,
        beam=8,
        num_candidates=options.candidates,
        num_confirmed=150,
    )
    if options.quick:
        spec = StaticSpec(
            min_depth=0.9, size=4, beam=2, num_candidates=3, num_prompts=6, num_screened=2
        )
    found = search_static(
        model, tokenizer, tasks[0], folder / "plans", spec, shortcuts=maps, progress=say
    )
    missing = [
        found.pool[row]
        for row in opponents(plan_depth(found.pool), found.pool_values)
        if not (found.menu == found.pool[row]).all(axis=1).any()
    ]
    plans = np.concatenate(
        [found.menu, np.array(missing, dtype=np.uint8).reshape(-1, found.menu.shape[1])]
    )
    for plan in plans:
        say(f"{plan_text(plan)} {float(plan_depth(plan)):.3f}", 1, 1)
    if options.stop_after == "search":
        return None
    tables = []
    for name, task in zip(("train", "heldout"), tasks, strict=True):
        tables.append(
            score_prompts(
                model,
                tokenizer,
                task,
                plans,
                folder / name,
                layers=decision_layers(found.menu),
                shortcuts=maps,
                progress=say,
            )
        )
        if options.stop_after == name:
            return None
    return Scored((tables[0], tables[1]), found.menu)


def opponents(depths: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> list[int]:
    """Return the plans that static mixtures are made of, and the best single plan within each budget."""
    single = {
        int(np.argmax(np.where(depths <= budget + 1e-9, values, -np.inf)))
        for budget in BUDGETS
        if depths.min() <= budget + 1e-9
    }
    return sorted(single.union(concave_hull(depths, values).tolist()))


def compare_static(plain: _Pair, mapped: _Pair) -> list[dict[str, Any]]:
    """Compare static plans of the same depth on held-out prompts, all chosen on the training prompts.

    Of each way, the best mixture, and the best plan that all prompts share, which is what runs where nothing is planned
    by prompt.
    """
    rows = []
    lowest = max(float(plan_depth(heldout.plans).min()) for _, heldout in (plain, mapped))
    for budget in (each for each in BUDGETS if each >= lowest - 1e-9):
        row: dict[str, Any] = {"budget": budget}
        for name, sign, factor in (("agreement", 1.0, 100.0), ("divergence", -1.0, 1.0)):
            mixtures, single = [], []
            for train, heldout in (plain, mapped):
                depths = plan_depth(heldout.plans)
                known = sign * getattr(train, name).mean(axis=0)
                values = factor * getattr(heldout, name)
                mixtures.append(mix_to_depth(depths, known, budget).expected(values.T))
                allowed = np.where(depths <= budget + 1e-9, known, -np.inf)
                single.append(values[:, int(np.argmax(allowed))])
            row[name] = {"mixture": _against(*mixtures), "one plan": _against(*single)}
        rows.append(row)
    return rows


def _against(plain: npt.NDArray[np.float64], mapped: npt.NDArray[np.float64]) -> dict[str, Any]:
    return {
        "plain": float(plain.mean()),
        "shortcuts": float(mapped.mean()),
        "gain": paired_difference(mapped, plain).to_dict(),
    }


def compare(
    found: Scored,
    tokenizer: Any,
    train_kinds: list[str],
    heldout_kinds: list[str],
    *,
    shortcuts: Shortcuts | None,
) -> dict[str, Any]:
    """Train menus on more and more prompts, and compare the last with static plans on held-out prompts."""
    train, heldout = found.tables
    counts = [count for count in (len(train) // part for part in (8, 4, 2, 1)) if count >= 40]
    mix, curve = table_mix(heldout, tokenizer), []
    for count in counts:
        part = train.take(np.arange(count))
        trained = fit_trained_menu(part, plans=found.menu, shortcuts=shortcuts, progress=say)
        kinds = (train_kinds[:count], heldout_kinds)
        rows = compare_menu(trained, part, heldout, BUDGETS, mix=mix, kinds=kinds)
        curve.append({"prompts": count, "recipe": trained.training["recipe"], "rows": rows})
    return {
        "train_prompts": len(train),
        "heldout_prompts": len(heldout),
        "kinds": dict(Counter(heldout_kinds)),
        "plans": [plan_text(plan) for plan in trained.menu.plans],
        "range": list(trained.calibration.range),
        "recipe": trained.training["recipe"],
        "trials": trained.training["trials"],
        "base_accuracy": float(100 * heldout.correct[:, 0].mean()) if heldout.graded else None,
        "rows": curve[-1]["rows"],
        "learning_curve": curve,
    }


def show(report: dict[str, Any]) -> None:
    lines = []
    for way, found in report["ways"].items():
        lines += ["", f"## {way}", "", *_way_lines(found)]
    for form in ("mixture", "one plan") if "static" in report else ():
        lines += [
            "",
            f"## static, {form}: with shortcuts over plain at equal depth",
            "",
            "| depth | agreement, plain | shortcuts | gain [95 %] | divergence, plain | shortcuts | ratio |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in report["static"]:
            agreement, divergence = row["agreement"][form], row["divergence"][form]
            ratio = divergence["shortcuts"] / divergence["plain"]
            lines.append(
                f"| {row['budget']:.3f} | {agreement['plain']:.1f} | {agreement['shortcuts']:.1f} | "
                f"{_gain('agreement', agreement['gain'])} | {divergence['plain']:.3f} | "
                f"{divergence['shortcuts']:.3f} | {ratio:.2f} |"
            )
    sys.stdout.write("\n".join(lines) + "\n")


def _way_lines(report: dict[str, Any]) -> list[str]:
    lines = [
        f"{report['train_prompts']} prompts to train, {report['heldout_prompts']} held out, "
        f"{len(report['plans'])} plans, base accuracy {report['base_accuracy']}; recipe {report['recipe']}",
        "| budget | depth | figure | static | policy | gain [95 %] | gain over a mixture for each kind | identity |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['budget']:.3f} | {row['depth']:.3f} | {name} | {_number(name, row[name]['static'])} | "
        f"{_number(name, row[name]['policy']['mean'])} | {_gain(name, row[name]['gain'])} | "
        f"{_gain(name, row[name]['gain by kind'])} | {row['identity rate']:.0%} |"
        for row in report["rows"]
        for name in ("agreement", "accuracy", "total variation", "divergence")
        if name in row
    ]
    lines += [
        "",
        "| prompts | " + " | ".join(f"{row['budget']:.3f}" for row in report["rows"]) + " |",
    ]
    lines.append("|---" * (1 + len(report["rows"])) + "|")
    for point in report["learning_curve"]:
        gains = [_gain("agreement", row["agreement"]["gain"]) for row in point["rows"]]
        lines.append(f"| {point['prompts']} | {' | '.join(gains)} |")
    return lines


def _number(name: str, value: float) -> str:
    return f"{value:.1f}" if name in ("agreement", "accuracy") else f"{value:.4f}"


def _gain(name: str, gain: dict[str, float]) -> str:
    digits = 1 if name in ("agreement", "accuracy") else 4
    return f"{gain['mean']:+.{digits}f} [{gain['low']:+.{digits}f}, {gain['high']:+.{digits}f}]"


def say(stage: str, done: int, total: int) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {stage} {done}/{total}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
