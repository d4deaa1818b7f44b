"""Folders as a user has them: a tiny base model with its tokenizer, and routers beside it."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from dynadepth.checkpoints.save_load import save_policy
from dynadepth.models.fingerprint import fingerprint
from tests.tiny import tiny_model
from tests.tiny_routers import random_routers
from tests.tiny_text import word_tokenizer


def save_tiny_base(folder: Path, *, family: str = "llama", num_layers: int = 4) -> Path:
    """Write a tiny random model and its tokenizer, as `from_pretrained` reads them."""
    tiny_model(family, num_layers=num_layers, dtype=torch.float32).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def save_tiny_routers(base: Path) -> Path:
    """Write random routers beside a base model; budgets from 0.5 to 1 are calibrated."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = model.config
    routers = random_routers(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        fingerprint=fingerprint(model),
        base_model=base.name,
    )
    return save_policy(base / "routers", routers)
