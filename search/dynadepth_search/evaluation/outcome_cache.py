"""Outcomes of plans on prompts, kept on disk by prompt and plan: what was scored is never scored again.

Owns the file `outcomes.jsonl` of an evaluation. Its first line says what else the outcomes depend on; every other line
holds the outcomes of one prompt under some plans, and a prompt has as many lines as there were runs that had new plans
for it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dynadepth.errors import LabelError, SearchError
from dynadepth.files import check_schema_version, sha256_text
from dynadepth.models.fingerprint import fingerprint, fingerprint_digest
from dynadepth.plans import Plans, parse_plan, plan_text
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.files.journal import Journal, read_journal
from dynadepth_search.files.stored import Stored
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.storage.compatibility import check_asked, dtype_name, shortcut_fields

__all__ = ["METRICS", "SCHEMA_VERSION", "OutcomeCache", "Table", "outcome_conditions"]

# Metrics of a pair of prompt and plan. `reward` and `accuracy` are missing if there are no right
# answers.
METRICS = ("reward", "preserve", "agreement", "accuracy")
SCHEMA_VERSION = 2
_UNGRADED = ("preserve", "agreement")
_ADVICE = "remove that line and evaluate again; only its outcomes are scored again"

Floats = npt.NDArray[np.float64]
# Figures of a prompt's plans, by the plan's digits and in the order of the task's metrics.
_Known = dict[str, tuple[float, ...]]


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


def outcome_conditions(scorer: Scorer, task: Task) -> dict[str, Any]:
    """Return what outcomes depend on besides prompt and plan, as values that JSON knows.

    The fingerprint is the same in every dtype; the outcomes are not. Outcomes of both objectives are kept, so none is
    named here. How a prompt is read is part of its own name in the file.

    Args:
        scorer: Of the base model.
        task: The prompts; which ones there are does not matter.
    """
    model = scorer.model
    return {
        "base_model": fingerprint_digest(fingerprint(model)),
        "num_layers": scorer.num_layers,
        "dtype": dtype_name(model),
        "device": model.device.type,
        "kind": task.kind,
        "limits": scorer.limits,
        **shortcut_fields(scorer.shortcuts),
    }


class OutcomeCache:
    """Outcomes on the prompts of a task; hold the lock of the file's folder while there is one.

    What the file knows is taken from it, bit for bit; the plans that are new for a prompt are scored together and
    appended when the prompt is done. A prompt's outcomes depend on the prompt, its plans and `outcome_conditions`, and
    not on the other prompts, their order, or where an earlier run was killed. Which plans of a prompt were scored in
    one run can move the last bits of their outcomes, since they share a sweep.

    Args:
        scorer: The scorer of the base model.
        task: The prompts.
        path: Where the outcomes are kept; nothing is written before something is scored.

    Raises:
        LabelError: The file is damaged, or of another model, dtype or kind of task.
    """

    def __init__(self, scorer: Scorer, task: Task, path: Path) -> None:
        self._scorer, self._task, self._path = scorer, task, path
        self._metrics = METRICS if task.kind != "prompt" else _UNGRADED
        self._conditions = outcome_conditions(scorer, task)
        self._known, self._length = _read(path, self._conditions, self._metrics)
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
        for done, (number, plans) in enumerate(missing.items(), start=total - len(missing) + 1):
            outcomes = _score(self._scorer, examples[number], plans, self._metrics)
            self._open().append({"example": keys[number], "plans": plans, **outcomes})
            figures = zip(*outcomes.values(), strict=True)
            known[number].update(zip(plans, figures, strict=True))
            progress(done, total)
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


def _score(
    scorer: Scorer, example: Example, texts: list[str], metrics: tuple[str, ...]
) -> dict[str, list[float]]:
    """Return the figures of a prompt under some plans, by metric."""
    # They depend on this prompt alone, whatever was scored before it.
    scorer.forget()
    plans = np.stack([parse_plan(text, scorer.num_layers) for text in texts])
    outcomes = scorer.outcomes([example], plans, np.zeros(len(plans), dtype=np.int64))
    _check_finite(example, plans, outcomes.preserve)
    if "reward" in metrics:
        _check_finite(example, plans, outcomes.reward)
    found = {
        "reward": outcomes.reward,
        "preserve": outcomes.preserve,
        "agreement": outcomes.agrees.astype(np.int64),
        "accuracy": outcomes.correct.astype(np.int64),
    }
    return {metric: found[metric].tolist() for metric in metrics}


def _check_finite(item: Example, plans: Plans, rewards: Floats) -> None:
    broken = np.flatnonzero(~np.isfinite(rewards))
    if broken.size:
        raise SearchError(
            f"prompt {item.prompt[:40]!r} has reward {rewards[broken[0]]} under plan "
            f"{plan_text(plans[broken[0]])}; expected a finite number: load the model in another dtype"
        )


def _read(
    path: Path, asked: dict[str, Any], metrics: tuple[str, ...]
) -> tuple[dict[str, _Known], int]:
    """Return what the file knows of each example, and how many bytes of it are whole lines."""
    known: dict[str, _Known] = {}
    conditions: list[dict[str, Any]] = []

    def check(line: Stored) -> None:
        if conditions:
            _read_line(line, known, metrics, asked["num_layers"])
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
