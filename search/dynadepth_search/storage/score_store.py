"""The files of a score table: a manifest, and for each block of prompts its metrics and its states.

Each block has a Parquet file of metrics and a safetensors file of states; every file names its table and block, and
identifies the other file.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from dynadepth.errors import LabelError
from dynadepth.files import read_versioned_json, sha256_bytes, sha256_text, write_bytes_atomic
from dynadepth.plans import prefix_numbers
from dynadepth_search.data.tasks import Example
from dynadepth_search.files.stored import Stored
from dynadepth_search.storage.compatibility import check_stored_fingerprint, check_stored_task
from dynadepth_search.storage.row_checks import read_example, read_parquet

__all__ = [
    "BLOCK",
    "MANIFEST",
    "METRICS",
    "SCHEMA",
    "SCHEMA_VERSION",
    "Part",
    "block_of",
    "is_whole",
    "part_name",
    "part_of",
    "read_manifest",
    "read_part",
    "write_part",
]

MANIFEST = "scores.json"
SCHEMA_VERSION = 1
# Number of prompts of a block; a kill loses at most one block of work.
BLOCK = 16
METRICS = ("agreement", "total_variation", "divergence", "reward", "correct")
# Lowest and highest value of each, rounding to float32 included.
_RANGES: dict[str, tuple[float | None, float | None]] = {
    "agreement": (0.0, 1.0),
    "total_variation": (0.0, 1.0 + 1e-4),
    "divergence": (0.0, None),
    "reward": (None, 1e-4),
    "correct": (0.0, 1.0),
}
SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("choices", pa.list_(pa.string())),
        pa.field("answer", pa.int64()),
        pa.field("completion", pa.string()),
        pa.field("given", pa.list_(pa.int64()), nullable=False),
        *(pa.field(name, pa.list_(pa.float32()), nullable=False) for name in METRICS),
    ]
)


@dataclass(frozen=True, slots=True)
class Part:
    """The two files of a block of prompts.

    Args:
        metrics: Content of the Parquet file.
        states: Content of the safetensors file.
    """

    metrics: bytes
    states: bytes


def part_of(
    examples: Sequence[Example],
    given: npt.NDArray[np.int64],
    metrics: Mapping[str, npt.NDArray[np.float64]],
    views: Mapping[int, torch.Tensor],
    block: dict[str, str],
) -> Part:
    """Return a block of prompts as its files.

    Args:
        examples: The prompts.
        given: Their answers under each plan. Shape (prompts, K), int64.
        metrics: All of `METRICS`. Shape (prompts, K) each, float64.
        views: The states by layer. Shape (prompts, prefixes, views, hidden) each.
        block: What `block_of` returned.
    """
    data = save_tensors({str(layer): view for layer, view in views.items()})
    columns = {
        "prompt_id": [item.prompt_id for item in examples],
        "prompt": [item.prompt for item in examples],
        "choices": [item.choices for item in examples],
        "answer": [item.answer for item in examples],
        "completion": [item.completion for item in examples],
        "given": given.tolist(),
        **{name: values.astype(np.float32).tolist() for name, values in metrics.items()},
    }
    table = pa.table(columns, schema=SCHEMA)
    seals = {"states_sha256": sha256_bytes(data), "figures_sha256": _seal(table), **block}
    table = table.replace_schema_metadata(seals)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return Part(sink.getvalue().to_pybytes(), data)


def write_part(path: Path, part: Part) -> None:
    """Write a block of prompts.

    Args:
        path: Path of its files, without their extensions.
        part: Their content.
    """
    # The metrics come last: a block counts as finished once they are there.
    write_bytes_atomic(path.with_suffix(".safetensors"), part.states)
    write_bytes_atomic(path.with_suffix(".parquet"), part.metrics)


def read_part(
    path: Path, asked: dict[str, Any], number: int
) -> tuple[dict[str, list[Any]], dict[str, torch.Tensor]]:
    """Read a block of prompts.

    Args:
        path: Path of its files, without their extensions.
        asked: The settings of the table, as its manifest has them.
        number: Number of the block, from 0.

    Returns:
        The columns of its metrics, one row for each prompt; and the tensors of its states.

    Raises:
        LabelError: A file is damaged, or belongs to another table or block.
    """
    metrics, states = path.with_suffix(".parquet"), path.with_suffix(".safetensors")
    advice = "delete both files of this block and score again; only its prompts are scored again"
    table = read_parquet(metrics, SCHEMA, advice)
    try:
        data = states.read_bytes()
        seals = {
            key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()
        }
        figures = _seal(table)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise LabelError(f"{metrics} or {states.name} is damaged ({error}); {advice}") from error
    if any(seals.get(key) != value for key, value in block_of(asked, number).items()):
        raise LabelError(
            f"{metrics} is not block {number} of what {MANIFEST} says this table is; {advice}"
        )
    if seals.get("states_sha256") != sha256_bytes(data):
        raise LabelError(f"{states} is not the file that {metrics.name} names; {advice}")
    if seals.get("figures_sha256") != figures:
        raise LabelError(f"{metrics} is damaged: its metrics are not those written; {advice}")
    try:
        views = load_tensors(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise LabelError(f"{states} is damaged ({error}); {advice}") from error
    _check_rows(Stored(table.to_pylist(), str(metrics), advice), asked, number)
    _check_views(Stored(views, str(states), advice), asked, len(table))
    return {name: table[name].to_pylist() for name in SCHEMA.names}, views


def _check_rows(block: Stored, asked: dict[str, Any], number: int) -> None:
    """Check the prompts of a block and their metrics."""
    task, count = asked["task"], len(asked["plans"])
    for row in block.entries(min(BLOCK, task["prompts"] - number * BLOCK)):
        found = row.fields(SCHEMA.names)
        kind = read_example(found, row).kind
        if kind != task["kind"]:
            row.damaged(f"it is a {kind} example; expected {task['kind']}, as {MANIFEST} says")
        for answer in found["given"].entries(count):
            answer.whole()
        for name in METRICS:
            if name == "reward" and kind == "prompt":
                found[name].entries(count)
            else:
                found[name].numbers(count, *_RANGES[name])


def _check_views(views: Stored, asked: dict[str, Any], rows: int) -> None:
    """Check that the states are those of the layers and prefixes that were asked for."""
    found = views.fields(map(str, asked["layers"]))
    plans = np.array([[int(action) for action in plan] for plan in asked["plans"]], dtype=np.uint8)
    for layer in asked["layers"]:
        shape = (rows, int(prefix_numbers(plans, layer).max()) + 1, asked["num_windows"] + 1)
        view = found[str(layer)].value
        if tuple(view.shape[:-1]) != shape or view.ndim != 4 or not view.is_floating_point():
            views.damaged(
                f"the states of layer {layer} are {view.dtype} of shape {tuple(view.shape)}; expected floating-point "
                f"numbers of shape {(*shape, 'width')}"
            )


def _seal(table: pa.Table) -> str:
    """Return a hash of all metrics, since Parquet's own checksums do not cover every bit of a file."""
    content = {name: table[name].to_pylist() for name in SCHEMA.names}
    return sha256_text(json.dumps(content, separators=(",", ":")))


def block_of(asked: dict[str, Any], number: int) -> dict[str, str]:
    """Return the metadata by which a block's file names its table and block."""
    return {"table": sha256_text(json.dumps(asked, sort_keys=True)), "block": str(number)}


def is_whole(folder: Path, number: int) -> bool:
    """Say whether both files of a block exist."""
    return all(
        (folder / f"{part_name(number)}.{kind}").is_file() for kind in ("parquet", "safetensors")
    )


def part_name(number: int) -> str:
    """Return the name of the files of a block, without their extensions."""
    return f"part-{number:05d}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what a table was made with.

    Raises:
        FileNotFoundError: There is no table.
        LabelError: It is damaged, or of another schema version.
    """
    path = folder / MANIFEST
    content = read_versioned_json(
        path,
        SCHEMA_VERSION,
        error=LabelError,
        make_again="score the prompts again",
        missing="make it with `dynadepth score`",
    )
    stored = Stored(content, str(path), "score the prompts again in another folder")
    found = stored.fields(
        ["schema_version", "asked", "task_name", "base_model", "versions"],
        ["prompt_hashes", "plan_prompt_hashes"],
    )
    _check_asked(found["asked"])
    found["task_name"].text()
    base = found["base_model"].fields(["name", "fingerprint"])
    base["name"].text()
    check_stored_fingerprint(base["fingerprint"])
    for version in found["versions"].mapping().values():
        version.text()
    for key in ("prompt_hashes", "plan_prompt_hashes"):
        if key in found:
            found[key].texts()
    return content


def _check_asked(stored: Stored) -> None:
    """Check what a manifest says that its table was asked for."""
    needed = ["base_model", "dtype", "task", "plans", "layers", "num_windows"]
    asked = stored.fields(needed, ["shortcuts"])
    if "shortcuts" in asked:
        asked["shortcuts"].hexadecimal(16)
    asked["base_model"].hexadecimal(16)
    asked["dtype"].text()
    check_stored_task(asked["task"], named=False)
    first = asked["plans"].entries(least=1)[0].text()
    asked["plans"].plans(len(first))
    if set(first) != {"1"}:
        asked["plans"].wrong("the identity plan first")
    layers = [item.whole(0, len(first) - 1) for item in asked["layers"].entries()]
    if layers != sorted(set(layers)):
        asked["layers"].wrong("rising numbers of layers")
    asked["num_windows"].whole()
