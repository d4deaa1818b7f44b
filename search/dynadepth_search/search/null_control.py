"""The null control of labels: the same search for answers that belong to other prompts.

The label of a prompt that the base model answers wrongly may make the answer right: a *fix*. A search that tries many
plans also finds one by luck: some plan gives any answer that is asked for. How often is measured with the answer key
shuffled between the prompts: what is right for one prompt is what was right for another. Everything else is that of the
real search: the settings, the prior, the penalty on depth, the number of evaluations, the confirmation. If plans knew
nothing of what is right, both searches would fix equally often; so the rate of the shuffled one divided by that of the
real one is the share of fixes that luck explains.

An answer keeps its index among the choices, so with n choices one prompt in n gets its own answer again. That makes
the share rather too large than too small.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dynadepth.errors import TaskError
from dynadepth.evaluation.intervals import Interval, interval_of_means
from dynadepth.files import write_json_atomic
from dynadepth.plans import identity_plan
from dynadepth.shortcuts.maps import Shortcuts
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.files.locking import locked
from dynadepth_search.progress import Progress, silent
from dynadepth_search.runners.work import Loaded
from dynadepth_search.scoring.generating import judge_answers
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.search.null_files import REPORT, SCHEMA_VERSION
from dynadepth_search.search.per_prompt import search_prompts
from dynadepth_search.search.per_prompt_spec import PromptSearchSpec
from dynadepth_search.search.prompt_works import Reading
from dynadepth_search.storage.compatibility import chat_form, check_asked, task_fields
from dynadepth_search.storage.label_manifest import Manifest
from dynadepth_search.storage.label_store import LabelStore
from dynadepth_search.storage.labels import Labels, read_labels

__all__ = ["Fixes", "NullControl", "search_null", "shuffle_answers"]

_BLOCK = 16

_Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Fixes:
    """What labels did to the answers of P prompts.

    Args:
        wrong: Whether the base model's answer is wrong. Shape (P,), bool.
        raw: Whether the raw label makes a wrong answer right. Shape (P,), bool.
        confirmed: Whether the label does. Shape (P,), bool.
    """

    wrong: _Flags
    raw: _Flags
    confirmed: _Flags

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers of prompts and the rates of fixes among the wrong answers; None for no rate."""
        found: dict[str, Any] = {"base_wrong": int(self.wrong.sum())}
        for name in ("raw", "confirmed"):
            fixed = getattr(self, name)
            rate = interval_of_means([fixed, self.wrong], np.divide)
            found[name] = {"fixes": int(fixed.sum()), "rate": _finite(rate)}
        return found


@dataclass(frozen=True, slots=True, eq=False)
class NullControl:
    """The fixes of a search, and those of the same search with the answer key shuffled between the prompts.

    Args:
        real: The fixes of the search.
        null: The fixes with shuffled answers.
        own_answers: Number of prompts whose shuffled answer is their own.
        evaluations: Mean number of evaluated plans per label: of the search, and of the shuffled one.
        seed: Seed of the shuffling.
    """

    real: Fixes
    null: Fixes
    own_answers: int
    evaluations: tuple[float, float]
    seed: int

    def luck(self, kind: str) -> Interval:
        """Return the share of fixes that luck explains: the null rate over the real rate, with its 95 % interval.

        Prompts are resampled as pairs of their real and their shuffled outcome. The share is NaN or infinite if the
        search fixed nothing.

        Args:
            kind: `raw` or `confirmed`, for the fixes of raw labels or of labels.
        """
        columns = [self.null.wrong, self.real.wrong]
        fixed = [getattr(self.null, kind), getattr(self.real, kind)]
        return interval_of_means(
            [*fixed, *columns],
            lambda null, real, null_wrong, real_wrong: (null / null_wrong) / (real / real_wrong),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as values that JSON can hold; None for what is undefined or unbounded."""
        return {
            "schema_version": SCHEMA_VERSION,
            "prompts": len(self.real.wrong),
            "seed": self.seed,
            "own_answers": self.own_answers,
            "evaluations_per_label": dict(zip(("real", "null"), self.evaluations, strict=True)),
            "real": self.real.to_dict(),
            "null": self.null.to_dict(),
            "luck": {name: _finite(self.luck(name)) for name in ("raw", "confirmed")},
        }


def shuffle_answers(task: Task, seed: int) -> Task:
    """Return a task whose answers are shuffled between its prompts.

    Indices of right choices are shuffled between prompts with equally many choices; completions between all prompts.

    Args:
        task: A task with answers.
        seed: Seed of the shuffling.

    Raises:
        TaskError: The task has no answers, or two prompts become one and the same.
    """
    if task.kind == "prompt":
        raise TaskError(
            f"task {task.name!r} has prompts alone, and no answers to shuffle; a null control needs a task with answers"
        )
    rng = np.random.default_rng(seed)
    examples = list(task.examples)
    sizes = np.array([len(item.choices or ()) for item in examples])
    for size in np.unique(sizes):
        here = np.flatnonzero(sizes == size)
        for place, source in zip(here.tolist(), rng.permutation(here).tolist(), strict=True):
            given = task.examples[source]
            examples[place] = replace(
                task.examples[place],
                answer=given.answer,
                completion=given.completion,
                solution=given.solution,
            )
    if len({item.prompt_id for item in examples}) < len(examples):
        raise TaskError(
            f"with seed {seed} two prompts of task {task.name!r} have the same text and get the same completion; give "
            "another seed"
        )
    return replace(task, name=f"{task.name}, answers shuffled", examples=tuple(examples))


def search_null(
    model: Any,
    tokenizer: Any,
    labels: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    shortcuts: Shortcuts | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> NullControl:
    """Measure how many of a search's fixes luck explains, or continue a control that was interrupted.

    Args:
        model: The base model of the labels, in evaluation mode and not wrapped; not changed.
        tokenizer: Tokenizer of the base model.
        labels: Folder of the labels, searched with the objective `reward`.
        folder: Folder of the control; it is made if it is missing. It holds labels like any other, and `null.json`.
        shortcuts: Those that the labels were searched with; None: they were searched without.
        seed: Seed of the shuffling.
        progress: Called with the stage, the number of finished steps and the number of all steps.

    Returns:
        The control, which `null.json` holds as well.

    Raises:
        FileNotFoundError: There are no labels.
        LabelError: The labels are unfinished, damaged or of another model, or the folder belongs to another control.
        ShortcutError: The shortcuts belong to another base model.
        TaskError: The labels were searched with the objective `preserve`, so that no answer is right or wrong.
        WrapError: The model is wrapped.
    """
    found = read_labels(labels, model=model)
    manifest, report = found.manifest, progress or silent
    if manifest.objective != "reward":
        raise TaskError(
            f"the labels in {Path(labels)} were searched with the objective {manifest.objective}, which asks for the "
            "base model's own answers, so none of these is wrong and no label fixes any; a null control needs labels "
            "of the objective reward (--objective reward)"
        )
    fields = manifest.task
    task = Task(fields["name"], found.examples, fields["scoring"], chat_form(fields))
    spec = PromptSearchSpec.from_dict(manifest.search)
    shuffled = shuffle_answers(task, seed)
    place = Path(folder)
    _start(place, shuffled, spec, manifest)
    search_prompts(model, tokenizer, shuffled, place, spec, shortcuts=shortcuts, progress=progress)
    null = read_labels(place, model=model)
    scorer = Reading.of(task, spec).scorer(Loaded(model, tokenizer, shortcuts))
    control = NullControl(
        real=_fixes(scorer, found, "checking answers", report, spec.new_tokens),
        null=_fixes(scorer, null, "checking shuffled answers", report, spec.new_tokens),
        own_answers=sum(
            (ours.answer, ours.completion, ours.solution)
            == (given.answer, given.completion, given.solution)
            for ours, given in zip(task.examples, shuffled.examples, strict=True)
        ),
        evaluations=(found.evaluations, null.evaluations),
        seed=seed,
    )
    write_json_atomic(place / REPORT, control.to_dict())
    return control


def _start(folder: Path, task: Task, spec: PromptSearchSpec, real: Manifest) -> None:
    """Give a new folder the prior and the penalty of the real search, or check that it has them."""
    with locked(folder):
        store = LabelStore(folder, [item.prompt_id for item in task.examples], spec.shard_size)
        manifest = replace(real, task={"name": task.name, **task_fields(task)}, shards=())
        if store.manifest is None:
            store.create(manifest)
            return
        check_asked(folder, _same(manifest), _same(store.manifest))


def _same(manifest: Manifest) -> dict[str, Any]:
    return {"depth_penalty": manifest.depth_penalty, "prior": manifest.prior.to_dict()}


def _fixes(
    scorer: Scorer, labels: Labels, stage: str, progress: Progress, new_tokens: int
) -> Fixes:
    """Answer every prompt under the identity plan, its raw label and its label."""
    base = np.broadcast_to(identity_plan(scorer.num_layers), labels.plans.shape)
    plans = np.stack([base, labels.raw_plans, labels.plans], axis=1)
    right: list[_Flags] = []
    for first in range(0, len(labels), _BLOCK):
        progress(stage, first, len(labels))
        right.append(
            _right(scorer, labels.examples[first : first + _BLOCK], plans[first:], new_tokens)
        )
    progress(stage, len(labels), len(labels))
    kept, raw, confirmed = np.concatenate(right).T
    return Fixes(wrong=~kept, raw=~kept & raw, confirmed=~kept & confirmed)


def _right(
    scorer: Scorer, examples: Sequence[Example], plans: npt.NDArray[np.uint8], new_tokens: int
) -> _Flags:
    """Return whether answers are right. Shape (examples, plans of each), bool."""
    scorer.forget()
    here = plans[: len(examples)]
    tree = np.repeat(np.arange(len(examples)), here.shape[1])
    asked = here.reshape(len(tree), -1)
    if examples[0].kind == "solution":
        correct = np.array(judge_answers(scorer, examples, asked, tree, new_tokens=new_tokens)[1])
    else:
        correct = scorer.outcomes(examples, asked, tree).correct
    return correct.reshape(len(examples), -1)


def _finite(interval: Interval) -> dict[str, float | int | None] | None:
    if not math.isfinite(interval.mean):
        return None
    return {
        name: value if math.isfinite(value) else None for name, value in interval.to_dict().items()
    }
