"""Llamas spoiled on purpose, each in one line that no list of families would show."""

from typing import ClassVar

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


class NeighbourLayer(LlamaDecoderLayer):
    """Adds what its neighbour has put into the cache for the same tokens."""

    # Without a cache: what each place of the stack would have put there in this forward.
    values: ClassVar[dict[int, torch.Tensor]] = {}

    def forward(self, hidden_states, attention_mask=None, position_ids=None, cache=None, **kwargs):
        place, tokens = self.self_attn.layer_idx, hidden_states.shape[1]
        if place and cache is not None:
            seen = cache.layers[place - 1].values[:, :, -tokens:]
            hidden_states = hidden_states + seen.mean((1, 3))[..., None]
        elif place:
            hidden_states = hidden_states + self.values[place - 1].mean(-1, keepdim=True)
        self.values[place] = self.self_attn.v_proj(self.input_layernorm(hidden_states))
        return super().forward(hidden_states, attention_mask, position_ids, cache, **kwargs)


class CountingLayer(LlamaDecoderLayer):
    """Grows louder with every call."""

    calls = 0

    def forward(self, hidden_states, *args, **kwargs):
        self.calls += 1
        return super().forward(hidden_states, *args, **kwargs) * (1 + 1e-6 * self.calls)

    # The parameters are those of the layer it spoils.
    forward.__wrapped__ = LlamaDecoderLayer.forward


class IndexedMaskLayer(LlamaDecoderLayer):
    """Hides the first column in every second place of the stack, whatever layer stands there."""

    def forward(self, hidden_states, attention_mask=None, position_ids=None, cache=None, **kwargs):
        place, (rows, tokens) = self.self_attn.layer_idx, hidden_states.shape[:2]
        if place % 2:
            past = 0 if cache is None else cache.get_seq_length(place)
            if attention_mask is None:
                causal = torch.ones(tokens, past + tokens, dtype=torch.bool).tril(past)
                attention_mask = causal.expand(rows, 1, -1, -1)
            attention_mask = attention_mask.clone()
            attention_mask[..., (0 if past else 1) :, 0] = False
        return super().forward(hidden_states, attention_mask, position_ids, cache, **kwargs)


class LoudLayer(LlamaDecoderLayer):
    """Is told by its model how loud each token is, in an argument that nobody puts together over several forwards."""

    def forward(self, hidden_states, attention_mask=None, position_ids=None, cache=None, **kwargs):
        loudness = kwargs.pop("loudness")
        states = super().forward(hidden_states, attention_mask, position_ids, cache, **kwargs)
        return states * loudness[:, -states.shape[1] :]


class _Spoiled(LlamaForCausalLM):
    layer = LlamaDecoderLayer

    def __init__(self, config):
        super().__init__(config)
        for layer_idx in range(config.num_hidden_layers):
            self.model.layers[layer_idx] = self.layer(config, layer_idx)
        self.post_init()


class NeighbourLlama(_Spoiled):
    layer = NeighbourLayer


class CountingLlama(_Spoiled):
    layer = CountingLayer


class IndexedMaskLlama(_Spoiled):
    layer = IndexedMaskLayer


class LoudLlama(_Spoiled):
    layer = LoudLayer

    def forward(self, input_ids=None, **kwargs):
        kwargs["loudness"] = 1.0 + (input_ids % 3)[..., None] / 10
        return super().forward(input_ids=input_ids, **kwargs)

    forward.__wrapped__ = LlamaForCausalLM.forward


def spoiled(kind: type[LlamaForCausalLM], num_layers: int = 4) -> LlamaForCausalLM:
    """Return a small model of one of these classes."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval()
