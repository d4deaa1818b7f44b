"""States of prompts, collected at some layers while their plans are scored.

A sweep holds every distinct prefix of its plans as a row of states, so what a policy would read of a prompt at some
layer under some plan is available without another forward.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from dynadepth.plans import Plans, prefix_numbers
from dynadepth.policies.pooling import last_token_state, window_means

__all__ = ["PromptStates", "SweptPrompt"]


class SweptPrompt:
    """The position of one prompt under some plans in a sweep.

    Args:
        example: Index of the prompt, as the caller numbers them.
        plans: The plans. Shape (plans, layers), uint8.
        rows: The sweep's row of each plan. Shape (plans,), int64.
        first: Column of the prompt's first token.
        after: Column after its last token.
    """

    __slots__ = ("after", "example", "first", "plans", "rows")

    def __init__(
        self, example: int, plans: Plans, rows: npt.NDArray[np.int64], first: int, after: int
    ) -> None:
        self.example, self.plans, self.rows = example, plans, rows
        self.first, self.after = first, after


class PromptStates:
    """Collects the pooled states of prompts at some layers, for every distinct prefix of some plans.

    Args:
        plans: The plans whose prefixes are collected. Shape (plans, layers), uint8.
        layers: Layers whose entering states are read.
        num_windows: Number of windows that are averaged in addition to the last token's state; 0 for that state alone.
        num_prompts: Number of prompts.
        hidden_size: Width of the states.
        dtype: The dtype of the collected states.

    Attributes:
        views: The collected states, by layer. Shape (prompts, prefixes, num_windows + 1, hidden) each, on the host.
    """

    def __init__(
        self,
        plans: Plans,
        layers: Sequence[int],
        *,
        num_windows: int,
        num_prompts: int,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        self._num_windows = num_windows
        self._numbers: dict[int, dict[bytes, int]] = {}
        self.views: dict[int, torch.Tensor] = {}
        for layer in layers:
            numbers = prefix_numbers(plans, layer)
            self._numbers[layer] = {
                plan[:layer].tobytes(): int(number)
                for plan, number in zip(plans, numbers, strict=True)
            }
            shape = (num_prompts, int(numbers.max()) + 1, num_windows + 1, hidden_size)
            self.views[layer] = torch.full(shape, torch.nan, dtype=dtype)

    def watch(self, prompts: Sequence[SweptPrompt]) -> "_Watch":
        """Return the observer of one sweep."""
        return _Watch(prompts, self._numbers, self.views, self._num_windows)


class _Watch:
    """The observer of one sweep, see `dynadepth.execution.sweep.StateObserver`."""

    def __init__(
        self,
        prompts: Sequence[SweptPrompt],
        numbers: Mapping[int, dict[bytes, int]],
        views: Mapping[int, torch.Tensor],
        num_windows: int,
    ) -> None:
        self.layers = frozenset(numbers)
        self._prompts, self._numbers = prompts, numbers
        self._views, self._num_windows = views, num_windows

    def observe(
        self, layer_idx: int, states: torch.Tensor, entering: npt.NDArray[np.int64]
    ) -> None:
        """Collect the states that enter a layer, one for each prompt and prefix."""
        rows: list[int] = []
        places: list[tuple[int, int]] = []
        bounds: list[tuple[int, int]] = []
        numbers = self._numbers[layer_idx]
        for prompt in self._prompts:
            seen: set[int] = set()
            for plan, row in zip(prompt.plans, prompt.rows.tolist(), strict=True):
                number = numbers.get(plan[:layer_idx].tobytes())
                if number is None or number in seen:
                    continue
                seen.add(number)
                rows.append(int(entering[row]))
                places.append((prompt.example, number))
                bounds.append((prompt.first, prompt.after))
        if not rows:
            return
        picked = states.index_select(0, torch.tensor(rows, device=states.device))
        first, after = torch.tensor(bounds, device=states.device).T
        column = torch.arange(states.shape[1], device=states.device)
        mask = (column >= first[:, None]) & (column < after[:, None])
        if self._num_windows:
            means = window_means(picked, mask, self._num_windows)
            pooled = torch.cat([means, last_token_state(picked, mask).unsqueeze(1)], dim=1)
        else:
            # A view of one row instead of a weighted sum over all tokens.
            pooled = picked[torch.arange(len(rows), device=states.device), after - 1].unsqueeze(1)
        view = self._views[layer_idx]
        example, number = torch.tensor(places).T
        view[example, number] = pooled.to("cpu", view.dtype)
