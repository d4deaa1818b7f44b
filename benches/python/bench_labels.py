"""What labels are worth: their price, how many of their fixes are luck, and what confirmation takes out of it.

The plan of each prompt is searched with the objective `reward`, and again with the answers shuffled between the prompts
(`dynadepth search null`). Then raw and confirmed labels are judged on forms of the prompts that neither the search nor
the confirmation saw: with letter scoring the orders of the choices that are left, with raw scoring a third wording. All
of it goes on when it was killed.

ASDiv has word problems in place of choices: labels are confirmed by generated answers, and accuracy is that of
generated answers too.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dynadepth.evaluation.intervals import mean_interval, paired_difference
from dynadepth.models.loading import load_model, load_tokenizer
from dynadepth.plans import identity_plan
from dynadepth_search.data.downloads import SMOLLM2, default_cache, fetch_model
from dynadepth_search.data.kinds import shuffled
from dynadepth_search.data.questions import QUESTION_SETS, fetch_questions, fetch_word_problems
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.data.variants import in_other_orders, in_other_words
from dynadepth_search.scoring.generating import judge_answers
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.search.null_control import search_null
from dynadepth_search.search.null_files import luck_text
from dynadepth_search.search.per_prompt import search_prompts
from dynadepth_search.search.per_prompt_spec import PromptSearchSpec
from dynadepth_search.storage.answer_counts import answer_counts
from dynadepth_search.storage.labels import Labels, read_labels

# Long prompts cost time and tell little more.
LONGEST = 700
PROBLEMS = "ASDiv"
_SPEC = PromptSearchSpec()
THIRD_WORDING = "Here is a question.\n{prompt}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder or Hub id [default: SmolLM2-135M-Instruct]")
    parser.add_argument(
        "--set", choices=sorted([*QUESTION_SETS, PROBLEMS]), default="CommonsenseQA"
    )
    parser.add_argument("--scoring", choices=["letter", "raw"], default="letter")
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--evaluations", type=int, default=40)
    parser.add_argument("--depth-penalty", type=float, help="[default: chosen by the probe]")
    parser.add_argument("--confirm", type=int, default=_SPEC.confirm)
    parser.add_argument(
        "--new-tokens", type=int, default=64, help="the most tokens of an answer, for ASDiv"
    )
    parser.add_argument("--variants", type=int, default=_SPEC.variants)
    parser.add_argument(
        "--out", type=Path, help="folder of the run [default: runs/bench-labels/SCORING, or SET]"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help="a small run that only shows that the bench works"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.set == PROBLEMS:
            options.scoring = "raw"
        name = options.set if options.set == PROBLEMS else options.scoring
        folder = options.out or Path("runs/bench-labels") / name
        if options.quick:
            folder, options.prompts, options.evaluations = Path(scratch), 4, 4
            options.new_tokens = 8
        report = run(options, folder)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    cache = default_cache()
    source = options.model or str(fetch_model(cache, source=SMOLLM2))
    model, tokenizer = load_model(source, dtype="fast"), load_tokenizer(source)
    task, spec = questions(options, cache), settings(options)
    summary = search_prompts(model, tokenizer, task, folder / "labels", spec, progress=say)
    control = search_null(model, tokenizer, folder / "labels", folder / "null", progress=say)
    labels = read_labels(folder / "labels", model=model)
    scorer = Scorer(model, tokenizer, task.scoring)
    report = {
        "model": source,
        "set": options.set,
        "scoring": options.scoring,
        "prompts": len(labels),
        "evaluations_per_label": labels.evaluations,
        "confirmations_per_label": labels.confirmations,
        "sharing_factor": summary.sharing_factor if summary.executed_visits else None,
        "depth_penalty": labels.manifest.depth_penalty,
        "identity_rate": labels.identity_rate,
        "kept_rate": labels.kept_rate,
        "mean_depth": float(labels.depths.mean()),
        "control": control.to_dict(),
        "luck": {kind: luck_text(control.to_dict(), kind) for kind in ("raw", "confirmed")},
        "answers": {
            name: answer_counts(read_labels(folder / name, model=model))
            for name in (("labels", "null") if labels.manifest.generates else ())
        },
        "unseen": judge(scorer, labels, options),
        "seconds": round(time.perf_counter() - started, 1),
    }
    show(report)
    return report


def questions(options: argparse.Namespace, cache: Path) -> Task:
    lettered = options.scoring == "letter"
    if options.set == PROBLEMS:
        found = [item for item in fetch_word_problems(cache) if len(item.prompt) <= LONGEST]
    else:
        found = [
            question.example() if lettered else question.raw_example()
            for question in fetch_questions(cache, options.set)
            if len(question.text) + sum(map(len, question.options)) <= LONGEST
        ]
    examples = tuple(shuffled(found, 0)[: options.prompts])
    return Task(options.set, examples, options.scoring)


def settings(options: argparse.Namespace) -> PromptSearchSpec:
    config = replace(
        _SPEC.config,
        max_evaluations=options.evaluations,
        probe_trees=1 if options.quick else _SPEC.config.probe_trees,
    )
    return replace(
        _SPEC,
        config=config,
        objective="reward",
        depth_penalty=options.depth_penalty,
        confirm=options.confirm,
        variants=options.variants,
        new_tokens=options.new_tokens,
    )


def unseen(example: Example, options: argparse.Namespace) -> list[Example]:
    """Return the forms of a prompt that judge its labels."""
    if options.scoring == "raw":
        return [in_other_words(example, THIRD_WORDING)]
    size = len(example.choices or ())
    seen = in_other_orders(example, options.variants) if options.confirm else ()
    return [item for item in in_other_orders(example, size - 1) if item not in seen]


def judge(scorer: Scorer, labels: Labels, options: argparse.Namespace) -> dict[str, Any]:
    """Score base, raw and confirmed labels on forms of the prompts that took no part."""
    penalty = labels.manifest.depth_penalty
    base = identity_plan(scorer.num_layers)
    generated = generated_answers(scorer, labels, options)
    rows = []
    for index, example in enumerate(labels.examples):
        say("judging", index, len(labels))
        forms = unseen(example, options)
        if not forms:
            continue
        plans = np.stack([base, labels.raw_plans[index], labels.plans[index]])
        scorer.forget()
        found = scorer.outcomes(
            forms, np.tile(plans, (len(forms), 1)), np.repeat(np.arange(len(forms)), len(plans))
        )
        prices = penalty * plans.sum(axis=1) / scorer.num_layers
        values = found.reward.reshape(len(forms), -1).mean(axis=0) - prices
        correct = found.correct.reshape(len(forms), -1) if generated is None else generated[index]
        rows.append([*values, *correct.mean(axis=0)])
    say("judging", len(labels), len(labels))
    if not rows:
        return {}
    table = np.array(rows)
    result: dict[str, Any] = {"prompts": len(table)}
    for first, name in ((0, "value"), (3, "accuracy")):
        kept, raw, confirmed = table[:, first : first + 3].T
        result[name] = {
            "base": float(kept.mean()),
            "raw": paired_difference(raw, kept).to_dict(),
            "confirmed": paired_difference(confirmed, kept).to_dict(),
            "confirmed over raw": paired_difference(confirmed, raw).to_dict(),
            "raw is worse": mean_interval(raw < kept - 1e-9).to_dict(),
            "confirmed is worse": mean_interval(confirmed < kept - 1e-9).to_dict(),
        }
    return result


def generated_answers(
    scorer: Scorer, labels: Labels, options: argparse.Namespace
) -> np.ndarray | None:
    """Return whether base, raw label and label answer each form right, shape (prompts, 1, 3); None: no task for it."""
    if not labels.manifest.generates:
        return None
    forms = [form for example in labels.examples for form in unseen(example, options)]
    base = np.broadcast_to(identity_plan(scorer.num_layers), labels.plans.shape)
    plans = np.stack([base, labels.raw_plans, labels.plans], axis=1)
    say("answering", 0, len(forms))
    right = judge_answers(
        scorer,
        forms,
        plans.reshape(3 * len(forms), -1),
        np.repeat(np.arange(len(forms)), 3),
        new_tokens=options.new_tokens,
    )[1]
    return np.array(right).reshape(len(forms), 1, 3)


def show(report: dict[str, Any]) -> None:
    real = report["control"]["real"]
    lines = [
        f"{report['prompts']} prompts of {report['set']}, {report['scoring']} scoring; base answers wrong: "
        f"{real['base_wrong']}; {report['evaluations_per_label']:.1f} evaluations for a label and "
        f"{report['confirmations_per_label']:.1f} to confirm it; lambda {report['depth_penalty']:.3f}; "
        f"identity {report['identity_rate']:.0%}, label as searched {report['kept_rate']:.0%}; {report['seconds']} s",
        *(f"{kind} labels: {text}" for kind, text in report["luck"].items()),
    ]
    for name, found in report["answers"].items():
        lines.append(
            f"generated answers, {name}: {found['answered_prompts']} prompts answered; right: base "
            f"{found['base_right']}, raw labels {found['raw_right']}, labels {found['labels_right']}; fixes of the "
            f"screen {found['fixes_found']}, confirmed {found['fixes_confirmed']}; losses avoided "
            f"{found['losses_avoided']}"
        )
    if report["unseen"]:
        lines += [
            "",
            "| on unseen forms | base | raw - base [95 %] | worse | confirmed - base [95 %] | worse |",
            "|---|---:|---:|---:|---:|---:|",
        ]
    for name in ("value", "accuracy") if report["unseen"] else ():
        row = report["unseen"][name]
        lines.append(
            f"| {name} | {row['base']:.3f} | {gain(row['raw'])} | {row['raw is worse']['mean']:.0%} | "
            f"{gain(row['confirmed'])} | {row['confirmed is worse']['mean']:.0%} |"
        )
    sys.stdout.write("\n".join(lines) + "\n")


def gain(found: dict[str, float]) -> str:
    return f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def say(stage: str, done: int, total: int) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {stage} {done}/{total}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
