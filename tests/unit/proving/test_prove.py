"""What a proof finds: exact families, refusals by reason, models spoiled on purpose; and where verdicts are kept."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dynadepth.errors import ConfigError, UnsupportedModelError
from dynadepth.models.structure import LayerTraits
from dynadepth.proving import prove as proving
from dynadepth.proving import verdict as verdicts
from dynadepth.proving.prove import prove, proved_stack
from dynadepth.wrapping.bake import bake
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from tests.tiny import tiny_model
from tests.tiny_exits import random_exits
from tests.unit.proving.spoiled import (
    CountingLlama,
    IndexedMaskLlama,
    LoudLlama,
    NeighbourLlama,
    spoiled,
)

ROWS = ("attention_mask", "position_embeddings", "position_ids")


def skeleton(model_type, **settings):
    """Return a family's model by its defaults, without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings))


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """Keep the verdicts of a test in a folder of its own."""
    monkeypatch.setattr(verdicts, "_KNOWN", {})
    monkeypatch.setattr(verdicts, "proofs_folder", lambda: tmp_path / "proofs")
    return tmp_path / "proofs"


# Between them: sliding and full layers, tuples and lists, alibi and biases, no cache, experts of three kinds, latent
# attention, chunked attention, layers without positions, a text model inside one that reads images.
DOZEN = {
    "llama": LayerTraits(None, "mlp", ROWS),
    "gemma3_text": LayerTraits(None, "mlp", ROWS),
    "gemma3": LayerTraits(None, "mlp", ROWS),
    "gpt2": LayerTraits(None, "mlp", ("attention_mask", "position_ids")),
    "falcon": LayerTraits(1, "mlp", ROWS),
    "bloom": LayerTraits(1, None, ("alibi", "attention_mask")),
    "mpt": LayerTraits(1, None, ("attention_mask",), ("position_bias",)),
    "openai-gpt": LayerTraits(0, "mlp", ("attention_mask",), fixed_rows=True),
    "gpt_bigcode": LayerTraits(None, "mlp", ("attention_mask",), fixed_rows=True),
    "mixtral": LayerTraits(None, "mlp", ROWS),
    "gpt_oss": LayerTraits(None, None, ROWS),
    "deepseek_v3": LayerTraits(None, "mlp", ROWS),
    "llama4_text": LayerTraits(None, None, ROWS),
    "smollm3": LayerTraits(None, "mlp", ROWS),
}


@pytest.mark.parametrize("family", DOZEN)
def test_families_of_every_mechanism_are_proved_exact(family):
    verdict = prove(skeleton(family), again=True)
    assert verdict.exact, verdict.reason
    assert verdict.worst < 1e-11
    assert verdict.noise < 1e-11
    assert replace(verdict.traits, no_exits=None) == DOZEN[family]
    why = NO_EXITS.get(family)
    assert (verdict.traits.no_exits or "").startswith(why or "")
    assert (verdict.traits.no_exits is None) == (why is None)


# Of these families no token may leave early.
NO_EXITS = {
    "mpt": "tokens that go on differ from the base model's by",
    "openai-gpt": "it keeps no cache",
}


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("mamba", {}, "keeps states that are not keys and values by token"),
        ("qwen3_next", {}, r"layer types linear_attention"),
        ("whisper", {}, "has cross-attention"),
        ("gemma3n_text", {}, "read another layer's keys and values"),
        ("deepseek_v32", {}, "the cache has a layer of class DynamicIndexedLayer"),
        ("bert", {}, "not causal: later tokens change the logits of earlier ones"),
        ("doge", {}, "not causal"),
        ("hy_v4", {}, r"states that enter layer 0 are of shape \(3, 10, 4, 48\)"),
        ("hrm_text", {}, "holds 16 decoder layers, but the config says 128"),
        ("xlnet", {}, "has no list of 24 modules"),
    ],
)
def test_refusals_say_why(family, settings, reason):
    model = skeleton(family, **settings)
    verdict = prove(model, again=True)
    assert not verdict.exact
    with pytest.raises(UnsupportedModelError, match=reason):
        proved_stack(model)


SPOILED = {
    NeighbourLlama: "`values` of a cache layer was asked for, but the cache of a wrapped model holds states by visit",
    CountingLlama: "the base model gives two answers to one input",
    IndexedMaskLlama: r"law 2: uncached, plan [012]+ differs from the model rebuilt as its visits "
    r"by [\d.e-]+ of the largest logit, (first wrong token at position \d+|same tokens)",
}


@pytest.mark.usefixtures("own_folder")
@pytest.mark.parametrize("kind", SPOILED, ids=lambda kind: kind.__name__)
def test_spoiled_models_are_refused_by_what_differs(kind):
    model = spoiled(kind)
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(UnsupportedModelError, match=SPOILED[kind]):
        wrap_model(model, plan="0,2-3")
    with pytest.raises(UnsupportedModelError, match=SPOILED[kind]):
        bake(model, "0,2-3")
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    assert not hasattr(model, "dynadepth")


@pytest.mark.usefixtures("own_folder")
def test_a_model_that_breaks_the_law_of_exits_alone_runs_plans_and_no_exits():
    model = spoiled(LoudLlama)
    wrap_model(model, plan="0,2-3")
    unwrap_model(model)
    names = set(model.__dict__)
    with pytest.raises(UnsupportedModelError, match="may leave early: tokens that go on differ"):
        wrap_model(model, fidelity=0.9, routers=random_exits(model))
    assert set(model.__dict__) == names


@pytest.mark.usefixtures("own_folder")
def test_a_layer_that_was_put_in_later_is_refused():
    wrap_model(tiny_model("llama"), plan="0-3")
    # A Llama's layer by inheritance too: its own forward is not the one of the copy.
    for other, name in ((tiny_model("qwen3"), "Qwen3"), (spoiled(IndexedMaskLlama), "IndexedMask")):
        model = tiny_model("llama")
        model.model.layers[1] = other.model.layers[1]
        with pytest.raises(
            UnsupportedModelError, match=rf"builds a LlamaDecoderLayer as layer 1.*{name}"
        ):
            wrap_model(model, plan="0-3")


def test_a_verdict_is_kept_and_found_again(own_folder, caplog, monkeypatch):
    model = tiny_model("llama")
    with caplog.at_level(logging.INFO, "dynadepth"):
        first = prove(model)
    (file,) = own_folder.iterdir()
    assert first.kept == str(file)
    assert [record.getMessage() for record in caplog.records] == [
        f"proved LlamaForCausalLM (model_type llama) on a copy of 4 layers in {first.seconds:.1f} s: exact; "
        f"verdict in {file}"
    ]
    # Another process knows the file only.
    monkeypatch.setattr(verdicts, "_KNOWN", {})
    monkeypatch.setattr(proving, "_prove", pytest.fail)
    assert prove(tiny_model("llama", seed=5, dtype=torch.float32)) == first
    assert json.loads(file.read_text())["exact"] is True


@pytest.mark.parametrize(
    "content", ["", "{}", '{"schema_version": 1}', "[1]", '{"schema_version": 9}']
)
def test_a_damaged_verdict_is_made_again(own_folder, monkeypatch, content):
    prove(tiny_model("llama"))
    (file,) = own_folder.iterdir()
    whole = json.loads(file.read_text())
    file.write_text(content)
    monkeypatch.setattr(verdicts, "_KNOWN", {})
    assert prove(tiny_model("llama")).exact
    again = json.loads(file.read_text())
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}


def test_a_folder_that_cannot_be_written_keeps_the_verdict_in_memory(own_folder, monkeypatch):
    own_folder.write_text("a file is in the way")
    assert prove(tiny_model("llama")).kept == "memory"
    monkeypatch.setattr(proving, "_prove", pytest.fail)
    assert prove(tiny_model("llama")).exact


def test_what_this_machine_may_have_caused_is_not_kept_on_disk(own_folder, monkeypatch):
    def fail(model, **_):
        raise OSError("no space left on device")

    monkeypatch.setattr(proving, "check_laws", fail)
    verdict = prove(tiny_model("llama"))
    assert (verdict.exact, verdict.kept) == (False, "memory")
    assert verdict.reason == "its tiny copy fails with OSError: no space left on device"
    assert not own_folder.exists()


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_models_of_very_few_layers_are_proved(own_folder, num_layers):
    verdict = prove(tiny_model("gemma3", num_layers=num_layers))
    assert verdict.exact, verdict.reason
    assert verdict.num_layers == num_layers


@pytest.mark.usefixtures("own_folder")
def test_another_shape_or_release_is_proved_anew(monkeypatch):
    def key(model):
        stack = proving.layer_stack(model)
        return verdicts.verdict_key(model, stack, 4)

    plain = key(tiny_model("llama"))
    assert key(tiny_model("llama", seed=3, dtype=torch.bfloat16)) == plain
    assert key(tiny_model("llama", num_layers=9)) == plain
    assert key(tiny_model("llama", attention="eager")) != plain
    model = tiny_model("llama")
    model.config.attention_bias = True
    assert key(model) != plain
    monkeypatch.setattr(verdicts.transformers, "__version__", "5.99")
    assert key(tiny_model("llama")) != plain


@pytest.mark.usefixtures("own_folder")
def test_unlisted_models_can_be_refused_without_a_proof(monkeypatch):
    monkeypatch.setattr(proving, "_prove", pytest.fail)
    with pytest.raises(UnsupportedModelError, match=r"no LlamaForCausalLM of this shape has been"):
        wrap_model(tiny_model("llama"), plan="0-3", unlisted="refuse")
    with pytest.raises(ConfigError, match=r"unlisted is 'refuze' \(did you mean 'refuse'\?\)"):
        wrap_model(tiny_model("llama"), plan="0-3", unlisted="refuze")
    monkeypatch.undo()
    prove(tiny_model("llama"))
    assert wrap_model(tiny_model("llama"), plan="0-3", unlisted="refuse").dynadepth


@pytest.mark.usefixtures("own_folder")
def test_a_proof_leaves_the_caller_as_it_was():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert prove(tiny_model("llama")).exact
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.rand(3), expected)
