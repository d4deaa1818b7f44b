"""The offline search: ask the forest, sweep, tell, and store a label for every prompt.

This includes the order of the work and the resumption of a search. `dynadepth.tree_search.forest` chooses plans,
`dynadepth_search.scoring` evaluates them, and `dynadepth_search.storage.label_store` stores labels.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dynadepth import _core
from dynadepth.errors import LabelError, SearchError
from dynadepth.models.fingerprint import check_base_model, fingerprint
from dynadepth.plans import Plans
from dynadepth.shortcuts.maps import Shortcuts
from dynadepth.tree_search.forest import EditPrior, Evaluated, Forest, SearchConfig
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.files.locking import locked
from dynadepth_search.progress import Progress, silent
from dynadepth_search.scoring.objectives import check_answers
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.search.confirming import Confirmation
from dynadepth_search.search.per_prompt_spec import PromptSearchSpec, PromptSearchSummary
from dynadepth_search.storage.choice import Choice
from dynadepth_search.storage.compatibility import (
    check_asked,
    dtype_name,
    shortcut_fields,
    task_fields,
)
from dynadepth_search.storage.label_manifest import Manifest
from dynadepth_search.storage.label_store import LabelStore
from dynadepth_search.storage.labels import label_row

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
    progress: Progress | None = None,
) -> PromptSearchSummary:
    """Find a label for every prompt of a task, or continue a search that was interrupted.

    The prompts are searched in blocks, each with its own forest, so a label depends on its block and the spec, not on
    when it was searched. If a prompt of a block has no label, the whole block is searched again, since the last bits of
    rewards depend on what shares a sweep; the labels that it already had are kept.

    Args:
        model: The base model, in evaluation mode and not wrapped; not changed.
        tokenizer: Tokenizer of the base model.
        task: The prompts.
        folder: Folder of the labels; it is made if it is missing.
        spec: Settings of the search.
        shortcuts: What states take in place of layers that a plan skips; None: nothing.
        progress: Called with the stage, the number of finished steps and the number of all steps.

    Returns:
        A summary of this run.

    Raises:
        ConfigError: The spec does not fit the model.
        LabelError: The folder is damaged or in use, or belongs to another model, task or spec.
        SearchError: A reward is not finite.
        ShortcutError: The shortcuts belong to another base model.
        TaskError: The objective needs answers that the task does not have, or a prompt or a variant of it cannot be
            encoded.
        WrapError: The model is wrapped.
    """
    check_answers(task, spec.objective)
    scorer = Scorer(
        model,
        tokenizer,
        task.scoring,
        chat=task.chat,
        shortcuts=shortcuts,
        max_logit_bytes=spec.max_logit_bytes,
    )
    confirmation = Confirmation(scorer, task, spec)
    # Before anything is written: a prompt that is too long would end the search in its middle.
    for example in task.examples:
        scorer.encode(example)
    confirmation.check(task.examples)
    return _Search(scorer, task, spec, confirmation, progress or silent).run(Path(folder))


class _Search:
    """One run of a search."""

    def __init__(
        self,
        scorer: Scorer,
        task: Task,
        spec: PromptSearchSpec,
        confirmation: Confirmation,
        progress: Progress,
    ) -> None:
        self._scorer, self._task, self._spec, self._progress = scorer, task, spec, progress
        self._confirmation = confirmation
        self._counts = {"searched": 0, "evaluations": 0, "probe_evaluations": 0}
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
            confirming_evaluations=self._confirmation.evaluations,
            **self._counts,
            **self._visits,
        )

    def _probe(self) -> EditPrior:
        examples, spec = self._task.examples, self._spec
        count = min(spec.config.probe_trees, len(examples))
        order = np.random.default_rng(spec.seed).permutation(len(examples))[:count]
        chosen = [examples[index] for index in np.sort(order).tolist()]
        config = replace(spec.config, max_evaluations=1, probe_trees=count)
        forest = self._forest(chosen, config, None)
        batch = forest.ask(count * (2 * forest.num_layers + 1))
        self._scorer.forget()
        for first in range(0, count, _PROBE_BLOCK):
            self._progress("probe", first, count)
            here = (batch.tree >= first) & (batch.tree < first + _PROBE_BLOCK)
            rewards = self._rewards(chosen, batch.plans[here], batch.tree[here])
            forest.tell(batch.ticket[here], rewards)
        self._progress("probe", count, count)
        self._counts["probe_evaluations"] = len(batch)
        return forest.prior()

    def _search_blocks(self, store: LabelStore, manifest: Manifest) -> None:
        examples, size = self._task.examples, self._spec.block_size
        config = replace(self._spec.config, depth_penalty=manifest.depth_penalty)
        for first in range(0, len(examples), size):
            block = examples[first : first + size]
            done = store.done
            self._progress("search", len(done), len(examples))
            if all(item.prompt_id in done for item in block):
                continue
            # The base is scored again in every block; otherwise sweeps would differ from those of a resumed run.
            self._scorer.forget()
            forest = self._forest(block, config, manifest.prior)
            waiting = dict(enumerate(block))
            while not forest.finished:
                batch = forest.ask(size * config.round_size)
                forest.tell(batch.ticket, self._rewards(block, batch.plans, batch.tree))
                finished = [tree for tree in waiting if forest.tree_finished(tree)]
                examples_done = [waiting.pop(tree) for tree in finished]
                evaluated = [forest.evaluated(tree) for tree in finished]
                # Also of prompts that have a label already, since the last bits depend on what shares a sweep.
                choices = self._confirmation.choose(
                    examples_done, evaluated, config.depth_penalty, self._rewards
                )
                for tree, example, tried, choice in zip(
                    finished, examples_done, evaluated, choices, strict=True
                ):
                    self._counts["evaluations"] += len(tried)
                    self._counts["searched"] += 1
                    if example.prompt_id not in done:
                        store.append(_row(first + tree, example, tried, choice))
            store.compact()
        store.compact()
        self._progress("search", len(examples), len(examples))

    def _forest(
        self, examples: Sequence[Example], config: SearchConfig, prior: EditPrior | None
    ) -> Forest:
        keys = np.array([int(item.prompt_id, 16) for item in examples], dtype=np.uint64)
        return Forest(
            self._scorer.num_layers,
            len(examples),
            config=config,
            seed=self._spec.seed,
            prior=prior,
            tree_keys=keys,
        )

    def _rewards(
        self, examples: Sequence[Example], plans: Plans, tree: npt.NDArray[np.uint32]
    ) -> npt.NDArray[np.float64]:
        rewards, naive, executed = self._scorer.rewards(examples, plans, tree, self._spec.objective)
        self._visits["naive_visits"] += naive
        self._visits["executed_visits"] += executed
        return rewards

    def _manifest(self, prior: EditPrior) -> Manifest:
        asked = self._spec.depth_penalty
        return Manifest(
            base_model=fingerprint(self._scorer.model),
            num_layers=self._scorer.num_layers,
            dtype=dtype_name(self._scorer.model),
            task={"name": self._task.name, **task_fields(self._task)},
            search=self._spec.to_dict(),
            depth_penalty=probe_penalty(prior) if asked is None else float(asked),
            prior=prior,
            versions=_versions(),
            shortcuts=shortcut_fields(self._scorer.shortcuts).get("shortcuts"),
        )

    def _check(self, manifest: Manifest, folder: Path) -> None:
        check_base_model(
            self._scorer.model,
            manifest.base_model,
            holder=f"the labels in {folder}",
            error=LabelError,
            advice="search with that model, or into another folder",
        )
        asked = {
            "task": task_fields(self._task),
            "search": self._spec.to_dict(),
            "dtype": dtype_name(self._scorer.model),
            **shortcut_fields(self._scorer.shortcuts),
        }
        stored_task = {key: value for key, value in manifest.task.items() if key != "name"}
        stored = {"task": stored_task, "search": manifest.search, "dtype": manifest.dtype}
        if manifest.shortcuts is not None:
            stored["shortcuts"] = manifest.shortcuts
        check_asked(folder, asked, stored)


def _row(index: int, example: Example, evaluated: Evaluated, choice: Choice) -> dict[str, Any]:
    # A tree starts with the identity plan.
    base_reward = float(evaluated.rewards[0])
    return label_row(index, example, evaluated, base_reward=base_reward, choice=choice)


def _versions() -> dict[str, str]:
    found = {"dynadepth": _core.__version__}
    for name in ("numpy", "pyarrow", "torch", "transformers"):
        found[name] = version(name)
    return found
