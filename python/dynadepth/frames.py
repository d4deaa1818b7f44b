"""Frames: what the caller has said for the forwards inside a `with` block, or inside one `generate`.

Frames are this thread's and task's, as the executor's scopes are. Knows nothing of what they are used for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from dynadepth.cache import DepthCache
from dynadepth.plans import Plans
from dynadepth.rows import RowPlans
from dynadepth.watching import VisitCallback, Watchers

__all__ = ["Frame", "frames_of", "open_frame", "watchers_of"]


@dataclass(slots=True)
class Frame:
    """What one block says; what is None is said by an outer block or not at all.

    Attributes:
        owner: The controller whose forwards it is about.
        plans: Plans in place of the policy's. Shape (rows, num_layers), uint8.
        prompt_lengths: Real tokens of each row that are the prompt. Shape (rows,), int64, on the host.
        prompt_width: Columns of the batch that `generate` was given; None once the prompt is planned.
        row_plans: Plans of a generation without a cache to keep them on.
        in_generate: Whether the block is one `generate`.
        cache: The cache of a generation; it holds the states until the generation's figures are taken.
        before: Called before each visit.
        after: Called after each visit.
    """

    owner: object
    plans: Plans | None = None
    prompt_lengths: torch.Tensor | None = None
    prompt_width: int | None = None
    row_plans: RowPlans | None = None
    in_generate: bool = False
    cache: DepthCache | None = None
    before: VisitCallback | None = None
    after: VisitCallback | None = None


_FRAMES: ContextVar[tuple[Frame, ...]] = ContextVar("dynadepth_frames", default=())


@contextmanager
def open_frame(frame: Frame) -> Iterator[Frame]:
    """Put a frame inside those that are open, for this thread and the length of the block."""
    token = _FRAMES.set((*_FRAMES.get(), frame))
    try:
        yield frame
    finally:
        _FRAMES.reset(token)


def frames_of(owner: object) -> list[Frame]:
    """Return the open frames of a controller, innermost first."""
    return [frame for frame in reversed(_FRAMES.get()) if frame.owner is owner]


def watchers_of(owner: object) -> Watchers | None:
    """Return the callbacks of the open frames of a controller, or None if there are none."""
    watching = [frame for frame in reversed(frames_of(owner)) if frame.before or frame.after]
    if not watching:
        return None
    return Watchers(
        [frame.before for frame in watching if frame.before is not None],
        [frame.after for frame in watching if frame.after is not None],
    )
