"""The second stage of a fit: the maps are trained further, through the frozen model, by its divergence from itself.

Gradients reach the maps alone. Rows of a batch skip different layers, drawn as a search would choose them: layers that
are missed less are drawn more often. A text's own tokens are its data, so nothing is labelled.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from dynadepth.errors import LabelError
from dynadepth.execution.executor import NOTHING, Skipped
from dynadepth.files import parse_json, write_bytes_atomic
from dynadepth.models.structure import LayerStack, position_arguments
from dynadepth.plans import SKIP, Plans, identity_plan
from dynadepth.proving.driving import FixedPlans
from dynadepth.shortcuts.maps import LinearShortcut
from dynadepth_search.progress import Progress
from dynadepth_search.scoring.batching import pad_left
from dynadepth_search.scoring.own_text import Text, score_texts

__all__ = ["Distilled", "distil", "draw_plans"]

_LEARNING_RATE = 3e-4
_WARM_UP = 20
_ROWS = 8
# Places of a batch whose vocabularies are compared: the head is the widest layer of a small model.
_PLACES = 256
_EVERY = 50
# Evaluations without progress before training stops.
_PATIENCE = 3
_WRITE_SECONDS = 30.0
# Stands for a divergence that is not finite; nats of ordinary models are far below.
_OVERFLOW = 1e9
# Shares of the layers that the plans of the held-out texts skip, and plans of each.
_SHARES = (0.05, 0.1, 0.2, 0.3)
_PLANS = 3

_Maps = Sequence[LinearShortcut | None]


@dataclass(frozen=True, slots=True)
class Distilled:
    """What the second stage came to.

    Args:
        maps: The maps to keep: the trained ones, or those given.
        notes: What was measured, as values that JSON can hold.
    """

    maps: list[LinearShortcut | None]
    notes: dict[str, Any]


def draw_plans(
    harm: npt.NDArray[np.float64], shares: Sequence[float], rng: np.random.Generator
) -> Plans:
    """Draw plans that skip layers, one for each share, as a search would choose them.

    Args:
        harm: Divergence of the plan that skips one layer alone; infinite for layers that are never skipped. Shape
            (layers,), float64.
        shares: The share of the layers that each plan skips; at least one layer is skipped.
        rng: Draws.

    Returns:
        Plans. Shape (plans, layers), uint8.
    """
    free = int(np.isfinite(harm).sum())
    plans = np.tile(identity_plan(len(harm)), (len(shares), 1))
    for plan, share in zip(plans, shares, strict=True):
        count = min(max(1, round(share * len(harm))), free, len(harm) - 1)
        # Adding Gumbel noise to a logarithm and taking the largest draws without replacement.
        keys = rng.gumbel(size=len(harm)) - np.log(np.maximum(harm, 1e-6))
        plan[np.argsort(-keys, kind="stable")[:count]] = int(SKIP)
    return plans


def distil(
    model: Any,
    stack: LayerStack,
    maps: _Maps,
    harm: npt.NDArray[np.float64],
    texts: Sequence[Text],
    heldout: Sequence[Text],
    file: Path,
    *,
    steps: int,
    seed: int,
    progress: Progress,
) -> Distilled:
    """Train maps further, or go on with a training that was interrupted.

    Args:
        model: The unwrapped base model; its weights get no gradients, and it is not changed.
        stack: Its layers, proved.
        maps: The fitted maps; layers without one are never skipped here.
        harm: See `draw_plans`.
        texts: The texts to train on.
        heldout: Other texts: every second one stops the training, the others decide whether it is kept.
        file: Where its state is kept.
        steps: The most steps of the optimiser.
        seed: Seed of everything that is drawn.
        progress: Called with the stage, the number of finished steps and the number of all steps.

    Returns:
        The maps to keep. They are the trained ones if these lower the divergence on the held-out texts by more than its
        standard error, over plans of all depths.

    Raises:
        LabelError: The file is damaged.
    """
    run = _Distillation(model, stack, maps, harm, file, seed)
    return run.run(texts, heldout, steps, progress)


class _Distillation:
    def __init__(
        self,
        model: Any,
        stack: LayerStack,
        maps: _Maps,
        harm: npt.NDArray[np.float64],
        file: Path,
        seed: int,
    ) -> None:
        self._model, self._stack, self._given, self._file = model, stack, list(maps), file
        self._harm = np.where([each is not None for each in maps], harm, np.inf)
        self._seed = seed
        self._weights: dict[str, nn.Parameter] = {
            f"{layer}.{name}": nn.Parameter(tensor.detach().float().to(model.device))
            for layer, each in enumerate(maps)
            if each is not None
            for name, tensor in (("A", each.A), ("B", each.B), ("b", each.b))
            if tensor is not None
        }
        self._optimiser = torch.optim.Adam(self._weights.values(), lr=_LEARNING_RATE)
        self._rng = np.random.default_rng([seed, 1])
        shares = np.repeat(_SHARES, _PLANS)
        self._plans = draw_plans(self._harm, shares.tolist(), self._rng)

    def run(
        self, texts: Sequence[Text], heldout: Sequence[Text], steps: int, progress: Progress
    ) -> Distilled:
        stopping, deciding = heldout[::2], heldout[1::2] or heldout
        before = self._judge(self._given, deciding)
        state = self._read()
        best = {name: weight.detach().clone() for name, weight in self._weights.items()}
        history: list[float] = [] if state is None else state["history"]
        step = 0 if state is None else int(state["step"])
        if state is not None:
            best = state["best"]
        written = time.monotonic()
        with self._frozen():
            while step < steps and not _stalled(history):
                progress("distilling shortcuts", step, steps)
                self._step(texts, step, steps)
                step += 1
                if step % _EVERY == 0 or step == steps:
                    value = float(self._judge(self._maps(self._weights), stopping).mean())
                    if value < min(history, default=np.inf):
                        best = {n: w.detach().clone() for n, w in self._weights.items()}
                    history.append(value if np.isfinite(value) else _OVERFLOW)
                if step == steps or time.monotonic() - written > _WRITE_SECONDS:
                    self._write(step, history, best)
                    written = time.monotonic()
        progress("distilling shortcuts", steps, steps)
        trained = self._maps(best)
        after = self._judge(trained, deciding)
        # What overflows before and after has not changed.
        change = np.nan_to_num(after - before, nan=0.0).mean(axis=0)
        error = float(change.std(ddof=1) / np.sqrt(len(change))) if len(change) > 1 else np.inf
        kept = bool(change.mean() < -error)
        groups = [slice(first, first + _PLANS) for first in range(0, len(before), _PLANS)]
        notes = {
            "steps": step,
            "kept": kept,
            "change": _finite(float(change.mean())),
            "standard_error": error if np.isfinite(error) else None,
            "by_share_of_layers_skipped": [
                {
                    "share": share,
                    "divergence_before": _finite(float(before[group].mean())),
                    "divergence_after": _finite(float(after[group].mean())),
                }
                for share, group in zip(_SHARES, groups, strict=True)
            ],
            "history": history,
        }
        return Distilled(trained if kept else self._given, notes)

    def _step(self, texts: Sequence[Text], step: int, steps: int) -> None:
        """Train on one batch; what is drawn depends on the seed and the step alone, so that a killed run goes on."""
        rng = np.random.default_rng([self._seed, 2, step])
        rows = rng.choice(len(texts), size=min(_ROWS, len(texts)), replace=False)
        shares = rng.uniform(0.0, max(_SHARES), size=len(rows)).tolist()
        plans = draw_plans(self._harm, shares, rng)
        ids, mask = pad_left((texts[row].ids for row in rows), self._model.device)
        real = torch.nonzero((mask.cumsum(dim=1) > 1).flatten()).flatten()
        places = real[torch.from_numpy(rng.permutation(len(real))[:_PLACES]).to(real.device)]
        with torch.no_grad():
            base = self._log_probs(ids, mask, places)
        with FixedPlans(self._model, self._stack, plans, self._skips()):
            found = self._log_probs(ids, mask, places)
        # The same sum as in `score_texts`, as a mean over the places.
        loss = torch.where(base.isfinite(), base.exp() * (base - found), 0.0).sum(dim=-1).mean()
        share = min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + np.cos(np.pi * step / steps))
        for group in self._optimiser.param_groups:
            group["lr"] = _LEARNING_RATE * share
        self._optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._weights.values(), 1.0)
        # A batch whose logits overflow under its plans teaches nothing.
        if bool(torch.isfinite(norm)):
            self._optimiser.step()

    def _log_probs(self, ids: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        """Return log-probabilities at some places. Shape (places, vocabulary), float32 or better."""
        head = self._model.get_output_embeddings()

        def only_places(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
            return (args[0].flatten(0, 1).index_select(0, places).unsqueeze(0),)

        handle = head.register_forward_pre_hook(only_places)
        try:
            logits = self._model(
                input_ids=ids,
                attention_mask=mask,
                use_cache=False,
                **position_arguments(self._model, mask),
            ).logits[0]
        finally:
            handle.remove()
        exact = torch.promote_types(logits.dtype, torch.float32)
        return log_softmax(logits, dim=-1, dtype=exact)

    def _skips(self) -> list[Skipped]:
        return [
            NOTHING if each is None else Skipped(_Trained(self._weights, layer))
            for layer, each in enumerate(self._given)
        ]

    def _maps(self, weights: Mapping[str, Tensor]) -> list[LinearShortcut | None]:
        """Return maps in the dtypes and shapes of those given."""
        found: list[LinearShortcut | None] = []
        for layer, each in enumerate(self._given):
            if each is None:
                found.append(None)
                continue
            down, up, bias = (
                None if given is None else weights[f"{layer}.{name}"].detach().cpu().to(given.dtype)
                for name, given in (("A", each.A), ("B", each.B), ("b", each.b))
            )
            found.append(LinearShortcut(down, up, each.b if bias is None else bias))
        return found

    def _judge(self, maps: _Maps, texts: Sequence[Text]) -> npt.NDArray[np.float64]:
        """Return the divergence of the held-out plans on each text. Shape (plans, texts)."""
        skips = [NOTHING if each is None else Skipped(each) for each in maps]
        found = score_texts(self._model, self._stack, texts, self._plans, skips=skips)
        return found.by_text()[0]

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Take gradients off the base model's weights for the duration of a block."""
        trainable = [weight for weight in self._model.parameters() if weight.requires_grad]
        for weight in trainable:
            weight.requires_grad = False
        try:
            yield
        finally:
            for weight in trainable:
                weight.requires_grad = True

    def _write(self, step: int, history: list[float], best: Mapping[str, Tensor]) -> None:
        tensors = {f"now.{name}": weight.detach() for name, weight in self._weights.items()}
        tensors |= {f"best.{name}": weight for name, weight in best.items()}
        for name, weight in self._weights.items():
            for part, tensor in self._optimiser.state[weight].items():
                tensors[f"adam.{name}.{part}"] = tensor
        data = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        notes = {"step": str(step), "history": json.dumps(history)}
        write_bytes_atomic(self._file, save(data, metadata=notes))

    def _read(self) -> dict[str, Any] | None:
        """Restore weights and optimiser from the file; returns the step, the history and the best weights so far."""
        if not self._file.exists():
            return None
        device = self._model.device
        try:
            with safe_open(self._file, framework="pt", device=str(device)) as file:
                notes = file.metadata()
                best = {name: file.get_tensor(f"best.{name}") for name in self._weights}
                with torch.no_grad():
                    for name, weight in self._weights.items():
                        weight.copy_(file.get_tensor(f"now.{name}"))
                        self._optimiser.state[weight] = {
                            part: file.get_tensor(f"adam.{name}.{part}")
                            for part in ("step", "exp_avg", "exp_avg_sq")
                        }
                # Adam counts its steps on the host.
                for state in self._optimiser.state.values():
                    state["step"] = state["step"].cpu()
            return {
                "step": int(notes["step"]),
                "history": parse_json(notes["history"]),
                "best": best,
            }
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise LabelError(
                f"{self._file} is damaged ({error}); delete it and fit again"
            ) from error


class _Trained:
    """A map whose weights are being trained."""

    def __init__(self, weights: Mapping[str, nn.Parameter], layer: int) -> None:
        self._parts = [weights.get(f"{layer}.{name}") for name in ("A", "B", "b")]

    def __call__(self, states: Tensor) -> Tensor:
        down, up, bias = (
            None if part is None else part.to(states.device, states.dtype) for part in self._parts
        )
        moved = states
        if down is not None:
            change = states @ down
            moved = states + (change if up is None else change @ up)
        return moved if bias is None else moved + bias


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _stalled(history: Sequence[float]) -> bool:
    return len(history) > _PATIENCE and min(history) < min(history[-_PATIENCE:])
