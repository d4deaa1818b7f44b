"""How a model's own forward calls its decoder layers and what they return, read off two forwards."""

from typing import Any

import torch
from torch import nn

from dynadepth.errors import UnsupportedModelError
from dynadepth.models.structure import LayerStack, LayerTraits, layer_signature
from dynadepth.proving.driving import Batch, run

__all__ = ["observe_layers"]


def observe_layers(model: Any, stack: LayerStack, batches: tuple[Batch, Batch]) -> LayerTraits:
    """Watch every layer during one forward of each batch.

    Args:
        model: The model.
        stack: Its layers.
        batches: Two batches with another number of rows each; no width is a multiple of a number of rows.

    Returns:
        What both forwards had in common.

    Raises:
        UnsupportedModelError: The layers are not called once each, in their order, with states of shape (rows, tokens,
            hidden), or do not all return such states.
    """
    seen = [_watch(model, stack, batch) for batch in batches]
    extras = {call.num_extras for calls in seen for call in calls}
    if len(extras) > 1:
        raise UnsupportedModelError(
            f"its layers return {sorted(map(str, extras))} values after the states; expected as many each"
        )
    row_arguments, shared_arguments = set(), set()
    for first, second in zip(*seen, strict=True):
        for name, sizes in first.leading.items():
            others = second.leading.get(name)
            if sizes and others:
                if _by_row(sizes, batches[0]) and _by_row(others, batches[1]):
                    row_arguments.add(name)
                elif sizes == others:
                    shared_arguments.add(name)
    return LayerTraits(
        num_extras=extras.pop(),
        feed_forward=_feed_forward(stack, seen[0]),
        row_arguments=tuple(sorted(row_arguments)),
        shared_arguments=tuple(sorted(shared_arguments - row_arguments)),
    )


def _by_row(sizes: tuple[int, ...], batch: Batch) -> bool:
    """Say whether tensors have an entry, or a group of entries, for each row; one entry serves all rows."""
    return all(size == 1 or size % len(batch.ids) == 0 for size in sizes)


class _Call:
    """One call of a layer: what it was given and what it returned."""

    def __init__(self, layer_idx: int, arguments: dict[str, Any], output: Any) -> None:
        self.layer_idx = layer_idx
        self.leading = {name: _leading_sizes(value) for name, value in arguments.items()}
        several = isinstance(output, (tuple, list)) and len(output) > 0
        self.states = output[0] if several else output
        self.num_extras = len(output) - 1 if several else None
        # The modules of the layer that were given one tensor of states and returned one.
        self.mapped: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}


def _leading_sizes(value: Any) -> tuple[int, ...]:
    items = value if isinstance(value, tuple) else (value,)
    return tuple(item.shape[0] for item in items if isinstance(item, torch.Tensor) and item.dim())


def _watch(model: Any, stack: LayerStack, batch: Batch) -> list[_Call]:
    calls: list[_Call] = []
    handles = []
    mapped: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch_layer(layer_idx: int, layer: nn.Module) -> Any:
        names = layer_signature(type(layer).forward).names

        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            given = arguments.pop(names[0], None)
            call = _Call(layer_idx, arguments, output)
            call.mapped.update(mapped)
            mapped.clear()
            if not isinstance(given, torch.Tensor) or given.dim() != 3:
                raise UnsupportedModelError(
                    f"the states that enter layer {layer_idx} are {_form(given)}; expected (rows, tokens, hidden)"
                )
            if not isinstance(call.states, torch.Tensor) or call.states.shape != given.shape:
                raise UnsupportedModelError(
                    f"layer {layer_idx} returns {_form(call.states)} for states of {tuple(given.shape)}"
                )
            calls.append(call)

        return hook

    def watch_module(name: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            alone = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor)
            if alone and isinstance(output, torch.Tensor) and output.shape == args[0].shape:
                # Some layers add to these in place.
                mapped[name] = (args[0].clone(), output.clone())

        return hook

    for layer_idx, layer in enumerate(stack.layers):
        handles.append(layer.register_forward_hook(watch_layer(layer_idx, layer), with_kwargs=True))
        for name, child in layer.named_children():
            handles.append(child.register_forward_hook(watch_module(name), with_kwargs=True))
    try:
        run(model, batch, "uncached")
    finally:
        for handle in handles:
            handle.remove()
    order = [call.layer_idx for call in calls]
    if order != list(range(stack.num_layers)):
        raise UnsupportedModelError(
            f"one forward calls its layers in the order {order}; expected each once, from the first to the last"
        )
    return calls


def _form(value: Any) -> str:
    return (
        f"of shape {tuple(value.shape)}"
        if isinstance(value, torch.Tensor)
        else f"a {type(value).__name__}"
    )


def _feed_forward(stack: LayerStack, calls: list[_Call]) -> str | None:
    """Return the largest module that every layer has and that maps each token alone, if a matrix is in it."""
    candidates: dict[str, int] = {}
    for name in set.intersection(*(set(call.mapped) for call in calls)):
        if all(
            _maps_tokens_alone(stack.layers[call.layer_idx].get_submodule(name), *call.mapped[name])
            for call in calls
        ):
            modules = [layer.get_submodule(name) for layer in stack.layers]
            if all(any(p.dim() > 1 for p in module.parameters()) for module in modules):
                candidates[name] = sum(p.numel() for module in modules for p in module.parameters())
    return max(candidates, key=lambda name: (candidates[name], name), default=None)


def _maps_tokens_alone(module: nn.Module, given: torch.Tensor, output: torch.Tensor) -> bool:
    """Say whether some tokens, taken out of their rows, come out as they did among the others."""
    tokens = torch.arange(0, given.shape[0] * given.shape[1], 3)
    try:
        with torch.no_grad():
            alone = module(given.flatten(0, 1)[tokens].unsqueeze(0))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    expected = output.flatten(0, 1)[tokens]
    return (
        isinstance(alone, torch.Tensor)
        and alone.shape == (1, *expected.shape)
        and bool((alone[0] - expected).abs().max() <= 1e-9 * (1 + expected.abs().max()))
    )
