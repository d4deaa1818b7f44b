"""What all tests share: no network, one thread, and how many examples a property tries."""

import os
import shutil

# Before anything imports huggingface_hub: it reads this once.
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.tiny_folder import save_tiny_base, save_tiny_routers

# Tiny models are slower on several threads than on one, and float sums stay in one order.
torch.set_num_threads(1)

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=25, **_COMMON)
settings.register_profile("ci", max_examples=100, derandomize=True, print_blob=True, **_COMMON)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny llama (4 layers, float32) and its tokenizer; read only."""
    return save_tiny_base(tmp_path_factory.mktemp("base") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_routed(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `tiny_base` with random routers in its `routers/`; read only."""
    folder = shutil.copytree(tiny_base, tmp_path_factory.mktemp("routed") / "tiny-llama")
    save_tiny_routers(folder)
    return folder
