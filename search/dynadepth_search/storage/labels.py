"""Labels on disk: how they are read, and how damaged files are recognised.

A folder holds `manifest.json`, Parquet shards `part-00000.parquet` and so on, and, while a search is
unfinished, `journal.jsonl` with the prompts that no shard holds yet. `label_store` writes them.
"""

import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dynadepth.errors import LabelError
from dynadepth.files import sha256_file
from dynadepth.models.fingerprint import check_base_model
from dynadepth.plans import Plans, plan_depth
from dynadepth.tree_search.forest import Evaluated
from dynadepth_search.data.tasks import Example
from dynadepth_search.files.journal import read_journal
from dynadepth_search.files.stored import Stored
from dynadepth_search.storage.choice import Candidate, Choice
from dynadepth_search.storage.label_manifest import MANIFEST, Manifest, Shard, read_manifest
from dynadepth_search.storage.row_checks import check_label_row, plan_rows, read_parquet

__all__ = [
    "JOURNAL",
    "Labels",
    "check_shard",
    "label_row",
    "read_labels",
    "read_shard",
    "read_unfinished",
    "shard_bytes",
]

JOURNAL = "journal.jsonl"

_SCHEMA = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("choices", pa.list_(pa.string())),
        pa.field("answer", pa.int64()),
        pa.field("completion", pa.string()),
        pa.field("solution", pa.string()),
        pa.field("base_reward", pa.float64(), nullable=False),
        pa.field("plans", pa.list_(pa.string()), nullable=False),
        pa.field("rewards", pa.list_(pa.float64()), nullable=False),
        pa.field("depths", pa.list_(pa.float64()), nullable=False),
        pa.field("visits", pa.list_(pa.int64()), nullable=False),
        pa.field("raw_label", pa.string(), nullable=False),
        pa.field("raw_value", pa.float64(), nullable=False),
        pa.field("candidates", pa.list_(pa.string()), nullable=False),
        pa.field("variant_rewards", pa.list_(pa.list_(pa.float64())), nullable=False),
        pa.field("confirmed_values", pa.list_(pa.float64()), nullable=False),
        pa.field("generated", pa.list_(pa.list_(pa.string())), nullable=False),
        pa.field("right", pa.list_(pa.list_(pa.bool_())), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("label_value", pa.float64(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """Labels of P prompts, in the order of the task.

    Args:
        manifest: What they were made with.
        examples: The prompts, with their right answers if any.
        base_rewards: Reward of the identity plan. Shape (P,), float64.
        plans: The labels: the chosen plans, confirmed if the search confirmed any. Shape (P, layers), uint8.
        rewards: Their rewards on the prompts themselves. Shape (P,), float64.
        values: Their values there, reward - depth_penalty * depth. Shape (P,), float64.
        depths: Their depths. Shape (P,), float64.
        evaluated: Every evaluated plan of each prompt, the identity included.
        raw_plans: The plans of highest value on the prompts themselves. Shape (P, layers), uint8.
        raw_values: Their values there. Shape (P,), float64.
        candidates: The plans of each prompt that were scored on variants, best first by value on the prompt; empty
            where none was.
        margins: By how much the value of the label exceeds the identity plan's: on the worst of the variants, which the
            search did not see, or on the prompt itself if there was none. 0 where the label is the identity; it may be
            below 0 where generated answers say that the label is right and the identity is not.
            Shape (P,), float64.
        leads: By how much the value that chose the label (over the prompt and its variants) exceeds that of the second
            best plan: of the candidates, or of all evaluated plans if none was confirmed. Below 0 where a plan of
            higher value lacked the margin, or right answers; NaN where there is no other plan. Shape (P,), float64.
    """

    manifest: Manifest
    examples: tuple[Example, ...]
    base_rewards: npt.NDArray[np.float64]
    plans: Plans
    rewards: npt.NDArray[np.float64]
    values: npt.NDArray[np.float64]
    depths: npt.NDArray[np.float64]
    evaluated: tuple[Evaluated, ...]
    raw_plans: Plans
    raw_values: npt.NDArray[np.float64]
    candidates: tuple[tuple[Candidate, ...], ...]
    margins: npt.NDArray[np.float64]
    leads: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def identity_rate(self) -> float:
        """Fraction of prompts whose label is the identity plan."""
        return float((self.plans == 1).all(axis=1).mean())

    @property
    def evaluations(self) -> float:
        """Mean number of plans per label that the search evaluated, without those that confirmed it."""
        return float(np.mean([len(item) for item in self.evaluated]))

    @property
    def confirmations(self) -> float:
        """Mean number of evaluations on variants and of generated answers per label."""
        return float(
            np.mean(
                [
                    sum(len(each.variant_rewards) + len(each.answers) for each in item)
                    for item in self.candidates
                ]
            )
        )

    @property
    def kept_rate(self) -> float:
        """Fraction of prompts whose label is the plan of highest value on the prompt itself."""
        return float((self.plans == self.raw_plans).all(axis=1).mean())


def label_row(
    index: int, example: Example, evaluated: Evaluated, *, base_reward: float, choice: Choice
) -> dict[str, Any]:
    """Return one prompt's label as it is stored, both in the journal and in a shard.

    Args:
        index: Index of the prompt in the task.
        example: The prompt.
        evaluated: Every evaluated plan.
        base_reward: Reward of the identity plan.
        choice: The label, and what it was chosen from.
    """
    digits = [bytes(plan + ord("0")).decode() for plan in evaluated.plans]
    return {
        "index": index,
        "prompt_id": example.prompt_id,
        "prompt": example.prompt,
        "choices": None if example.choices is None else list(example.choices),
        "answer": example.answer,
        "completion": example.completion,
        "solution": example.solution,
        "base_reward": base_reward,
        "plans": digits,
        "rewards": evaluated.rewards.tolist(),
        "depths": evaluated.depths.tolist(),
        "visits": evaluated.visits.tolist(),
        "raw_label": choice.raw.plan,
        "raw_value": choice.raw.raw_value,
        "candidates": [item.plan for item in choice.candidates],
        "variant_rewards": [list(item.variant_rewards) for item in choice.candidates],
        "confirmed_values": [item.value for item in choice.candidates],
        "generated": [list(item.answers) for item in choice.candidates if item.answers],
        "right": [list(item.right) for item in choice.candidates if item.answers],
        "label": choice.label.plan,
        "label_value": choice.label.raw_value,
    }


def shard_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return rows as a Parquet file; equal rows give equal bytes for one version of pyarrow."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=_SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def read_shard(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a shard, unchecked.

    Raises:
        LabelError: It is no Parquet file with the columns of labels.
    """
    advice = "delete it and run the same search again; only its prompts are searched again"
    rows: list[dict[str, Any]] = read_parquet(path, _SCHEMA, advice).to_pylist()
    return rows


def check_shard(folder: Path, shard: Shard) -> None:
    """Check that a shard is the file that was written.

    Raises:
        LabelError: It is missing, truncated or altered; the message says how to repair it.
    """
    path = folder / shard.name
    only = f"only its {shard.prompts} prompts are searched again"
    if not path.exists():
        raise LabelError(f"shard {path} is missing: run the same search again; {only}")
    if sha256_file(path) != shard.sha256:
        raise LabelError(
            f"shard {path} is not the file that was written (cut off or altered): delete it and run "
            f"the same search again; {only}"
        )


def read_unfinished(folder: Path, manifest: Manifest) -> tuple[list[dict[str, Any]], int]:
    """Return the rows that no shard holds yet, and how many bytes of the journal they take.

    Args:
        folder: Of the labels.
        manifest: What they are made with.

    Raises:
        LabelError: A line was altered.
    """
    path = folder / JOURNAL
    seen: set[str] = set()

    def check(line: Stored) -> dict[str, Any]:
        row = _check_row(line, manifest)
        if row["prompt_id"] in seen:
            line.damaged(f"prompt {row['prompt_id']} is on an earlier line too")
        seen.add(row["prompt_id"])
        return row

    advice = "remove that line and run the same search again; only its prompt is searched again"
    return read_journal(path, check, advice=advice)


def _check_row(row: Stored, manifest: Manifest) -> dict[str, Any]:
    checked = check_label_row(
        row,
        num_layers=manifest.num_layers,
        depth_penalty=manifest.depth_penalty,
        confirm=manifest.confirm,
        margin=manifest.margin,
        generates=manifest.generates,
    )
    if (checked["solution"] is None) == (manifest.task["kind"] == "solution"):
        row.damaged(
            f"solution is {checked['solution']!r}, but {MANIFEST} says that the task is of kind "
            f"{manifest.task['kind']}; expected a solution in tasks of kind solution only"
        )
    if checked["index"] >= manifest.task["prompts"]:
        row.damaged(
            f"index is {checked['index']}; expected less than {manifest.task['prompts']}, the prompts of the task"
        )
    return checked


def _rows_of(folder: Path, shard: Shard, manifest: Manifest) -> list[dict[str, Any]]:
    """Return the rows of a shard, all of them checked."""
    path = folder / shard.name
    check_shard(folder, shard)
    rows = read_shard(path)
    advice = "delete it and run the same search again; only its prompts are searched again"
    if len(rows) != shard.prompts:
        Stored(None, str(path), advice).damaged(
            f"it holds {len(rows)} prompts; expected {shard.prompts}, as {MANIFEST} says"
        )
    return [
        _check_row(Stored(row, f"{path}, row {number}", advice), manifest)
        for number, row in enumerate(rows)
    ]


def read_labels(
    folder: str | os.PathLike[str],
    *,
    model: Any = None,
    accept_mismatch: bool = False,
    accept_partial: bool = False,
) -> Labels:
    """Read labels, and check that they are complete and belong to a model.

    Args:
        folder: The folder that a search wrote.
        model: The base model that they must belong to; None: this is not checked.
        accept_mismatch: Accept labels that were made with another model.
        accept_partial: Accept labels of a search that has not finished.

    Returns:
        The labels, in the order of the task.

    Raises:
        FileNotFoundError: There is no manifest in the folder.
        LabelError: A shard is missing or damaged, the search is unfinished, or the labels belong to
            another model.
    """
    place = Path(folder)
    if not (place / MANIFEST).exists():
        raise FileNotFoundError(
            f"{place} holds no labels: there is no {MANIFEST}; run a search into it first"
        )
    manifest = read_manifest(place)
    if model is not None:
        check_base_model(
            model,
            manifest.base_model,
            holder=f"the labels in {place}",
            error=LabelError,
            advice="search with this model",
            accepted=accept_mismatch,
            how_to_accept="pass accept_mismatch=True",
        )
    rows: dict[str, dict[str, Any]] = {}
    for shard in manifest.shards:
        rows.update((row["prompt_id"], row) for row in _rows_of(place, shard, manifest))
    asked = manifest.task["prompts"]
    if len(rows) < asked:
        for row in read_unfinished(place, manifest)[0]:
            rows.setdefault(row["prompt_id"], row)
        if not accept_partial:
            raise LabelError(
                f"the search in {place} is unfinished: {len(rows)} of {asked} prompts have a label; run "
                "the same search again to go on, or take what there is (--accept-partial, or accept_partial=True in "
                "Python)"
            )
    if not rows:
        raise LabelError(
            f"the search in {place} has not finished a single prompt; run it again to go on"
        )
    if len({row["index"] for row in rows.values()}) < len(rows) or len(rows) < sum(
        shard.prompts for shard in manifest.shards
    ):
        raise LabelError(
            f"{place} is damaged (two of its labels are of one prompt, or claim one place in the task): run the search "
            "in a new folder"
        )
    return _labels(manifest, sorted(rows.values(), key=lambda row: row["index"]))


def _labels(manifest: Manifest, rows: Sequence[Mapping[str, Any]]) -> Labels:
    evaluated, rewards, every, margins, leads = [], [], [], [], []
    for row in rows:
        plans = plan_rows(row["plans"])
        evaluated.append(
            Evaluated(
                plans,
                np.array(row["rewards"], dtype=np.float64),
                np.array(row["depths"], dtype=np.float64),
                np.array(row["visits"], dtype=np.uint32),
            )
        )
        rewards.append(row["rewards"][row["plans"].index(row["label"])])
        compared, confirmed = _compared(row, manifest)
        every.append(confirmed)
        label = compared[row["label"]]
        margins.append(label.margin_over(compared["1" * manifest.num_layers]))
        others = [item.value for plan, item in compared.items() if plan != row["label"]]
        leads.append(label.value - max(others, default=math.nan))
    chosen = plan_rows([row["label"] for row in rows])
    return Labels(
        manifest=manifest,
        examples=tuple(_example(row) for row in rows),
        base_rewards=np.array([row["base_reward"] for row in rows], dtype=np.float64),
        plans=chosen,
        rewards=np.array(rewards, dtype=np.float64),
        values=np.array([row["label_value"] for row in rows], dtype=np.float64),
        depths=plan_depth(chosen),
        evaluated=tuple(evaluated),
        raw_plans=plan_rows([row["raw_label"] for row in rows]),
        raw_values=np.array([row["raw_value"] for row in rows], dtype=np.float64),
        candidates=tuple(every),
        margins=np.array(margins, dtype=np.float64),
        leads=np.array(leads, dtype=np.float64),
    )


def _compared(
    row: Mapping[str, Any], manifest: Manifest
) -> tuple[dict[str, Candidate], tuple[Candidate, ...]]:
    """Return the plans that the label was chosen from, and those of them that were scored on variants."""
    scored, answers, right = (
        dict(
            zip(
                row["candidates"],
                map(tuple, row[name] or [()] * len(row["candidates"])),
                strict=True,
            )
        )
        for name in ("variant_rewards", "generated", "right")
    )
    every = {
        plan: Candidate(
            plan,
            reward,
            scored.get(plan, ()),
            manifest.depth_penalty * depth,
            answers.get(plan, ()),
            right.get(plan, ()),
        )
        for plan, reward, depth in zip(row["plans"], row["rewards"], row["depths"], strict=True)
    }
    confirmed = {plan: every[plan] for plan in row["candidates"]}
    return confirmed or every, tuple(confirmed.values())


def _example(row: Mapping[str, Any]) -> Example:
    choices = row["choices"]
    return Example(
        prompt=row["prompt"],
        choices=None if choices is None else tuple(choices),
        answer=row["answer"],
        completion=row["completion"],
        solution=row["solution"],
    )
