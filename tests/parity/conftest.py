"""What the parity suite shares: exact eager attention, shortcuts in place of skipped layers, and a count of its cases.

Every case runs twice: skipped layers leave nothing behind, and they leave random shortcuts (with one kind of attention
of each family). The reference of the second is a baked model with ordinary modules that compute the same.
"""

import re
import sys
from collections import Counter

import pytest
import torch

from dynadepth.execution.sweep import Sweeper
from dynadepth.wrapping.bake import bake
from dynadepth.wrapping.skipping import skips_of
from dynadepth.wrapping.wrap import wrap_model
from tests.parity import drivers, recompute
from tests.tiny import FAMILIES, VARIANTS, attentions
from tests.tiny_shortcuts import random_shortcuts, rebuilt_with_shortcuts

# Not about skipped layers: decisions, files, exits, or models without a reference.
_ONCE = (
    "test_budgets",
    "test_exits",
    "test_exits_generate",
    "test_lossless",
    "test_onnx",
    "test_onnx_menu",
    "test_prompt_exits",
    "test_published_bugs",
    "test_scoring",
)

# The compiler cannot trace who calls; and whether watching changes a bit is asked of the families as they are.
_OWN_CASTS = ("test_neighbours_compile", "test_states")


# No layer is skipped in these, so they run without shortcuts alone.
_SKIP_NOTHING = ("test_identity_is_bit_equal",)


def pytest_collection_modifyitems(config, items):
    """Leave out shortcuts where no layer is skipped, and where they meet a family's second kind of attention."""
    twice = {item for item in items if _is_twice(item)}
    if twice:
        config.hook.pytest_deselected(items=list(twice))
        items[:] = [item for item in items if item not in twice]


def _is_twice(item):
    callspec = getattr(item, "callspec", None)
    given = {} if callspec is None else callspec.params
    if given.get("skipped_layers") != "shortcuts":
        return False
    # What stands in place of a layer has no attention.
    second = given.get("attention") == "eager" and "sdpa" in attentions(given["family"])
    return second or item.originalname in _SKIP_NOTHING


def pytest_generate_tests(metafunc):
    """Let every case of the other modules run both ways."""
    if metafunc.module.__name__.rpartition(".")[2] not in _ONCE:
        metafunc.fixturenames.append("skipped_layers")
        metafunc.parametrize("skipped_layers", ["plain", "shortcuts"], indirect=True)


@pytest.fixture
def skipped_layers(request, monkeypatch):
    """Wrap, sweep and bake with shortcuts, whatever the test calls."""
    if request.param == "plain":
        return

    def wrapped(model, **how):
        inner = getattr(model, "_orig_mod", model)
        inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
        return wrap_model(model, **{"shortcuts": random_shortcuts(inner), **how})

    def baked(model, plan):
        checked = bake(model, plan)  # refuses what it refuses
        del checked
        return rebuilt_with_shortcuts(model, plan, random_shortcuts(model))

    def sweeper(model, stack):
        return Sweeper(model, stack, skips_of(random_shortcuts(model), stack.num_layers))

    replacements = {"wrap_model": wrapped, "bake": baked, "Sweeper": sweeper}
    for module in (request.module, drivers, recompute):
        for name, replacement in replacements.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, replacement)


@pytest.fixture(autouse=True)
def float64_throughout(request, monkeypatch):
    """Let a model of float64 keep it: the families cast softmax, norms and experts' scores to float32.

    That alone is worth 1e-6, wherever another batch shape or another CPU moves a value over a boundary of rounding.
    """
    softmax, float_, to = torch.nn.functional.softmax, torch.Tensor.float, torch.Tensor.to

    def keeping(states, dim=None, _stacklevel=3, dtype=None):
        return softmax(
            states, dim=dim, dtype=states.dtype if states.dtype == torch.float64 else dtype
        )

    def keeps(states, wanted):
        # dynadepth's own casts stay as they are.
        family = sys._getframe(2).f_globals.get("__name__", "").startswith("transformers.models.")
        return family and states.dtype == torch.float64 and wanted is torch.float32

    def as_float(states, *args, **kwargs):
        return states if keeps(states, torch.float32) else float_(states, *args, **kwargs)

    def converted(states, *args, **kwargs):
        wanted = kwargs.get("dtype", args[0] if args else None)
        return states if keeps(states, wanted) else to(states, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "softmax", keeping)
    if request.module.__name__.endswith(_OWN_CASTS):
        return
    monkeypatch.setattr(torch.Tensor, "float", as_float)
    monkeypatch.setattr(torch.Tensor, "to", converted)


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
