"""A menu policy on a real model and held-out prompts, against the best mixture of static plans of equal depth.

    python benches/python/bench_policy.py --model qwen --json qwen.json       (hours; killed, it goes on)
    python benches/python/bench_policy.py --model smollm2 --json smollm2.json

`qwen` is Qwen2.5-Coder-1.5B-Instruct on six sets of questions with lettered answers, as turns of a chat. `smollm2` and
`gemma` are small models on prompts of several kinds without answers, compared over the whole vocabulary. Everything
comes from packages; `--quick` is `smollm2` with few prompts and only shows that the bench works.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dynadepth.evaluation import mean_interval, mix_to_depth, paired_difference
from dynadepth.loading import load_model, load_tokenizer
from dynadepth.menu_training import MenuData, MenuFit, fit_menu, walk_budget
from dynadepth.plans import plan_depth, plan_text
from dynadepth_search.assets import GEMMA3, QWEN_CODER, SMOLLM2, default_cache, fetch_model
from dynadepth_search.chat import as_chat
from dynadepth_search.damage import DamageTable, score_damage
from dynadepth_search.questions import QUESTION_SETS, fetch_questions
from dynadepth_search.shared import SharedSpec, menu_data, search_shared
from dynadepth_search.tasks import Example, Task

MODELS = {"qwen": QWEN_CODER, "smollm2": SMOLLM2, "gemma": GEMMA3}
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
        parts[name] = _shuffled(found, len(parts))
    first, second = {}, {}
    for name, found in parts.items():
        first[name] = found[: train // len(parts)]
        second[name] = found[train // len(parts) :]
    return (
        *(
            _chat_task(tokenizer, title, part, count)
            for title, part, count in (("train", first, train), ("heldout", second, heldout))
        ),
        *(_interleaved(part, count)[1] for part, count in ((first, train), (second, heldout))),
    )


def _chat_task(tokenizer: Any, title: str, parts: dict[str, list[Example]], count: int) -> Task:
    examples = tuple(_interleaved(parts, count)[0])
    return as_chat(Task(f"six sets, {title}", examples, "letter"), tokenizer, system=SYSTEM)


def _shuffled(examples: list[Example], seed: int) -> list[Example]:
    return [examples[index] for index in np.random.default_rng(seed).permutation(len(examples))]


def _interleaved(parts: dict[str, list[Example]], count: int) -> tuple[list[Example], list[str]]:
    """Return examples of all parts in turns, so that an unfinished run has some of each."""
    longest = max(len(part) for part in parts.values())
    turns = [
        (part[index], name)
        for index in range(longest)
        for name, part in parts.items()
        if index < len(part)
    ][:count]
    return [example for example, _ in turns], [name for _, name in turns]


def several_kinds(
    _tokenizer: Any, cache: Path, train: int, heldout: int
) -> tuple[Task, Task, list[str], list[str]]:
    """Return prompts without answers: questions, passages to go on with, instructions."""
    questions = fetch_questions(cache, "CommonsenseQA")
    passages = fetch_questions(cache, "BoolQ")
    goals = fetch_questions(cache, "PIQA")
    rng = np.random.default_rng(0)
    parts = {
        "question": [f"Question: {each.text}\nAnswer:" for each in questions],
        "passage": [_beginning(each.text, rng) for each in passages],
        "instruction": [_instruction(each.text) for each in goals],
    }
    examples: dict[str, list[Example]] = {}
    for name, texts in parts.items():
        distinct = list(dict.fromkeys(text for text in texts if 20 <= len(text) <= LONGEST))
        examples[name] = _shuffled([Example(prompt=text) for text in distinct], len(examples))
    first = {name: part[: train // 3] for name, part in examples.items()}
    second = {name: part[train // 3 :] for name, part in examples.items()}
    made = []
    for title, part, count in (("train", first, train), ("heldout", second, heldout)):
        listed, names = _interleaved(part, count)
        made.append((Task(f"three kinds, {title}", tuple(listed)), names))
    return made[0][0], made[1][0], made[0][1], made[1][1]


def _beginning(passage: str, rng: np.random.Generator) -> str:
    """Cut a passage somewhere between words of its second half."""
    words = passage.rsplit("\n", 1)[0].split(" ")
    return " ".join(words[: int(rng.integers(len(words) // 2, len(words))) or 1])


def _instruction(goal: str) -> str:
    return f"Give step by step instructions for the following.\n{goal.rstrip('.?')}.\nSteps:\n1."


def depth_rows(
    fit: MenuFit,
    chosen_scores: list[np.ndarray],
    train: MenuData,
    table: DamageTable,
    columns: np.ndarray,
) -> list[dict[str, Any]]:
    """Return what the policy and the static mixture of its mean depth do on held-out prompts, for each budget."""
    plans, depths = fit.menu.plans, fit.menu.depths
    metrics = {
        "agreement": 100 * table.agreement[:, columns],
        "total variation": table.total_variation[:, columns],
    }
    if table.graded:
        metrics["accuracy"] = 100 * table.correct[:, columns]
        metrics["graded reward"] = table.reward[:, columns]
    static_quality = {
        "agreement": train.agreement.mean(axis=0),
        "total variation": -train.total_variation.mean(axis=0),
    }
    if train.reward is not None:
        # The accuracy's and the reward's own best static mixture, the harder opponent.
        static_quality["graded reward"] = static_quality["accuracy"] = train.reward.mean(axis=0)
    rows = []
    for budget in BUDGETS:
        if budget < depths.min() - 1e-9:
            continue
        low, high, share = penalties_for(fit, budget)
        # A prompt's hash, in place of a draw: uniform and fixed.
        mix = (np.arange(len(table)) * 0.6180339887498949) % 1.0
        rows_of = [
            walk_budget(chosen_scores, plans, fit.recipe.layers, penalty) for penalty in (low, high)
        ]
        choice = np.where(mix < share, rows_of[1], rows_of[0])
        depth = float(depths[choice].mean())
        row: dict[str, Any] = {"budget": budget, "depth": depth, "n": len(table)}
        row["identity rate"] = float((choice == 0).mean())
        row["different plans"] = len(np.unique(choice))
        for name, values in metrics.items():
            policy = values[np.arange(len(values)), choice]
            static = mix_to_depth(depths, static_quality[name], depth).expected(values.T)
            gain = paired_difference(policy, static)
            row[name] = {
                "static": float(static.mean()),
                "policy": mean_interval(policy).to_dict(),
                "gain": gain.to_dict(),
            }
        rows.append(row)
    return rows


def penalties_for(fit: MenuFit, budget: float) -> tuple[float, float, float]:
    """Return two penalties, and the share of prompts for the second, whose mean depth is the budget in training."""
    from dynadepth.menu_training import PENALTIES

    means = np.minimum.accumulate([fit.menu.depths[fit.choices(p)].mean() for p in PENALTIES])
    after = (
        int(np.argmax(means <= budget + 1e-12))
        if (means <= budget + 1e-12).any()
        else len(means) - 1
    )
    if after == 0:
        return float(PENALTIES[0]), float(PENALTIES[0]), 0.0
    high, low = means[after - 1], means[after]
    share = 0.0 if high == low else (budget - low) / (high - low)
    return float(PENALTIES[after]), float(PENALTIES[after - 1]), float(share)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="smollm2")
    parser.add_argument("--train", type=int, default=1200)
    parser.add_argument("--heldout", type=int, default=2000)
    parser.add_argument("--from-layer", type=int, help="no plan edits a layer before this one")
    parser.add_argument("--min-depth", type=float, default=0.8)
    parser.add_argument("--size", type=int, default=16, help="plans on the menu")
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


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    cache, started = default_cache(), time.perf_counter()
    source = str(fetch_model(cache, source=MODELS[options.model]))
    model, tokenizer = load_model(source), load_tokenizer(source)
    material = lettered if options.model == "qwen" else several_kinds
    train, heldout, _, kinds = material(tokenizer, cache, options.train, options.heldout)
    from_layer = options.from_layer
    if from_layer is None:
        from_layer = 20 if options.model == "qwen" else 0
    spec = SharedSpec(
        from_layer=from_layer,
        min_depth=options.min_depth,
        size=options.size,
        num_prompts=32,
        num_screened=12,
    )
    if options.quick:
        spec = SharedSpec(
            min_depth=0.9, size=4, beam=2, num_candidates=3, num_prompts=6, num_screened=2
        )
    found = search_shared(model, tokenizer, train, folder / "shared", spec, progress=say)
    for plan in found.menu:
        say(f"{plan_text(plan)} {float(plan_depth(plan)):.3f}", 1, 1)
    if options.stop_after == "search":
        return None
    first = int(np.flatnonzero((found.menu != 1).any(axis=0))[0])
    last = int(np.flatnonzero((found.menu != 1).any(axis=0))[-1])
    layers = sorted(
        {first // 2, 3 * first // 4, first, *range(first + 2, last, 2 if first > 9 else 4)}
    )
    tables = []
    for name, task in (("train", train), ("heldout", heldout)):
        tables.append(
            score_damage(
                model, tokenizer, task, found.menu, folder / name, layers=layers, progress=say
            )
        )
        if options.stop_after == name:
            return None
    data = menu_data(tables[0])
    fit = fit_menu(data, progress=lambda done, total: say("cross-validating", done, total))
    report = compare(fit, data, tables[1], kinds)
    report["model"], report["seconds"] = source, round(time.perf_counter() - started, 1)
    show(report)
    return report


def compare(fit: MenuFit, data: MenuData, table: DamageTable, kinds: list[str]) -> dict[str, Any]:
    """Score held-out prompts with the trained heads and compare."""
    scores = held_out_scores(fit, table)
    columns = np.arange(len(data.plans))
    return {
        "train_prompts": len(data.agreement),
        "heldout_prompts": len(table),
        "kinds": {name: kinds[: len(table)].count(name) for name in dict.fromkeys(kinds)},
        "plans": [plan_text(plan) for plan in data.plans],
        "recipe": fit.recipe.to_dict(),
        "trials": [trial.to_dict() for trial in fit.trials],
        "base_accuracy": float(100 * table.correct[:, 0].mean()) if table.graded else None,
        "rows": depth_rows(fit, scores, data, table, columns),
    }


def held_out_scores(fit: MenuFit, table: DamageTable) -> list[np.ndarray]:
    """Return what each head scores, every plan by the states under its own prefix."""
    import torch

    from dynadepth_search.states import prefix_numbers

    found = []
    for head in fit.menu.heads:
        numbers = prefix_numbers(fit.menu.plans, head.layer_idx)
        views = table.views[head.layer_idx][:, :, -head.num_views :].float()
        with torch.no_grad():
            every = torch.stack([head.scores(views[:, p]) for p in range(views.shape[1])], dim=1)
        found.append(every[:, numbers, np.arange(len(numbers))].double().numpy())
    return found


def show(report: dict[str, Any]) -> None:
    sys.stdout.write(
        f"{report['train_prompts']} prompts to train, {report['heldout_prompts']} held out, "
        f"{len(report['plans'])} plans; recipe {report['recipe']}\n"
    )
    for row in report["rows"]:
        line = f"{row['budget']:.3f} -> {row['depth']:.3f}"
        for name in ("agreement", "accuracy", "total variation"):
            if name in row:
                gain, digits = row[name]["gain"], 3 if name == "total variation" else 1
                line += (
                    f"  {name} static {row[name]['static']:.{digits}f} policy {row[name]['policy']['mean']:.{digits}f} "
                    f"gain {gain['mean']:+.{digits}f} [{gain['low']:+.{digits}f}, {gain['high']:+.{digits}f}]"
                )
        sys.stdout.write(line + "\n")


def say(stage: str, done: int, total: int) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {stage} {done}/{total}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
