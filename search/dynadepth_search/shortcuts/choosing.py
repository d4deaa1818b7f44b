"""Which ridge each layer's map is fitted with, and which layers get a map at all: by the harm on held-out texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dynadepth.execution.executor import NOTHING, Skipped
from dynadepth.models.structure import LayerStack
from dynadepth.plans import SKIP, Plans, identity_plan
from dynadepth.shortcuts.fit import explained_variance, fit_shortcut
from dynadepth.shortcuts.maps import LinearShortcut, Rank
from dynadepth.shortcuts.moments import Moments
from dynadepth_search.progress import Progress
from dynadepth_search.scoring.own_text import Text, score_texts

__all__ = ["ChosenMap", "choose_maps", "measure_again", "single_skips"]


@dataclass(frozen=True, slots=True)
class ChosenMap:
    """The map of one layer.

    Args:
        shortcut: The map; None: nothing is better than the best map.
        measured: What was measured on held-out texts, as values that JSON can hold.
    """

    shortcut: LinearShortcut | None
    measured: dict[str, Any]


def choose_maps(
    model: Any,
    stack: LayerStack,
    moments: Mapping[int, Moments],
    heldout_moments: Mapping[int, Moments],
    texts: Sequence[Text],
    *,
    rank: Rank,
    ridges: Sequence[float],
    progress: Progress,
) -> list[ChosenMap]:
    """Fit every layer's map with each ridge, and keep the one whose layer is missed least.

    Args:
        model: The unwrapped base model.
        stack: Its layers, proved.
        moments: Of the texts to fit on, for each layer.
        heldout_moments: Of the held-out texts; they say how much of an update a map explains, which chooses nothing.
        texts: The held-out texts.
        rank: Rank of the maps.
        ridges: The ridges to choose from.
        progress: Called with the stage, the number of finished steps and the number of all steps.

    Returns:
        A map, or none, for each layer. A layer has one if the divergence of the plan that skips this layer alone is
        lower with it than without.

    Raises:
        ConfigError: There are no tokens to fit on.
    """
    plans = single_skips(stack.num_layers)
    stage, steps = "choosing shortcuts", len(ridges) + 1

    def judged(skips: Sequence[Skipped]) -> tuple[Any, Any]:
        divergence, agreement = score_texts(model, stack, texts, plans, skips=skips).by_text()
        return divergence.mean(axis=1), agreement.mean(axis=1)

    progress(stage, 0, steps)
    plain, plain_agreement = judged((NOTHING,) * stack.num_layers)
    tried = []
    for step, ridge in enumerate(ridges, start=1):
        progress(stage, step, steps)
        maps = [
            fit_shortcut(moments[layer], rank=rank, ridge=ridge, dtype=model.dtype)
            for layer in range(stack.num_layers)
        ]
        tried.append((maps, *judged([Skipped(each) for each in maps])))
    progress(stage, steps, steps)
    chosen = []
    for layer in range(stack.num_layers):
        best = int(np.argmin([divergence[layer] for _, divergence, _ in tried]))
        maps, divergence, agreement = tried[best]
        better = bool(divergence[layer] < plain[layer])
        variance = explained_variance(maps[layer], heldout_moments[layer])
        measured = {
            "layer": layer,
            "mapped": better,
            "ridge": float(ridges[best]),
            "explained_variance": variance,
            "divergence": _finite(divergence[layer]),
            "agreement": float(agreement[layer]),
            "divergence_without": _finite(plain[layer]),
            "agreement_without": float(plain_agreement[layer]),
        }
        shortcut = _on_host(maps[layer]) if better else None
        chosen.append(ChosenMap(shortcut, measured))
    return chosen


def measure_again(
    model: Any,
    stack: LayerStack,
    chosen: Sequence[ChosenMap],
    maps: Sequence[LinearShortcut | None],
    heldout_moments: Mapping[int, Moments],
    texts: Sequence[Text],
) -> list[dict[str, Any]]:
    """Return what is measured of maps that have been trained further.

    Args:
        model: The unwrapped base model.
        stack: Its layers, proved.
        chosen: The maps before, with what was measured of them.
        maps: The maps now.
        heldout_moments: As for `choose_maps`.
        texts: As for `choose_maps`.
    """
    plans = single_skips(stack.num_layers)
    skips = [NOTHING if each is None else Skipped(each) for each in maps]
    divergence, agreement = score_texts(model, stack, texts, plans, skips=skips).by_text()
    return [
        before.measured
        if each is None
        else {
            **before.measured,
            "explained_variance": explained_variance(each, heldout_moments[layer]),
            "divergence": _finite(float(divergence[layer].mean())),
            "agreement": float(agreement[layer].mean()),
        }
        for layer, (before, each) in enumerate(zip(chosen, maps, strict=True))
    ]


def single_skips(num_layers: int) -> Plans:
    """Return the plans that skip one layer each. Shape (layers, layers), uint8."""
    plans = np.tile(identity_plan(num_layers), (num_layers, 1))
    np.fill_diagonal(plans, int(SKIP))
    return plans


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _on_host(shortcut: LinearShortcut) -> LinearShortcut:
    def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.cpu()

    return LinearShortcut(moved(shortcut.A), moved(shortcut.B), shortcut.b.cpu())
