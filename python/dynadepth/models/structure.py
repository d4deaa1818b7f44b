"""Where a causal language model keeps its decoder layers, found by how it is built and not by the family's name.

Also refuses what the structure alone shows to be impossible, by its reason. Whether a model runs exactly is for the
proof to say (`dynadepth.proving`).
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dynadepth.errors import UnsupportedModelError

__all__ = [
    "LayerSignature",
    "LayerStack",
    "LayerTraits",
    "check_not_parallel",
    "forward_parameters",
    "layer_signature",
    "layer_stack",
    "position_arguments",
    "takes",
    "text_config_of",
]

# The parameter for the cache: since transformers 5.24, before it, and in families with a name of their own.
_CACHE_NAMES = ("cache", "past_key_values", "layer_past")
_MASK_NAME = "attention_mask"
# Modules of a layer that attend to the states of an encoder.
_CROSS_ATTENTION = frozenset({"crossattention", "cross_attn", "encoder_attn"})
# Kinds of layers whose states are keys and values by token.
_ATTENTION_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


@dataclass(frozen=True, slots=True)
class LayerTraits:
    """How decoder layers are called and what they return, as a proof has seen it.

    Attributes:
        num_extras: Values that a layer returns after the states, in a tuple or list; None if it returns the states
            alone, as a tensor.
        feed_forward: Name of the layer's module that maps each token's state independently and takes the states only;
            None if there is no such module.
        row_arguments: Parameters of a layer's forward that take tensors with one entry, or one group of entries, for
            each row of the batch.
        shared_arguments: Parameters that take tensors which are the same for all rows.
        fixed_rows: Whether the stack's forward needs as many rows after its layers as before them.
        no_exits: Why no new token may leave early; None if they may.
    """

    num_extras: int | None = None
    feed_forward: str | None = None
    row_arguments: tuple[str, ...] = ()
    shared_arguments: tuple[str, ...] = ()
    fixed_rows: bool = False
    no_exits: str | None = None


@dataclass(frozen=True, slots=True)
class LayerStack:
    """The decoder layers of a model and the module that runs them.

    Attributes:
        stack: The module whose forward makes masks and positions and loops over the layers.
        layers: The decoder layers, in order.
        holder: The module that has the list of layers as a child: the stack, or a container inside it.
        name: The list's name in its holder.
        num_layers: How many there are.
        hidden_size: Width of the residual stream.
        model_type: The family, as named in the config.
        traits: How the layers are called, if the model has been proved; otherwise None, and nothing can be installed.
    """

    stack: nn.Module
    layers: nn.ModuleList
    holder: nn.Module
    name: str
    num_layers: int
    hidden_size: int
    model_type: str
    traits: LayerTraits | None = None

    def with_traits(self, traits: LayerTraits) -> "LayerStack":
        """Return the same layers as proved ones."""
        return replace(self, traits=traits)


def text_config_of(config: Any) -> Any:
    """Return the part of a config that describes the decoder layers: of a model that also reads images, the text's."""
    get_text_config = getattr(config, "get_text_config", None)
    return config if get_text_config is None else get_text_config(decoder=True)


def takes(module: nn.Module, name: str) -> bool:
    """Say whether a module's forward has a parameter of this name."""
    return name in forward_parameters(type(module).forward)


# Asked for every module of a model, and models with a list of experts in every layer have tens of thousands.
@functools.cache
def forward_parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of an unbound forward's parameters, self included."""
    return tuple(inspect.signature(forward).parameters)


def position_arguments(module: nn.Module, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the positions of a padded batch, as the argument of a module's forward that takes them.

    Args:
        module: The model, or its stack of layers.
        attention_mask: 1 for real tokens. Shape (rows, tokens).

    Returns:
        `position_ids`, which number the real tokens of each row from 0, shape (rows, tokens), int64; empty if the
        forward takes none.
    """
    if not takes(module, "position_ids"):
        return {}
    return {"position_ids": (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)}


def layer_stack(model: nn.Module) -> LayerStack:
    """Find the decoder layers of a causal language model: the list of as many modules as its config has layers.

    Args:
        model: A transformers causal language model, wrapped or not.

    Returns:
        Its decoder layers and the module that runs them.

    Raises:
        UnsupportedModelError: The model has no config, no such list or several; its structure shows that it cannot run
            exactly (an encoder, cross-attention, recurrent states, layers that share keys and values or weights); or
            it is inside a PEFT model.
    """
    if hasattr(model, "get_base_model"):
        raise UnsupportedModelError(
            f"this is a {type(model).__name__} around a model, and only wrap_model and unwrap_model look inside; "
            "give what merge_and_unload() returns, or get_base_model() to leave its adapters as they are"
        )
    check_not_parallel(model)
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if config is None or not isinstance(model_type, str):
        raise UnsupportedModelError(
            f"{type(model).__name__} has model_type {model_type!r}; expected a transformers causal language model, as "
            "AutoModelForCausalLM.from_pretrained loads it"
        )
    text = text_config_of(config)
    reason = _structural_reason(model, config, text)
    if reason is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} (model_type {model_type!r}) is refused: {reason}"
        )
    expected = getattr(text, "num_hidden_layers", None)
    # Layers of an encoder of images take a mask too; those of a family that keeps no cache, nothing else.
    found = list(_layer_lists(model, cache=True)) or list(_layer_lists(model, cache=False))
    fitting = [each for each in found if len(each[2]) == expected]
    if len(fitting) != 1:
        raise UnsupportedModelError(_no_single_list(model, model_type, expected, found, fitting))
    holder, name, layers = fitting[0]
    if len({id(layer) for layer in layers}) < len(layers):
        raise UnsupportedModelError(
            f"in this {model_type} one decoder layer stands at several places of the list, so its visits could not be "
            "told apart; give each place a layer of its own"
        )
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no output head; expected the causal language model of {model_type}, as "
            "AutoModelForCausalLM.from_pretrained loads it"
        )
    return LayerStack(
        _running_module(model, holder),
        layers,
        holder,
        name,
        len(layers),
        int(text.hidden_size),
        model_type,
    )


def check_not_parallel(model: nn.Module) -> None:
    """Refuse a model inside a wrapper such as DataParallel.

    Raises:
        UnsupportedModelError: The module is a wrapper around a transformers model.
    """
    inner = getattr(model, "module", None)
    model_type = getattr(getattr(inner, "config", None), "model_type", None)
    if (
        isinstance(inner, nn.Module)
        and isinstance(model_type, str)
        and not hasattr(model, "config")
    ):
        raise UnsupportedModelError(
            f"this is a {type(model).__name__} around a {type(inner).__name__}; call wrap_model, and unwrap_model, on "
            "the model itself (model.module), in each process, before anything is put around it"
        )


def _structural_reason(model: nn.Module, config: Any, text: Any) -> str | None:
    """Return why a model cannot be run exactly, as far as its config tells; None if nothing stands in the way."""
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder, whose states its layers also read"
    if getattr(text, "add_cross_attention", False) or any(
        name.rpartition(".")[2] in _CROSS_ATTENTION for name, _ in model.named_modules()
    ):
        return (
            "it has cross-attention, whose states come from an encoder and are kept in a cache of another kind; load "
            "it with add_cross_attention=False"
        )
    types = getattr(text, "layer_types", None) or ()
    other = sorted({str(each) for each in types} - _ATTENTION_TYPES)
    if getattr(model, "_is_stateful", False) or any(
        word in each for each in other for word in ("linear", "mamba", "recurrent", "conv")
    ):
        named = f" (layer types {', '.join(other)})" if other else ""
        return (
            f"it keeps states that are not keys and values by token{named}: a recurrent state, which a skipped layer "
            "would leave behind the tokens"
        )
    shared = getattr(text, "num_kv_shared_layers", 0)
    if shared:
        return (
            f"{shared} of its layers read another layer's keys and values; skipping the layer that makes them would "
            "break these"
        )
    return None


def _layer_lists(
    model: nn.Module, *, cache: bool
) -> Iterator[tuple[nn.Module, str, nn.ModuleList]]:
    """Yield every list of modules that are called with states, a mask and, if asked for, a cache."""
    for holder in model.modules():
        for name, child in holder.named_children():
            if (
                isinstance(child, nn.ModuleList)
                and len(child)
                and all(_takes_mask(each, cache=cache) for each in child)
            ):
                yield holder, name, child


def _takes_mask(module: nn.Module, *, cache: bool) -> bool:
    """Say whether a module, or one that another library has put itself around, is called as decoder layers are."""
    names = (forward_parameters(type(each).forward) for each in module.modules())
    return any(
        _MASK_NAME in each[2:] and (not cache or any(name in each for name in _CACHE_NAMES))
        for each in names
    )


def _running_module(model: nn.Module, holder: nn.Module) -> nn.Module:
    """Return the module whose forward loops over the layers: the innermost one around the list that has a forward."""
    running = model
    for module in model.modules():
        if not isinstance(module, (nn.ModuleDict, nn.ModuleList)) and any(
            each is holder for each in module.modules()
        ):
            # Outer modules come first.
            running = module
    return running


def _no_single_list(
    model: nn.Module, model_type: str, expected: Any, found: list[Any], fitting: list[Any]
) -> str:
    if len(fitting) > 1:
        names = ", ".join(sorted({name for _, name, _ in fitting}))
        return (
            f"{type(model).__name__} (model_type {model_type!r}) has {len(fitting)} lists of {expected} modules that "
            f"could be its decoder layers ({names}); expected one"
        )
    lengths = [len(layers) for _, _, layers in found]
    if lengths:
        return (
            f"{type(model).__name__} holds {max(lengths)} decoder layers, but the config says {expected}; "
            "make num_hidden_layers and the layers agree before wrapping"
        )
    return (
        f"{type(model).__name__} (model_type {model_type!r}) has no list of {expected} modules that take states, an "
        f"{_MASK_NAME} and a cache called {' or '.join(_CACHE_NAMES)}; expected decoder layers of attention, one after "
        "the other"
    )


@dataclass(frozen=True, slots=True)
class LayerSignature:
    """The parameters of a decoder layer class.

    Attributes:
        names: Names of the parameters of its forward after self, in order.
        cache_name: The parameter that takes the cache; None if its family keeps no cache.
        mask_name: The parameter that takes the attention mask.
    """

    names: tuple[str, ...]
    cache_name: str | None
    mask_name: str


def layer_signature(forward: Callable[..., Any]) -> LayerSignature:
    """Read the parameters of a decoder layer's own forward.

    Args:
        forward: The unbound forward of a decoder layer class.

    Returns:
        Its parameter names and which of them takes the cache and the mask.

    Raises:
        UnsupportedModelError: It has no parameter for the mask under a known name, or takes arguments that it does not
            name.
    """
    names = tuple(
        name
        for name, parameter in inspect.signature(forward).parameters.items()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    )[1:]
    cache_name = next((name for name in names if name in _CACHE_NAMES), None)
    if _MASK_NAME not in names[1:]:
        raise UnsupportedModelError(
            f"{forward.__qualname__} takes {', '.join(names) or 'no argument by name'}; expected an {_MASK_NAME} and, "
            f"if it keeps one, a cache called {' or '.join(_CACHE_NAMES)}"
        )
    return LayerSignature(names, cache_name, _MASK_NAME)
