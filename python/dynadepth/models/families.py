"""Where a supported model keeps its decoder layers, and whether it can be run exactly.

An allow-list names the families, one line each; further checks refuse single models that the list cannot tell apart.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from dynadepth.errors import UnsupportedModelError

__all__ = ["SUPPORTED_FAMILIES", "Family", "LayerStack", "check_not_parallel", "layer_stack"]


@dataclass(frozen=True, slots=True)
class Family:
    """How the models of one family are built.

    Attributes:
        stack: Path of the module whose forward makes masks and positions and loops over the layers.
        layers: Name of its list of decoder layers.
        feed_forward: Name of the layer's module that maps each token's state independently and takes the states only;
            None if there is no such module.
        num_extras: Values that a layer returns after the states, as a tuple; 0 if it returns the states alone.
    """

    stack: str = "model"
    layers: str = "layers"
    feed_forward: str | None = "mlp"
    num_extras: int = 0


# By `model_type`. To support a family, add a line here and one in the contract suite.
SUPPORTED_FAMILIES: dict[str, Family] = {
    "bloom": Family("transformer", "h", feed_forward=None, num_extras=1),
    "cohere": Family(),
    "falcon": Family("transformer", "h", num_extras=1),
    "gemma2": Family(),
    "gemma3_text": Family(),
    "gpt2": Family("transformer", "h"),
    "gpt_neox": Family("gpt_neox"),
    "granite": Family(),
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(),
    "olmo2": Family(),
    "olmoe": Family(),
    "opt": Family("model.decoder", feed_forward=None),
    "phi": Family(),
    "phi3": Family(),
    "qwen2": Family(),
    "qwen2_moe": Family(),
    "qwen3": Family(),
    "qwen3_moe": Family(),
    "smollm3": Family(),
    "stablelm": Family(),
    "starcoder2": Family(),
}

# The parameter for the cache: since transformers 5.24, before it, and in families with a name of their own.
_CACHE_NAMES = ("cache", "past_key_values", "layer_past")


@dataclass(frozen=True, slots=True)
class LayerStack:
    """The decoder layers of a model and the module that runs them.

    Attributes:
        stack: The module whose forward makes masks and positions and loops over the layers.
        layers: The decoder layers, in order.
        num_layers: How many there are.
        hidden_size: Width of the residual stream.
        model_type: The family, as named in the config.
        family: How models of this family are built.
    """

    stack: nn.Module
    layers: nn.ModuleList
    num_layers: int
    hidden_size: int
    model_type: str
    family: Family


def layer_stack(model: nn.Module) -> LayerStack:
    """Find the decoder layers of a supported causal language model.

    Args:
        model: A transformers causal language model, wrapped or not.

    Returns:
        Its decoder layers and the module that runs them.

    Raises:
        UnsupportedModelError: The family is not on the allow-list; the model shares key and value states between
            layers, has no output head, or is not built as its family should be; or it is inside a PEFT model.
    """
    if hasattr(model, "get_base_model"):
        raise UnsupportedModelError(
            f"this is a {type(model).__name__} around a model, and only wrap_model and unwrap_model look inside; "
            "give what merge_and_unload() returns, or get_base_model() to leave its adapters as they are"
        )
    check_not_parallel(model)
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if config is None or model_type not in SUPPORTED_FAMILIES:
        raise UnsupportedModelError(
            f"{type(model).__name__} has model_type {model_type!r}; supported are "
            f"{', '.join(sorted(SUPPORTED_FAMILIES))}. {_why_not(model, config)}"
        )
    family = SUPPORTED_FAMILIES[model_type]
    path, name = family.stack, family.layers
    try:
        stack = model.get_submodule(path)
        layers = stack.get_submodule(name)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no {path}.{name}; expected the causal language model of family {model_type}, "
            "as AutoModelForCausalLM.from_pretrained loads it"
        ) from error
    if not isinstance(layers, nn.ModuleList) or len(layers) != config.num_hidden_layers:
        found = len(layers) if isinstance(layers, nn.ModuleList) else type(layers).__name__
        raise UnsupportedModelError(
            f"{path}.{name} holds {found} decoder layers, but the config says {config.num_hidden_layers}; "
            "make num_hidden_layers and the layers agree before wrapping"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(
            f"{config.num_kv_shared_layers} layers of this {model_type} read another layer's keys and values; "
            "skipping the layer that makes them would break these, so the model is refused"
        )
    if getattr(config, "add_cross_attention", False):
        raise UnsupportedModelError(
            f"this {model_type} has cross-attention, whose states come from an encoder and are kept in a cache of "
            "another kind; load it with add_cross_attention=False"
        )
    return LayerStack(stack, layers, len(layers), int(config.hidden_size), model_type, family)


def check_not_parallel(model: nn.Module) -> None:
    """Refuse a model inside a wrapper such as DataParallel.

    Raises:
        UnsupportedModelError: The module is a wrapper around a model of a supported family.
    """
    inner = getattr(model, "module", None)
    model_type = getattr(getattr(inner, "config", None), "model_type", None)
    if isinstance(inner, nn.Module) and model_type in SUPPORTED_FAMILIES:
        raise UnsupportedModelError(
            f"this is a {type(model).__name__} around a {type(inner).__name__}; call wrap_model, and unwrap_model, on "
            "the model itself (model.module), in each process, before anything is put around it"
        )


def _why_not(model: nn.Module, config: Any) -> str:
    """Say why a model that is not on the list cannot be run exactly, as far as its config tells."""
    if getattr(config, "is_encoder_decoder", False):
        return "This one has an encoder, whose states its layers also read"
    if getattr(model, "_is_stateful", False):
        return (
            "This one keeps a recurrent state, which a skipped layer would leave behind the tokens"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        return (
            "In this one, some layers read the keys and values of others, which must not be skipped"
        )
    if hasattr(config, "vision_config") or hasattr(config, "audio_config"):
        return "This one reads more than text; load its text model by itself if its family is on the list"
    return (
        "Other families may share caches between layers, or carry more than states of (batch, tokens, hidden) from one "
        "to the next, so each is refused until it passes the parity suite"
    )


@dataclass(frozen=True, slots=True)
class LayerSignature:
    """The parameters of a decoder layer class.

    Attributes:
        names: Names of the parameters of its forward after self, in order.
        cache_name: The parameter that takes the cache.
        mask_name: The parameter that takes the attention mask.
    """

    names: tuple[str, ...]
    cache_name: str
    mask_name: str


def layer_signature(forward: Callable[..., Any]) -> LayerSignature:
    """Read the parameters of a decoder layer's own forward.

    Args:
        forward: The unbound forward of a decoder layer class.

    Returns:
        Its parameter names and which of them takes the cache and the mask.

    Raises:
        UnsupportedModelError: It has no parameter for the cache, or none for the mask, under a known name.
    """
    names = tuple(
        name
        for name, parameter in inspect.signature(forward).parameters.items()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    )[1:]
    cache_name = next((name for name in names if name in _CACHE_NAMES), None)
    if cache_name is None or "attention_mask" not in names:
        raise UnsupportedModelError(
            f"{forward.__qualname__} takes {', '.join(names) or 'no argument by name'}; expected an attention_mask and "
            f"a cache called {' or '.join(_CACHE_NAMES)}"
        )
    return LayerSignature(names, cache_name, "attention_mask")
