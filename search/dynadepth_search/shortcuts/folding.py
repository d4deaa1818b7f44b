"""A plan folded into a plain model: maps of what skipped layers leave behind, multiplied into the layers that stay.

Owns the texts, the states that the maps are fitted on, which of them are kept and what they were measured to do. What
is worked on lies in a folder of its own, and a killed run goes on from there.
"""

import functools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from dynadepth.errors import ConfigError, LabelError, ShortcutError, TaskError
from dynadepth.evaluation.intervals import Interval, mean_interval
from dynadepth.execution.executor import check_unwrapped
from dynadepth.files import write_bytes_atomic
from dynadepth.models.fingerprint import fingerprint, fingerprint_digest
from dynadepth.models.structure import LayerStack, layer_stack, position_arguments
from dynadepth.plans import Plans, check_plans, plan_text
from dynadepth.proving.prove import proved_stack
from dynadepth.shortcuts.folding import SkippedRun, find_projection, fit_fold, skipped_runs
from dynadepth.shortcuts.maps import LinearShortcut
from dynadepth.shortcuts.moments import Moments
from dynadepth.wrapping.bake import bake
from dynadepth_search.data.tasks import Task
from dynadepth_search.files.locking import locked
from dynadepth_search.progress import Progress, silent
from dynadepth_search.scoring.batching import batches_of, pad_left
from dynadepth_search.scoring.own_text import Text, compare_models
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.shortcuts.spec import ShortcutSpec
from dynadepth_search.shortcuts.texts import TextFile
from dynadepth_search.storage.compatibility import dtype_name, mark_asked, task_fields

__all__ = ["FoldedPlan", "FoldedRun", "fold_plan"]

_Floats = npt.NDArray[np.float64]
# One for each run; None: nothing is folded for it.
_Maps = tuple[LinearShortcut | None, ...]
_FEWEST_PROMPTS = 10
# Of the prompts, those that choose are at most this share, and so are those that measure.
_HELD_OUT = 0.1
_ADVICE = "delete it and fold again"


@dataclass(frozen=True, slots=True)
class FoldedRun:
    """What became of one run of skipped layers.

    Args:
        run: The layers.
        states: Whose states its map was fitted on: "base", the base model's own, or "folded", those of the model whose
            runs below are folded already; None: no map is better than none, so nothing is folded.
        ridge: The ridge of the map; None if there is no map.
    """

    run: SkippedRun
    states: str | None
    ridge: float | None


@dataclass(frozen=True, slots=True, eq=False)
class FoldedPlan:
    """A model that runs a plan with what its skipped layers leave behind folded in, and what was measured of it.

    Outcomes are those at every token of held-out texts that chose nothing, as means over texts.

    Args:
        model: The model, in which nothing else differs from what `bake` returns.
        plan: The plan. Shape (num_layers,), uint8.
        runs: The runs of skipped layers, from the first to the last.
        tokens: Number of tokens that the maps were fitted on.
        divergence: KL(base, folded) in nats; None if logits overflow, as for the two other divergences.
        agreement: Share of tokens at which the first choice is the base's.
        plain_divergence: The same of the baked model without anything folded in.
        plain_agreement: The same of that model.
        less_divergence: How much lower the divergence is than the plain one, paired by text.
        more_agreement: How much higher the agreement is than the plain one, paired by text.
    """

    model: Any
    plan: Plans
    runs: tuple[FoldedRun, ...]
    tokens: int
    divergence: Interval | None
    agreement: Interval
    plain_divergence: Interval | None
    plain_agreement: Interval
    less_divergence: Interval | None
    more_agreement: Interval


def fold_plan(
    model: Any,
    tokenizer: Any,
    task: Task,
    plan: Any,
    folder: str | os.PathLike[str],
    spec: ShortcutSpec,
    *,
    progress: Progress = silent,
) -> FoldedPlan:
    """Fold the runs of layers that a plan skips into the layers before them, or go on with a fold.

    Args:
        model: The unwrapped base model, in evaluation mode; not changed.
        tokenizer: Tokenizer of the base model.
        task: Prompts to fit on; answers are not read. Of at least 10 different ones, a tenth each choose and measure.
        plan: The plan. Shape (num_layers,), uint8, or a text that `parse_plan` reads.
        folder: Folder of what is worked on, made if it is missing; it can be deleted when the fold is done.
        spec: Settings; `rank` and `distil_steps` stay at their defaults, and up to `num_heldout` prompts each choose
            and measure.
        progress: Called with the stage, the number of finished steps and the number of all steps.

    Returns:
        The folded model, to be saved by `dynadepth.wrapping.bake.save_checkpoint`.

    Raises:
        ConfigError: The settings ask for a rank or a second stage.
        LabelError: The folder holds a fold with other settings, is damaged, or is in use.
        PlanError: The plan is not one of this model, skips nothing, or skips layer 0.
        ShortcutError: For no run any map is better than none.
        TaskError: There are too few prompts, or one cannot be encoded.
        UnsupportedModelError: A layer has no projection that takes a map.
        WrapError: The model is wrapped.

    Source:
        ReplaceMe, arXiv 2505.02819. Deviations: several runs, each fitted on the states of the base or of the model
        that is folded below, whichever is better; the base's own text; see `dynadepth.shortcuts.folding.fit_fold`.
    """
    if spec.rank is not None or spec.distil_steps:
        raise ConfigError(
            "a map that is folded into weights has full rank and no second stage; leave rank and distil_steps out"
        )
    check_unwrapped(model, before="folding a plan")
    run = _Fold(model, tokenizer, task, plan, Path(folder), spec, progress)
    with locked(run.folder):
        return run.run()


class _Fold:
    """One run of a fold."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task: Task,
        plan: Any,
        folder: Path,
        spec: ShortcutSpec,
        progress: Progress,
    ) -> None:
        self.folder = folder
        self._model, self._spec, self._progress = model, spec, progress
        self._stack = proved_stack(model)
        self._plan = check_plans(plan, self._stack.num_layers, num_rows=1)[0]
        self._runs = skipped_runs(self._plan)
        self._baked = bake(model, self._plan).eval()
        # What a proof has found of a layer holds for its copy.
        self._baked_stack = replace(layer_stack(self._baked), traits=self._stack.traits)
        self._projections = [
            find_projection(self._baked_stack, run.place, called=run.below) for run in self._runs
        ]
        scorer = Scorer(model, tokenizer, task.scoring, chat=task.chat)
        # Of examples with the same prompt, only the first takes part.
        distinct = {example.prompt.strip(): example for example in reversed(task.examples)}
        self._prompts = [scorer.encode(each).prompt_ids for each in reversed(distinct.values())]
        if len(self._prompts) < _FEWEST_PROMPTS:
            raise TaskError(
                f"{len(self._prompts)} different prompts cannot fit what is folded in; give {_FEWEST_PROMPTS} or more"
            )
        self._asked = {
            "base_model": fingerprint_digest(fingerprint(model)),
            "dtype": dtype_name(model),
            "task": task_fields(task),
            "plan": plan_text(self._plan),
            "fit": spec.to_dict(),
        }

    def run(self) -> FoldedPlan:
        mark_asked(self.folder / "asked.json", self._asked, advice=_ADVICE)
        texts = TextFile(self.folder / "texts.jsonl").continued(
            self._model,
            self._prompts,
            new_tokens=self._spec.new_tokens,
            batch_size=2 * self._spec.batch_size,
            progress=self._progress,
        )
        drawn = np.random.default_rng(self._spec.seed).permutation(len(texts)).tolist()
        count = max(1, min(self._spec.num_heldout, round(_HELD_OUT * len(texts))))
        choosing, measuring = ([texts[row] for row in drawn[at : at + count]] for at in (0, count))
        fitted_on = [texts[row] for row in sorted(drawn[2 * count :])]
        moments = self._kept("base", lambda name: self._base_moments(name, fitted_on))
        maps, runs = self._choose(moments, fitted_on, choosing)
        # The maps that are judged last stay in the weights.
        divergence, agreement = self._harms([(None,) * len(runs), maps], measuring, "measuring")
        return FoldedPlan(
            model=self._baked,
            plan=self._plan,
            runs=runs,
            tokens=int(moments[0].tokens),
            divergence=_interval(divergence[1]),
            agreement=mean_interval(agreement[1]),
            plain_divergence=_interval(divergence[0]),
            plain_agreement=mean_interval(agreement[0]),
            less_divergence=_interval(divergence[0] - divergence[1]),
            more_agreement=mean_interval(agreement[1] - agreement[0]),
        )

    def _choose(
        self, moments: Sequence[Moments], fitted_on: Sequence[Text], choosing: Sequence[Text]
    ) -> tuple[_Maps, tuple[FoldedRun, ...]]:
        """Return the maps of all runs and where they are from: those with the lowest divergence on some texts.

        All runs begin with maps fitted on the base's states, with one ridge. Then each, from the first to the last, is
        tried without a map, and with those fitted on the states of the model as it is folded below.
        """
        ridges = self._spec.ridges
        tried: list[_Maps] = [
            tuple(self._fit(number, each, ridge) for number, each in enumerate(moments))
            for ridge in ridges
        ]
        scores = self._scores(tried, choosing, "choosing a ridge")
        best = int(np.argmin(scores))
        maps, lowest = tried[best], scores[best]
        runs = [FoldedRun(run, "base", ridges[best]) for run in self._runs]
        for number, run in enumerate(self._runs):
            others: list[tuple[LinearShortcut | None, FoldedRun]]
            others = [(None, FoldedRun(run, None, None))]
            # Below the first run the states are the base's own, unless the plan repeats a layer there.
            if number or run.place != run.below:
                own = self._folded_moments(number, maps, fitted_on)
                others += [
                    (self._fit(number, own, ridge), FoldedRun(run, "folded", ridge))
                    for ridge in ridges
                ]
            tried = [(*maps[:number], each, *maps[number + 1 :]) for each, _ in others]
            scores = self._scores(tried, choosing, f"choosing for run {number + 1}")
            best = int(np.argmin(scores))
            if scores[best] < lowest:
                maps, lowest, runs[number] = tried[best], scores[best], others[best][1]
        if not any(maps):
            raise ShortcutError(
                f"no map that is folded in beats nothing on {len(choosing)} held-out prompts; give more prompts, or "
                "bake the plan as it is"
            )
        return maps, tuple(runs)

    def _fit(self, number: int, moments: Moments, ridge: float) -> LinearShortcut:
        return fit_fold(moments, ridge=ridge, bias=self._projections[number].has_bias)

    def _base_moments(self, name: str, texts: Sequence[Text]) -> list[Moments]:
        """Return the moments of all runs, from the states of the base."""
        found = [self._zero() for _ in self._runs]
        layers = {each for run in self._runs for each in (run.below, run.last)}
        with _watched(self._stack, layers) as base:
            for ids, mask in self._batches(texts, name):
                _run(self._stack, ids, mask)
                for number, run in enumerate(self._runs):
                    self._add(found[number], number, base[run.below], base[run.last], mask)
        return found

    def _folded_moments(self, number: int, maps: _Maps, texts: Sequence[Text]) -> Moments:
        """Return the moments of one run, from the states of the model as it is folded below, towards the base's."""
        run = self._runs[number]

        def collect(name: str) -> list[Moments]:
            moments = self._zero()
            # The run's own projection gives what the map is to take.
            self._fold((*maps[:number], None, *maps[number + 1 :]))
            with (
                _watched(self._stack, {run.last}) as base,
                _watched(self._baked_stack, {run.place}) as folded,
            ):
                for ids, mask in self._batches(texts, name):
                    _run(self._stack, ids, mask)
                    _run(self._baked_stack, ids, mask)
                    self._add(moments, number, folded[run.place], base[run.last], mask)
            return [moments]

        (found,) = self._kept(f"run {number + 1}", collect)
        return found

    def _zero(self) -> Moments:
        return Moments.zero(self._stack.hidden_size, self._model.device)

    def _add(
        self,
        moments: Moments,
        number: int,
        below: Sequence[torch.Tensor],
        behind: Sequence[torch.Tensor],
        mask: torch.Tensor,
    ) -> None:
        """Add a batch's tokens but each text's first, on which attention often rests whatever it says."""
        counted, device = mask.cumsum(dim=1) > 1, moments.hh.device
        output, state, wanted = (
            each[counted.to(each.device)].to(device, torch.promote_types(each.dtype, torch.float32))
            for each in (*below, behind[1])
        )
        added = self._projections[number].share * output
        moments.add(added, added + (wanted - state), weighed_by=state)

    def _batches(
        self, texts: Sequence[Text], name: str
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        batches = batches_of([len(text.ids) for text in texts], self._spec.batch_size)
        for step, rows in enumerate(batches):
            self._progress(f"states for {name}", step, len(batches))
            yield pad_left((texts[row].ids for row in rows), self._model.device)
        self._progress(f"states for {name}", len(batches), len(batches))

    def _kept(self, name: str, collect: Callable[[str], list[Moments]]) -> list[Moments]:
        """Return moments from their file, which is written first if there is none."""
        path = self.folder / f"{name.replace(' ', '-')}.safetensors"
        if not path.exists():
            tensors = {
                f"{number}.{key}": tensor.cpu().contiguous()
                for number, each in enumerate(collect(name))
                for key, tensor in each.tensors().items()
            }
            write_bytes_atomic(path, save(tensors))
        found: dict[int, dict[str, torch.Tensor]] = {}
        try:
            for key, tensor in load(path.read_bytes()).items():
                number, _, part = key.partition(".")
                found.setdefault(int(number), {})[part] = tensor.to(self._model.device)
            return [Moments.from_tensors(found[number]) for number in sorted(found)]
        except (SafetensorError, OSError, ValueError) as error:
            raise LabelError(f"{path} is damaged ({error}); {_ADVICE}") from error

    def _fold(self, maps: _Maps) -> None:
        for projection, each in zip(self._projections, maps, strict=True):
            projection.fold(each)

    def _scores(self, tried: Sequence[_Maps], texts: Sequence[Text], stage: str) -> _Floats:
        divergence, _ = self._harms(tried, texts, stage)
        # What overflows is no candidate.
        scores: _Floats = np.nan_to_num(divergence.mean(axis=1), nan=np.inf)
        return scores

    def _harms(
        self, tried: Sequence[_Maps], texts: Sequence[Text], stage: str
    ) -> tuple[_Floats, _Floats]:
        """Return divergence and agreement with each of some maps, as means over the tokens of each text."""
        found = np.empty((2, len(tried), len(texts)))
        for number, maps in enumerate(tried):
            self._progress(stage, number, len(tried))
            self._fold(maps)
            for rows in batches_of([len(text.ids) for text in texts], self._spec.batch_size):
                found[:, number, rows] = compare_models(
                    self._model,
                    self._baked,
                    [texts[row] for row in rows],
                    num_places=self._spec.num_places,
                )
        self._progress(stage, len(tried), len(tried))
        return found[0], found[1]


def _interval(values: _Floats) -> Interval | None:
    return mean_interval(values) if np.isfinite(values).all() else None


@contextmanager
def _watched(stack: LayerStack, layers: Collection[int]) -> Iterator[dict[int, list[torch.Tensor]]]:
    """Keep what some layers have returned last: for each its feed-forward module's output, and the state."""
    seen: dict[int, list[torch.Tensor]] = {}
    name = stack.traits.feed_forward if stack.traits is not None else None
    handles = []
    for index in layers:
        seen[index] = [torch.empty(0)] * 2
        layer = stack.layers[index]
        for at, module in enumerate((layer.get_submodule(name or ""), layer)):
            hook = functools.partial(_keep, seen[index], at)
            handles.append(module.register_forward_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _keep(kept: list[torch.Tensor], at: int, _module: Any, _args: Any, output: Any) -> None:
    states = output if isinstance(output, torch.Tensor) else output[0]
    # Some layers add to these in place.
    kept[at] = states.clone()


@torch.inference_mode()
def _run(stack: LayerStack, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """Run a batch, without the output head, which nothing here reads."""
    more = position_arguments(stack.stack, mask)
    stack.stack(input_ids=ids, attention_mask=mask, use_cache=False, **more)
