"""The offline search: a label for every prompt, block by block.

Owns which blocks are to be done and the resumption of a search. A runner does the blocks
(`dynadepth_search.search.prompt_works` says how), and `dynadepth_search.storage.label_store` stores labels.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dynadepth import _core
from dynadepth.errors import LabelError, SearchError
from dynadepth.models.fingerprint import check_base_model, fingerprint
from dynadepth.models.structure import layer_stack
from dynadepth.shortcuts.maps import Shortcuts
from dynadepth.tree_search.forest import EditPrior
from dynadepth_search.data.tasks import Task
from dynadepth_search.files.locking import locked
from dynadepth_search.progress import Progress, silent
from dynadepth_search.runners.local import LocalRunner
from dynadepth_search.runners.work import Loaded, Runner
from dynadepth_search.scoring.objectives import check_answers
from dynadepth_search.search.confirming import Confirmation
from dynadepth_search.search.per_prompt_spec import PromptSearchSpec, PromptSearchSummary
from dynadepth_search.search.prompt_works import (
    BlockJob,
    ProbeJob,
    Reading,
    Rewards,
    RewardWork,
    SearchWork,
    new_forest,
)
from dynadepth_search.storage.compatibility import (
    check_asked,
    dtype_name,
    shortcut_fields,
    task_fields,
)
from dynadepth_search.storage.label_manifest import Manifest
from dynadepth_search.storage.label_store import LabelStore

__all__ = ["probe_penalty", "search_prompts"]


# Number of probed prompts that share a sweep: enough to fill it, few enough to show progress.
_PROBE_BLOCK = 4


def probe_penalty(prior: EditPrior) -> float:
    """Choose lambda from what the probe measured.

    At this lambda, skipping the layer of median cost breaks even on the average prompt: the loss of reward equals the
    price of one visit, lambda / L. Cheaper layers are then worth skipping on their own, and more expensive ones on the
    prompts that do not need them; since several skips together cost more, labels do not skip half of the layers.

    Args:
        prior: Mean effects of single edits on the objective.

    Returns:
        Lambda, in units of the objective for a depth of 1; 0 if half of the skips cost nothing.

    Raises:
        SearchError: The probe measured no skip.
    """
    num_layers = len(prior.mean) // 2
    losses = -prior.mean[:num_layers]
    measured = losses[~np.isnan(losses)]
    if not len(measured):
        raise SearchError(
            "the probe measured no skip, since every layer is protected; name a depth_penalty"
        )
    return max(0.0, float(np.median(measured)) * num_layers)


def search_prompts(
    model: Any,
    tokenizer: Any,
    task: Task,
    folder: str | os.PathLike[str],
    spec: PromptSearchSpec,
    *,
    shortcuts: Shortcuts | None = None,
    runner: Runner | None = None,
    progress: Progress | None = None,
) -> PromptSearchSummary:
    """Find a label for every prompt of a task, or continue a search that was interrupted.

    The prompts are searched in blocks, each with its own forest, so a label depends on its block and the spec, not on
    when it was searched. If a prompt of a block has no label, the whole block is searched again, since the last bits of
    rewards depend on what shares a sweep; the labels that it already had are kept. Blocks may be searched by others and
    finish in any order: in the end the folder is the same, byte for byte.

    Args:
        model: The base model, in evaluation mode and not wrapped; not changed.
        tokenizer: Tokenizer of the base model.
        task: The prompts.
        folder: Folder of the labels; it is made if it is missing.
        spec: Settings of the search.
        shortcuts: What states take in place of layers that a plan skips; None: nothing.
        runner: Who evaluates plans; its workers load the same model. None: this process.
        progress: Called with the stage, the number of finished steps and the number of all steps.

    Returns:
        A summary of this run.

    Raises:
        ConfigError: The spec does not fit the model.
        LabelError: The folder is damaged or in use, or belongs to another model, task or spec.
        RunnerError: The workers of the runner died, or do not run what this process runs.
        SearchError: A reward is not finite.
        ShortcutError: The shortcuts belong to another base model.
        TaskError: The objective needs answers that the task does not have, or a prompt or a variant of it cannot be
            encoded.
        WrapError: The model is wrapped.
    """
    check_answers(task, spec.objective)
    loaded = Loaded(model, tokenizer, shortcuts)
    scorer = Reading.of(task, spec).scorer(loaded)
    # Before anything is written: a prompt that is too long would end the search in its middle.
    scorer.check(task.examples)
    Confirmation(scorer, task.kind, spec).check(task.examples)
    search = _Search(loaded, task, spec, runner or LocalRunner(), progress or silent)
    return search.run(Path(folder))


class _Search:
    """One run of a search."""

    def __init__(
        self,
        loaded: Loaded,
        task: Task,
        spec: PromptSearchSpec,
        runner: Runner,
        progress: Progress,
    ) -> None:
        self._loaded, self._task, self._spec = loaded, task, spec
        self._runner, self._progress = runner, progress
        self._reading = Reading.of(task, spec)
        self._num_layers = layer_stack(loaded.model).num_layers
        self._counts = {
            "searched": 0,
            "evaluations": 0,
            "probe_evaluations": 0,
            "confirming_evaluations": 0,
        }
        self._visits = {"naive_visits": 0, "executed_visits": 0}

    def run(self, folder: Path) -> PromptSearchSummary:
        task = self._task
        with locked(folder):
            store = LabelStore(
                folder, [item.prompt_id for item in task.examples], self._spec.shard_size
            )
            started = time.perf_counter()
            if store.manifest is None:
                manifest = self._manifest(self._probe())
                store.create(manifest)
            else:
                manifest = store.manifest
                self._check(manifest, folder)
            probed = time.perf_counter()
            store.open()
            self._search_blocks(store, manifest)
            finished = time.perf_counter()
        return PromptSearchSummary(
            prompts=len(task.examples),
            depth_penalty=manifest.depth_penalty,
            probe_seconds=probed - started if self._counts["probe_evaluations"] else 0.0,
            search_seconds=finished - probed,
            **self._counts,
            **self._visits,
        )

    def _probe(self) -> EditPrior:
        examples, spec = self._task.examples, self._spec
        count = min(spec.config.probe_trees, len(examples))
        order = np.random.default_rng(spec.seed).permutation(len(examples))[:count]
        chosen = tuple(examples[index] for index in np.sort(order).tolist())
        config = replace(spec.config, max_evaluations=1, probe_trees=count)
        forest = new_forest(self._num_layers, chosen, config, seed=spec.seed)
        batch = forest.ask(count * (2 * forest.num_layers + 1))
        blocks = [
            (batch.tree >= first) & (batch.tree < first + _PROBE_BLOCK)
            for first in range(0, count, _PROBE_BLOCK)
        ]
        jobs = [
            ProbeJob(
                chosen[number * _PROBE_BLOCK : (number + 1) * _PROBE_BLOCK],
                batch.plans[here],
                batch.tree[here] - np.uint32(number * _PROBE_BLOCK),
            )
            for number, here in enumerate(blocks)
        ]
        self._progress("probe", 0, count)
        found: dict[int, Rewards] = {}
        work = RewardWork(self._reading)
        for number, rewards in self._runner.run(work, enumerate(jobs), self._loaded):
            found[number] = rewards
            self._count_visits(rewards.naive, rewards.executed)
            self._progress("probe", min(count, len(found) * _PROBE_BLOCK), count)
        for number, here in enumerate(blocks):
            forest.tell(batch.ticket[here], found[number].rewards)
        self._counts["probe_evaluations"] = len(batch)
        return forest.prior()

    def _search_blocks(self, store: LabelStore, manifest: Manifest) -> None:
        work = SearchWork(self._reading, manifest.depth_penalty, manifest.prior)
        total = len(self._task.examples)
        self._progress("search", store.num_done, total)
        for _, block in self._runner.run(work, self._jobs(store), self._loaded):
            self._counts["searched"] += len(block.rows)
            self._counts["evaluations"] += block.evaluations
            self._counts["confirming_evaluations"] += block.confirming
            self._count_visits(block.naive, block.executed)
            # A prompt that an earlier run had finished keeps its label.
            store.append(*(row for row in block.rows if not store.holds(row["prompt_id"])))
            store.compact()
            self._progress("search", store.num_done, total)
        store.compact()

    def _jobs(self, store: LabelStore) -> Iterator[tuple[int, BlockJob]]:
        """Yield the blocks that are not finished, by their numbers."""
        examples, size = self._task.examples, self._spec.block_size
        for number, first in enumerate(range(0, len(examples), size)):
            block = examples[first : first + size]
            if not all(store.holds(item.prompt_id) for item in block):
                yield number, BlockJob(first, block)

    def _count_visits(self, naive: int, executed: int) -> None:
        self._visits["naive_visits"] += naive
        self._visits["executed_visits"] += executed

    def _manifest(self, prior: EditPrior) -> Manifest:
        asked = self._spec.depth_penalty
        return Manifest(
            base_model=fingerprint(self._loaded.model),
            num_layers=self._num_layers,
            dtype=dtype_name(self._loaded.model),
            task={"name": self._task.name, **task_fields(self._task)},
            search=self._spec.to_dict(),
            depth_penalty=probe_penalty(prior) if asked is None else float(asked),
            prior=prior,
            versions=_versions(),
            shortcuts=shortcut_fields(self._loaded.shortcuts).get("shortcuts"),
        )

    def _check(self, manifest: Manifest, folder: Path) -> None:
        check_base_model(
            self._loaded.model,
            manifest.base_model,
            holder=f"the labels in {folder}",
            error=LabelError,
            advice="search with that model, or into another folder",
        )
        asked = {
            "task": task_fields(self._task),
            "search": self._spec.to_dict(),
            "dtype": dtype_name(self._loaded.model),
            **shortcut_fields(self._loaded.shortcuts),
        }
        stored_task = {key: value for key, value in manifest.task.items() if key != "name"}
        stored = {"task": stored_task, "search": manifest.search, "dtype": manifest.dtype}
        if manifest.shortcuts is not None:
            stored["shortcuts"] = manifest.shortcuts
        check_asked(folder, asked, stored)


def _versions() -> dict[str, str]:
    found = {"dynadepth": _core.__version__}
    for name in ("numpy", "pyarrow", "torch", "transformers"):
        found[name] = version(name)
    return found
