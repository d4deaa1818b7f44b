"""The damage table: what each plan of a menu does to the base model's answers, prompt by prompt.

Owns the folder of a table (its manifest, and for each block of prompts a Parquet file of figures and a safetensors file
of states) and the loop that fills it. Needs prompts alone; where there are right answers, they are graded too. Knows
nothing of what is learned from a table.
"""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from dynadepth import __version__
from dynadepth.errors import ConfigError, LabelError, PlanError, SearchError, WrapError
from dynadepth.families import layer_stack
from dynadepth.files import (
    read_json,
    sha256_bytes,
    sha256_text,
    write_bytes_atomic,
    write_json_atomic,
)
from dynadepth.fingerprint import compare_fingerprints, fingerprint, fingerprint_digest
from dynadepth.folders import base_model_name
from dynadepth.menu_data import MenuData
from dynadepth.plans import Plans, check_plans, identity_plan, parse_plan, plan_text, prefix_numbers
from dynadepth_search.locking import locked
from dynadepth_search.progress import Progress, silent
from dynadepth_search.resuming import check_asked, dtype_name, task_fields
from dynadepth_search.scoring import Scorer
from dynadepth_search.states import PromptStates
from dynadepth_search.tasks import Example, Task

__all__ = ["MANIFEST", "DamageTable", "menu_data", "read_damage", "score_damage"]

MANIFEST = "damage.json"
SCHEMA_VERSION = 1
# Prompts of a file; a kill loses no more than one block of work.
_BLOCK = 16
_FIGURES = ("agreement", "total_variation", "divergence", "reward", "correct")
_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("choices", pa.list_(pa.string())),
        pa.field("answer", pa.int64()),
        pa.field("completion", pa.string()),
        pa.field("given", pa.list_(pa.int64()), nullable=False),
        *(pa.field(name, pa.list_(pa.float32()), nullable=False) for name in _FIGURES),
    ]
)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class DamageTable:
    """N prompts under K plans.

    Args:
        plans: The identity first. Shape (K, layers), uint8.
        examples: The prompts with what their answers are judged by, in the order of the task.
        given: The answer under each plan: the best choice, or else the best token after the prompt. Shape (N, K),
            int64.
        agreement: 1 where it is the base model's; for a completion the share of its tokens. Shape (N, K), float64.
        total_variation: Between base and plan, over the choices or else the vocabulary. Shape (N, K), float64.
        divergence: KL(base, plan) in nats over the same. Shape (N, K), float64.
        reward: The graded reward; NaN for prompts alone. Shape (N, K), float64.
        correct: 1 where the answer is right; agreement for prompts alone. Shape (N, K), float64.
        views: By layer, what a policy reads of the prompts that come there under each distinct prefix of the plans:
            the windows' means, then the last token's state. Shape (N, prefixes, num_windows + 1, hidden), model dtype.
        manifest: What the table was made with.
    """

    plans: Plans
    examples: tuple[Example, ...]
    given: npt.NDArray[np.int64]
    agreement: Floats
    total_variation: Floats
    divergence: Floats
    reward: Floats
    correct: Floats
    views: dict[int, torch.Tensor]
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, prompts: Any) -> "DamageTable":
        """Return the table of some of its prompts, by index."""
        rows = np.asarray(prompts, dtype=np.int64)
        return replace(
            self,
            examples=tuple(self.examples[row] for row in rows.tolist()),
            given=self.given[rows],
            views={layer: view[rows] for layer, view in self.views.items()},
            **{name: getattr(self, name)[rows] for name in _FIGURES},
        )

    @property
    def graded(self) -> bool:
        """Whether the prompts have right answers."""
        return self.examples[0].kind != "prompt"

    @property
    def num_windows(self) -> int:
        """Windows in the views."""
        return int(self.manifest["asked"]["num_windows"])

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of the base model."""
        known: dict[str, Any] = self.manifest["base_model"]["fingerprint"]
        return known


def score_damage(
    model: Any,
    tokenizer: Any,
    task: Task,
    plans: Any,
    folder: str | os.PathLike[str],
    *,
    layers: Sequence[int],
    num_windows: int = 0,
    progress: Progress = silent,
) -> DamageTable:
    """Score prompts under plans, or go on with a table whose scoring was interrupted.

    Args:
        model: The unwrapped base model; left as it was.
        tokenizer: Of the base model.
        task: The prompts, all of one kind.
        plans: The identity first, all different. Shape (K, layers), uint8.
        folder: Of the table; made if it is missing.
        layers: Layers whose entering states are kept.
        num_windows: Windows kept besides the last prompt token's state.
        progress: Called with the stage, finished prompts and all of them.

    Returns:
        The table.

    Raises:
        ConfigError: A layer is not one of the model, or `num_windows` is negative.
        LabelError: The folder holds a table of something else, is damaged, or is in use.
        PlanError: The plans are not different plans of this model with the identity first.
        SearchError: A figure is not finite.
        TaskError: A prompt cannot be encoded.
        WrapError: The model is wrapped.
    """
    if "dynadepth" in model.__dict__:
        raise WrapError("the model is wrapped; call unwrap_model(model) before scoring")
    stack = layer_stack(model)
    rows = _checked_plans(plans, stack.num_layers)
    wrong = [layer for layer in layers if not 0 <= layer < stack.num_layers]
    if wrong or num_windows < 0:
        raise ConfigError(
            f"states of layers {list(layers)} with {num_windows} windows were asked for; expected layers from 0 to "
            f"{stack.num_layers - 1} and 0 windows or more"
        )
    place = Path(folder)
    mark = fingerprint(model)
    asked = {
        "base_model": fingerprint_digest(mark),
        "dtype": dtype_name(model),
        "task": task_fields(task),
        "plans": [plan_text(plan) for plan in rows],
        "layers": sorted({int(layer) for layer in layers}),
        "num_windows": num_windows,
    }
    scorer = Scorer(model, tokenizer, task.scoring)
    for example in task.examples:
        scorer.encode(example)
    with locked(place):
        if (place / MANIFEST).exists():
            stored = _read_manifest(place)
            check_asked(place / MANIFEST, asked, stored["asked"])
        else:
            stray = sorted(place.glob("part-*"))
            if stray:
                raise LabelError(
                    f"{place} holds {stray[0].name} but no {MANIFEST}, so nothing says what it was scored with: put it "
                    "back, or score into another folder"
                )
            manifest = {
                "schema_version": SCHEMA_VERSION,
                "asked": asked,
                "task_name": task.name,
                "base_model": {"name": base_model_name(model), "fingerprint": mark},
                "versions": _versions(),
            }
            write_json_atomic(place / MANIFEST, manifest)
        for litter in place.glob(".*.tmp"):
            litter.unlink(missing_ok=True)
        total = len(task.examples)
        for start in range(0, total, _BLOCK):
            progress("scoring plans", start, total)
            block = task.examples[start : start + _BLOCK]
            number = start // _BLOCK
            path, block_of = place / _part(number), _block_of(asked, number)
            if not _whole(place, number):
                _score_block(scorer, block, rows, path, asked, stack.hidden_size, block_of)
        progress("scoring plans", total, total)
    return read_damage(place)


def read_damage(folder: str | os.PathLike[str], *, model: Any = None) -> DamageTable:
    """Read a damage table.

    Args:
        folder: What `score_damage` filled.
        model: The base model; its fingerprint is compared if it is given.

    Returns:
        The table, with as many of its blocks as are there from the first one on: an unfinished table can be learned
        from.

    Raises:
        FileNotFoundError: There is no table.
        LabelError: It is damaged, empty, or of another base model.
    """
    place = Path(folder)
    manifest = _read_manifest(place)
    if model is not None:
        differences = compare_fingerprints(
            fingerprint(model), manifest["base_model"]["fingerprint"]
        )
        if differences:
            raise LabelError(
                f"the damage table {place} belongs to {manifest['base_model']['name'] or 'another model'}, not to this "
                f"{type(model).__name__}: {'; '.join(differences)}; score the prompts with this model"
            )
    asked = manifest["asked"]
    total = int(asked["task"]["prompts"])
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    views: dict[int, list[torch.Tensor]] = {layer: [] for layer in asked["layers"]}
    for number in range(-(-total // _BLOCK)):
        if not _whole(place, number):
            break
        figures, states = _read_part(place / _part(number), asked, number)
        for name, values in figures.items():
            columns[name] += values
        for layer, listed in views.items():
            listed.append(states[str(layer)])
    if not columns["prompt"]:
        raise LabelError(f"{place} holds no scored prompts yet: run the scoring first")
    width = len(asked["plans"][0])
    arrays = {name: np.array(columns[name], dtype=np.float64) for name in _FIGURES}
    return DamageTable(
        plans=np.stack([parse_plan(text, width) for text in asked["plans"]]),
        examples=tuple(
            Example(
                prompt=prompt,
                choices=None if choices is None else tuple(choices),
                answer=answer,
                completion=completion,
            )
            for prompt, choices, answer, completion in zip(
                *(columns[name] for name in ("prompt", "choices", "answer", "completion")),
                strict=True,
            )
        ),
        given=np.array(columns["given"], dtype=np.int64),
        views={layer: torch.cat(listed) for layer, listed in views.items()},
        manifest=manifest,
        **arrays,
    )


def menu_data(table: DamageTable, columns: Any = None) -> MenuData:
    """Return a damage table, or some of its plans, as what a menu is trained on.

    Args:
        table: The table.
        columns: Plans to take, in their order on the menu; None takes all.
    """
    taken = np.arange(len(table.plans)) if columns is None else np.asarray(columns)
    plans = table.plans[taken]
    views = {}
    for layer, view in table.views.items():
        old, new = prefix_numbers(table.plans, layer)[taken], prefix_numbers(plans, layer)
        # The first plan of each new prefix says which of the old ones it was.
        first = [int(old[np.flatnonzero(new == number)[0]]) for number in range(int(new.max()) + 1)]
        views[layer] = view[:, first]
    reward = np.exp(np.minimum(table.reward, 0.0))[:, taken] if table.graded else None
    return MenuData(
        plans=plans,
        views=views,
        agreement=table.agreement[:, taken],
        total_variation=table.total_variation[:, taken],
        reward=reward,
        groups=[example.prompt.strip() for example in table.examples],
    )


def _score_block(
    scorer: Scorer,
    examples: Sequence[Example],
    plans: Plans,
    path: Path,
    asked: dict[str, Any],
    hidden_size: int,
    block_of: dict[str, str],
) -> None:
    """Score a block of prompts by itself, so that its figures depend on nothing before it, and write it."""
    scorer.forget()
    states = PromptStates(
        plans,
        asked["layers"],
        num_windows=asked["num_windows"],
        num_prompts=len(examples),
        hidden_size=hidden_size,
        dtype=scorer.model.dtype,
    )
    outcomes = scorer.outcomes(
        examples,
        np.tile(plans, (len(examples), 1)),
        np.repeat(np.arange(len(examples)), len(plans)),
        states=states,
    )
    shape = (len(examples), len(plans))
    figures = {
        name: np.asarray(getattr(outcomes, name), dtype=np.float64).reshape(shape)
        for name in _FIGURES
    }
    graded = examples[0].kind != "prompt"
    for name, values in figures.items():
        bad = np.argwhere(~np.isfinite(values))
        if len(bad) and (graded or name != "reward"):
            row, column = bad[0].tolist()
            raise SearchError(
                f"plan {plan_text(plans[column])} gives prompt {examples[row].prompt[:40]!r} the {name} "
                f"{values[row, column]}; the model's logits overflow there: load it in another dtype, or leave the "
                "plan out"
            )
    data = save_tensors({str(layer): view for layer, view in states.views.items()})
    columns = {
        "prompt_id": [item.prompt_id for item in examples],
        "prompt": [item.prompt for item in examples],
        "choices": [item.choices for item in examples],
        "answer": [item.answer for item in examples],
        "completion": [item.completion for item in examples],
        "given": outcomes.answer.reshape(shape).tolist(),
        **{name: values.astype(np.float32).tolist() for name, values in figures.items()},
    }
    table = pa.table(columns, schema=_SCHEMA)
    seals = {"states_sha256": sha256_bytes(data), "figures_sha256": _seal(table), **block_of}
    table = table.replace_schema_metadata(seals)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    # The figures last: a block counts as finished once they are there.
    write_bytes_atomic(path.with_suffix(".safetensors"), data)
    write_bytes_atomic(path.with_suffix(".parquet"), sink.getvalue().to_pybytes())


def _read_part(
    path: Path, asked: dict[str, Any], number: int
) -> tuple[dict[str, list[Any]], dict[str, torch.Tensor]]:
    figures, states = path.with_suffix(".parquet"), path.with_suffix(".safetensors")
    advice = "delete both files of this block and score again; only its prompts are scored again"
    try:
        table = pq.read_table(figures)
        data = states.read_bytes()
        seals = {
            key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()
        }
        if any(seals.get(key) != value for key, value in _block_of(asked, number).items()):
            raise LabelError(
                f"{figures} is not block {number} of what {MANIFEST} says this table is; {advice}"
            )
        if seals.get("states_sha256") != sha256_bytes(data):
            raise LabelError(f"{states} is not the file that {figures.name} names; {advice}")
        if seals.get("figures_sha256") != _seal(table):
            raise LabelError(f"{figures} is damaged: its figures are not those written; {advice}")
        return {name: table[name].to_pylist() for name in _SCHEMA.names}, load_tensors(data)
    except (pa.ArrowException, SafetensorError, OSError, KeyError, UnicodeDecodeError) as error:
        raise LabelError(f"{figures} or {states.name} is damaged ({error}); {advice}") from error


def _seal(table: pa.Table) -> str:
    """Return a hash of all figures: Parquet's own checksums leave bits of a file unwatched."""
    content = {name: table[name].to_pylist() for name in _SCHEMA.names}
    return sha256_text(json.dumps(content, separators=(",", ":")))


def _block_of(asked: dict[str, Any], number: int) -> dict[str, str]:
    """Return what a block's file says of the table that it is a part of."""
    return {"table": sha256_text(json.dumps(asked, sort_keys=True)), "block": str(number)}


def _whole(folder: Path, number: int) -> bool:
    return all(
        (folder / f"{_part(number)}.{kind}").is_file() for kind in ("parquet", "safetensors")
    )


def _part(number: int) -> str:
    return f"part-{number:05d}"


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; make it with `dynadepth score`")
    content = read_json(path, LabelError)
    if content.get("schema_version") != SCHEMA_VERSION:
        raise LabelError(
            f"{path} has schema version {content.get('schema_version')!r}; this dynadepth-search reads "
            f"{SCHEMA_VERSION}: score the prompts again, or install the version that wrote it"
        )
    if not _is_manifest(content):
        raise LabelError(
            f"{path} is damaged: its keys or their values are not those of a table; score the prompts again in another "
            "folder"
        )
    return content


def _is_manifest(content: dict[str, Any]) -> bool:
    """Say whether everything that is read of a manifest is there and of its kind."""
    asked, base = content.get("asked"), content.get("base_model")
    if not isinstance(asked, dict) or not isinstance(base, dict):
        return False
    task, plans, layers = asked.get("task"), asked.get("plans"), asked.get("layers")
    numbers = [asked.get("num_windows"), *(layers if isinstance(layers, list) else [None])]
    numbers.append(task.get("prompts") if isinstance(task, dict) else None)
    texts = plans if isinstance(plans, list) and plans else [None]
    return (
        all(type(number) is int and number >= 0 for number in numbers)
        and all(isinstance(text, str) and text and set(text) <= set("012") for text in texts)
        and len({len(str(text)) for text in texts}) == 1
        and isinstance(base.get("fingerprint"), dict)
        and isinstance(base.get("name"), str)
        and isinstance(content.get("task_name"), str)
    )


def _checked_plans(plans: Any, num_layers: int) -> Plans:
    rows = check_plans(plans, num_layers)
    if not len(rows):
        raise PlanError("no plans were given; expected the identity plan and others")
    if not np.array_equal(rows[0], identity_plan(num_layers)):
        raise PlanError(
            f"the first plan is {plan_text(rows[0])}; expected the identity plan, which all others are compared with"
        )
    texts = [plan_text(plan) for plan in rows]
    twice = sorted({text for text in texts if texts.count(text) > 1})
    if twice:
        raise PlanError(f"plan {twice[0]} is given twice; give each plan once")
    return rows


def _versions() -> dict[str, str]:
    return {
        "dynadepth": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
