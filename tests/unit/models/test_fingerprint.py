"""Fingerprints: the same for one base model however it is held, another for any other."""

import json

import pytest
import torch
from torch import nn

from dynadepth import unwrap_model, wrap_model
from dynadepth.errors import CheckpointError, UnsupportedModelError
from dynadepth.models.fingerprint import (
    check_base_model,
    compare_fingerprints,
    fingerprint,
    fingerprint_digest,
)
from tests.tiny import FAMILIES, tiny_model


def published(dtype):
    """A model whose weights were published in a dtype, held in float32."""
    return tiny_model(dtype=torch.float32).to(dtype).float()


@pytest.mark.parametrize(
    ("stored", "held"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float64),
        (torch.float16, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
def test_dtype_does_not_matter(stored, held):
    expected = fingerprint(published(stored))
    assert compare_fingerprints(fingerprint(published(stored).to(held)), expected) == []


def test_weights_below_the_range_of_float16_do_not_matter():
    model = published(torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight[:4] = torch.tensor(
            [1.0078125 * 2.0**-20, -1.0078125 * 2.0**-22, -(2.0**-30), 1.0078125 * 2.0**-16]
        )
    expected = fingerprint(model)
    assert fingerprint(model.half()) == expected


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_json_keeps_it_and_the_seed_changes_it(family):
    given = fingerprint(tiny_model(family))
    assert json.loads(json.dumps(given)) == given
    assert given["architecture"]["num_hidden_layers"] == 4
    other = fingerprint(tiny_model(family, seed=1))
    assert other["architecture"] == given["architecture"]
    assert any("weights of" in line for line in compare_fingerprints(other, given))
    assert fingerprint_digest(other) != fingerprint_digest(given)


def test_a_wrapped_model_keeps_it():
    model = tiny_model()
    expected = fingerprint(model)
    wrap_model(model, plan=[1, 0, 1, 2])
    assert fingerprint(model) == expected
    unwrap_model(model)
    assert fingerprint(model) == expected


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0"),
        ("model.layers.2.self_attn.q_proj.weight", "model.layers.2"),
        ("model.layers.3.input_layernorm.weight", "model.layers.3"),
        ("model.norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_a_changed_weight_is_named(name, where):
    model = tiny_model()
    expected = fingerprint(model)
    with torch.no_grad():
        model.get_parameter(name).mul_(1.01)
    assert compare_fingerprints(fingerprint(model), expected) == [f"weights of {where} differ"]


def test_architecture_is_compared_field_by_field():
    lines = compare_fingerprints(
        fingerprint(tiny_model(num_layers=6)), fingerprint(tiny_model("qwen3"))
    )
    assert "model_type is llama, expected qwen3" in lines
    assert "num_hidden_layers is 6, expected 4" in lines
    assert "model.layers.5 is not in the expected model" in lines


def test_another_scheme_is_said_to_be_incomparable():
    given = fingerprint(tiny_model())
    lines = compare_fingerprints(given, {**given, "scheme": 7})
    assert lines == [
        "the fingerprint was made by scheme 7, this dynadepth makes scheme 1, so the two cannot be compared"
    ]


def test_weights_that_cannot_be_read_never_compare_equal():
    model = tiny_model()
    for layer in (0, 2, 3):
        model.model.layers[layer].to("meta")
    given = fingerprint(model)
    lines = compare_fingerprints(given, given)
    assert len(lines) == 3
    assert lines[0].startswith("weights of model.layers.0 are unreadable: ")
    assert lines[0].endswith("so they cannot be compared")
    assert "on meta" in lines[0]


def test_quantised_weights_are_hashed_as_they_are_stored():
    model = tiny_model(dtype=torch.bfloat16)
    expected = fingerprint(model)
    for layer in model.model.layers:
        stored = layer.mlp.up_proj.weight.detach().view(torch.uint8)
        layer.mlp.up_proj.weight = nn.Parameter(stored, requires_grad=False)
    given = fingerprint(model)
    assert compare_fingerprints(given, given) == []
    assert compare_fingerprints(given, expected)[0] == (
        "weights of model.layers.0 differ (stored as bfloat16+uint8, expected bfloat16)"
    )


def test_the_quantisation_is_named():
    model = tiny_model()
    expected = fingerprint(model)
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert compare_fingerprints(fingerprint(model), expected) == [
        "quantization is gptq, expected None"
    ]


def test_a_module_that_is_no_model_is_refused():
    with pytest.raises(
        UnsupportedModelError, match=r"Linear has no config; expected a transformers"
    ):
        fingerprint(nn.Linear(2, 2))
    model = nn.Linear(2, 2)
    model.config = tiny_model().config
    with pytest.raises(UnsupportedModelError, match=r"no numbered decoder layers"):
        fingerprint(model)


def test_a_base_in_float16_that_differs_says_what_to_try_first():
    base = tiny_model(dtype=torch.float32)
    with pytest.raises(CheckpointError, match="this model is in float16.*dtype of its checkpoint"):
        check_base_model(
            tiny_model(dtype=torch.float32).half(),
            fingerprint(base),
            holder="the routers",
            error=CheckpointError,
            advice="use others",
        )
    with pytest.raises(CheckpointError) as caught:
        check_base_model(
            tiny_model(seed=1, dtype=torch.float32),
            fingerprint(base),
            holder="the routers",
            error=CheckpointError,
            advice="use others",
        )
    assert "float16" not in str(caught.value)
