"""Prove a model: find out on a tiny copy of it whether every plan runs exactly, once for each shape of model.

A list of families can only say what somebody tried with one release of transformers. A proof says it of the very
classes, config and versions at hand, and refuses what differs, by how much and under which plan.
"""

import logging
import threading
import time
from contextlib import ExitStack
from typing import Any, Literal

import torch

from dynadepth.config import did_you_mean
from dynadepth.errors import ConfigError, DynadepthError, UnsupportedModelError
from dynadepth.models.structure import LayerStack, layer_signature, layer_stack
from dynadepth.proving.float64 import KeepFloat64
from dynadepth.proving.laws import Kept, LawBroken, check_laws
from dynadepth.proving.tiny_copy import NoCopyError, failure, layers_needed, own_class, tiny_copy
from dynadepth.proving.verdict import Verdict, recall, remember, verdict_key

__all__ = ["Unlisted", "prove", "proved_stack"]

# What to do with a model whose shape has no verdict yet.
Unlisted = Literal["prove", "refuse"]
_UNLISTED = ("prove", "refuse")
_log = logging.getLogger("dynadepth")
# Building a copy sets torch's default dtype for the whole process, for a moment.
_LOCK = threading.Lock()


def proved_stack(model: Any, *, unlisted: Unlisted = "prove") -> LayerStack:
    """Return a model's decoder layers, which have been proved to run exactly.

    Args:
        model: A transformers causal language model, wrapped or not; not changed.
        unlisted: "prove" proves a shape of model that has no verdict yet, which takes seconds; "refuse" refuses it.

    Returns:
        The layers, with the traits that the proof found.

    Raises:
        ConfigError: `unlisted` is something else.
        UnsupportedModelError: The model cannot run exactly, or has no verdict and none may be made.
    """
    _check_unlisted(unlisted)
    stack = layer_stack(model)
    verdict = _verdict(model, stack, unlisted, again=False)
    if not verdict.exact or verdict.traits is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} (model_type {stack.model_type!r}) is refused: {verdict.reason}. `dynadepth check` "
            "shows the whole verdict"
        )
    return stack.with_traits(verdict.traits)


def prove(model: Any, *, again: bool = False) -> Verdict:
    """Return the verdict on a model, from the cache if there is one for its shape.

    A tiny random copy is made of the model's own class and config: its first layers, as many as show every kind, with
    narrow states, in float64. On it, identity must be bit-equal, and every single edit and some mixed plans must equal
    the model rebuilt as the plan's visits: in padded batches, with a cache and without, in a sweep and in `generate`;
    and undoing must leave no trace.

    Args:
        model: A transformers causal language model; weights may be on the meta device. Not changed.
        again: Whether to prove even if there is a verdict.

    Returns:
        The verdict, also if the model is refused.

    Source:
        Our own.
    """
    try:
        stack = layer_stack(model)
    except UnsupportedModelError as error:
        model_type = str(getattr(getattr(model, "config", None), "model_type", None))
        return _refused(str(error), model_type)
    return _verdict(model, stack, "prove", again=again)


def _check_unlisted(unlisted: str) -> None:
    """Refuse a setting that does not exist.

    Raises:
        ConfigError: It is neither "prove" nor "refuse".
    """
    if unlisted not in _UNLISTED:
        raise ConfigError(
            f"unlisted is {unlisted!r}{did_you_mean(str(unlisted), _UNLISTED)}; expected 'prove' or 'refuse'"
        )


def _unreadable(stack: LayerStack) -> str | None:
    """Return why a layer cannot be called by name, which explains whatever its copy failed with; None if all can."""
    try:
        for layer in stack.layers:
            layer_signature(type(layer).forward)
    except UnsupportedModelError as error:
        return str(error)
    return None


def _refused(reason: str, model_type: str, num_layers: int = 0, seconds: float = 0.0) -> Verdict:
    return Verdict(
        exact=False,
        reason=reason,
        model_type=model_type,
        num_layers=num_layers,
        noise=None,
        worst=None,
        seconds=seconds,
        traits=None,
    )


def _verdict(model: Any, stack: LayerStack, unlisted: Unlisted, *, again: bool) -> Verdict:
    num_layers = layers_needed(stack.layers)
    key = verdict_key(model, stack, num_layers)
    known = None if again else recall(key)
    if known is not None:
        return known
    if unlisted == "refuse":
        raise UnsupportedModelError(
            f"no {type(model).__name__} of this shape has been proved here, and unlisted='refuse' was asked for; run "
            "`dynadepth check` on it, or leave unlisted out"
        )
    with _LOCK:
        known = None if again else recall(key)
        if known is not None:
            return known
        verdict, lasting = _prove(model, stack, num_layers)
        verdict = remember(key, verdict, on_disk=lasting)
    _log.info(
        "proved %s (model_type %s) on a copy of %d layers in %.1f s: %s; verdict in %s",
        type(model).__name__,
        stack.model_type,
        num_layers,
        verdict.seconds,
        "exact" if verdict.exact else f"refused: {verdict.reason}",
        verdict.kept,
    )
    return verdict


def _prove(model: Any, stack: LayerStack, num_layers: int) -> tuple[Verdict, bool]:
    """Return the verdict, and whether another process would come to the same one."""
    begin = time.monotonic()
    kept, reason, lasting = None, "", True
    try:
        with ExitStack() as block:
            # Whatever the caller has set for its own forwards.
            block.enter_context(torch.device("cpu"))
            block.enter_context(torch.autocast("cpu", enabled=False))
            block.enter_context(torch.random.fork_rng(devices=[]))
            kept = _examine(model, stack, num_layers)
    except (LawBroken, DynadepthError) as error:
        reason = str(error)
    except MemoryError:
        raise
    except Exception as error:  # whatever a model's own code raises on its copy, or this machine
        lasting = False
        reason = f"its tiny copy fails with {failure(error)}"
    seconds = round(time.monotonic() - begin, 3)
    if kept is None:
        return _refused(
            _unreadable(stack) or reason, stack.model_type, num_layers, seconds
        ), lasting
    proved = Verdict(
        exact=True,
        reason="",
        model_type=stack.model_type,
        num_layers=num_layers,
        noise=kept.noise,
        worst=kept.worst,
        seconds=seconds,
        traits=kept.traits,
    )
    return proved, lasting


def _examine(model: Any, stack: LayerStack, num_layers: int) -> Kept:
    try:
        with KeepFloat64():
            return check_laws(_copy_of(model, stack, num_layers))
    except (RuntimeError, TypeError, NoCopyError):
        # Some modules mix dtypes on purpose.
        return check_laws(_copy_of(model, stack, num_layers), in_float64=False)


def _copy_of(model: Any, stack: LayerStack, num_layers: int) -> Any:
    copy = tiny_copy(model, num_layers)
    for layer_idx, (own, other) in enumerate(
        zip(stack.layers, layer_stack(copy).layers, strict=False)
    ):
        if not any(own_class(module) is type(other) for module in own.modules()):
            raise UnsupportedModelError(
                f"its config builds a {type(other).__name__} as layer {layer_idx}, but the model has a "
                f"{type(own).__name__} there, which was put in later and cannot be proved from the config"
            )
    return copy
