"""Quantised base models: torchao's int8 weights in both orders, and what transformers makes of a GGUF file."""

from itertools import pairwise

import gguf
import numpy as np
import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, GgufConfig, TorchAoConfig

from dynadepth.errors import CheckpointError
from dynadepth.models.fingerprint import fingerprint
from dynadepth.plans import identity_plan
from dynadepth.wrapping.bake import bake
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from tests.parity.drivers import MODES, baked_rows, drive, mixed_plans
from tests.tiny import random_batch, tiny_model
from tests.tiny_routers import random_routers

PLAN = np.array([0, 2, 1, 2], dtype=np.uint8)
# torchao quantises no float64 weights.
DTYPES = (torch.float32, torch.bfloat16)


def in_int8(model):
    quantize_(model, Int8WeightOnlyConfig())
    assert type(model.model.layers[0].mlp.up_proj.weight).__name__ == "Int8Tensor"
    return model


def assert_equal(model, expected):
    """The same kernels on the same batch: not a bit may differ."""
    ids, mask = random_batch([9, 9], seed=1)
    for mode in MODES:
        logits = [drive(each, ids, mask, 5, mode) for each in (model, expected)]
        assert torch.equal(*logits), mode
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask}
    assert torch.equal(model.generate(ids, **settings), expected.generate(ids, **settings))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_int8_weights_run_in_every_visit(family, dtype):
    base = in_int8(tiny_model(family, dtype=dtype))
    expected = bake(base, PLAN)
    first = in_int8(wrap_model(tiny_model(family, dtype=dtype), plan=PLAN))
    then = wrap_model(in_int8(tiny_model(family, dtype=dtype)), plan=PLAN)
    for model in (first, then):
        assert_equal(model, expected)
    ids, mask = random_batch([9, 9], seed=1)
    plain = wrap_model(tiny_model(family, dtype=dtype), plan=PLAN)
    assert not torch.equal(*(drive(each, ids, mask, 9, "full") for each in (then, plain)))
    with then.dynadepth.plans(identity_plan(4)):
        assert_equal(then, base)
    unwrap_model(first)
    assert_equal(first, base)


def test_rows_of_an_int8_model_follow_plans_of_their_own():
    base = in_int8(tiny_model("qwen3", dtype=torch.float32))
    model = wrap_model(in_int8(tiny_model("qwen3", dtype=torch.float32)), plan=PLAN)
    plans = mixed_plans(4, 3, seed=2)
    ids, mask = random_batch([6, 9, 4], seed=1)
    with model.dynadepth.plans(plans):
        logits = drive(model, ids, mask, 5, "steps")
    rows = [logits[row][mask[row].bool()] for row in range(3)]
    for row, expected in zip(rows, baked_rows(base, plans, ids, mask, padded=False), strict=True):
        # Other batch shapes round float32 otherwise; plans differ by far more.
        assert (row - expected).abs().max() < 1e-3
    assert all((one[-1] - other[-1]).abs().max() > 0.1 for one, other in pairwise(rows))


def test_a_model_loaded_in_int8_is_told_from_its_base(tmp_path):
    plain = tiny_model(dtype=torch.float32)
    plain.save_pretrained(tmp_path)

    def load():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path,
            dtype=torch.float32,
            quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
        )

    assert_equal(wrap_model(load(), plan=PLAN), bake(load(), PLAN))
    routers = random_routers(fingerprint=fingerprint(plain))
    with pytest.raises(CheckpointError, match="quantization"):
        wrap_model(load(), budget=0.8, routers=routers)


def write_gguf(path):
    """Write a random llama with weights of 8 bits."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(97)
    writer.add_block_count(4)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    rng = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType.Q8_0
    matrices = {"token_embd": (97, 64), "output": (97, 64)}
    norms = ["output_norm"]
    for layer in range(4):
        parts = {
            "attn_q": (64, 64),
            "attn_k": (32, 64),
            "attn_v": (32, 64),
            "attn_output": (64, 64),
        }
        parts |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
        matrices |= {f"blk.{layer}.{part}": shape for part, shape in parts.items()}
        norms += [f"blk.{layer}.attn_norm", f"blk.{layer}.ffn_norm"]
    for name, shape in matrices.items():
        drawn = (0.5 * rng.standard_normal(shape)).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quantize(drawn, kind), raw_dtype=kind)
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("settings", [{}, {"dequantize": True}], ids=["as it is", "dequantised"])
def test_a_model_of_a_gguf_file_runs_the_plan(settings, tmp_path):
    write_gguf(tmp_path / "tiny.gguf")

    def load():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path,
            gguf_file="tiny.gguf",
            dtype=torch.float32,
            quantization_config=GgufConfig(**settings),
        )

    base, model = load(), wrap_model(load(), plan=PLAN)
    assert_equal(model, bake(base, PLAN))
    ids, mask = random_batch([9], seed=1)
    assert not torch.equal(*(drive(each, ids, mask, 9, "full") for each in (model, base)))
    assert_equal(unwrap_model(model), base)
