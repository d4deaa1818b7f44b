"""Prompts that are answered with one token each: those that are decided early leave before an exit layer.

There is nothing to decode, so the later layers of a prompt that left never run: that is its depth, and no audit can see
what the base model would have said.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dynadepth.caching.row_plans import RowPlans
from dynadepth.execution.executor import PER_ROW
from dynadepth.execution.layer_call import LayerCall
from dynadepth.execution.plan_forward import Planner, PlanScope
from dynadepth.exits.exit_forward import ExitHead
from dynadepth.plans import EXECUTE, SKIP, Plans
from dynadepth.policies.base import Policy
from dynadepth.policies.prompt_batch import PromptBatch

__all__ = ["PromptAnswers", "PromptExitScope", "PromptExits"]


@dataclass(frozen=True, slots=True, eq=False)
class PromptAnswers:
    """What follows the prompts of a batch.

    Attributes:
        logits: Of the token after each prompt. Shape (rows, vocabulary), model dtype and device.
        layers_run: How many layers each prompt ran. Shape (rows,), int64, on the host.
    """

    logits: torch.Tensor
    layers_run: npt.NDArray[np.int64]


class PromptExits(Policy):
    """Skips all layers from an exit layer on, if its head lets the state of the prompt's last token go.

    Args:
        heads: The exit heads, ascending by layer.
        num_layers: Decoder layers of the model.
    """

    def __init__(self, heads: Sequence[ExitHead], num_layers: int) -> None:
        self.heads = {head.layer_idx: head for head in heads}
        self.num_layers = num_layers
        self.decision_layers = tuple(self.heads)

    def initial_plans(self, num_rows: int) -> Plans:
        """Return the plan of every layer once, for each row."""
        return np.full((num_rows, self.num_layers), EXECUTE, dtype=np.uint8)

    def decide(self, layer_idx: int, hidden_states: torch.Tensor, prompts: PromptBatch) -> Plans:
        """Return SKIP for rows that leave here or have left, up to the next exit layer.

        Args:
            layer_idx: One of `decision_layers`.
            hidden_states: States entering that layer. Shape (batch, tokens, hidden), model dtype, any device.
            prompts: Which tokens belong to the prompts, and what has been decided before.

        Returns:
            Actions, on the host. Shape (batch, layers up to the next exit layer), uint8.
        """
        end = next((layer for layer in self.decision_layers if layer > layer_idx), self.num_layers)
        last = _last_states(hidden_states, prompts)
        leaves = self.heads[layer_idx].leaves(last).cpu().numpy()
        # An exit layer has another before it.
        leaves = leaves | (prompts.plans[:, layer_idx - 1] == int(SKIP))
        actions: Plans = np.where(leaves, SKIP, EXECUTE).astype(np.uint8)
        return np.repeat(actions[:, None], end - layer_idx, axis=1)


class PromptExitScope(PlanScope):
    """A forward without a cache under `PromptExits`, which keeps what stands for each prompt's last state.

    Args:
        owner: The planner.
        attention_mask: As for `PlanScope`.
        tokens: As for `PlanScope`.
        heads: The heads of the policy, by layer.
        given_out: Where two things go: the states after the last layer, one for each row, which are those of the base
            model, or where a row left, those that its head takes for them; and the plans of the rows.
        **known: The rest, as for `PlanScope`.
    """

    def __init__(
        self,
        owner: Planner,
        attention_mask: torch.Tensor | None,
        tokens: torch.Tensor | None = None,
        *,
        heads: dict[int, ExitHead],
        given_out: list[tuple[torch.Tensor, Plans]],
        **known: Any,
    ) -> None:
        super().__init__(owner, attention_mask, tokens, **known)
        self._heads, self._given_out = heads, given_out

    def run(self, call: LayerCall) -> torch.Tensor:
        """Run a layer for the rows that have not left; see `PlanScope.run`."""
        states = super().run(call)
        plans, prompts = self._plans, self._prompts
        if (
            call.layer_idx == self._planner.num_layers - 1
            and plans is not None
            and prompts is not None
        ):
            self._given_out.append((_last_states(states, prompts), plans.plans))
        return states

    def _look_ahead(self, plans: RowPlans) -> None:
        super()._look_ahead(plans)
        # The last layer is looked at, whatever it does.
        self.dispatch = [*self.dispatch[:-1], PER_ROW]

    def _skip(self, plans: RowPlans, layer_idx: int, states: torch.Tensor) -> torch.Tensor:
        head = self._heads.get(layer_idx)
        if head is None or self._prompts is None:
            return states
        rows = np.flatnonzero(
            (plans.plans[:, layer_idx] == int(SKIP)) & (plans.plans[:, layer_idx - 1] != int(SKIP))
        )
        if not len(rows):
            return states
        index = torch.from_numpy(rows).to(states.device)
        at = self._prompts.last_places.to(states.device)[index]
        final = head.final(states[index, at])
        return states.index_put((index, at), final)


def _last_states(states: torch.Tensor, prompts: PromptBatch) -> torch.Tensor:
    """Return the state of each prompt's last token. Shape (rows, hidden)."""
    places = prompts.last_places.to(states.device)
    return states[torch.arange(len(states), device=states.device), places]
