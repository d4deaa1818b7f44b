"""A tiny copy keeps what decides how layers work, and nothing else of the size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from dynadepth.models.structure import layer_stack
from dynadepth.proving.float64 import KeepFloat64
from dynadepth.proving.tiny_config import VOCAB_SIZE, tiny_config
from dynadepth.proving.tiny_copy import layers_needed, tiny_copy
from tests.tiny import tiny_model


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 16),
    ratio=st.integers(1, 16),
    width=st.sampled_from([16, 64, 80, 128]),
    apart=st.booleans(),
    layers=st.integers(4, 100),
)
def test_ratios_of_heads_are_kept(groups, ratio, width, apart, layers):
    heads = groups * ratio
    config = LlamaConfig(
        hidden_size=heads * (width + 8 * apart),
        head_dim=width,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        num_hidden_layers=layers,
        intermediate_size=1111,
    )
    small = tiny_config(config, 4, 8)
    assert (small.num_hidden_layers, small.vocab_size, small.head_dim) == (4, VOCAB_SIZE, 8)
    assert (small.num_key_value_heads == 1) == (groups == 1)
    assert (small.num_key_value_heads == small.num_attention_heads) == (ratio == 1)
    assert small.num_attention_heads % small.num_key_value_heads == 0
    assert (small.hidden_size == 8 * small.num_attention_heads) == (not apart)
    assert small.intermediate_size != small.hidden_size
    assert config.num_hidden_layers == layers


def test_the_first_layers_show_every_kind():
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = Gemma3TextConfig(num_hidden_layers=12, layer_types=kinds * 2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    needed = layers_needed(layer_stack(model).layers)
    assert needed == 7
    small = tiny_config(config, needed, 8)
    assert small.layer_types == [*kinds, "sliding_attention"]
    assert small.sliding_window == 6


@pytest.mark.parametrize(("layers", "needed"), [(1, 1), (3, 3), (4, 4), (30, 4)])
def test_layers_of_one_kind_need_four(layers, needed):
    assert layers_needed(layer_stack(tiny_model("llama", num_layers=layers)).layers) == needed


def test_numbers_of_layers_make_no_kinds_but_switches_do():
    model = tiny_model("llama", num_layers=20)
    layers = layer_stack(model).layers
    for place, layer in enumerate(layers):
        layer.self_attn.place = place
    assert layers_needed(layers) == 4
    layers[9].self_attn.is_windowed = True
    assert layers_needed(layers) == 11


def test_dense_and_expert_layers_are_two_kinds():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING["deepseek_v3"](num_hidden_layers=8, first_k_dense_replace=5)
        )
    assert layers_needed(layer_stack(model).layers) == 7


def test_a_copy_is_random_small_and_the_same_each_time():
    model = tiny_model("llama")
    first, second = tiny_copy(model, 4), tiny_copy(model, 4)
    weights = dict(second.named_parameters())
    for name, weight in first.named_parameters():
        assert weight.dtype == torch.float64
        assert torch.equal(weight, weights[name])
        # Biases and norms too: a constant would hide that it is read.
        assert weight.unique().numel() == weight.numel()


def test_float64_is_kept_inside_the_block_only():
    states = torch.rand(3, 4, dtype=torch.float64)
    with KeepFloat64():
        for narrowed in (
            states.float(),
            states.to(torch.float32),
            states.to(dtype=torch.float32),
            states.type(torch.float32),
            torch.nn.functional.softmax(states, dim=-1, dtype=torch.float32),
            states.sum(-1, dtype=torch.float32),
            torch.zeros_like(states, dtype=torch.float32),
        ):
            assert narrowed.dtype == torch.float64
        assert torch.arange(3).float().dtype == torch.float32
        assert states.to(torch.bfloat16).dtype == torch.bfloat16
    assert states.float().dtype == torch.float32
