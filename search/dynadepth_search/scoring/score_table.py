"""The score table: the effect of each plan of a menu on the base model's answers, for each prompt.

The loop that fills a table; `dynadepth_search.storage.score_store` writes its files. Prompts are enough; if there are
right answers, they are graded too.
"""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from dynadepth._core import __version__
from dynadepth.checkpoints.paths import base_model_name
from dynadepth.errors import ConfigError, LabelError, PlanError
from dynadepth.execution.executor import check_unwrapped
from dynadepth.files import write_json_atomic
from dynadepth.models.fingerprint import check_base_model, fingerprint, fingerprint_digest
from dynadepth.models.structure import layer_stack
from dynadepth.plans import Plans, check_plans, identity_plan, parse_plan, plan_text, prefix_numbers
from dynadepth.shortcuts.maps import Shortcuts
from dynadepth.training.menu.menu_data import MenuData
from dynadepth_search.data.splits import prompt_hashes
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.files.locking import locked
from dynadepth_search.progress import Progress, silent
from dynadepth_search.runners.local import LocalRunner
from dynadepth_search.runners.work import Loaded, Runner
from dynadepth_search.scoring.objectives import refuse_solutions
from dynadepth_search.scoring.score_work import ScoreJob, ScoreWork
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.storage.compatibility import (
    check_asked,
    dtype_name,
    shortcut_fields,
    stored_hashes,
    task_fields,
)
from dynadepth_search.storage.score_store import (
    BLOCK,
    MANIFEST,
    METRICS,
    SCHEMA,
    SCHEMA_VERSION,
    is_whole,
    part_name,
    read_manifest,
    read_part,
    write_part,
)

__all__ = ["MANIFEST", "ScoreTable", "menu_data", "read_scores", "score_prompts"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ScoreTable:
    """N prompts under K plans.

    Args:
        plans: The plans, the identity first. Shape (K, layers), uint8.
        examples: The prompts, with their right answers if any, in the order of the task.
        given: The answer under each plan: the best choice, or without choices the best token after the prompt. Shape
            (N, K), int64.
        agreement: 1 where it is the base model's answer; for a completion, the fraction of its tokens for which that
            holds. Shape (N, K), float64.
        total_variation: Total variation distance between base and plan, over the choices, or without choices over the
            vocabulary. Shape (N, K), float64.
        divergence: KL(base, plan) in nats, over the same. Shape (N, K), float64.
        reward: The graded reward; NaN for prompts alone. Shape (N, K), float64.
        correct: 1 where the answer is right; agreement for prompts alone. Shape (N, K), float64.
        views: What a policy reads of the prompts at each layer under each distinct prefix of the plans: the means over
            the windows, then the last token's state. Shape (N, prefixes, num_windows + 1, hidden), model dtype.
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

    def take(self, prompts: Any) -> "ScoreTable":
        """Return the table of some of its prompts, given by index."""
        rows = np.asarray(prompts, dtype=np.int64)
        return replace(
            self,
            examples=tuple(self.examples[row] for row in rows.tolist()),
            given=self.given[rows],
            views={layer: view[rows] for layer, view in self.views.items()},
            **{name: getattr(self, name)[rows] for name in METRICS},
        )

    @property
    def graded(self) -> bool:
        """Whether the prompts have right answers."""
        return self.examples[0].kind != "prompt"

    @property
    def num_windows(self) -> int:
        """Number of windows in the views."""
        return int(self.manifest["asked"]["num_windows"])

    @property
    def prompt_hashes(self) -> tuple[str, ...]:
        """Hashes of all prompts of the task, whether or not they have been scored."""
        known = stored_hashes(self.manifest, "prompt_hashes")
        return tuple(prompt_hashes(self.examples)) if known is None else known

    @property
    def plan_prompt_hashes(self) -> tuple[str, ...]:
        """Hashes of the prompts that chose the plans, as far as they are known."""
        return stored_hashes(self.manifest, "plan_prompt_hashes") or ()

    @property
    def shortcuts(self) -> str | None:
        """The digest of the shortcuts that were in place of skipped layers; None: nothing was."""
        known: str | None = self.manifest["asked"].get("shortcuts")
        return known

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The fingerprint of the base model."""
        known: dict[str, Any] = self.manifest["base_model"]["fingerprint"]
        return known


def score_prompts(
    model: Any,
    tokenizer: Any,
    task: Task,
    plans: Any,
    folder: str | os.PathLike[str],
    *,
    layers: Sequence[int],
    num_windows: int = 0,
    shortcuts: Shortcuts | None = None,
    plan_prompts: Sequence[str] = (),
    runner: Runner | None = None,
    progress: Progress = silent,
) -> ScoreTable:
    """Score prompts under plans, or continue a table whose scoring was interrupted.

    Args:
        model: The unwrapped base model; not changed.
        tokenizer: Tokenizer of the base model.
        task: The prompts, all of one kind.
        plans: The plans, all different, the identity first. Shape (K, layers), uint8.
        folder: Folder of the table; it is made if it is missing.
        layers: Layers whose entering states are stored.
        num_windows: Number of windows that are stored in addition to the last prompt token's state.
        shortcuts: What states take in place of layers that a plan skips; None: nothing.
        plan_prompts: Hashes of the prompts that chose the plans; they are stored so that held-out prompts can be
            compared with them.
        runner: Who scores the blocks; its workers load the same model. None: this process.
        progress: Called with the stage, finished prompts and all of them.

    Returns:
        The table.

    Raises:
        ConfigError: The model does not have a layer, or `num_windows` is negative.
        LabelError: The folder holds a table with other settings, is damaged, or is in use.
        PlanError: The plans are not different plans of this model with the identity first.
        RunnerError: The workers of the runner died, or do not run what this process runs.
        SearchError: A metric is not finite.
        ShortcutError: The shortcuts belong to another base model.
        TaskError: A prompt cannot be encoded, or the answers of the task are to be generated.
        WrapError: The model is wrapped.
    """
    check_unwrapped(model, before="scoring")
    refuse_solutions(task, before="a score table")
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
        **shortcut_fields(shortcuts),
    }
    scorer = Scorer(model, tokenizer, task.scoring, chat=task.chat, shortcuts=shortcuts)
    scorer.check(task.examples)
    with locked(place):
        if (place / MANIFEST).exists():
            stored = read_manifest(place)
            check_asked(place / MANIFEST, asked, stored["asked"])
            known = stored_hashes(stored, "plan_prompt_hashes") or ()
            if not set(plan_prompts) <= set(known):
                stored["plan_prompt_hashes"] = sorted({*known, *plan_prompts})
                write_json_atomic(place / MANIFEST, stored)
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
                # Of all prompts, scored or not yet, as the user wrote them.
                "prompt_hashes": prompt_hashes(task.examples),
                "plan_prompt_hashes": sorted(set(plan_prompts)),
                "base_model": {"name": base_model_name(model), "fingerprint": mark},
                "versions": _versions(),
            }
            write_json_atomic(place / MANIFEST, manifest)
        for litter in place.glob(".*.tmp"):
            litter.unlink(missing_ok=True)
        work = ScoreWork(task.scoring, task.chat, rows, asked)
        jobs = _jobs(task, place)
        total, left = len(task.examples), sum(len(job.examples) for _, job in jobs)
        progress("scoring plans", total - left, total)
        who = runner or LocalRunner()
        for number, part in who.run(work, jobs, Loaded(model, tokenizer, shortcuts)):
            write_part(place / part_name(number), part)
            left -= min(BLOCK, total - number * BLOCK)
            progress("scoring plans", total - left, total)
    return read_scores(place)


def read_scores(
    folder: str | os.PathLike[str], *, model: Any = None, accept_partial: bool = False
) -> ScoreTable:
    """Read a score table, and check that it is complete.

    Args:
        folder: What `score_prompts` filled.
        model: The base model; its fingerprint is compared if it is given.
        accept_partial: Accept a table whose scoring has not finished, and read its blocks up to the first missing one.

    Returns:
        The table.

    Raises:
        FileNotFoundError: There is no table.
        LabelError: It is damaged, unfinished, empty, or of another base model.
    """
    place = Path(folder)
    manifest = read_manifest(place)
    if model is not None:
        check_base_model(
            model,
            manifest["base_model"]["fingerprint"],
            holder=f"the scores in {place}",
            error=LabelError,
            advice="score the prompts with this model",
            made_with=manifest["base_model"]["name"],
        )
    asked = manifest["asked"]
    total = int(asked["task"]["prompts"])
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    views: dict[int, list[torch.Tensor]] = {layer: [] for layer in asked["layers"]}
    for number in range(-(-total // BLOCK)):
        if not is_whole(place, number):
            break
        metrics, states = read_part(place / part_name(number), asked, number)
        for name, values in metrics.items():
            columns[name] += values
        for layer, listed in views.items():
            listed.append(states[str(layer)])
    if not columns["prompt"]:
        raise LabelError(f"{place} holds no scored prompts yet: run the scoring first")
    scored = len(columns["prompt"])
    if scored < total and not accept_partial:
        raise LabelError(
            f"the scoring in {place} is unfinished: {scored} of {total} prompts are scored; score the same again to go "
            "on, or take what there is (--accept-partial, or accept_partial=True in Python)"
        )
    width = len(asked["plans"][0])
    arrays = {name: np.array(columns[name], dtype=np.float64) for name in METRICS}
    return ScoreTable(
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


def menu_data(table: ScoreTable, columns: Any = None) -> MenuData:
    """Return a score table, or some of its plans, as the data that a menu is trained on.

    Args:
        table: The table.
        columns: Indices of the plans to take, in their order on the menu; None: all plans.
    """
    taken = np.arange(len(table.plans)) if columns is None else np.asarray(columns)
    plans = table.plans[taken]
    views = {}
    for layer, view in table.views.items():
        old, new = prefix_numbers(table.plans, layer)[taken], prefix_numbers(plans, layer)
        # The first plan of each new prefix tells which of the old prefixes it was.
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


def _jobs(task: Task, place: Path) -> list[tuple[int, ScoreJob]]:
    """Return the blocks that are not finished, by their numbers."""
    return [
        (number, ScoreJob(number, task.examples[number * BLOCK : (number + 1) * BLOCK]))
        for number in range(-(-len(task.examples) // BLOCK))
        if not is_whole(place, number)
    ]


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
