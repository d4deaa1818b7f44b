"""What late exits kept and cost on held-out prompts, at each of some thresholds, and which threshold keeps a promise.

The figures are of text that was produced with exits on, not of the base model's own: after a token that it would not
have chosen, the text goes where its own would not have.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from dynadepth.config import check_fields, config_from_dict, config_to_dict, plain_number
from dynadepth.errors import BudgetError, ConfigError
from dynadepth.policies.calibration import Calibration

__all__ = ["ExitCalibration"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitCalibration:
    """Measured rows, from the strictest threshold to the loosest; at the first one no token leaves.

    Every prompt counts once.

    Attributes:
        thresholds: In log-odds, descending.
        passes: Mean passes of new tokens, descending.
        kept: Mean share of new tokens that are the base model's own choice after the same text.
        likely: A bound that this mean is above with 95 %, by the spread of the prompts (normal approximation).
        certain: A bound that it is above with 95 %, for any number of prompts of any distribution.
        prompts: Number of prompts.
    """

    thresholds: tuple[float, ...]
    passes: tuple[float, ...]
    kept: tuple[float, ...]
    likely: tuple[float, ...]
    certain: tuple[float, ...]
    prompts: int

    def __post_init__(self) -> None:
        check_fields(self)
        columns = (self.thresholds, self.passes, self.kept, self.likely, self.certain)
        if len(self.thresholds) < 2 or len({len(column) for column in columns}) > 1:
            raise ConfigError(
                f"a calibration of exits has columns of {[len(column) for column in columns]} rows; expected as many "
                "rows in each, at least two"
            )
        for name in ("thresholds", "passes"):
            column = getattr(self, name)
            if any(a <= b for a, b in pairwise(column)):
                raise ConfigError(
                    f"the {name} of a calibration of exits are {list(column)}; expected them to fall from row to row"
                )

    def threshold_for(self, fidelity: Any, *, certain: bool = False) -> float:
        """Return the loosest threshold that keeps a share of new tokens.

        All stricter rows have to keep it too, so the bounds hold together (fixed-sequence testing). Without `certain`,
        the threshold lies between two rows as the share does.

        Args:
            fidelity: The share, below 1.
            certain: Whether the bound has to hold for any distribution, rather than by normal approximation.

        Returns:
            The threshold, in log-odds.

        Raises:
            BudgetError: The share is no number, or outside of what was measured.

        Source:
            Angelopoulos et al., Learn then Test (arXiv 2110.01052), with the bounds of `mean_loss_bound`.
        """
        wanted = plain_number(fidelity)
        # At the first row no token leaves, which no promise needs.
        bounds = np.minimum.accumulate((self.certain if certain else self.likely)[1:])
        thresholds = self.thresholds[1:]
        lowest, highest = float(bounds[-1]), float(bounds[0])
        if type(wanted) not in (int, float) or not lowest <= wanted <= highest:
            hint = (
                f"; a promise that no audit keeps needs more held-out prompts than {self.prompts} (tokens that are "
                "decoded are audited, with adapt=True)"
                if certain
                else ""
            )
            raise BudgetError(
                f"fidelity {fidelity!r} was asked for; expected a share from {_up(lowest):.4f} to "
                f"{_down(highest):.4f}, which held-out prompts support{hint}"
            )
        last = int(np.flatnonzero(bounds >= wanted)[-1])
        if certain or last == len(bounds) - 1 or bounds[last] == bounds[last + 1]:
            return thresholds[last]
        share = (bounds[last] - wanted) / (bounds[last] - bounds[last + 1])
        return float(thresholds[last] + share * (thresholds[last + 1] - thresholds[last]))

    def threshold_at(self, passes: float) -> float:
        """Return the threshold of a mean number of passes, between rows by straight lines; infinite at one pass.

        Args:
            passes: Within the range of `budgets`.
        """
        if passes >= self.passes[0]:
            return float("inf")
        return float(np.interp(passes, self.passes[::-1], self.thresholds[::-1]))

    def budgets(self) -> Calibration:
        """Return the table from mean passes to threshold, whose penalties are the negated thresholds."""
        lambdas = tuple(-threshold for threshold in self.thresholds[::-1])
        depths = self.passes[::-1]
        return Calibration(lambdas=lambdas, depths=depths, lowest=depths[0], highest=depths[-1])

    def to_dict(self) -> dict[str, Any]:
        """Return the table as values that JSON can hold."""
        return config_to_dict(self)

    @classmethod
    def from_dict(cls, content: Any) -> "ExitCalibration":
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: A key is missing or unknown, or the values do not form a calibration.
        """
        return config_from_dict(cls, content)


def _up(share: float) -> float:
    return float(np.ceil(share * 1e4) / 1e4)


def _down(share: float) -> float:
    return float(np.floor(share * 1e4) / 1e4)
