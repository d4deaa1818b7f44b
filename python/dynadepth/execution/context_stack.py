"""Contexts: settings that hold for the forwards inside a `with` block, or inside one `generate`.

Like the executor's scopes, contexts belong to one thread and task.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from dynadepth.caching.depth_cache import DepthCache
from dynadepth.caching.row_plans import RowPlans
from dynadepth.execution.callbacks import VisitCallback, VisitCallbacks
from dynadepth.plans import Plans
from dynadepth.policies.base import Policy

__all__ = ["Context", "callbacks_of", "contexts_of", "open_context"]


@dataclass(slots=True)
class Context:
    """The settings of one block; a field that is None is left to the outer blocks.

    Attributes:
        owner: The controller whose forwards the context governs.
        plans: Plans to run instead of the policy's. Shape (rows, num_layers), uint8.
        policy: Another policy to use instead of the model's.
        prompt_lengths: Real tokens at the start of each row that form the prompt. Shape (rows,), int64, on the host.
        prompt_width: Number of columns of the batch passed to `generate`, padding included; None once the prompt is
            planned.
        row_plans: The plans of a generation that has no cache to keep them on.
        in_generate: Whether the block is one `generate`.
        only_plans: Whether the forward inside is made for the plans alone, which go to `row_plans`.
        cache: The cache of a generation, kept alive until its memory has been measured.
        ends: The tokens that end a row of a generation; after one, the row pads.
        has_begun: Whether a forward of the generation has completed, so that the next one is given its own tokens.
        scope: Makes what the forward inside runs in, as the controller's `scope_class` does.
        reading: States that the forward inside is to read through norm and head alone. Shape (rows, tokens, hidden).
        before: Called before each visit.
        after: Called after each visit.
        is_open: Whether the block is still running.
    """

    owner: object
    plans: Plans | None = None
    policy: Policy | None = None
    prompt_lengths: torch.Tensor | None = None
    prompt_width: int | None = None
    row_plans: RowPlans | None = None
    in_generate: bool = False
    only_plans: bool = False
    cache: DepthCache | None = None
    ends: frozenset[int] = frozenset()
    has_begun: bool = False
    scope: Callable[..., Any] | None = None
    reading: torch.Tensor | None = None
    before: VisitCallback | None = None
    after: VisitCallback | None = None
    is_open: bool = True


_CONTEXTS: ContextVar[tuple[Context, ...]] = ContextVar("dynadepth_contexts", default=())


@contextmanager
def open_context(context: Context) -> Iterator[Context]:
    """Open a context inside those that are already open, in this thread and for the duration of the block.

    A block inside a generator may end in another thread or task than the one it began in, as when a streaming server
    closes its generators; its settings then end everywhere.
    """
    _CONTEXTS.set((*_open_contexts(), context))
    try:
        yield context
    finally:
        context.is_open = False
        _CONTEXTS.set(_open_contexts())


def _open_contexts() -> tuple[Context, ...]:
    return tuple(context for context in _CONTEXTS.get() if context.is_open)


def contexts_of(owner: object) -> list[Context]:
    """Return the open contexts of a controller, innermost first."""
    return [context for context in reversed(_open_contexts()) if context.owner is owner]


def callbacks_of(owner: object) -> VisitCallbacks | None:
    """Return the callbacks of the open contexts of a controller, or None if there are none."""
    watching = [
        context for context in reversed(contexts_of(owner)) if context.before or context.after
    ]
    if not watching:
        return None
    return VisitCallbacks(
        [context.before for context in watching if context.before is not None],
        [context.after for context in watching if context.after is not None],
    )
