"""Products of a linear layer with few tokens: the order of the operands that is measured to be faster.

A call that settles owed tokens, or reads several states, multiplies each weight with two to some dozens of vectors.
Matrix libraries for CPUs are made for one vector or for hundreds: on some machines a product with two costs three times
one with one, while the same numbers, asked for as the transposed product, cost hardly more than one. Which way is
faster is measured once for each shape; both are the same sums, added up in another order.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dynadepth.execution.executor import is_compiled

__all__ = ["few_token_products"]

# Tokens of a call that are few; more are what matrix libraries are made for.
_FEWEST, _MOST = 2, 64
# The transposed product must take less than this share of the time of the ordinary one.
_WORTHWHILE = 0.85
# What is measured: the best of a few rounds over so many weights, or so many numbers.
_ROUNDS, _MOST_WEIGHTS, _NUMBERS = 4, 32, 2**24


@contextmanager
def few_token_products(module: nn.Module | None, num_tokens: int) -> Iterator[None]:
    """Let the linear layers of a module choose their product, inside the block.

    Only plain `nn.Linear` on CPUs take part, with plain weights, outside compiled graphs and where no gradients are
    recorded; nothing happens while torch is asked for deterministic algorithms, since times decide.

    Args:
        module: A decoder layer or a head; None: nothing happens.
        num_tokens: Tokens of the call, over all rows.
    """
    swapped: list[nn.Module] = []
    if module is not None and not _is_idle(module, num_tokens):
        swapped = [each for each in module.modules() if _is_plain(each)]
    try:
        for linear in swapped:
            linear.__dict__["forward"] = _ChosenProduct(linear)
        yield
    finally:
        for linear in swapped:
            # Another thread that runs the same layer may have been here first.
            linear.__dict__.pop("forward", None)


def _is_idle(module: nn.Module, num_tokens: int) -> bool:
    return (
        not _FEWEST <= num_tokens <= _MOST
        or torch.is_grad_enabled()
        or torch.are_deterministic_algorithms_enabled()
        or torch.compiler.is_compiling()
        or is_compiled(module)
    )


def _is_plain(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    weight = module.weight
    return (
        type(weight) in (nn.Parameter, torch.Tensor)
        and weight.device.type == "cpu"
        and weight.is_contiguous()
    )


class _ChosenProduct:
    """The forward of a linear layer, by the product that is faster for as many tokens as come."""

    __slots__ = ("_linear",)

    def __init__(self, linear: Any) -> None:
        self._linear = linear

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = self._linear.weight, self._linear.bias
        num_tokens = input.numel() // max(1, input.shape[-1])
        few = _FEWEST <= num_tokens <= _MOST and input.dtype == weight.dtype
        if not few or not _transposed_is_faster(weight, num_tokens):
            return functional.linear(input, weight, bias)
        output = _transposed(input.reshape(num_tokens, -1), weight)
        if bias is not None:
            output = output + bias
        return output.reshape(*input.shape[:-1], -1)


_Shape = tuple[torch.Size, torch.dtype, int, int]
_measured: dict[_Shape, bool] = {}


def _transposed_is_faster(weight: torch.Tensor, num_tokens: int) -> bool:
    """Say whether the transposed product is faster, from a measurement on the first call for a shape."""
    # Powers of two stand for what is between them.
    rounded = 1 << (num_tokens - 1).bit_length()
    shape = weight.shape, weight.dtype, rounded, torch.get_num_threads()
    faster = _measured.get(shape)
    if faster is None:
        faster = _measured[shape] = _measure(weight, rounded)
    return faster


def _measure(weight: torch.Tensor, num_tokens: int) -> bool:
    # As many numbers as a model has, one after the other, lest the processor's cache answer for its memory.
    copies = max(1, min(_MOST_WEIGHTS, _NUMBERS // max(1, weight.numel())))
    weights = [weight, *(torch.zeros_like(weight) for _ in range(copies - 1))]
    tokens = torch.zeros((num_tokens, weight.shape[1]), dtype=weight.dtype)
    ways: tuple[Callable[..., Any], ...] = (functional.linear, _transposed)
    best = [float("inf")] * len(ways)
    for _ in range(_ROUNDS):
        for place, way in enumerate(ways):
            begun = time.perf_counter()
            for each in weights:
                way(tokens, each)
            best[place] = min(best[place], time.perf_counter() - begun)
    return best[1] < _WORTHWHILE * best[0]


def _transposed(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the outputs of tokens, laid out as a linear layer's, whose strides some families ask for."""
    return torch.mm(weight, tokens.t()).t().contiguous()
