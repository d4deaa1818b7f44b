"""Plans: how many times each decoder layer runs for one prompt.

The actions, the checks that every plan passes before it touches a model, the computation of depth, and the two ways to
write a plan as text: digits ("1102", one for each layer) and ranges ("0-1,3,3", the layers in the order of their
visits).
"""

import re
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from dynadepth.errors import PlanError

__all__ = [
    "EXECUTE",
    "NUM_ACTIONS",
    "REPEAT",
    "SKIP",
    "Action",
    "Plans",
    "check_plans",
    "identity_plan",
    "parse_plan",
    "plan_depth",
    "plan_ranges",
    "plan_text",
    "prefix_numbers",
]

Plans = npt.NDArray[np.uint8]


class Action(IntEnum):
    """How many times a layer runs for a prompt."""

    SKIP = 0
    EXECUTE = 1
    REPEAT = 2


SKIP, EXECUTE, REPEAT = Action.SKIP, Action.EXECUTE, Action.REPEAT
NUM_ACTIONS = len(Action)

# One item of a plan written as ranges. No layer number is longer, and int() refuses texts of thousands of digits.
_ITEM = re.compile(r" *([0-9]{1,9})(?: *- *([0-9]{1,9}))? *")


def identity_plan(num_layers: int) -> Plans:
    """Return the plan of the base model itself: every layer runs once.

    Args:
        num_layers: Decoder layers of the model.

    Returns:
        All EXECUTE. Shape (num_layers,), uint8.

    Example:
        >>> identity_plan(3)
        array([1, 1, 1], dtype=uint8)
    """
    return np.full(num_layers, int(EXECUTE), dtype=np.uint8)


def check_plans(plans: Any, num_layers: int, *, num_rows: int | None = None) -> Plans:
    """Check plans and return them as a new array.

    Args:
        plans: One plan or several, as whole numbers of any dtype. Shape (num_layers,) or (rows, num_layers). Or a text
            that `parse_plan` reads, which is one plan, or a list of such texts, one for each row.
        num_layers: Decoder layers of the model.
        num_rows: Number of rows required; None: any number.

    Returns:
        The plans, copied. Shape (rows, num_layers), uint8.

    Raises:
        PlanError: The shape is wrong, an action is not 0, 1 or 2, no layer of a plan runs, or a text is not a plan.

    Example:
        >>> check_plans([[1, 0, 2]], num_layers=3)
        array([[1, 0, 2]], dtype=uint8)
        >>> check_plans(["102", "0-2"], num_layers=3)
        array([[1, 0, 2],
               [1, 1, 1]], dtype=uint8)
    """
    if isinstance(plans, str):
        plans = parse_plan(plans, num_layers)
    elif isinstance(plans, (list, tuple)):
        plans = [parse_plan(each, num_layers) if isinstance(each, str) else each for each in plans]
    try:
        array = np.asarray(plans)
    except (ValueError, TypeError, RuntimeError) as error:
        raise PlanError(f"plans cannot be read as one array: {error}") from error
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise PlanError(
            f"plans are an array of {array.dtype} with shape {array.shape}; expected whole numbers "
            f"of shape ({num_layers},) or (rows, {num_layers}): 0 skips, 1 executes, 2 repeats a layer"
        )
    rows = np.atleast_2d(array)
    if rows.shape[1] != num_layers:
        raise PlanError(
            f"a plan names {rows.shape[1]} layers, but the model has {num_layers} decoder layers; "
            "give one action for each layer"
        )
    if num_rows is not None and rows.shape[0] != num_rows:
        raise PlanError(
            f"{rows.shape[0]} plans were given for {num_rows} rows; give one plan for each row"
        )
    if rows.size and (int(rows.min()) < 0 or int(rows.max()) >= NUM_ACTIONS):
        row, layer = np.argwhere((rows < 0) | (rows >= NUM_ACTIONS))[0]
        raise PlanError(
            f"plan {row} has action {rows[row, layer]} at layer {layer}; "
            "expected 0 (skip), 1 (execute) or 2 (repeat)"
        )
    empty = np.flatnonzero(rows.sum(axis=1) == 0)
    if empty.size:
        raise PlanError(
            f"plan {empty[0]} skips all {num_layers} layers; at least one layer must run"
        )
    checked: Plans = rows.astype(np.uint8)
    return checked


def plan_depth(plans: Any) -> npt.NDArray[np.float64]:
    """Return executed visits as a fraction of the number of layers.

    Args:
        plans: Shape (..., num_layers), uint8.

    Returns:
        Depth of each plan; 1.0 is the base model. Shape (...), float64.

    Example:
        >>> float(plan_depth(np.array([1, 0, 2, 0], dtype=np.uint8)))
        0.75
    """
    array = np.asarray(plans)
    depth: npt.NDArray[np.float64] = array.sum(axis=-1, dtype=np.float64) / array.shape[-1]
    return depth


def plan_text(plan: Any) -> str:
    """Write a plan as one digit for each layer.

    Example:
        >>> plan_text(np.array([1, 0, 2], dtype=np.uint8))
        '102'
    """
    return "".join(str(int(action)) for action in np.asarray(plan).tolist())


def plan_ranges(plan: Any) -> str:
    """Write a plan as the layers in the order of their visits, consecutive ones joined; `parse_plan` reads it back.

    Args:
        plan: Shape (num_layers,), actions of which at least one runs its layer.

    Example:
        >>> plan_ranges([1, 1, 0, 1, 2])
        '0-1,3-4,4'
        >>> plan_ranges([0, 1, 0])
        '1-1'
    """
    runs: list[list[int]] = []
    for layer, action in enumerate(np.asarray(plan).tolist()):
        for _ in range(action):
            if runs and runs[-1][1] == layer - 1:
                runs[-1][1] = layer
            else:
                runs.append([layer, layer])
    if len(runs) == 1:
        # A single number would be read as digits.
        return f"{runs[0][0]}-{runs[0][1]}"
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def parse_plan(text: str, num_layers: int) -> Plans:
    """Read a plan written as digits or as ranges.

    A text with a comma or a dash consists of ranges: layers in the order of their visits, "0-11,14-27". A layer named
    twice in a row is repeated, so "0-3,3" and "0-3,3-5" repeat layer 3; layers that are not named are skipped. Any
    other text consists of digits, one for each layer: 0 skips, 1 executes, 2 repeats. So "12" is always the plan of a
    model with two layers; a plan that runs layer 12 alone is "12-12".

    Args:
        text: Digits or ranges; spaces around the numbers of ranges are ignored.
        num_layers: Decoder layers of the model.

    Returns:
        The plan. Shape (num_layers,), uint8.

    Raises:
        PlanError: The text has neither form, names a layer that the model does not have, names layers in the wrong
            order or one of them three times, has another number of digits than the model has layers, or runs no layer.

    Example:
        >>> parse_plan("102", 3)
        array([1, 0, 2], dtype=uint8)
        >>> parse_plan("0-2,5,5", 6)
        array([1, 1, 1, 0, 0, 2], dtype=uint8)
    """
    if "," in text or "-" in text:
        return _parse_ranges(text, num_layers)
    stray = next((character for character in text if character not in "012"), None)
    if stray is not None or not text:
        raise PlanError(
            f"plan {text!r} cannot be read; expected {num_layers} digits, one for each layer (0 skips, 1 executes, "
            '2 repeats), or the layers in the order of their visits, such as "0-2,4"'
        )
    if len(text) != num_layers and len(text) < 9 and int(text) < num_layers:
        raise PlanError(
            f"a plan names {len(text)} layers, but the model has {num_layers} decoder layers; {text!r} without a comma "
            f'or a dash is digits, one for each layer: write "{int(text)}-{int(text)}" for layer {int(text)} alone'
        )
    plan: Plans = check_plans([int(character) for character in text], num_layers)[0]
    return plan


def _parse_ranges(text: str, num_layers: int) -> Plans:
    plan = np.zeros(num_layers, dtype=np.uint8)
    last = -1
    for item in text.split(","):
        found = _ITEM.fullmatch(item)
        if found is None:
            raise PlanError(
                f"plan {text!r} cannot be read at {item!r}; expected layer numbers and ranges in the order of the "
                'visits, separated by commas, such as "0-2,4,4"'
            )
        low, high = int(found[1]), int(found[2] or found[1])
        if low > high:
            raise PlanError(
                f"plan {text!r} has the range {item.strip()!r}, which goes backwards; write {high}-{low}"
            )
        if high >= num_layers:
            raise PlanError(
                f"plan {text!r} names layer {high}, but the model has layers 0 to {num_layers - 1}"
            )
        if low < last:
            raise PlanError(
                f"plan {text!r} goes back from layer {last} to layer {low}; a plan visits layers in ascending order "
                "and can repeat a layer only right after itself"
            )
        if plan[low] >= int(REPEAT):
            raise PlanError(
                f"plan {text!r} names layer {low} three times; a layer runs at most twice"
            )
        plan[low : high + 1] += 1
        last = high
    return plan


def prefix_numbers(plans: Plans, layer_idx: int) -> npt.NDArray[np.int64]:
    """Number the distinct prefixes of plans before a layer, in the order in which they first occur.

    Args:
        plans: Shape (plans, layers), uint8.
        layer_idx: The layer.

    Returns:
        The number of each plan's prefix; plan 0 has number 0. Shape (plans,).

    Example:
        >>> prefix_numbers(np.array([[1, 1, 1], [0, 1, 1], [1, 1, 0]], dtype=np.uint8), 2)
        array([0, 1, 0])
    """
    known: dict[bytes, int] = {}
    numbers = [known.setdefault(plan[:layer_idx].tobytes(), len(known)) for plan in plans]
    return np.array(numbers, dtype=np.int64)
