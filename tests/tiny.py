"""Tiny random models of every supported family, and batches for them.

`initializer_range=0.5` makes attention to the past matter: at the usual 0.02 a broken cache moves logits by 1e-3 only.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 97
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_WINDOWED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
_NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

# By name: the model_type and what it needs besides the shape. `layer_types` is repeated over the layers; windows are
# shorter than the prompts.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "mistral": ("mistral", {"sliding_window": None}),
    "gemma3": ("gemma3_text", {"head_dim": 8, "query_pre_attn_scalar": 8, **_WINDOWED}),
    "gemma2": ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, **_WINDOWED}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {"sliding_window": None}),
    "gpt2": ("gpt2", {"n_inner": 48, **_NO_DROPOUT}),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "falcon": ("falcon", {"ffn_hidden_size": 48, "alibi": False}),
    "bloom": ("bloom", {}),
    "olmo2": ("olmo2", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "stablelm": ("stablelm", {}),
    "granite": ("granite", {"attention_multiplier": 0.35, "residual_multiplier": 0.5}),
    "cohere": ("cohere", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 0]}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "qwen2_moe": (
        "qwen2_moe",
        {"shared_expert_intermediate_size": 24, "mlp_only_layers": [1], **_EXPERTS},
    ),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 8, "decoder_sparse_step": 2, **_EXPERTS}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
}
# Settings of some families that take other ways through their layers.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral, window": ("mistral", {"sliding_window": 6}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 0, **_WINDOWED}),
    "phi3, window": ("phi3", {"sliding_window": 6}),
    "gpt2, scaled": (
        "gpt2",
        {"n_inner": 48, "scale_attn_by_inverse_layer_idx": True, **_NO_DROPOUT},
    ),
    "gpt_neox, serial": ("gpt_neox", {"use_parallel_residual": False}),
    "opt, post-norm": (
        "opt",
        {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "falcon, alibi": (
        "falcon",
        {"ffn_hidden_size": 48, "alibi": True, "parallel_attn": False, "multi_query": False},
    ),
    "falcon, new": (
        "falcon",
        {
            "ffn_hidden_size": 48,
            "alibi": False,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
        },
    ),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "cohere, normed": ("cohere", {"use_qk_norm": True}),
    # Families that no list has named; each has a way of its own to be called or to attend.
    "gpt_oss": (
        "gpt_oss",
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **_WINDOWED},
    ),
    "glm4": ("glm4", {"head_dim": 8}),
    "llama4": (
        "llama4_text",
        {
            "head_dim": 8,
            "num_local_experts": 4,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 6,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
            "moe_layers": [1],
        },
    ),
}


# Families that between them have every way in which layers are called: windows, positional arguments, tuples, names of
# the cache, alibi and experts.
MECHANISMS = ("llama", "gemma3", "gpt2", "falcon", "bloom", "mixtral")


def attentions(family: str) -> tuple[str, ...]:
    """Return the kinds of attention that a family runs on a processor."""
    return ("eager",) if family in ("bloom", "gemma2", "gpt_oss") else ("sdpa", "eager")


# Every family and variant with every kind of attention that it runs.
KINDS = [(name, kind) for name in (*FAMILIES, *VARIANTS) for kind in attentions(name)]


def tiny_model(
    family: str = "llama",
    *,
    num_layers: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    attention: str | None = None,
) -> PreTrainedModel:
    """Return a random model in evaluation mode, the same for the same arguments; sdpa where the family has it."""
    model_type, extra = {**FAMILIES, **VARIANTS}[family]
    settings = {**_SHAPE, **extra, "num_hidden_layers": num_layers}
    for name in ("layer_types", "no_rope_layers"):
        if name in extra:
            settings[name] = (extra[name] * num_layers)[:num_layers]
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **settings),
            attn_implementation=attention or attentions(family)[0],
            # The fused kernel has no float64.
            experts_implementation="eager",
            dtype=dtype,
        )
    finally:
        torch.random.set_rng_state(state)
    model.generation_config.pad_token_id = 0
    return model.eval()


def random_prompts(lengths: list[int], *, seed: int = 0) -> list[npt.NDArray[np.int64]]:
    """Return the token ids of prompts of these lengths, without padding."""
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCAB_SIZE, length) for length in lengths]


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
