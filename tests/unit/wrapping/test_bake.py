"""A baked checkpoint is an ordinary one, and is only published if it reloads to the same logits."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynadepth.errors import PlanError, ShortcutError, UnsupportedModelError, WrapError
from dynadepth.wrapping import bake as baking
from dynadepth.wrapping.bake import bake, save_baked
from dynadepth.wrapping.wrap import wrap_model
from tests.tiny import FAMILIES, VARIANTS, random_batch, tiny_model
from tests.tiny_shortcuts import random_shortcuts
from tests.tiny_text import word_tokenizer

PLAN = [0, 2, 1, 2]
SCALED = "gpt2, scaled"


@pytest.mark.parametrize("family", [*FAMILIES, *(name for name in VARIANTS if name != SCALED)])
def test_a_saved_baked_model_reloads_to_the_same_logits_and_tokens(family, tmp_path):
    model = tiny_model(family)
    ids, _ = random_batch([12])
    save_baked(model, PLAN, tmp_path / "baked")
    # A checkpoint names no kernels, and those that the library would choose compute something else for gemma2.
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "baked",
        dtype=torch.float64,
        experts_implementation="eager",
        attn_implementation=model.config._attn_implementation,
    )
    baked = bake(model, PLAN)
    assert again.config.num_hidden_layers == 5
    with torch.no_grad():
        assert torch.equal(again(ids).logits, baked(ids).logits)
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(again.generate(ids, **settings), baked.generate(ids, **settings))
    assert [path.name for path in tmp_path.iterdir()] == ["baked"]


def test_baking_leaves_the_model_alone():
    model = tiny_model("gemma3")
    config, keys = model.config.to_dict(), list(model.state_dict())
    baked = bake(model, PLAN)
    with torch.no_grad():
        for parameter in baked.parameters():
            parameter.zero_()
    assert model.config.to_dict() == config
    assert list(model.state_dict()) == keys
    assert all(
        parameter.abs().sum() > 0
        for parameter in model.model.layers.parameters()
        if parameter.dim() > 1
    )
    # The repeated layer's two visits are weights of their own, so that any engine can load them.
    assert baked.model.layers[0] is not baked.model.layers[1]


def test_a_scale_by_layer_number_cannot_be_saved_and_is_refused(tmp_path):
    """A layer of gpt2 takes its scale from its place, which a config cannot say of a plan."""
    with pytest.raises(UnsupportedModelError, match="gpt2 has a per-layer setting"):
        save_baked(tiny_model(SCALED), PLAN, tmp_path / "baked")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_reloads_differently_is_not_published(tmp_path, monkeypatch):
    class Forgetful:
        """Reloads a layer as another kind, as a family does whose per-layer setting bake does not know."""

        @staticmethod
        def from_pretrained(folder, dtype):
            again = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            again.model.layers[0].self_attn.scaling *= 2
            return again

    monkeypatch.setattr(baking, "AutoModelForCausalLM", Forgetful)
    with pytest.raises(
        UnsupportedModelError, match="plan 0212 and its reloaded checkpoint differ by"
    ):
        save_baked(tiny_model("gemma3"), PLAN, tmp_path / "baked")
    assert list(tmp_path.iterdir()) == []


def test_refusals_leave_nothing_behind(tmp_path):
    model = tiny_model("llama")
    with pytest.raises(PlanError, match="names 3 layers"):
        save_baked(model, [1, 1, 1], tmp_path / "baked")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").touch()
    with pytest.raises(FileExistsError, match="exists already; give a new folder"):
        save_baked(model, PLAN, tmp_path / "full")
    wrap_model(model, plan=PLAN)
    with pytest.raises(WrapError, match="is wrapped; call unwrap_model.model. before bake"):
        save_baked(model, PLAN, tmp_path / "baked")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_plain_checkpoint_has_no_place_for_shortcuts(tmp_path):
    model = tiny_model("llama")
    for shortcuts in (random_shortcuts(model), "a/folder"):
        with pytest.raises(ShortcutError, match="no place for shortcuts: .* `dynadepth fold` fits"):
            save_baked(model, PLAN, tmp_path / "baked", shortcuts=shortcuts)
    assert list(tmp_path.iterdir()) == []
    save_baked(model, PLAN, tmp_path / "baked", shortcuts=False)
    assert (tmp_path / "baked" / "config.json").is_file()


def test_a_tokenizer_is_saved_with_the_checkpoint(tmp_path):
    save_baked(tiny_model("llama"), PLAN, tmp_path / "baked", tokenizer=word_tokenizer())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "baked")
    assert tokenizer("Answer yes")["input_ids"] == word_tokenizer()("Answer yes")["input_ids"]
