"""Frames: what the caller has said for the forwards inside a `with` block, or inside one `generate`.

Frames are this thread's and task's, as the executor's scopes are. Knows nothing of what they are used for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from dynadepth.plans import Plans
from dynadepth.rows import RowPlans

__all__ = ["Frame", "frames_of", "open_frame"]


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
    """

    owner: object
    plans: Plans | None = None
    prompt_lengths: torch.Tensor | None = None
    prompt_width: int | None = None
    row_plans: RowPlans | None = None
    in_generate: bool = False


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
