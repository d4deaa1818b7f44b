"""Outcomes of plans on prompts, kept on disk by prompt and plan: what was scored is never scored again.

Owns the file `outcomes.jsonl` of an evaluation. Its first line says what else the outcomes depend on; every other line
holds the outcomes of one prompt under some plans, and a prompt has as many lines as there were runs that had new plans
for it.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dynadepth.errors import LabelError
from dynadepth.files import check_schema_version, sha256_text, write_bytes_atomic
from dynadepth.plans import Plans, plan_text
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.evaluation.outcome_work import (
    OutcomeJob,
    OutcomeWork,
    outcome_conditions,
    score_outcomes,
)
from dynadepth_search.files.journal import Journal, read_journal
from dynadepth_search.files.stored import Stored
from dynadepth_search.runners.work import Loaded, Runner
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.storage.compatibility import check_asked

__all__ = ["METRICS", "SCHEMA_VERSION", "OutcomeCache", "Table"]

# Metrics of a pair of prompt and plan. `reward` and `accuracy` are missing if there are no right
# answers.
METRICS = ("reward", "preserve", "agreement", "accuracy")
SCHEMA_VERSION = 2
_UNGRADED = ("preserve", "agreement")
_ADVICE = "remove that line and evaluate again; only its outcomes are scored again"

Floats = npt.NDArray[np.float64]
# Figures of a prompt's plans, by the plan's digits and in the order of the task's metrics.
_Known = dict[str, tuple[float, ...]]
# Figures of a prompt under some plans, by metric.
Outcomes = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Table:
    """Outcomes of sets of plans on the prompts of a task.

    Args:
        rows: The row of each set of plans, by its name.
        values: The values of each metric that the task has. Shape (sets, prompts) each, float64.
    """

    rows: dict[str, int]
    values: dict[str, Floats]

    def of(self, name: str) -> dict[str, Floats]:
        """Return the metrics of one set of plans. Shape (prompts,) each, float64."""
        return {metric: values[self.rows[name]] for metric, values in self.values.items()}


class OutcomeCache:
    """Outcomes on the prompts of a task; hold the lock of the file's folder while there is one.

    In the end the lines of the task's prompts stand in the order of the task, the first line of each before the second
    of any, in whatever order they were scored.

    What the file knows is taken from it, bit for bit; the plans that are new for a prompt are scored together and
    appended when the prompt is done. A prompt's outcomes depend on the prompt, its plans and `outcome_conditions`, and
    not on the other prompts, their order, or where an earlier run was killed. Which plans of a prompt were scored in
    one run can move the last bits of their outcomes, since they share a sweep.

    Args:
        scorer: The scorer of the base model.
        task: The prompts.
        path: Where the outcomes are kept; nothing is written before something is scored.
        runner: Who scores; its workers load what `loaded` is. None: this process, with `scorer`.
        loaded: What the workers of the runner load; the shortcuts are left out if the scorer has none. None: what the
            scorer has.

    Raises:
        LabelError: The file is damaged, or of another model, dtype or kind of task.
    """

    def __init__(
        self,
        scorer: Scorer,
        task: Task,
        path: Path,
        *,
        runner: Runner | None = None,
        loaded: Loaded | None = None,
    ) -> None:
        self._scorer, self._task, self._path = scorer, task, path
        self._runner = runner
        self._loaded = loaded or Loaded(scorer.model, scorer.tokenizer, scorer.shortcuts)
        self._metrics = METRICS if task.kind != "prompt" else _UNGRADED
        self._conditions = outcome_conditions(scorer, task.kind)
        # Whose outcomes each line of the file is, after the first one.
        self._lines: list[str] = []
        self._known, self._length = _read(path, self._conditions, self._metrics, self._lines)
        self._journal: Journal | None = None

    def score(self, sets: Mapping[str, Plans], *, progress: Callable[[int, int], None]) -> Table:
        """Return the outcomes of sets of plans on every prompt; what is not known is scored.

        Args:
            sets: One plan for each prompt, by name. Shape (prompts, num_layers) each, uint8.
            progress: Called with the prompts that are done and all of them.

        Raises:
            SearchError: A reward is not a finite number.
        """
        examples = self._task.examples
        wanted = [
            [plan_text(plan) for plan in plans] for plans in np.stack(list(sets.values()), axis=1)
        ]
        keys = [_key(self._scorer, example) for example in examples]
        known = [self._known.setdefault(key, {}) for key in keys]
        # Equal plans of a prompt are scored once.
        missing = {
            number: new
            for number, plans in enumerate(wanted)
            if (new := sorted(set(plans).difference(known[number])))
        }
        total = len(examples)
        if missing:
            self._open()
        progress(total - len(missing), total)
        for done, (number, outcomes) in enumerate(
            self._score(missing), start=total - len(missing) + 1
        ):
            plans = missing[number]
            self._open().append({"example": keys[number], "plans": plans, **outcomes})
            self._lines.append(keys[number])
            figures = zip(*outcomes.values(), strict=True)
            known[number].update(zip(plans, figures, strict=True))
            progress(done, total)
        self._put_in_order(keys)
        values = np.array(
            [
                [figures_of[plan] for plan in plans]
                for figures_of, plans in zip(known, wanted, strict=True)
            ],
            dtype=np.float64,
        )
        return Table(
            rows={name: row for row, name in enumerate(sets)},
            values={metric: values[:, :, column].T for column, metric in enumerate(self._metrics)},
        )

    def _score(self, missing: Mapping[int, list[str]]) -> Iterator[tuple[int, Outcomes]]:
        """Yield the outcomes of prompts under the plans that are new for them, by the numbers of the prompts."""
        examples, scorer, metrics = self._task.examples, self._scorer, self._metrics
        if self._runner is None:
            for number, plans in missing.items():
                yield number, score_outcomes(scorer, examples[number], plans, metrics)
            return
        work = OutcomeWork(
            self._task.scoring,
            self._task.chat,
            metrics,
            self._conditions,
            plain=scorer.shortcuts is None,
        )
        jobs = ((number, OutcomeJob(examples[number], plans)) for number, plans in missing.items())
        yield from self._runner.run(work, jobs, self._loaded)

    def _put_in_order(self, keys: list[str]) -> None:
        """Write the file again if its lines are not in the order that they are to have."""
        place = {key: number for number, key in enumerate(keys)}
        before: Counter[str] = Counter()
        ranks = []
        for key in self._lines:
            # Lines of prompts that are not in the task come first and stay as they are.
            ranks.append((before[key], place[key]) if key in place else (-1, 0))
            before[key] += 1
        order = sorted(range(len(ranks)), key=ranks.__getitem__)
        if order != list(range(len(ranks))):
            # What follows the last line feed is a torn line, which is dropped.
            first, *lines = [line + b"\n" for line in self._path.read_bytes().split(b"\n")[:-1]]
            lines = lines[: len(order)]
            self._lines = [self._lines[number] for number in order]
            write_bytes_atomic(self._path, first + b"".join(lines[number] for number in order))

    def _open(self) -> Journal:
        """Return the file, to be added to; its torn end is cut off, and a new one gets its first line."""
        if self._journal is None:
            self._journal = Journal(self._path, self._length)
            if not self._length:
                self._journal.append(
                    {"schema_version": SCHEMA_VERSION, "conditions": self._conditions}
                )
        return self._journal


def _key(scorer: Scorer, example: Example) -> str:
    """Return what names an example in the file: a hash of its tokens, and of what it is judged by.

    So the tokenizer, a chat template and the way of scoring need no mention elsewhere.
    """
    encoded = scorer.encode(example)
    tokens = [*encoded.rows, encoded.entry_place, encoded.entry_token, encoded.divisors]
    judged = [example.prompt, example.choices, example.answer, example.completion]
    content = [*judged, *(each.tolist() for each in tokens)]
    return sha256_text(json.dumps(content))[:16]


def _read(
    path: Path, asked: dict[str, Any], metrics: tuple[str, ...], examples: list[str]
) -> tuple[dict[str, _Known], int]:
    """Return what the file knows of each example, and how many bytes of it are whole lines.

    The name of each line's example is added to `examples`.
    """
    known: dict[str, _Known] = {}
    conditions: list[dict[str, Any]] = []

    def check(line: Stored) -> None:
        if conditions:
            _read_line(line, known, metrics, asked["num_layers"])
            examples.append(line.value["example"])
        else:
            conditions.append(_read_header(line, path))
            check_asked(path, asked, conditions[0])

    _, length = read_journal(path, check, advice=_ADVICE)
    return known, length


def _read_header(line: Stored, path: Path) -> dict[str, Any]:
    advice = "delete the file and evaluate again"
    if set(line.value) == {"spec"}:
        raise LabelError(
            f"{path} was written by an older dynadepth, whose outcomes cannot be added to: {advice}"
        )
    if "schema_version" in line.value:
        check_schema_version(
            line.value, SCHEMA_VERSION, name=str(path), error=LabelError, make_again=advice
        )
    header = Stored(line.value, line.where, advice)
    stored = header.fields(["schema_version", "conditions"])["conditions"]
    stored.mapping()
    conditions: dict[str, Any] = stored.value
    return conditions


def _read_line(
    line: Stored, known: dict[str, _Known], metrics: tuple[str, ...], num_layers: int
) -> None:
    """Add the outcomes of a line to what is known."""
    found = line.fields(["example", "plans", *metrics])
    of_prompt = known.setdefault(found["example"].hexadecimal(16), {})
    plans = found["plans"].plans(num_layers, least=1)
    if twice := [plan for plan in plans if plan in of_prompt]:
        line.damaged(
            f"it has plan {twice[0]} of example {line.value['example']}, which an earlier line has"
        )
    columns = []
    for metric in metrics:
        if metric in ("agreement", "accuracy"):
            columns.append([float(item.whole(0, 1)) for item in found[metric].entries(len(plans))])
        else:
            # Both are logarithms of probabilities, but for rounding.
            columns.append(found[metric].numbers(len(plans), highest=1e-6))
    of_prompt.update(zip(plans, zip(*columns, strict=True), strict=True))
