"""Rebuild a model as its plan's visits: an ordinary model of the same class that knows nothing of dynadepth.

The reference of every proof and parity test, and what `bake` ships.
"""

import copy
from typing import Any

from torch import nn

from dynadepth.models.structure import layer_stack, text_config_of

__all__ = ["rebuild"]

# The names under which modules of a layer keep its index, by which they find their slot of the cache.
_INDEX_NAMES = ("layer_idx", "layer_id", "layer_number", "layer_index")
# Lists of a config that name layers by their index.
_LISTS_OF_LAYERS = ("mlp_only_layers", "moe_layers")
# Lists of a config that may be as long as the model is deep but say nothing of its layers.
_NOT_PER_LAYER = ("architectures", "_token_id", "_token_ids", "mrope_section")


def rebuild(model: Any, plan: Any) -> Any:
    """Return a copy whose decoder layers are a plan's visits, in order, each with weights and a `layer_idx` of its own.

    Args:
        model: An unwrapped causal language model; not changed.
        plan: The actions. Shape (num_layers,), integer.

    Returns:
        The copy; per-layer fields of its config follow the visits.
    """
    visits = [layer_idx for layer_idx, action in enumerate(plan) for _ in range(int(action))]
    rebuilt = copy.deepcopy(model)
    originals, stack = layer_stack(model).layers, layer_stack(rebuilt)
    seen: set[int] = set()
    layers = []
    for place, layer_idx in enumerate(visits):
        layer = stack.layers[layer_idx]
        if layer_idx in seen:
            layer = copy.deepcopy(originals[layer_idx])
        seen.add(layer_idx)
        for module in layer.modules():
            for name in _INDEX_NAMES:
                if module.__dict__.get(name) == layer_idx:
                    setattr(module, name, place)
        layers.append(layer)
    setattr(stack.holder, stack.name, nn.ModuleList(layers))
    _follow_visits(text_config_of(rebuilt.config), visits, stack.num_layers)
    return rebuilt


def _follow_visits(config: Any, visits: list[int], num_layers: int) -> None:
    """Make a config describe the visited layers, in that order."""
    before = config.to_dict()
    for field, values in before.items():
        if field in _LISTS_OF_LAYERS and values is not None:
            setattr(config, field, [place for place, idx in enumerate(visits) if idx in values])
            continue
        if field.endswith(_NOT_PER_LAYER):
            continue
        if isinstance(values, (list, tuple)) and len(values) == num_layers:
            setattr(config, field, [values[layer_idx] for layer_idx in visits])
    dense = before.get("mlp_only_layers")
    if dense is not None and hasattr(config, "decoder_sparse_step"):
        # A config lists the layers without experts or gives their period; after the rebuild they are listed.
        step = config.decoder_sparse_step
        config.mlp_only_layers = [
            place
            for place, layer_idx in enumerate(visits)
            if layer_idx in dense or (layer_idx + 1) % step
        ]
        config.decoder_sparse_step = 1
    config.num_hidden_layers = len(visits)
