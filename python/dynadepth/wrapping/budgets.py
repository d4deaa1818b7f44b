"""Budgets: the policies that one trained policy provides, one for each budget."""

from typing import Any

from dynadepth.checkpoints.trained_exits import TrainedExits
from dynadepth.checkpoints.trained_policy import Backend, TrainedPolicy
from dynadepth.errors import ConfigError
from dynadepth.exits.prompt_exits import PromptExits
from dynadepth.policies.base import Policy

__all__ = ["Budgets"]

# A server uses the same few budgets repeatedly; each policy holds its heads on the device.
_MOST_KEPT = 16


class Budgets:
    """Makes the policy of each budget once, and caches those that were made last.

    Safe to share between threads; two that ask for a new budget at the same time may both make its policy.

    Args:
        trained: The routers or the menu; None if the model was wrapped with a plan or the user's own policy.
        backend: The library that computes the decisions.
    """

    def __init__(self, trained: TrainedPolicy | None, backend: Backend = "torch") -> None:
        self._trained, self._backend = trained, backend
        self._kept: dict[float, Policy] = {}
        self._prompt_exits: tuple[tuple[float | None, float | None], PromptExits] | None = None

    @property
    def trained(self) -> TrainedPolicy | None:
        """The trained policy, if the model was wrapped with one."""
        return self._trained

    def exits(self) -> TrainedExits:
        """Return the trained exits.

        Raises:
            ConfigError: The model was not wrapped with trained exits.
        """
        if not isinstance(self._trained, TrainedExits):
            raise ConfigError(
                "this model was not wrapped with trained exits, so no fidelity can be promised; call "
                "unwrap_model(model) and wrap it with fidelity= and routers that are exits"
            )
        return self._trained

    def policy(self, budget: Any) -> Policy:
        """Return the policy that keeps a budget.

        Args:
            budget: Mean depth over prompts, each counting once, as a fraction of the layers.

        Raises:
            BudgetError: The budget is not a number or outside the calibrated range.
            ConfigError: The model was not wrapped with a budget.
        """
        if self._trained is None:
            raise ConfigError(
                "this model was wrapped with a plan or a policy, which a budget does not change; call "
                "unwrap_model(model) and wrap it with a budget and routers"
            )
        found = self._kept.get(budget) if isinstance(budget, float) else None
        if found is None:
            found = self._trained.policy(budget, backend=self._backend)
            kept = [*self._kept.items(), (float(budget), found)]
            # Replaced as a whole, so that another thread never sees a partial change.
            self._kept = dict(kept[-_MOST_KEPT:])
        return found

    def prompt_exits(self, *, fidelity: float | None, budget: float | None) -> PromptExits:
        """Return which prompts leave, of those that are answered with one token each; see `TrainedExits.prompt_exits`.

        Raises:
            BudgetError: The promise is outside of what was measured.
            ConfigError: The model was not wrapped with trained exits, or these know nothing of such prompts.
        """
        promise = (fidelity, budget)
        kept = self._prompt_exits
        if kept is None or kept[0] != promise:
            made = self.exits().prompt_exits(
                fidelity=fidelity, budget=budget, backend=self._backend
            )
            kept = self._prompt_exits = (promise, made)
        return kept[1]
