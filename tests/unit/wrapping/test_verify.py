"""`wrap_model(verify=True)`, and models that read more than text."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dynadepth.errors import UnsupportedModelError
from dynadepth.wrapping.bake import bake
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from tests.tiny import random_batch, tiny_model

PLAN = "0,2-3,3"


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "falcon"])
@pytest.mark.parametrize("training", [False, True])
def test_a_sound_model_passes_and_stays_as_it_is(family, training):
    model = tiny_model(family).train(training)
    assert wrap_model(model, plan=PLAN, verify=True) is model
    assert model.training is training
    # What is counted is the caller's forwards.
    assert model.dynadepth.last_plans is None


def test_a_model_whose_wrapped_forward_differs_is_refused_and_unwrapped():
    model = tiny_model("llama")
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    calls = []

    def drift(_module, _args, output):
        """Stands for a kernel that is not the same at every call."""
        calls.append(0)
        return output + 1e-3 * len(calls)

    handle = model.model.embed_tokens.register_forward_hook(drift)
    with pytest.raises(
        UnsupportedModelError,
        match=r"this LlamaForCausalLM differs from its own forward by [\d.e-]+ in a logit; it was left unwrapped",
    ):
        wrap_model(model, plan=PLAN, verify=True)
    handle.remove()
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    # Without the check it is the caller's business.
    assert wrap_model(model, plan=PLAN).dynadepth


@pytest.fixture(scope="module")
def with_images():
    """A small model that reads images, around a text model of five sliding layers and a full one."""
    text = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "initializer_range": 0.5,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=95,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()


def test_the_text_of_a_model_that_reads_images_follows_plans(with_images):
    assert type(with_images).__name__ == "Gemma3ForConditionalGeneration"
    ids, mask = random_batch([9, 5, 7], seed=1)
    plans = [[1, 0, 1, 2, 1, 0], [0, 1, 1, 1, 1, 2], [1, 1, 0, 1, 2, 1]]
    # With padding, the family's own positions count it, so each row keeps its own.
    expected = []
    for row, plan in enumerate(plans):
        baked = bake(with_images, plan)
        with torch.no_grad():
            expected.append(
                baked(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1]).logits[0]
            )
    wrap_model(with_images, plan="0-5")
    with with_images.dynadepth.plans(plans), torch.no_grad():
        logits = with_images(input_ids=ids, attention_mask=mask).logits
    unwrap_model(with_images)
    for row, reference in enumerate(expected):
        real = mask[row].bool()
        assert (logits[row][real] - reference[real]).abs().max() < 1e-5


def test_images_are_refused_by_name(with_images):
    ids, _ = random_batch([9])
    wrap_model(with_images, plan="0-5")
    pixels = torch.zeros(1, 3, 28, 28, dtype=torch.float64)
    try:
        with pytest.raises(
            UnsupportedModelError, match="pixel_values was given, and a wrapped Gemma3"
        ):
            with_images(input_ids=ids, pixel_values=pixels)
        with pytest.raises(UnsupportedModelError, match="pixel_values was given"):
            with_images.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=2)
        # Text goes on.
        assert with_images.generate(input_ids=ids, max_new_tokens=2, do_sample=False).shape[1] == 11
    finally:
        unwrap_model(with_images)
