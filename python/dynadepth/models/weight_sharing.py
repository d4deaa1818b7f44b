"""A second model on the weights of the first, such as a base model beside its wrapped self at no cost in memory."""

import copy
from itertools import chain
from typing import Any

__all__ = ["share_weights"]


def share_weights(model: Any) -> Any:
    """Return a second model that shares the parameters and buffers of the first.

    Everything else is a copy: modules, hooks, configs, and the controller of a wrapped model. So one of them can be
    wrapped and the other not, or each can have its own plan: a wrapped model can draft for its base, or be compared
    with it.

    Args:
        model: A transformers causal language model, wrapped or not; not changed. Move it to its device and dtype first:
            moving one model afterwards would move the shared parts of the other.

    Returns:
        The second model, of the same class, wrapped if the first is.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from dynadepth import wrap_model
        >>> shape = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_attention_heads=2)
        >>> base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **shape))
        >>> draft = wrap_model(share_weights(base), plan=[1, 0, 1])
        >>> draft.lm_head.weight is base.lm_head.weight
        True
    """
    kept = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, kept)
