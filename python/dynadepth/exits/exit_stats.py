"""What late exits have done: how many new tokens left where, and what decoding cost."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from dynadepth.drafting.pace import PaceTotals
from dynadepth.exits.audit import Audited

__all__ = ["ExitStats", "ExitTotals", "passes_alone"]


@dataclass(frozen=True, slots=True)
class ExitTotals:
    """What late exits have done since the model was wrapped, or since `reset_totals`.

    Attributes:
        num_layers: Decoder layers of the model.
        steps: Steps of decoding: forwards of one new token for each row, after the prefill.
        tokens: New tokens of these steps, over all rows.
        left: Those that left early, by the layer before which they did.
        layer_calls: Calls of layers in these steps, and to settle outside of them. A call serves all rows, and all
            tokens that settle in it.
        settles: Settlings outside of a step, because somebody needed the states.
        audited: What audits found of tokens whose layers have all run.
        drafted: What lossless decoding has done.

    Example:
        >>> totals = ExitTotals(num_layers=4, steps=2, tokens=2, left={1: 1}, layer_calls=5)
        >>> totals.passes, totals.share
        (0.625, 0.5)
    """

    num_layers: int
    steps: int = 0
    tokens: int = 0
    left: Mapping[int, int] = field(default_factory=dict)
    layer_calls: int = 0
    settles: int = 0
    audited: Audited = field(default_factory=Audited)
    drafted: PaceTotals = field(default_factory=PaceTotals)

    @property
    def fidelity(self) -> float | None:
        """Measured share of new tokens that are the base model's own choice; None before the first audit."""
        return self.audited.fidelity

    @property
    def passes(self) -> float | None:
        """Layer calls of a step over the number of layers; None before the first step.

        In lossless decoding, of a token that was given out: a draft that was not kept is a step and no token.
        """
        steps = self.drafted.tokens or self.steps
        return self.layer_calls / (self.num_layers * steps) if steps else None

    @property
    def share(self) -> float | None:
        """Share of new tokens that left early; None before the first step."""
        return sum(self.left.values()) / self.tokens if self.tokens else None


class ExitStats:
    """Counts for one wrapped model; several threads may read and write them.

    Args:
        num_layers: Decoder layers of the model.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._lock = Lock()
        self.reset()

    def reset(self) -> None:
        """Set everything back to zero."""
        with self._lock:
            self._steps = self._tokens = self._layer_calls = self._settles = 0
            self._left: Counter[int] = Counter()

    def step(self, left: Mapping[int, int], num_rows: int, layer_calls: int) -> None:
        """Record a step of decoding that has completed.

        Args:
            left: How many rows left before each exit layer.
            num_rows: Rows of the batch.
            layer_calls: Calls of layers.
        """
        with self._lock:
            self._steps += 1
            self._tokens += num_rows
            self._layer_calls += layer_calls
            self._left.update(left)

    def settled(self, layer_calls: int) -> None:
        """Record calls of layers outside of a step."""
        with self._lock:
            self._layer_calls += layer_calls
            self._settles += 1

    @property
    def totals(self) -> ExitTotals:
        """The current totals."""
        with self._lock:
            return ExitTotals(
                self._num_layers,
                self._steps,
                self._tokens,
                dict(sorted(self._left.items())),
                self._layer_calls,
                self._settles,
            )

    # A deep copy of a wrapped model continues with its own counts; locks are not copied.
    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            state = dict(self.__dict__)
        del state["_lock"]
        return {**state, "_left": state["_left"].copy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = Lock()


def passes_alone(
    layers_run: Sequence[int] | npt.NDArray[np.integer[Any]], num_layers: int, window: int
) -> float:
    """Return the mean passes of a row that is decoded alone.

    Args:
        layers_run: For each new token, the layer before which its reading was taken; `num_layers` if it went on.
        num_layers: Decoder layers of the model.
        window: Most tokens that later layers run for in one call.

    Returns:
        Layer calls of a step over the number of layers; a call serves all tokens that settle in it.

    Example:
        >>> passes_alone([1, 1, 4, 1], num_layers=4, window=8)
        0.4375
    """
    owed = calls = 0
    for layer in layers_run:
        stays = layer >= num_layers or owed + 1 >= window
        calls += num_layers if stays else int(layer)
        owed = 0 if stays else owed + 1
    return calls / (num_layers * max(1, len(layers_run)))
