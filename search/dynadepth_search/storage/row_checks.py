"""What a stored row must be, whether it lies in a journal or in a Parquet file.

Owns the checks of a prompt and of a label, and the one way to read a Parquet file of ours.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dynadepth.errors import LabelError
from dynadepth_search.data.tasks import Example
from dynadepth_search.files.stored import Stored

__all__ = ["check_label_row", "read_example", "read_parquet"]

_EXAMPLE = ("prompt_id", "prompt", "choices", "answer", "completion")
_ROW = (
    *("index", *_EXAMPLE, "base_reward", "plans", "rewards"),
    *("depths", "visits", "label", "label_value"),
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
        found: Has `prompt_id`, `prompt`, `choices`, `answer` and `completion`.
        row: The row, for messages.

    Raises:
        LabelError: They are no example, or not the one that `prompt_id` names.
    """
    prompt = found["prompt"].text()
    choices = found["choices"].optional(Stored.texts)
    completion = found["completion"].optional(Stored.text)
    if choices is not None and completion is not None:
        row.damaged("it has both choices and a completion; expected one of them")
    if choices is None:
        if found["answer"].value is not None:
            found["answer"].wrong("nothing, since there are no choices")
        example = Example(prompt, completion=completion)
    else:
        found["choices"].entries(least=2)
        answer = found["answer"].whole(0, len(choices) - 1)
        example = Example(prompt, tuple(choices), answer)
    if found["prompt_id"].hexadecimal(16) != example.prompt_id:
        found["prompt_id"].wrong(f"{example.prompt_id}, which names its prompt and answers")
    return example


def check_label_row(row: Stored, *, num_layers: int, depth_penalty: float) -> dict[str, Any]:
    """Return a row of labels as it was stored, once all of it has been checked.

    Args:
        row: The row.
        num_layers: Decoder layers of the model.
        depth_penalty: Lambda of the labels' value.

    Raises:
        LabelError: A value is of the wrong type or out of range, or does not fit the others.
    """
    found = row.fields(_ROW)
    read_example(found, row)
    found["index"].whole()
    plans = found["plans"].plans(num_layers, least=1)
    rewards = dict(zip(plans, found["rewards"].numbers(len(plans)), strict=True))
    depths = found["depths"].numbers(len(plans))
    visits = [item.whole(1) for item in found["visits"].entries(len(plans))]
    for plan, depth, count in zip(plans, depths, visits, strict=True):
        right = _visits(plan)
        if count != right or abs(depth - right / num_layers) > _ROUNDING:
            row.damaged(
                f"plan {plan} has {count} visits and depth {depth}; expected {right} and {right / num_layers}"
            )
    base = found["base_reward"].number()
    identity = "1" * num_layers
    if rewards.get(identity) != base:
        row.damaged(
            f"base_reward is {base} and the reward of {identity} is {rewards.get(identity, 'missing')}; expected one "
            "number, since it is the base model's plan"
        )
    label = found["label"].plan(num_layers)
    if label not in rewards:
        found["label"].wrong("one of the plans that were evaluated")
    value = rewards[label] - depth_penalty * _visits(label) / num_layers
    if abs(found["label_value"].number() - value) > _ROUNDING * max(1.0, abs(value)):
        found["label_value"].wrong(f"{value}, its reward less {depth_penalty} x its depth")
    best = max(
        rewards[plan] - depth_penalty * depth for plan, depth in zip(plans, depths, strict=True)
    )
    if best - value > _ROUNDING * max(1.0, abs(best)):
        found["label"].wrong(f"a plan of value {best}, the highest of those that were evaluated")
    stored: dict[str, Any] = row.value
    return stored


def _visits(plan: str) -> int:
    return plan.count("1") + 2 * plan.count("2")
