"""Multiply-adds of layers and plans, against counts by hand."""

import numpy as np
import pytest
from torch import nn
from transformers import LlamaConfig

from dynadepth.models.compute import PlanCost, layer_multiply_adds
from dynadepth.models.structure import layer_stack
from tests.tiny import FAMILIES, tiny_model

# Queries and the output are 32 x 32, keys and values 32 x 16.
_ATTENTION = 2 * 32 * 32 + 2 * 32 * 16


def test_a_llama_layer_is_its_matrices():
    model = tiny_model("llama")
    counted = layer_multiply_adds(layer_stack(model).layers[0], model.config)
    assert counted == _ATTENTION + 3 * 32 * 48


def test_gpt2_keeps_its_matrices_the_other_way_round():
    model = tiny_model("gpt2")
    counted = layer_multiply_adds(layer_stack(model).layers[0], model.config)
    assert counted == 4 * 32 * 32 + 2 * 32 * 48


def test_a_token_takes_a_few_of_the_experts():
    model = tiny_model("mixtral")
    counted = layer_multiply_adds(layer_stack(model).layers[0], model.config)
    # Two of four experts, and the gate that chooses them.
    assert counted == _ATTENTION + 2 * 3 * 32 * 48 + 32 * 4


def test_a_list_of_experts_counts_alike():
    layer = nn.Module()
    layer.experts = nn.ModuleList(nn.Linear(8, 6, bias=False) for _ in range(4))
    layer.positions = nn.Embedding(50, 8)
    assert layer_multiply_adds(layer, LlamaConfig(num_experts_per_tok=1)) == 8 * 6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_identity_plan_is_the_base_model(family):
    model = tiny_model(family)
    cost = PlanCost.of_model(model, layer_stack(model))
    assert (cost.layers > 0).all()
    assert cost.compute(np.ones((1, 4), dtype=np.uint8)) == pytest.approx([1.0])


def test_skips_repeats_shortcuts_and_heads_are_counted():
    cost = PlanCost(np.array([10.0, 20.0, 30.0, 40.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    found = cost.compute([[1, 0, 2, 1], [1, 1, 1, 0]], heads=5.0)
    assert found == pytest.approx([(10 + 2 + 60 + 40 + 5) / 100, (10 + 20 + 30 + 4 + 5) / 100])
