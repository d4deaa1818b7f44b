"""Outcomes of many plans on many prompts, stored for each prompt so that nothing is scored twice.

They are in the file `outcomes.jsonl` of an evaluation.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dynadepth.errors import SearchError
from dynadepth.files import sha256_text, write_text_atomic
from dynadepth.plans import Plans, plan_text
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.scoring.scorer import Scorer

__all__ = ["METRICS", "Table", "score_plans"]

# Metrics of a pair of prompt and plan. `reward` and `accuracy` are missing if there are no right
# answers.
METRICS = ("reward", "preserve", "agreement", "accuracy")
_BLOCK = 16

Floats = npt.NDArray[np.float64]


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


def score_plans(
    scorer: Scorer,
    task: Task,
    sets: Mapping[str, Plans],
    path: Path,
    *,
    spec: str,
    progress: Callable[[int, int], None],
) -> Table:
    """Score sets of plans on every prompt of a task, and store the outcomes.

    All plans of a prompt are scored together, in blocks of prompts; a finished block is appended to the
    file. A second call with the same arguments continues after the last complete line. A file of
    another task, other plans or another `spec` is replaced.

    Args:
        scorer: The scorer of the base model.
        task: The prompts.
        sets: One plan for each prompt, by name. Shape (prompts, num_layers) each, uint8.
        path: The file of the outcomes.
        spec: Everything else that the outcomes depend on, such as the model's fingerprint.
        progress: Called with the numbers of finished prompts and of all prompts.

    Returns:
        The outcomes.

    Raises:
        SearchError: A reward is not a finite number.
    """
    stack = np.stack(list(sets.values()), axis=1)
    header = sha256_text(json.dumps([spec, task.sha256, stack.shape, stack.tobytes().hex()]))
    # There is one line for each prompt; equal plans are scored once.
    distinct = [np.unique(plans, axis=0, return_inverse=True) for plans in stack]
    lines = _read(path, header)
    if lines is None:
        write_text_atomic(path, json.dumps({"spec": header}) + "\n")
        lines = []
    progress(len(lines), len(task.examples))
    while len(lines) < len(task.examples):
        block = range(len(lines), min(len(lines) + _BLOCK, len(task.examples)))
        scored = _score(scorer, task, [distinct[index][0] for index in block], block.start)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in scored)
            file.flush()
            os.fsync(file.fileno())
        lines += scored
        progress(len(lines), len(task.examples))
    values = {
        metric: np.array(
            [
                np.array(line[metric], dtype=np.float64)[inverse.reshape(-1)]
                for line, (_, inverse) in zip(lines, distinct, strict=True)
            ]
        ).T
        for metric in METRICS
        if metric in lines[0]
    }
    return Table(rows={name: row for row, name in enumerate(sets)}, values=values)


def _score(scorer: Scorer, task: Task, plans: list[Plans], first: int) -> list[dict[str, Any]]:
    # The outcomes of a block do not depend on what was scored before it.
    scorer.forget()
    examples = task.examples[first : first + len(plans)]
    example = np.repeat(np.arange(len(plans)), [len(rows) for rows in plans])
    outcomes = scorer.outcomes(examples, np.concatenate(plans), example)
    lines = []
    for index, item in enumerate(examples):
        at = example == index
        line: dict[str, Any] = {
            "prompt_id": item.prompt_id,
            "preserve": outcomes.preserve[at].tolist(),
            "agreement": outcomes.agrees[at].astype(int).tolist(),
        }
        _check_finite(item, plans[index], outcomes.preserve[at])
        if task.kind != "prompt":
            _check_finite(item, plans[index], outcomes.reward[at])
            line["reward"] = outcomes.reward[at].tolist()
            line["accuracy"] = outcomes.correct[at].astype(int).tolist()
        lines.append(line)
    return lines


def _check_finite(item: Example, plans: Plans, rewards: Floats) -> None:
    broken = np.flatnonzero(~np.isfinite(rewards))
    if broken.size:
        raise SearchError(
            f"prompt {item.prompt[:40]!r} has reward {rewards[broken[0]]} under plan "
            f"{plan_text(plans[broken[0]])}; expected a finite number: load the model in another dtype"
        )


def _read(path: Path, header: str) -> list[dict[str, Any]] | None:
    """Return the complete lines and cut off an incomplete last one; None if the file has another header."""
    if not path.is_file():
        return None
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    try:
        content = [json.loads(line) for line in whole.splitlines()]
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    if not content or content[0] != {"spec": header}:
        return None
    if len(whole) < len(text):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return content[1:]
