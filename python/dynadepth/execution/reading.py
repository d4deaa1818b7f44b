"""Readings: what a model's own norm and head say of states, in an ordinary forward in which no layer runs."""

from collections.abc import Sequence
from typing import Any

import torch

from dynadepth.execution.executor import (
    NOTHING,
    OnUnwrapped,
    Scope,
    Skipped,
    enter_scope,
    leave_scope,
)
from dynadepth.execution.few_tokens import few_token_products
from dynadepth.execution.layer_call import LayerCall
from dynadepth.models.structure import LayerStack

__all__ = ["ReadScope", "StateReader", "read_states"]


class ReadScope:
    """A forward in which every layer is passed by and the last gives out given states.

    Args:
        owner: Whose layers they are.
        num_layers: Decoder layers of the model.
        states: What the last layer gives out. Shape (rows, tokens, hidden).
    """

    def __init__(self, owner: object, num_layers: int, states: torch.Tensor) -> None:
        self.owner = owner
        self.outer: Scope | None = None
        self._states = states
        self.dispatch: Sequence[Any] = [NOTHING] * (num_layers - 1) + [Skipped(self._given)]

    def _given(self, entering: torch.Tensor) -> torch.Tensor:
        return self._states.to(entering)

    def run(self, call: LayerCall) -> torch.Tensor:
        """Pass by a layer that was not given its cache by name."""
        through: torch.Tensor = self.dispatch[call.layer_idx].through(call.hidden_states)
        return through


def read_states(model: Any, states: torch.Tensor) -> torch.Tensor:
    """Return the logits of states, from a forward that a `ReadScope` governs.

    Args:
        model: The causal language model.
        states: The states. Shape (states, hidden).

    Returns:
        Shape (states, vocabulary), model dtype.
    """
    tokens = torch.zeros((len(states), 1), dtype=torch.long, device=model.device)
    with few_token_products(model.get_output_embeddings(), len(states)):
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False, return_dict=True).logits
    return logits[:, -1]


class StateReader(OnUnwrapped):
    """Reads states after the last layer of a model that is not wrapped; leaves the model as it found it.

    Gradients flow from the logits to the states.

    Args:
        model: A causal language model.
        stack: Its layers, as `dynadepth.proving.proved_stack` returns them.

    Raises:
        UnsupportedModelError: On entering: the model has not been proved.
        WrapError: On entering: the model is wrapped.
    """

    def __init__(self, model: Any, stack: LayerStack) -> None:
        super().__init__(stack)
        self._model = model

    def read(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits of states.

        Args:
            states: As after the last layer, before the model's norm. Shape (states, hidden).

        Returns:
            Shape (states, vocabulary), model dtype.
        """
        enter_scope(ReadScope(self, self._stack.num_layers, states[:, None]))
        try:
            return read_states(self._model, states)
        finally:
            leave_scope(self)
