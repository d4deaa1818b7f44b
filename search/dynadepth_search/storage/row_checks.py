"""What a stored row must be, whether it lies in a journal or in a Parquet file.

Owns the checks of a prompt and of a label, and the one way to read a Parquet file of ours.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dynadepth.errors import LabelError
from dynadepth.plans import Plans
from dynadepth.tree_search.forest import Evaluated
from dynadepth_search.data.tasks import Example
from dynadepth_search.files.stored import Stored
from dynadepth_search.storage.choice import Candidate, best_plans, choose_label, plan_visits

__all__ = ["check_label_row", "plan_rows", "read_example", "read_parquet"]

_EXAMPLE = ("prompt_id", "prompt", "choices", "answer", "completion")
_ROW = (
    *("index", *_EXAMPLE, "solution", "base_reward", "plans", "rewards"),
    *("depths", "visits", "raw_label", "raw_value", "candidates", "variant_rewards"),
    *("confirmed_values", "generated", "right", "label", "label_value"),
)
_ROUNDING = 1e-9


def read_parquet(path: Path, schema: pa.Schema, advice: str) -> pa.Table:
    """Read a Parquet file of ours as a table that has the columns of a schema, in its order.

    Args:
        path: The file.
        schema: Names and types of the columns.
        advice: What the user can do about a damaged file.

    Raises:
        LabelError: It cannot be read, or has other columns.
    """
    try:
        # Not `read_table`, which takes folders of the path for columns of the table.
        table = pq.ParquetFile(path).read()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise LabelError(f"{path} is damaged ({error}): {advice}") from error
    found = dict(zip(table.schema.names, table.schema.types, strict=True))
    wanted = dict(zip(schema.names, schema.types, strict=True))
    if found != wanted or len(found) != len(table.schema):
        other = sorted(
            {*found, *wanted} - {name for name in found if found[name] == wanted.get(name)}
        )
        raise LabelError(
            f"{path} is damaged (its columns differ in {', '.join(map(ascii, other))} from what was written): {advice}"
        )
    return table.select(schema.names)


def read_example(found: dict[str, Stored], row: Stored) -> Example:
    """Return the prompt of a stored row, with what its answer is judged by.

    Args:
        found: Has `prompt_id`, `prompt`, `choices`, `answer` and `completion`; `solution` if any may have one.
        row: The row, for messages.

    Raises:
        LabelError: They are no example, or not the one that `prompt_id` names.
    """
    prompt = found["prompt"].text()
    choices = found["choices"].optional(Stored.texts)
    completion = found["completion"].optional(Stored.text)
    if choices is not None and completion is not None:
        row.damaged("it has both choices and a completion; expected one of them")
    solution = found["solution"].optional(Stored.text) if "solution" in found else None
    if solution is not None and completion is None:
        row.damaged("it has a solution and no completion; expected both or no solution")
    if choices is None:
        if found["answer"].value is not None:
            found["answer"].wrong("nothing, since there are no choices")
        example = Example(prompt, completion=completion, solution=solution)
    else:
        found["choices"].entries(least=2)
        answer = found["answer"].whole(0, len(choices) - 1)
        example = Example(prompt, tuple(choices), answer)
    if found["prompt_id"].hexadecimal(16) != example.prompt_id:
        found["prompt_id"].wrong(f"{example.prompt_id}, which names its prompt and answers")
    return example


def check_label_row(
    row: Stored,
    *,
    num_layers: int,
    depth_penalty: float,
    confirm: int,
    margin: float,
    generates: bool,
) -> dict[str, Any]:
    """Return a row of labels as it was stored, once all of it has been checked.

    Args:
        row: The row.
        num_layers: Decoder layers of the model.
        depth_penalty: Lambda of the labels' value.
        confirm: Number of plans that are scored on variants, besides the identity; 0: none.
        margin: Margin over the identity plan that a label needs.
        generates: Whether answers were generated to confirm labels.

    Raises:
        LabelError: A value is of the wrong type or out of range, or does not fit the others.
    """
    found = row.fields(_ROW)
    read_example(found, row)
    found["index"].whole()
    evaluated = _read_evaluated(found, row, num_layers)
    plans: list[str] = found["plans"].value
    rewards = dict(zip(plans, evaluated.rewards.tolist(), strict=True))
    prices = {plan: depth_penalty * (plan_visits(plan) / num_layers) for plan in plans}
    raw = found["raw_label"].plan(num_layers)
    if raw not in rewards:
        found["raw_label"].wrong("one of the plans that were evaluated")
    _check_value(found["raw_value"], rewards[raw] - prices[raw], depth_penalty)
    best = max(rewards[plan] - prices[plan] for plan in plans)
    if best - (rewards[raw] - prices[raw]) > _ROUNDING * max(1.0, abs(best)):
        found["raw_label"].wrong(
            f"a plan of value {best}, the highest of those that were evaluated"
        )
    known = best_plans(evaluated, depth_penalty, confirm)
    expected = [plans[index] for index in known] if confirm and len(known) > 1 else []
    candidates = _read_candidates(found, expected, rewards, prices)
    candidates = _with_answers(candidates, found, generates=generates)
    identity = "1" * num_layers
    compared = candidates or [
        Candidate(plan, rewards[plan], (), prices[plan]) for plan in (raw, identity)
    ]
    label = choose_label(compared, margin=margin).plan
    if found["label"].plan(num_layers) != label:
        by = "answers and rewards" if generates else "rewards"
        found["label"].wrong(f"{label}, which the stored {by} choose")
    _check_value(found["label_value"], rewards[label] - prices[label], depth_penalty)
    stored: dict[str, Any] = row.value
    return stored


def _read_evaluated(found: dict[str, Stored], row: Stored, num_layers: int) -> Evaluated:
    plans = found["plans"].plans(num_layers, least=1)
    rewards = found["rewards"].numbers(len(plans))
    depths = found["depths"].numbers(len(plans))
    visits = [item.whole(1) for item in found["visits"].entries(len(plans))]
    for plan, depth, count in zip(plans, depths, visits, strict=True):
        right = plan_visits(plan)
        if count != right or abs(depth - right / num_layers) > _ROUNDING:
            row.damaged(
                f"plan {plan} has {count} visits and depth {depth}; expected {right} and {right / num_layers}"
            )
    base = found["base_reward"].number()
    identity = "1" * num_layers
    known = dict(zip(plans, rewards, strict=True)).get(identity)
    if known != base:
        row.damaged(
            f"base_reward is {base} and the reward of {identity} is {'missing' if known is None else known}; expected "
            "one number, since it is the base model's plan"
        )
    return Evaluated(
        plan_rows(plans),
        np.array(rewards, dtype=np.float64),
        np.array(depths, dtype=np.float64),
        np.array(visits, dtype=np.uint32),
    )


def _read_candidates(
    found: dict[str, Stored],
    expected: Sequence[str],
    rewards: dict[str, float],
    prices: dict[str, float],
) -> list[Candidate]:
    """Return the plans that were scored on variants, which have to be the expected ones."""
    if found["candidates"].texts() != list(expected):
        found["candidates"].wrong(
            f"{', '.join(expected)}, the best of the plans that were evaluated and the identity"
            if expected
            else "no plans, since none is confirmed"
        )
    lists = found["variant_rewards"].entries(len(expected))
    count = len(lists[0].entries(least=1)) if lists else 0
    values = found["confirmed_values"].numbers(len(expected))
    candidates = []
    for plan, given, value in zip(expected, lists, values, strict=True):
        known = Candidate(plan, rewards[plan], tuple(given.numbers(count)), prices[plan])
        if abs(value - known.value) > _ROUNDING * max(1.0, abs(known.value)):
            found["confirmed_values"].wrong(
                f"{known.value} for plan {plan}, the mean of its rewards less its price"
            )
        candidates.append(known)
    return candidates


def _with_answers(
    candidates: Sequence[Candidate], found: dict[str, Stored], *, generates: bool
) -> list[Candidate]:
    """Return candidates with their generated answers: one to the prompt and one to each variant."""
    if not candidates or not generates:
        for name in ("generated", "right"):
            found[name].entries(0)
        return list(candidates)
    answers = found["generated"].entries(len(candidates))
    right = found["right"].entries(len(candidates))
    judged: dict[str, bool] = {}
    complete = []
    for item, texts, flags in zip(candidates, answers, right, strict=True):
        count = 1 + len(item.variant_rewards)
        said = texts.texts(count)
        known = [flag.boolean() for flag in flags.entries(count)]
        for text, flag in zip(said, known, strict=True):
            if judged.setdefault(text, flag) != flag:
                flags.wrong(f"one judgement of {text[:40]!r}, which is generated several times")
        complete.append(replace(item, answers=tuple(said), right=tuple(known)))
    return complete


def _check_value(stored: Stored, value: float, depth_penalty: float) -> None:
    if abs(stored.number() - value) > _ROUNDING * max(1.0, abs(value)):
        stored.wrong(f"{value}, its reward less {depth_penalty} x its depth")


def plan_rows(texts: Sequence[str]) -> Plans:
    """Return plans given as digits. Shape (plans, layers), uint8."""
    joined = np.frombuffer("".join(texts).encode(), dtype=np.uint8) - ord("0")
    return joined.reshape(len(texts), -1).astype(np.uint8)
