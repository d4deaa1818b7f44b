"""What the parity suite shares: exact eager attention, and a count of its cases by family."""

import re
from collections import Counter

import pytest
import torch

from tests.tiny import FAMILIES, VARIANTS


@pytest.fixture(autouse=True)
def softmax_in_float64(monkeypatch):
    """Let eager attention keep float64: the families cast its softmax to float32, which alone is worth 1e-6."""
    softmax = torch.nn.functional.softmax

    def keep(states, dim=None, _stacklevel=3, dtype=None):
        return softmax(
            states, dim=dim, dtype=states.dtype if states.dtype == torch.float64 else dtype
        )

    monkeypatch.setattr(torch.nn.functional, "softmax", keep)


def pytest_terminal_summary(terminalreporter):
    """Print how many cases each family has passed and failed."""
    counts = {
        name: Counter(
            family
            for report in terminalreporter.stats.get(name, [])
            if (family := _family_of(report.nodeid))
        )
        for name in ("passed", "failed", "skipped")
    }
    named = sorted({family for count in counts.values() for family in count})
    if not named:
        return
    terminalreporter.section("parity cases by family")
    for family in named:
        figures = ", ".join(f"{count[family]} {name}" for name, count in counts.items())
        terminalreporter.write_line(f"{family:20} {figures}")


def _family_of(nodeid):
    """Return the family, or variant of one, that a case's parameters name; the longest name wins."""
    found = re.search(r"tests/parity/.*\[(.*)\]$", nodeid)
    parameters = found[1] if found else ""
    names = [
        name
        for name in (*FAMILIES, *VARIANTS)
        if re.search(rf"(^|-){re.escape(name)}(-|$)", parameters)
    ]
    return max(names, key=len, default=None)
