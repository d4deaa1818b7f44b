"""lm-evaluation-harness on SmolLM2: the stock model beside the same model wrapped, on choices and on generated answers.

    python benches/python/bench_harness.py --menu my-menu --exits my-exits --json harness.json

The tasks are PIQA as a multiple choice (likelihoods) and ASDiv as word problems whose answers are generated; both are
files that the harness reads, so no hub is needed. `--menu` and `--exits` are folders that `dynadepth train` wrote for
this model; each way to wrap it runs the harness' own procedure with the model `dynadepth`. Beside the task's metric
stands how often the answer is the stock model's: the option that it would choose, or the same text. `--quick` takes
four questions and a plan.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from dynadepth.models.loading import load_model, load_tokenizer
from dynadepth_search.data.downloads import SMOLLM2, default_cache, fetch_model
from dynadepth_search.data.questions import fetch_questions, fetch_word_problems
from dynadepth_search.harness.model import DynadepthLM

CHOICES = """
task: piqa_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
GENERATED = """
task: asdiv_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: solution
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: {new}, do_sample: false}}
filter_list:
  - name: last number
    filter:
      - {{function: regex, regex_pattern: "(-?[0-9.,]*[0-9])", group_select: -1}}
      - {{function: take_first}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
METRICS = {"piqa_local": "acc,none", "asdiv_local": "exact_match,last number"}


def write_tasks(folder: Path, count: int, new: int) -> None:
    """Write the tasks and their files."""
    choices = [each.raw_example() for each in fetch_questions(default_cache(), "PIQA")[:count]]
    problems = fetch_word_problems(default_cache())[:count]
    files = {
        "piqa": [
            {"prompt": each.prompt, "choices": list(each.choices or ()), "answer": each.answer}
            for each in choices
        ],
        "asdiv": [{"prompt": each.prompt, "solution": each.solution} for each in problems],
    }
    for (name, rows), text in zip(files.items(), (CHOICES, GENERATED), strict=True):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(text.format(file=path, new=new))


def answers_of(samples: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the answer of each sample: the likeliest option, or the text."""
    found = []
    for sample in sorted(samples, key=lambda each: int(each["doc_id"])):
        given = sample["resps"]
        likely = len(given) > 1
        found.append(
            int(np.argmax([float(each[0][0]) for each in given])) if likely else given[0][0]
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--menu", type=Path, help="routers folder of a menu")
    parser.add_argument("--exits", type=Path, help="routers folder of exits")
    parser.add_argument("--questions", type=int, default=60, help="of each task")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.questions, options.new_tokens = 4, 4
    source = str(fetch_model(default_cache(), source=SMOLLM2))
    model, tokenizer = load_model(source, dtype="fast"), load_tokenizer(source)
    ways: dict[str, dict[str, Any] | None] = {"stock `hf`": None}
    if options.menu is not None:
        ways |= {f"budget={each}": {"budget": each, "routers": options.menu} for each in (0.9, 0.8)}
    if options.exits is not None:
        ways |= {
            f"fidelity={each}": {"fidelity": each, "routers": options.exits}
            for each in (0.98, 0.95)
        }
    if len(ways) == 1:
        ways["plan=0-25+27-29"] = {"plan": "0-25+27-29"}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        write_tasks(Path(scratch), options.questions, options.new_tokens)
        tasks = TaskManager(include_path=scratch, include_defaults=False)
        stock: dict[str, list[Any]] = {}
        for name, how in ways.items():
            say(f"running {name}")
            rows += run(model, tokenizer, name, how, tasks, stock)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    lines = [
        "| task | model | questions | metric | ± | as the stock model's, % | depth | compute | passes | seconds |",
        "|---" * 10 + "|",
    ]
    lines += [
        f"| {row['task']} | {row['model']} | {row['questions']} | {row['metric']:.3f} | {row['error']:.3f} | "
        f"{100 * row['same']:.0f} | {row['depth']:.3f} | {row['compute']:.3f} | {row['passes'] or ''} | "
        f"{row['seconds']:.0f} |"
        for row in rows
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def run(
    model: Any,
    tokenizer: Any,
    name: str,
    how: Mapping[str, Any] | None,
    tasks: TaskManager,
    stock: dict[str, list[Any]],
) -> list[dict[str, Any]]:
    """Run both tasks one way; each by itself, so that what came of it is of this task alone."""
    from dynadepth import unwrap_model

    rows = []
    for task, metric in METRICS.items():
        given: dict[str, Any] = {"pretrained": model, "tokenizer": tokenizer, "batch_size": 4}
        lm = HFLM(**given) if how is None else DynadepthLM(**given, **how)
        begun = time.perf_counter()
        try:
            found = simple_evaluate(lm, tasks=[task], task_manager=tasks, log_samples=True)
        finally:
            if how is not None:
                unwrap_model(model)
        seconds = time.perf_counter() - begun
        answers = answers_of(found["samples"][task])
        own = stock.setdefault(task, answers)
        said = found["config"].get("dynadepth", {})
        rows.append(
            {
                "task": task,
                "model": name,
                "questions": len(answers),
                "metric": found["results"][task][metric],
                "error": found["results"][task][metric.replace(",", "_stderr,")],
                "same": float(np.mean([a == b for a, b in zip(answers, own, strict=True)])),
                "depth": said.get("depth", 1.0),
                "compute": said.get("compute", 1.0),
                "passes": None if said.get("passes") is None else round(said["passes"], 3),
                "fidelity": said.get("fidelity"),
                "seconds": seconds,
            }
        )
    return rows


def say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
