"""The dial of late exits: the threshold that scores are compared with, and how audits move it.

A promise of fidelity f allows a share a = 1 - f of new tokens to be changed. The threshold begins where held-out
prompts said, and after every new token moves by step * (changed - a): up by a step for each changed token, and down by
a little for every other. So the long-run share of changed tokens is a, whatever the traffic, as long as scores are
bounded.
"""

from threading import Lock
from typing import Any

__all__ = ["STEP", "Dial"]

# Of the threshold, which is compared with log-odds. A smaller one follows a change of traffic more slowly, a larger one
# wanders more.
STEP = 0.2


class Dial:
    """A threshold for the scores of exit routers; several threads may read and move it.

    Args:
        threshold: Tokens leave whose score is at least this. In log-odds.
        fidelity: The promised share of new tokens that are the base model's own choice.
        lowest: The threshold never goes below, since nothing was measured there.
        adapt: Whether audits move it.
        verify: Whether early tokens are verified before they are given out, so that nothing is changed.
        step: By how much one changed token raises it.

    Source:
        Online conformal inference: Gibbs and Candes (arXiv 2106.00170), on the threshold itself as in Angelopoulos et
        al. (arXiv 2307.16895). Deviation: the threshold has a floor, which can only make the promise kept more than
        asked for.

    Example:
        >>> dial = Dial(2.0, fidelity=0.75, step=0.5)
        >>> dial.record(tokens=4, changed=2)
        >>> dial.threshold
        2.5
    """

    def __init__(
        self,
        threshold: float,
        *,
        fidelity: float,
        lowest: float = float("-inf"),
        adapt: bool = True,
        verify: bool = False,
        step: float = STEP,
    ) -> None:
        self.threshold, self.fidelity = float(threshold), float(fidelity)
        self.lowest, self.adapt, self.step = float(lowest), adapt, float(step)
        self.verify = verify
        self._lock = Lock()

    def turn(
        self,
        threshold: float,
        *,
        fidelity: float,
        lowest: float,
        adapt: bool,
        verify: bool = False,
    ) -> None:
        """Begin anew with another promise.

        Args:
            threshold: As when made.
            fidelity: As when made.
            lowest: As when made.
            adapt: As when made.
            verify: As when made.
        """
        with self._lock:
            self.threshold, self.fidelity = float(threshold), float(fidelity)
            self.lowest, self.adapt, self.verify = float(lowest), adapt, verify

    def record(self, *, tokens: float, changed: float) -> None:
        """Move the threshold by what became of some new tokens.

        Args:
            tokens: How many they were, those that went on included.
            changed: How many of them were not the base model's choice.
        """
        if not self.adapt:
            return
        with self._lock:
            moved = self.threshold + self.step * (changed - (1.0 - self.fidelity) * tokens)
            self.threshold = max(self.lowest, moved)

    # A deep copy of a wrapped model continues from where this one stands; locks are not copied.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = Lock()
