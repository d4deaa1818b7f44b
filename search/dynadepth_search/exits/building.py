"""From prompts to trained exits: texts, states, layers, lenses, routers, calibration; a killed run goes on.

What is worked on lies beside the routers folder, in one named after it with `.work`, and goes when the exits are there.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from dynadepth.checkpoints.paths import base_model_name
from dynadepth.checkpoints.trained_exits import TrainedExits
from dynadepth.config import config_to_dict
from dynadepth.errors import TaskError
from dynadepth.evaluation.folds import draw_parts
from dynadepth.execution.executor import check_unwrapped
from dynadepth.execution.reading import StateReader
from dynadepth.exits.dial import Dial
from dynadepth.exits.exit_forward import Exits
from dynadepth.exits.exit_heads import ExitWeights, TrainedHead
from dynadepth.files import write_bytes_atomic
from dynadepth.models.fingerprint import fingerprint, fingerprint_digest
from dynadepth.proving.prove import proved_stack
from dynadepth_search.data.splits import prompt_hashes
from dynadepth_search.data.tasks import Task
from dynadepth_search.exits.calibrating import Row, answer_rows, calibration_of, measure_row
from dynadepth_search.exits.choosing import ExitScores, choose_layers, passes_at, thresholds_for
from dynadepth_search.exits.exit_states import ExitStates, collect_states
from dynadepth_search.exits.lens_training import affine_lens, read_choices, train_lens
from dynadepth_search.exits.producing import produce
from dynadepth_search.exits.router_training import router_scores, train_router
from dynadepth_search.exits.spec import ExitSpec
from dynadepth_search.files.journal import Journal, read_journal
from dynadepth_search.files.locking import locked
from dynadepth_search.files.stored import Stored
from dynadepth_search.progress import Progress, silent
from dynadepth_search.scoring.own_text import Text
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.shortcuts.texts import TextFile
from dynadepth_search.storage.compatibility import dtype_name, mark_asked, task_fields

__all__ = ["fit_exits"]

_FEWEST_PROMPTS = 20
_ADVICE = "delete the folder and train again"
# Thresholds that are measured keep these shares of tokens of given text; produced text keeps less.
_SHARES = (0.998, 0.995, 0.99, 0.98, 0.965, 0.945, 0.92)
# What text to learn from is produced at.
_PRODUCED_AT = 0.96


def fit_exits(
    model: Any,
    tokenizer: Any,
    task: Task,
    folder: Path,
    spec: ExitSpec,
    *,
    progress: Progress = silent,
) -> TrainedExits:
    """Train exit heads of a base model on prompts and its own continuations of them, or go on with a training.

    Args:
        model: The unwrapped base model; not changed.
        tokenizer: Tokenizer of the base model.
        task: Training prompts; answers are not read.
        folder: What is worked on; removed by the caller when the exits are written.
        spec: Settings.
        progress: Called with the stage, the number of finished steps and of all.

    Returns:
        The exits, not yet on disk.

    Raises:
        ConfigError: An exit layer is not one of the model's.
        LabelError: The folder holds a training with other settings, is damaged, or is in use.
        TaskError: There are too few prompts, or one cannot be encoded.
        UnsupportedModelError: No token of this model may leave early.
        WrapError: The model is wrapped.
    """
    check_unwrapped(model, before="training exits")
    run = _Training(model, tokenizer, task, folder, spec, progress)
    with locked(folder):
        return run.run()


class _Training:
    """One run of a training."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task: Task,
        folder: Path,
        spec: ExitSpec,
        progress: Progress,
    ) -> None:
        self._model, self._task, self._spec, self._progress = model, task, spec, progress
        self._folder, self._device = folder, model.device
        self._stack = proved_stack(model)
        self._num_layers = self._stack.num_layers
        self._candidates = spec.candidates(self._num_layers)
        self._width = spec.lens_width or max(1, self._stack.hidden_size // 4)
        scorer = Scorer(model, tokenizer, task.scoring, chat=task.chat)
        names = [example.prompt.strip() for example in task.examples]
        first = {name: row for row, name in reversed(list(enumerate(names)))}
        rows = sorted(first.values())
        if len(rows) < _FEWEST_PROMPTS:
            raise TaskError(
                f"{len(rows)} different prompts cannot train exits; give {_FEWEST_PROMPTS} or more"
            )
        prompts = [scorer.encode(task.examples[row]).prompt_ids for row in rows]
        count = max(1, round(spec.heldout * len(rows)))
        (drawn,) = draw_parts(
            [names[row] for row in rows], [count], np.random.default_rng(spec.seed)
        )
        held = set(drawn.tolist())
        self._train = [prompt for row, prompt in enumerate(prompts) if row not in held]
        self._heldout = [prompt for row, prompt in enumerate(prompts) if row in held]
        self._asked = {
            "base_model": fingerprint_digest(fingerprint(model)),
            "dtype": dtype_name(model),
            "task": task_fields(task),
            "fit": config_to_dict(spec),
        }

    def run(self) -> TrainedExits:
        mark_asked(self._folder / "asked.json", self._asked, advice=_ADVICE)
        train = self._states("train", self._train, self._candidates)
        # Exits are judged on the model's own text.
        heldout = self._states("held-out", self._heldout, self._candidates, own_only=True)
        with StateReader(self._model, self._stack) as reader:
            affine = {
                layer: affine_lens(train, layer, width=self._width) for layer in self._candidates
            }
            scores = {}
            for layer, lens in affine.items():
                right = [self._right(lens, each, layer, reader) for each in (train, heldout)]
                scores[layer] = self._scores(train, heldout, layer, *right)[1]
            layers, tried = choose_layers(scores, self._num_layers, most=self._spec.most_exits)
            layers = self._spec.layers or layers
            lenses = {layer: self._lens(affine[layer], train, layer, reader) for layer in layers}
        right_train, right_heldout = (self._all_right(lenses, each) for each in (train, heldout))
        heads, scores = self._heads(lenses, train, heldout, right_train, right_heldout)
        notes: dict[str, Any] = {"passes of layers": tried, "given text": [self._given(scores)]}
        for number in range(self._spec.rounds):
            (threshold,) = thresholds_for(scores, [_PRODUCED_AT], self._num_layers)
            texts = self._produced(number, heads, threshold)
            more = self._collect(f"round {number + 1}", texts, layers, own_only=True)
            chosen = {layer: train.before[layer] for layer in layers}
            train = ExitStates.joined([replace(train, before=chosen), more])
            # The lenses stay, so what they say of the former tokens is known.
            right_more = self._all_right(lenses, more)
            right_train = {
                layer: torch.cat([known, right_more[layer]]) for layer, known in right_train.items()
            }
            heads, scores = self._heads(lenses, train, heldout, right_train, right_heldout)
            notes["given text"].append(self._given(scores))
        rows = self._rows(heads, scores)
        never = 1.0 + max(float(each.score.max()) for each in scores.values())
        promises = calibration_of(rows, never=never)
        # Of the prompts alone: they are answered as the base model would begin.
        first = {
            layer: ExitScores(each.score[heldout.first], each.right[heldout.first])
            for layer, each in scores.items()
        }
        return TrainedExits(
            heads=tuple(heads),
            layers=self._num_layers,
            promises=promises,
            window=self._spec.window,
            answers=calibration_of(answer_rows(first, self._num_layers), never=never)
            if heldout.first.any()
            else None,
            calibration=promises.budgets(),
            fingerprint=fingerprint(self._model),
            base_model=base_model_name(self._model),
            training={
                "asked": self._asked,
                "task": {"name": self._task.name, **task_fields(self._task)},
                "objective": "exits",
                "prompt_hashes": prompt_hashes(self._task.examples),
                "train_prompts": len(self._train),
                "validation_prompts": len(self._heldout),
                "prompts_of_task": len(self._task.examples),
                "tokens": len(train),
                **notes,
            },
        )

    def _states(
        self, name: str, prompts: Sequence[Any], layers: Sequence[int], *, own_only: bool = False
    ) -> ExitStates:
        texts = TextFile(self._folder / f"{name}.jsonl").continued(
            self._model,
            prompts,
            new_tokens=self._spec.new_tokens,
            batch_size=2 * self._spec.batch_size,
            progress=self._progress,
        )
        return self._collect(name, texts, layers, own_only=own_only)

    def _collect(
        self, name: str, texts: Sequence[Text], layers: Sequence[int], *, own_only: bool = False
    ) -> ExitStates:
        found = collect_states(
            self._model,
            self._stack,
            texts,
            layers,
            self._folder / name.replace(" ", "-"),
            batch_size=self._spec.batch_size,
            name=f"states, {name}",
            progress=self._progress,
        )
        if own_only:
            found = found.take(found.own)
        generator = torch.Generator().manual_seed(self._spec.seed)
        rows = torch.randperm(len(found), generator=generator)[: self._spec.most_positions]
        # What a prompt is answered with is known of every prompt.
        return found.take(torch.cat([rows, found.first.nonzero()[:, 0]]).unique())

    def _lens(
        self, lens: dict[str, Tensor], train: ExitStates, layer: int, reader: StateReader
    ) -> dict[str, Tensor]:
        path = self._folder / f"lens-{layer}.safetensors"
        if not path.exists() and self._spec.lens_epochs:
            lens = train_lens(
                lens,
                train,
                layer,
                reader.read,
                epochs=self._spec.lens_epochs,
                seed=self._spec.seed,
                device=self._device,
                progress=self._progress,
            )
            write_bytes_atomic(path, save(lens))
        return load_file(path) if path.exists() else lens

    def _right(
        self, lens: dict[str, Tensor], states: ExitStates, layer: int, reader: StateReader
    ) -> Tensor:
        """Return whether the reading through a lens is the base model's choice, at each token. Shape (n,), bool."""
        self._progress(f"reading through the lens of layer {layer}", 0, 1)
        choices, _ = read_choices(lens, states.before[layer], reader.read, self._device)
        self._progress(f"reading through the lens of layer {layer}", 1, 1)
        return choices == states.choice

    def _all_right(
        self, lenses: dict[int, dict[str, Tensor]], states: ExitStates
    ) -> dict[int, Tensor]:
        with StateReader(self._model, self._stack) as reader:
            return {
                layer: self._right(lens, states, layer, reader) for layer, lens in lenses.items()
            }

    def _scores(
        self,
        train: ExitStates,
        heldout: ExitStates,
        layer: int,
        right_train: Tensor,
        right_heldout: Tensor,
    ) -> tuple[dict[str, Tensor], ExitScores]:
        """Return a router for a lens, and what both say of held-out tokens."""
        self._progress(f"training the router of layer {layer}", 0, 1)
        router = train_router(
            train.before[layer],
            right_train,
            width=self._spec.router_width,
            epochs=self._spec.router_epochs,
            seed=self._spec.seed,
            device=self._device,
        )
        score = router_scores(router, heldout.before[layer], self._device)
        self._progress(f"training the router of layer {layer}", 1, 1)
        return router, ExitScores(score, right_heldout)

    def _heads(
        self,
        lenses: dict[int, dict[str, Tensor]],
        train: ExitStates,
        heldout: ExitStates,
        right_train: dict[int, Tensor],
        right_heldout: dict[int, Tensor],
    ) -> tuple[list[ExitWeights], dict[int, ExitScores]]:
        heads, scores = [], {}
        for layer, lens in lenses.items():
            router, scores[layer] = self._scores(
                train, heldout, layer, right_train[layer], right_heldout[layer]
            )
            heads.append(ExitWeights(layer, {**lens, **router}))
        return heads, scores

    def _given(self, scores: dict[int, ExitScores]) -> dict[str, Any]:
        """Return passes on held-out tokens of given text, by the share that is kept."""
        shares = (0.99, 0.98, 0.95)
        thresholds = thresholds_for(scores, shares, self._num_layers)
        return {
            f"{share:g}": round(passes_at(scores, threshold, self._num_layers)[0], 4)
            for share, threshold in zip(shares, thresholds, strict=True)
        }

    def _produced(self, number: int, heads: Sequence[ExitWeights], threshold: float) -> list[Text]:
        """Return texts of the training prompts with exits on."""
        path = self._folder / f"round-{number + 1}.jsonl"

        def read(line: Stored) -> list[int]:
            return [token.whole(0) for token in line.fields(["new"])["new"].entries()]

        known, length = read_journal(path, read, advice=_ADVICE)
        if len(known) < len(self._train):
            dial = Dial(threshold, fidelity=1.0, adapt=False)
            exits = Exits(
                tuple(TrainedHead(head, dial) for head in heads), self._spec.window, audit=0
            )
            texts = produce(
                self._model,
                self._train,
                exits,
                new_tokens=self._spec.new_tokens,
                batch_size=self._spec.batch_size,
                name=f"producing text, round {number + 1}",
                progress=self._progress,
            )
            known = [each.text.ids[each.text.prompt :].tolist() for each in texts]
            Journal(path, length).replace({"new": each} for each in known)
        return [
            Text(np.concatenate([prompt, np.array(new, dtype=np.int64)]), len(prompt))
            for prompt, new in zip(self._train, known, strict=True)
        ]

    def _rows(self, heads: Sequence[ExitWeights], scores: dict[int, ExitScores]) -> list[Row]:
        """Return what held-out prompts have at each threshold; one row is a line of a journal."""
        path = self._folder / "calibration.jsonl"

        def read(line: Stored) -> Row:
            found = line.fields(["threshold", "passes", "changed"])
            columns = [np.array(found[name].numbers()) for name in ("passes", "changed")]
            if len(columns[0]) != len(columns[1]):
                line.damaged("passes and changed of different lengths")
            return Row(found["threshold"].number(), *columns)

        rows, length = read_journal(path, read, advice=_ADVICE)
        journal = Journal(path, length)
        wanted = thresholds_for(scores, _SHARES, self._num_layers)
        for threshold in dict.fromkeys(wanted[len(rows) :]):
            if not np.isfinite(threshold):
                continue
            row = measure_row(
                self._model,
                self._heldout,
                heads,
                threshold,
                window=self._spec.window,
                new_tokens=self._spec.new_tokens,
                batch_size=self._spec.batch_size,
                num_layers=self._num_layers,
                progress=self._progress,
            )
            rows.append(row)
            journal.append(
                {
                    "threshold": row.threshold,
                    "passes": row.passes.tolist(),
                    "changed": row.changed.tolist(),
                }
            )
        return rows


def clear_work(folder: Path) -> None:
    """Remove what a finished training worked on; a run that was killed here leaves it to the next."""
    shutil.rmtree(folder, ignore_errors=True)
