"""How decoder layers are found by structure, and what is refused by it."""

from functools import partial

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from dynadepth.errors import UnsupportedModelError
from dynadepth.models.structure import layer_signature, layer_stack
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from tests.tiny import FAMILIES, random_batch, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_of_every_family_are_found(family):
    model = tiny_model(family)
    stack = layer_stack(model)
    assert {type(layer).__name__ for layer in stack.layers} <= set(model._no_split_modules)
    assert stack.layers in list(stack.stack.children())
    assert stack.holder is stack.stack
    assert (stack.num_layers, stack.hidden_size) == (4, 32)
    assert stack.traits is None


def test_layers_in_a_container_belong_to_the_module_that_runs_them():
    model = tiny_model("llama")
    layers = model.model.layers
    model.model.blocks = nn.ModuleDict({"all": layers})
    del model.model.layers
    stack = layer_stack(model)
    assert (stack.stack, stack.holder, stack.name) == (model.model, model.model.blocks, "all")


def test_two_lists_that_could_be_the_layers_are_refused():
    model = tiny_model("llama")
    model.model.others = tiny_model("llama", seed=1).model.layers
    with pytest.raises(UnsupportedModelError, match=r"has 2 lists of 4 modules.*layers, others"):
        layer_stack(model)


def test_one_layer_at_two_places_is_refused():
    model = tiny_model("llama")
    model.model.layers[2] = model.model.layers[1]
    with pytest.raises(UnsupportedModelError, match="one decoder layer stands at several places"):
        layer_stack(model)


def test_what_is_not_a_causal_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="Linear has model_type None"):
        layer_stack(nn.Linear(2, 2))
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9
    )
    with pytest.raises(UnsupportedModelError, match=r"LlamaModel has no output head; expected the"):
        layer_stack(LlamaModel(config))


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        (T5ForConditionalGeneration, T5Config(num_layers=1, d_model=8, d_kv=4, d_ff=8), "encoder"),
        (MambaForCausalLM, MambaConfig(num_hidden_layers=1, hidden_size=8), "recurrent state"),
        (
            XLNetLMHeadModel,
            XLNetConfig(n_layer=1, d_model=8, n_head=1, d_inner=8),
            "has no list of 1",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_refusal_says_what_is_in_the_way(kind, settings, reason):
    with torch.device("meta"):
        model = kind(settings)
    with pytest.raises(
        UnsupportedModelError, match=rf"model_type '{settings.model_type}'.*{reason}"
    ):
        layer_stack(model)


def test_layers_and_config_must_agree():
    model = tiny_model("llama")
    model.model.layers.append(model.model.layers[0])
    with pytest.raises(
        UnsupportedModelError, match="holds 5 decoder layers, but the config says 4"
    ):
        layer_stack(model)


def test_cross_attention_is_refused():
    model = tiny_model("gpt2")
    model.config.add_cross_attention = True
    with pytest.raises(UnsupportedModelError, match="it has cross-attention"):
        layer_stack(model)


def test_shared_key_value_layers_are_refused():
    model = tiny_model("llama")
    model.config.num_kv_shared_layers = 2
    with pytest.raises(UnsupportedModelError, match="2 of its layers read another layer's keys"):
        layer_stack(model)


def test_a_layer_without_a_mask_is_refused_and_one_without_a_cache_is_not():
    def forward(self, hidden_states, memory=None):
        return hidden_states

    with pytest.raises(UnsupportedModelError, match="takes hidden_states, memory; expected an att"):
        layer_signature(forward)

    def without_cache(self, hidden_states, attention_mask=None):
        return hidden_states

    assert layer_signature(without_cache).cache_name is None


class DistributedDataParallel(nn.parallel.DistributedDataParallel):
    """The real one, in a group of this process alone."""

    def __init__(self, module):
        if not torch.distributed.is_initialized():
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        super().__init__(module)


@pytest.fixture
def no_process_group():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("no_process_group")
@pytest.mark.parametrize("around", [nn.DataParallel, DistributedDataParallel])
def test_what_is_put_around_a_model_for_many_devices_says_what_to_wrap(around):
    model = around(tiny_model(dtype=torch.float32))
    for refusing in (partial(wrap_model, plan="0-3"), unwrap_model, layer_stack):
        with pytest.raises(
            UnsupportedModelError,
            match=rf"{around.__name__} around a LlamaForCausalLM; .*model.module.*before",
        ):
            refusing(model)
    # As the message says, it works the other way round.
    inner = wrap_model(tiny_model(dtype=torch.float32), plan="0-1,3")
    ids, mask = random_batch([5, 7])
    expected = inner(ids, attention_mask=mask).logits
    assert torch.equal(around(inner)(ids, attention_mask=mask).logits, expected)
