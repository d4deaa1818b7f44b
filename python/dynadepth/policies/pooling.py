"""How the states of a prompt become a few vectors: means over windows of its tokens, and the last token's state."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = [
    "Pooling",
    "last_token_state",
    "window_means",
]


def window_means(hidden_states: Tensor, prompt_mask: Tensor, num_windows: int) -> Tensor:
    """Average the prompt's real tokens over contiguous windows.

    Of n real tokens, window w holds the tokens floor(w n / W) up to max(floor(w n / W) + 1, floor((w + 1) n / W)), so
    that a prompt shorter than W repeats tokens instead of leaving windows empty. Padding may be anywhere and its
    values never matter. Nothing waits for the device.

    Args:
        hidden_states: States. Shape (batch, tokens, hidden), any floating dtype.
        prompt_mask: Non-zero for real tokens. Shape (batch, tokens), bool or integer.
        num_windows: Number W of windows.

    Returns:
        Means; zeros for a row without real tokens. Shape (batch, num_windows, hidden), float32.

    Source:
        Window pooling of Dr.LLM (arXiv 2510.12773); deviation: only the prompt's real tokens are averaged, never
        padding or the scored answer.
    """
    members = _window_members(prompt_mask, num_windows)
    return Pooling.averaging(prompt_mask, members)(hidden_states)


def last_token_state(hidden_states: Tensor, prompt_mask: Tensor) -> Tensor:
    """Return the state of the last real token of each row.

    Args:
        hidden_states: States. Shape (batch, tokens, hidden), any floating dtype.
        prompt_mask: Non-zero for real tokens. Shape (batch, tokens), bool or integer.

    Returns:
        States; zeros for a row without real tokens. Shape (batch, hidden), float32.
    """
    real = prompt_mask.to(torch.bool)
    column = torch.arange(real.shape[1], device=real.device)
    last = (column * real).amax(dim=1)
    states = hidden_states[torch.arange(len(last), device=real.device), last].to(torch.float32)
    return states.masked_fill(real.any(dim=1).logical_not().unsqueeze(1), 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Pooling:
    """The pooling of one batch, computed from its mask once for all layers that read the batch.

    Args:
        weights: The weight of each token in each view. Shape (batch, views, tokens), float32.
        padding: True for tokens that belong to no prompt. Shape (batch, tokens, 1), bool.
        spans: First token and end of each view, if the host knows them and no row is padded; means over spans are
            cheaper than products with mostly zeros.
    """

    weights: Tensor
    padding: Tensor
    spans: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def of(cls, prompt_mask: Tensor, num_windows: int, *, last_token: bool) -> "Pooling":
        """Return the pooling for the window means and, if wanted, the last token's state.

        Args:
            prompt_mask: Non-zero for real tokens. Shape (batch, tokens), bool or integer.
            num_windows: Number W of windows.
            last_token: Whether the last real token's state is an additional view, after the windows.
        """
        members = _window_members(prompt_mask, num_windows)
        if last_token:
            members = torch.cat([members, _last_member(prompt_mask)], dim=1)
        return cls.averaging(prompt_mask, members)

    @classmethod
    def averaging(cls, prompt_mask: Tensor, members: Tensor) -> "Pooling":
        """Return the pooling for means over some tokens of each row. Shape (batch, views, tokens), bool."""
        weights = members.to(torch.float32)
        weights = weights / weights.sum(dim=2, keepdim=True).clamp(min=1.0)
        return cls(weights, prompt_mask.to(torch.bool).logical_not().unsqueeze(2))

    def unpadded(self) -> "Pooling":
        """Return the pooling for a batch in which no row is padded; this waits for the device."""
        held = self.weights[0] > 0
        first = held.int().argmax(dim=1)
        bounds = torch.stack([first, first + held.sum(dim=1)], dim=1).tolist()
        return replace(self, spans=tuple((begin, end) for begin, end in bounds))

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Return the views of states. Shape (batch, views, hidden), float32."""
        if self.spans is not None:
            means = [
                hidden_states[:, begin:end].mean(dim=1, dtype=torch.float32)
                for begin, end in self.spans
            ]
            return torch.stack(means, dim=1)
        # A fully masked position may hold inf or nan, and 0 * nan is nan.
        clean = hidden_states.masked_fill(self.padding, 0.0)
        return self.weights @ clean.to(torch.float32)


def _window_members(prompt_mask: Tensor, num_windows: int) -> Tensor:
    """Return which token is in which window. Shape (batch, num_windows, tokens), bool."""
    real = prompt_mask.to(torch.bool)
    position = real.to(torch.int64).cumsum(dim=1) - 1
    count = real.to(torch.int64).sum(dim=1, keepdim=True)
    window = torch.arange(num_windows, device=prompt_mask.device).unsqueeze(0)
    first = torch.div(window * count, num_windows, rounding_mode="floor")
    after = torch.div((window + 1) * count, num_windows, rounding_mode="floor")
    after = torch.maximum(after, first + 1)
    inside = (position.unsqueeze(1) >= first.unsqueeze(2)) & (
        position.unsqueeze(1) < after.unsqueeze(2)
    )
    return inside & real.unsqueeze(1)


def _last_member(prompt_mask: Tensor) -> Tensor:
    """Return which token is the last real one. Shape (batch, 1, tokens), bool."""
    real = prompt_mask.to(torch.bool)
    position = real.to(torch.int64).cumsum(dim=1)
    return (real & (position == position[:, -1:])).unsqueeze(1)
