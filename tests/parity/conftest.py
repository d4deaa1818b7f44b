"""Fixtures of the parity suite."""

import pytest
import torch


@pytest.fixture(autouse=True)
def softmax_in_float64(monkeypatch):
    """Let eager attention keep float64: the families cast its softmax to float32, which alone is worth 1e-6."""
    softmax = torch.nn.functional.softmax

    def keep(states, dim=None, _stacklevel=3, dtype=None):
        return softmax(
            states, dim=dim, dtype=states.dtype if states.dtype == torch.float64 else dtype
        )

    monkeypatch.setattr(torch.nn.functional, "softmax", keep)
