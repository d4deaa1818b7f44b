"""From prompts to a folder of shortcuts: the model's own texts, moments, choice, files; a killed run goes on.

What is worked on lies in `work/` inside the folder, and goes when the shortcuts are written.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynadepth.checkpoints.paths import base_model_name
from dynadepth.config import config_to_dict
from dynadepth.errors import ShortcutError, TaskError
from dynadepth.evaluation.folds import draw_parts
from dynadepth.execution.executor import check_unwrapped
from dynadepth.files import write_text_atomic
from dynadepth.models.fingerprint import fingerprint, fingerprint_digest
from dynadepth.proving.prove import proved_stack
from dynadepth.shortcuts.maps import Shortcuts
from dynadepth.shortcuts.save_load import CONFIG_NAME, load_shortcuts, save_shortcuts
from dynadepth_search.data.splits import prompt_hashes
from dynadepth_search.data.tasks import Task
from dynadepth_search.files.locking import locked
from dynadepth_search.progress import Progress, silent
from dynadepth_search.scoring.own_text import Text
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.shortcuts.card import shortcuts_card
from dynadepth_search.shortcuts.choosing import ChosenMap, choose_maps, measure_again
from dynadepth_search.shortcuts.distilling import Distilled, distil
from dynadepth_search.shortcuts.moment_files import MomentFiles
from dynadepth_search.shortcuts.spec import ShortcutSpec
from dynadepth_search.shortcuts.texts import TextFile
from dynadepth_search.storage.compatibility import check_asked, dtype_name, mark_asked, task_fields

__all__ = ["fit_shortcuts"]

_FEWEST_PROMPTS = 10
# Of the prompts, held-out ones are at most this share.
_HELD_OUT = 0.2
CARD_NAME = "README.md"


def fit_shortcuts(
    model: Any,
    tokenizer: Any,
    task: Task,
    folder: str | os.PathLike[str],
    spec: ShortcutSpec,
    *,
    progress: Progress = silent,
) -> Shortcuts:
    """Fit the shortcuts of a base model on prompts and its own continuations of them, or go on with a fit.

    Args:
        model: The unwrapped base model; not changed.
        tokenizer: Tokenizer of the base model.
        task: Training prompts; answers are not read.
        folder: Folder of the shortcuts; it is made if it is missing.
        spec: Settings of the fit.
        progress: Called with the stage, the number of finished steps and the number of all steps.

    Returns:
        The shortcuts, as loaded from the folder.

    Raises:
        ConfigError: The rank exceeds the width of the states.
        LabelError: The folder holds a fit with other settings, is damaged, or is in use.
        ShortcutError: No layer's map beats nothing, or the folder's files are damaged.
        TaskError: There are too few prompts, or one cannot be encoded.
        WrapError: The model is wrapped.

    Source:
        Ridge regression of a layer's update as in ReplaceMe (arXiv 2505.02819); deviations: a map for each layer
        instead of one for a block, of low rank under the data's metric, on the model's own text, chosen by divergence.
    """
    check_unwrapped(model, before="fitting shortcuts")
    run = _Fit(model, tokenizer, task, Path(folder), spec, progress)
    with locked(run.folder):
        return run.run()


class _Fit:
    """One run of a fit."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task: Task,
        folder: Path,
        spec: ShortcutSpec,
        progress: Progress,
    ) -> None:
        self.folder, self._work = folder, folder / "work"
        self._model, self._task, self._spec, self._progress = model, task, spec, progress
        self._stack = proved_stack(model)
        self._rank = spec.rank_for(self._stack.hidden_size)
        scorer = Scorer(model, tokenizer, task.scoring, chat=task.chat)
        self._prompts = [scorer.encode(example).prompt_ids for example in task.examples]
        names = [example.prompt.strip() for example in task.examples]
        different = list(dict.fromkeys(names))
        if len(different) < _FEWEST_PROMPTS:
            raise TaskError(
                f"{len(different)} different prompts cannot fit shortcuts; give {_FEWEST_PROMPTS} or more"
            )
        count = max(1, min(spec.num_heldout, round(_HELD_OUT * len(different))))
        (drawn,) = draw_parts(different, [count], np.random.default_rng(spec.seed))
        chosen = {different[number] for number in drawn.tolist()}
        self._heldout = sorted(names.index(name) for name in chosen)
        self._fitted_on = [row for row, name in enumerate(names) if name not in chosen]
        self._asked = {
            "base_model": fingerprint_digest(fingerprint(model)),
            "dtype": dtype_name(model),
            "task": task_fields(task),
            "fit": config_to_dict(spec),
        }

    def run(self) -> Shortcuts:
        path = self.folder / CONFIG_NAME
        if path.exists():
            shortcuts = load_shortcuts(self.folder, model=self._model)
            check_asked(path, self._asked, shortcuts.training.get("asked", {}))
            self._clear()
            return shortcuts
        mark_asked(self._work / "asked.json", self._asked, advice="delete the folder and fit again")
        texts = TextFile(self._work / "texts.jsonl").continued(
            self._model,
            self._prompts,
            new_tokens=self._spec.new_tokens,
            batch_size=2 * self._spec.batch_size,
            progress=self._progress,
        )
        fitted_on = [texts[row] for row in self._fitted_on]
        heldout = [texts[row] for row in self._heldout]
        files = MomentFiles(self._work, self._stack, self._model.device, self._spec.batch_size)
        moments = files.collect("moments", fitted_on, self._progress)
        others = files.collect("held-out moments", heldout, self._progress)
        judged = [_shortened(text, self._spec.num_places) for text in heldout]
        chosen = choose_maps(
            self._model,
            self._stack,
            moments,
            others,
            judged,
            rank=self._rank,
            ridges=self._spec.ridges,
            progress=self._progress,
        )
        maps = [each.shortcut for each in chosen]
        if not any(maps):
            raise ShortcutError(
                f"no map of rank {self._rank} beats nothing on {len(heldout)} held-out prompts; give more prompts, or "
                "a lower rank"
            )
        distilled = self._distil(chosen, fitted_on, judged)
        layers = [each.measured for each in chosen]
        if distilled.notes["kept"]:
            layers = measure_again(self._model, self._stack, chosen, distilled.maps, others, judged)
        shortcuts = Shortcuts(
            maps=distilled.maps,
            fingerprint=fingerprint(self._model),
            rank=self._rank,
            base_model=base_model_name(self._model),
            layers=layers,
            training={
                "asked": self._asked,
                "task_name": self._task.name,
                "prompt_hashes": prompt_hashes(self._task.examples),
                "prompts": len(fitted_on),
                "heldout_prompts": len(heldout),
                "tokens": int(moments[0].tokens),
                "distillation": distilled.notes,
            },
        )
        write_text_atomic(self.folder / CARD_NAME, shortcuts_card(shortcuts))
        save_shortcuts(self.folder, shortcuts)
        self._clear()
        return load_shortcuts(self.folder)

    def _distil(
        self, chosen: Sequence[ChosenMap], texts: Sequence[Text], heldout: Sequence[Text]
    ) -> Distilled:
        """Train the maps further if that is asked for."""
        maps = [each.shortcut for each in chosen]
        if not self._spec.distil_steps:
            return Distilled(maps, {"steps": 0, "kept": False})
        harm = [each.measured["divergence"] for each in chosen]
        return distil(
            self._model,
            self._stack,
            maps,
            np.array([np.inf if each is None else each for each in harm]),
            texts,
            heldout,
            self._work / "distillation.safetensors",
            steps=self._spec.distil_steps,
            seed=self._spec.seed,
            progress=self._progress,
        )

    def _clear(self) -> None:
        """Remove what was worked on; a run that was killed here leaves it to the next."""
        shutil.rmtree(self._work, ignore_errors=True)


def _shortened(text: Text, num_places: int) -> Text:
    """Return a text without what follows its last place that is compared."""
    return Text(text.ids[: text.prompt + num_places], text.prompt)
