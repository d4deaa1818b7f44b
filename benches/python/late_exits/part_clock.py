"""Where the time of decoding goes: layers with one token and with several, the head, exit heads, and the rest."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dynadepth.exits.exit_forward import ExitHead, Exits
from dynadepth.models.structure import LayerStack

_PARTS = ("layers alone", "layers settling", "layers owed", "head", "exit heads", "audits")


@dataclass
class Part:
    """Calls of one part of a model."""

    calls: int = 0
    tokens: int = 0
    seconds: float = 0.0


class PartClock:
    """Times the parts of a model by hooks on its modules; calls of a prompt are left out.

    Args:
        model: The causal language model.
        stack: Its layers.
    """

    def __init__(self, model: Any, stack: LayerStack) -> None:
        self._model, self._stack = model, stack
        self._parts: dict[str, Part] = {name: Part() for name in _PARTS}
        self._prompts = Part()

    @contextmanager
    def over(self, exits: Exits | None) -> Iterator[Exits | None]:
        """Time what runs inside the block; yields the exits whose heads are timed too."""
        handles = [handle for layer in self._stack.layers for handle in self._layer(layer)]
        head = self._model.get_output_embeddings()
        handles += self._hooked(head, lambda _: "head", lambda: None)
        try:
            timed = exits and replace(
                exits, heads=tuple(_TimedHead(each, self) for each in exits.heads)
            )
            yield timed
        finally:
            for handle in handles:
                handle.remove()

    def record(self, name: str, tokens: int, seconds: float) -> None:
        """Add a call."""
        if tokens > _MOST:
            name = "audits" if name == "head" else "prompt"
        part = self._parts.get(name, self._prompts)
        part.calls, part.tokens = part.calls + 1, part.tokens + tokens
        part.seconds += seconds

    def parts(self, seconds: float, tokens: int) -> dict[str, float]:
        """Return milliseconds of a token by part, and how often parts were called.

        Args:
            seconds: Of all that ran.
            tokens: New tokens of all texts.
        """
        found = {f"{name}, ms": 1e3 * part.seconds / tokens for name, part in self._parts.items()}
        inside = sum(part.seconds for part in self._parts.values()) + self._prompts.seconds
        found["the rest, ms"] = 1e3 * (seconds - inside) / tokens
        found["all without the prompt, ms"] = 1e3 * (seconds - self._prompts.seconds) / tokens
        for name in ("layers alone", "layers settling"):
            part = self._parts[name]
            found[f"{name}, calls"] = part.calls / tokens
            found[f"ms of a call, {name}"] = 1e3 * part.seconds / max(1, part.calls)
        settling = self._parts["layers settling"]
        found["tokens of a settling call"] = settling.tokens / max(1, settling.calls)
        return found

    def _layer(self, layer: nn.Module) -> list[Any]:
        """Time a layer; a call in which nothing of it ran only noted what is owed."""
        ran: list[bool] = []
        inner = next(each for each in layer.modules() if isinstance(each, nn.Linear))

        def name(tokens: int) -> str:
            here = "layers alone" if tokens == 1 else "layers settling"
            return here if ran else "layers owed"

        handles = [inner.register_forward_pre_hook(lambda *_: ran.append(True))]
        return [*handles, *self._hooked(layer, name, ran.clear)]

    def _hooked(
        self, module: nn.Module, name: Callable[[int], str], done: Callable[[], None]
    ) -> list[Any]:
        begun: list[float] = []

        def before(*_: Any) -> None:
            begun.append(time.perf_counter())

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            seconds = time.perf_counter() - begun.pop()
            states = output[0] if isinstance(output, (tuple, list)) else output
            tokens = states.shape[:-1].numel()
            self.record(name(tokens), tokens, seconds)
            done()

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


# Tokens of a call of decoding; audits read more at once, prompts have more.
_MOST = 16


class _TimedHead:
    """An exit head on the clock."""

    def __init__(self, head: ExitHead, clock: PartClock) -> None:
        self.layer_idx = head.layer_idx
        self._head, self._clock = head, clock

    def leaves(self, states: torch.Tensor) -> torch.Tensor:
        """See `ExitHead`."""
        begun = time.perf_counter()
        found = self._head.leaves(states)
        self._clock.record("exit heads", len(states), time.perf_counter() - begun)
        return found

    def final(self, states: torch.Tensor) -> torch.Tensor:
        """See `ExitHead`."""
        begun = time.perf_counter()
        found = self._head.final(states)
        self._clock.record("exit heads", len(states), time.perf_counter() - begun)
        return found
