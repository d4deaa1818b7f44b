"""Tiny random models of every supported family, and batches for them.

`initializer_range=0.5` makes attention to the past matter: at the usual 0.02 a broken cache moves logits by 1e-3 only.
"""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 97
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    # A window shorter than the prompts, and layers of both kinds.
    "gemma3": (
        Gemma3TextConfig,
        {
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}


def tiny_model(
    family: str = "llama",
    *,
    num_layers: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    attention: str = "sdpa",
) -> PreTrainedModel:
    """Return a random model in evaluation mode, the same for the same arguments."""
    config_class, extra = FAMILIES[family]
    settings = {**_SHAPE, **extra, "num_hidden_layers": num_layers}
    if "layer_types" in extra:
        settings["layer_types"] = (extra["layer_types"] * num_layers)[:num_layers]
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(
            config_class(**settings), attn_implementation=attention, dtype=dtype
        )
    finally:
        torch.random.set_rng_state(state)
    model.generation_config.pad_token_id = 0
    return model.eval()


def random_batch(
    lengths: list[int], *, seed: int = 0, side: str = "left"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids (B, T) and the attention mask (B, T) of prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        where = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, where] = torch.randint(2, VOCAB_SIZE, (length,), generator=generator)
        mask[row, where] = 1
    return ids, mask
