"""What exits keep and cost at some thresholds, on text that they produced from held-out prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dynadepth.evaluation.risk_bounds import mean_loss_bound
from dynadepth.exits.dial import Dial
from dynadepth.exits.exit_calibration import ExitCalibration
from dynadepth.exits.exit_forward import Exits
from dynadepth.exits.exit_heads import ExitWeights, TrainedHead
from dynadepth_search.exits.choosing import ExitScores, leaving_at
from dynadepth_search.exits.producing import changed_shares, produce
from dynadepth_search.progress import Progress

__all__ = ["Row", "answer_rows", "calibration_of", "measure_row"]

_Floats = npt.NDArray[np.float64]
# One-sided, 95 %.
_Z = 1.645


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """What prompts had at one threshold; those that were answered with one token have nothing to decode, and no part.

    Attributes:
        threshold: In log-odds.
        passes: Mean passes of each prompt's decoded tokens. Shape (prompts,).
        changed: Share of each prompt's decoded tokens that the base model would not have chosen. Shape (prompts,).
    """

    threshold: float
    passes: _Floats
    changed: _Floats


def measure_row(
    model: Any,
    prompts: Sequence[npt.NDArray[np.int64]],
    heads: Sequence[ExitWeights],
    threshold: float,
    *,
    window: int,
    new_tokens: int,
    batch_size: int,
    num_layers: int,
    progress: Progress,
) -> Row:
    """Produce text at a threshold, and compare it with the base model's choices.

    Args:
        model: The unwrapped base model.
        prompts: Token ids of each prompt.
        heads: The exit heads.
        threshold: In log-odds.
        window: Most tokens of a row that later layers run for in one call.
        new_tokens: The most tokens of a continuation.
        batch_size: Prompts of one batch.
        num_layers: Decoder layers of the model.
        progress: Called with the stage, the number of finished prompts and of all.
    """
    dial = Dial(threshold, fidelity=1.0, adapt=False)
    exits = Exits(tuple(TrainedHead(head, dial) for head in heads), window, audit=0)
    name = f"producing at {threshold:.2f}"
    texts = produce(
        model,
        prompts,
        exits,
        new_tokens=new_tokens,
        batch_size=batch_size,
        name=name,
        progress=progress,
    )
    changed = changed_shares(model, texts, num_layers, batch_size=batch_size, progress=progress)
    passes = [texts[row].passes(num_layers, window) for row in changed]
    return Row(threshold, np.array(passes), np.array(list(changed.values())))


def answer_rows(exits: Mapping[int, ExitScores], num_layers: int, *, steps: int = 40) -> list[Row]:
    """Return what prompts had that are answered with one token each, at thresholds between their scores.

    Args:
        exits: What each exit layer says of the last token of each prompt.
        num_layers: Decoder layers of the model.
        steps: The most thresholds.
    """
    scores = torch.cat([each.score for each in exits.values()]).unique()
    # Not the scores themselves, which another batch rounds to either side.
    between = torch.cat([scores[:1] - 0.01, (scores[1:] + scores[:-1]) / 2])
    tried = between[torch.linspace(0, len(between) - 1, min(steps, len(between))).long()]
    rows = []
    for threshold in tried.tolist():
        layers_run, changed = leaving_at(exits, threshold, num_layers)
        rows.append(
            Row(threshold, (layers_run / num_layers).double().numpy(), changed.double().numpy())
        )
    return rows


def calibration_of(rows: Sequence[Row], *, never: float) -> ExitCalibration:
    """Return the table of some rows, with a first one at which no token leaves.

    Args:
        rows: Of the same prompts, as far as they were answered with several tokens; a row that is not looser than the
            one before and cheaper is left out.
        never: A threshold that no score reaches.

    Raises:
        ConfigError: At none of the rows fewer layers run than at the first.
    """
    ordered = sorted(rows, key=lambda row: -row.threshold)
    columns: list[tuple[float, float, float, float, float]] = [(never, 1.0, 1.0, 1.0, 1.0)]
    for row in ordered:
        if not len(row.passes):
            continue
        passes, changed = float(row.passes.mean()), row.changed
        if not (row.threshold < columns[-1][0] and passes < columns[-1][1]):
            continue
        error = float(changed.std(ddof=1)) / len(changed) ** 0.5 if len(changed) > 1 else 1.0
        kept = 1.0 - float(changed.mean())
        likely = max(0.0, kept - _Z * error)
        columns.append((row.threshold, passes, kept, likely, 1.0 - mean_loss_bound(changed)))
    thresholds, passes_, kept_, likely_, certain = zip(*columns, strict=True)
    return ExitCalibration(
        thresholds=thresholds,
        passes=passes_,
        kept=kept_,
        likely=likely_,
        certain=certain,
        prompts=min((len(row.passes) for row in rows), default=0),
    )
