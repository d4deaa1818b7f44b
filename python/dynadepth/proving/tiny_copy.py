"""A tiny random model of a given model's own class and config, on which a proof runs."""

import copy
import math
from typing import Any, Literal

import torch
from torch import nn

from dynadepth.errors import UnsupportedModelError
from dynadepth.models.structure import layer_stack
from dynadepth.proving.tiny_config import tiny_config

__all__ = ["HEAD_DIMS", "NoCopyError", "failure", "layers_needed", "own_class", "tiny_copy"]

_FEWEST_LAYERS = 4
# Beyond this many kinds, counts are taken for numbers of the layers.
_MOST_KINDS = 12
# Widths of heads that are tried in turn; None keeps the config's own, "all" every width.
HEAD_DIMS: tuple[int | Literal["all"] | None, ...] = (8, 16, 32, None, "all")
_MOST_PARAMETERS = 12_000_000
_INITIALIZER_RANGE = 0.5
# Kernels that a processor can run in float64.
_ATTENTION = ("sdpa", "eager")


class NoCopyError(UnsupportedModelError):
    """No tiny copy of a model can be built from its config, or none runs."""


def layers_needed(layers: nn.ModuleList) -> int:
    """Return how many of the first layers show every kind of layer, at least four if there are as many.

    Two layers are of one kind if their modules have the same classes and the same switches, names and counts. Counts
    that make nearly every layer a kind of its own are numbers of the layer, and are left out.
    """
    for classes in ((bool, str, int, type(None)), (bool, str, type(None))):
        first: dict[tuple[Any, ...], int] = {}
        for layer_idx, layer in enumerate(layers):
            first.setdefault(_kind(layer, classes), layer_idx)
        if len(first) <= _MOST_KINDS:
            break
    return min(len(layers), max(_FEWEST_LAYERS, max(first.values()) + 2))


def _kind(layer: nn.Module, classes: tuple[type, ...]) -> tuple[Any, ...]:
    return tuple(
        (
            type(module).__name__,
            *sorted(
                (name, str(value))
                for name, value in module.__dict__.items()
                if type(value) in classes
                and not name.startswith("_")
                and not any(word in name for word in ("idx", "index", "number", "training"))
            ),
        )
        for module in layer.modules()
    )


def failure(error: Exception) -> str:
    """Return what a model's own code raised, in one line: the last of its message says most."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1].strip()}"


def own_class(module: nn.Module) -> Any:
    """Return the class that a module was built with: not the one that wrapping, or sharding, puts in front of it."""
    cls = getattr(type(module), "_dynadepth_base", type(module))
    return next(cls for cls in cls.__mro__ if not cls.__module__.startswith("torch."))


def tiny_copy(model: nn.Module, num_layers: int) -> Any:
    """Build a tiny random copy of a model, in float64 on the processor, the same for the same config.

    Args:
        model: The model, wrapped or not; only its class and config are used.
        num_layers: How many layers it has, the first ones of the model.

    Returns:
        The copy in evaluation mode.

    Raises:
        NoCopyError: No copy can be built, or none runs; says why.
    """
    cls = own_class(model)
    config: Any = model.config
    reasons = []
    for head_dim in HEAD_DIMS:
        model_or_reason = _tried(cls, config, num_layers, head_dim)
        if not isinstance(model_or_reason, str):
            return model_or_reason
        reasons.append(model_or_reason)
    # The first size says most: later ones are only larger.
    raise NoCopyError(
        f"no tiny copy of this {config.model_type} can be made from its config, so it cannot be proved ({reasons[0]})"
    )


def _tried(cls: Any, config: Any, num_layers: int, head_dim: int | Literal["all"] | None) -> Any:
    """Return a copy with heads of this width, or why there is none."""
    try:
        return _build(cls, tiny_config(config, num_layers, head_dim), config)
    except Exception as error:  # a config may be refused by any check of its family
        return failure(error)


def _build(cls: Any, config: Any, original: Any) -> Any:
    """Build the model with random weights and run it once."""
    with torch.device("meta"):
        parameters = sum(each.numel() for each in cls(copy.deepcopy(config)).parameters())
    if parameters > _MOST_PARAMETERS:
        raise UnsupportedModelError(f"its tiny copy would have {parameters:,} parameters")
    attention = getattr(original, "_attn_implementation", None)
    kernels = [attention] if attention in _ATTENTION else list(_ATTENTION)
    error: Exception | None = None
    for kernel in (*kernels, "eager"):
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = cls._from_config(
                    copy.deepcopy(config),
                    attn_implementation=kernel,
                    experts_implementation="eager",
                    dtype=torch.float64,
                )
            break
        except (ValueError, ImportError) as failed:
            error = failed
    else:
        raise error if error is not None else UnsupportedModelError("no attention kernel")
    # Some weights and tables are made in float32 whatever the model's dtype.
    model = model.to(device="cpu", dtype=torch.float64).eval()
    _randomise(model)
    layer_stack(model)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = 0
        model.generation_config.eos_token_id = None
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5, 6]]))
    return model


def _randomise(model: nn.Module) -> None:
    """Draw all weights so that every layer matters, whatever the family's own initialisation is."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                # As wide as 0.5 in a width of 64, and no louder in wider modules.
                scale = _INITIALIZER_RANGE * min(1.0, math.sqrt(64 / parameter.shape[-1]))
                parameter.copy_(noise * scale)
            else:
                parameter.add_(0.1 * noise)
