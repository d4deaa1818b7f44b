"""What a search of plans for all prompts leaves on disk: `menu.json`, read and checked value by value."""

import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dynadepth.errors import LabelError
from dynadepth.files import read_versioned_json
from dynadepth.models.fingerprint import check_base_model
from dynadepth.plans import Plans, parse_plan
from dynadepth_search.files.stored import Stored
from dynadepth_search.scoring.objectives import Objective, check_objective
from dynadepth_search.search.static_spec import StaticSpec
from dynadepth_search.storage.compatibility import (
    check_stored_fingerprint,
    check_stored_task,
    stored_config,
    stored_hashes,
)

__all__ = ["MENU", "SCHEMA_VERSION", "StaticPlans", "read_menu", "read_static"]

MENU = "menu.json"
SCHEMA_VERSION = 1

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StaticPlans:
    """What a search of static plans found.

    Args:
        menu: Plans to choose from by the prompt: the identity first, then by falling depth. Shape (K, layers), uint8.
        front: Nested plans for all prompts: the identity first, each with one more layer skipped. Shape (F, layers).
        front_values: Mean of each of these on prompts that chose none of them: of the agreement for `preserve`, of the
            graded reward for `reward`. Shape (F,).
        front_errors: Standard errors of these, against the identity. Shape (F,).
        pool: Every plan that was measured there, the identity first. Shape (P, layers).
        pool_values: Their means. Shape (P,).
        objective: What plans were compared by.
        prompts: Prompts in these means.
        evaluations: Plans evaluated on prompts in all.
        asked: What the search was asked for.
        prompt_hashes: Of the prompts that chose the plans, see `dynadepth_search.data.splits.prompt_hashes`; None if
            the folder is older than these.
    """

    menu: Plans
    front: Plans
    front_values: _Floats
    front_errors: _Floats
    pool: Plans
    pool_values: _Floats
    objective: Objective
    prompts: int
    evaluations: int
    asked: dict[str, Any]
    prompt_hashes: tuple[str, ...] | None = None

    @property
    def shortcuts(self) -> str | None:
        """The digest of the shortcuts that were in place of skipped layers; None: nothing was."""
        known: str | None = self.asked.get("shortcuts")
        return known


def read_static(folder: str | os.PathLike[str], *, model: Any = None) -> StaticPlans:
    """Read what a search of static plans found.

    Args:
        folder: Where it was written.
        model: The base model; its fingerprint is compared if it is given.

    Raises:
        FileNotFoundError: There is nothing.
        LabelError: It is damaged, unfinished or of another base model.
    """
    path = Path(folder) / MENU
    content = read_menu(path)
    if not content["complete"]:
        raise LabelError(f"the search of {path} is unfinished: run it again to go on")
    if model is not None:
        check_base_model(
            model,
            content["base_model"],
            holder=f"the plans in {path}",
            error=LabelError,
            advice="search with this model",
        )
    rows = content["pool"]
    pool = np.stack([parse_plan(row["plan"], len(row["plan"])) for row in rows])
    values = np.array([row["value"] for row in rows], dtype=np.float64)
    errors = np.array([row["standard_error"] for row in rows], dtype=np.float64)
    front = content["front"]
    return StaticPlans(
        menu=pool[content["menu"]],
        front=pool[front],
        front_values=values[front],
        front_errors=errors[front],
        pool=pool,
        pool_values=values,
        objective=check_objective(content["asked"]["search"]["objective"]),
        prompts=content["confirmed"],
        evaluations=content["evaluations"],
        asked=content["asked"],
        prompt_hashes=stored_hashes(content, "prompt_hashes"),
    )


def read_menu(path: Path, num_layers: int | None = None) -> dict[str, Any]:
    """Return the content of `menu.json`, of a finished search or of one that goes on.

    Args:
        path: The file.
        num_layers: Decoder layers of the model; None: those of the finished plans.

    Raises:
        FileNotFoundError: There is none.
        LabelError: It is damaged, or of another version.
    """
    content = read_versioned_json(
        path,
        SCHEMA_VERSION,
        error=LabelError,
        make_again="search again",
        missing="make it with `dynadepth search static`",
    )
    stored = Stored(content, str(path), "delete it and search again")
    found = stored.fields(
        [
            "schema_version",
            "asked",
            "base_model",
            "complete",
            "evaluations",
            "candidates",
            "levels",
        ],
        ["prompt_hashes", "pool", "confirmed", "front", "menu"],
    )
    asked = found["asked"].fields(["base_model", "dtype", "task", "search"], ["shortcuts"])
    asked["base_model"].hexadecimal(16)
    asked["dtype"].text()
    if "shortcuts" in asked:
        asked["shortcuts"].hexadecimal(16)
    check_stored_task(asked["task"], named=False)
    if "objective" not in asked["search"].mapping():
        asked["search"].damaged("asked.search has no 'objective'")
    spec = stored_config(asked["search"], StaticSpec)
    check_stored_fingerprint(found["base_model"])
    if "prompt_hashes" in found:
        found["prompt_hashes"].texts()
    found["evaluations"].whole()
    levels = _check_levels(found, num_layers)
    if found["complete"].boolean():
        found = stored.fields([*found, "pool", "confirmed", "front", "menu"])
        found["confirmed"].whole(1)
        _check_pool(found, levels, spec.objective, num_layers)
    return content


def _check_levels(found: dict[str, Stored], num_layers: int | None) -> list[list[int]]:
    """Check the plans that were grown; returns the layers that each of them skips."""
    highest = None if num_layers is None else num_layers - 1
    candidates = [item.whole(0, highest) for item in found["candidates"].entries()]
    if len(set(candidates)) < len(candidates):
        found["candidates"].wrong("different layers")
    every: list[list[int]] = []
    before: list[set[int]] = [set()]
    for count, level in enumerate(found["levels"].entries(), start=1):
        grown: list[set[int]] = []
        for item in level.entries(least=1):
            plan = item.fields(["skips", "value"])
            plan["value"].number()
            skips = [layer.whole(0, highest) for layer in plan["skips"].entries(count)]
            if skips != sorted(set(skips)) or not set(skips) <= set(candidates):
                plan["skips"].wrong("rising layers of the candidates")
            if set(skips) in grown or not any(known < set(skips) for known in before):
                plan["skips"].wrong("one layer more than a plan of the level before, each set once")
            grown.append(set(skips))
            every.append(skips)
        before = grown
    return every


def _check_pool(
    found: dict[str, Stored], levels: list[list[int]], objective: str, num_layers: int | None
) -> None:
    """Check the plans that were measured, and what was chosen of them."""
    bounds = (0.0, 1.0) if objective == "preserve" else (None, 1e-4)
    rows = [
        row.fields(["plan", "value", "standard_error", "agreement"])
        for row in found["pool"].entries(len(levels) + 1)
    ]
    width = len(rows[0]["plan"].text()) if num_layers is None else num_layers
    plans = []
    for skips, row in zip([[], *levels], rows, strict=True):
        plan = row["plan"].plan(width)
        wanted = "".join("0" if layer in skips else "1" for layer in range(width))
        if plan != wanted:
            row["plan"].wrong(f"{wanted}, as the levels say")
        row["value"].number(*bounds)
        row["standard_error"].number(0.0)
        row["agreement"].number(0.0, 1.0)
        plans.append(plan)
    for name in ("front", "menu"):
        chosen = [item.whole(0, len(plans) - 1) for item in found[name].entries(least=1)]
        if chosen[0] != 0 or len(set(chosen)) < len(chosen):
            found[name].wrong("rows of the pool, each once, the first one before all others")
        if name == "front":
            skipped = [
                {layer for layer in range(width) if plans[row][layer] == "0"} for row in chosen
            ]
            if any(
                not less < more or len(more) != len(less) + 1 for less, more in pairwise(skipped)
            ):
                found[name].wrong(
                    "rows of the pool, each with the skips of the one before and one more"
                )
