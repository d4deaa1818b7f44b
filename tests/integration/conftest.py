"""What the tests of the search application share."""

import importlib.metadata
from pathlib import Path

import pytest

from dynadepth.cli import main as cli
from tests.tiny_folder import save_tiny_base


@pytest.fixture(scope="session")
def tiny_deep_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny llama of 10 layers, enough for budgets in steps of a tenth; read only."""
    return save_tiny_base(tmp_path_factory.mktemp("base") / "tiny-deep", num_layers=10)


@pytest.fixture
def search_verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the verbs of this source tree, whatever is installed."""
    entry = importlib.metadata.EntryPoint(
        "search", "dynadepth_search.cli.main:register", "dynadepth.commands"
    )
    monkeypatch.setattr(cli, "entry_points", lambda *, group: [entry])
