"""Policies that were calibrated with shortcuts: their folder carries them, and they run with no others."""

import json
import shutil

import numpy as np
import pytest
import torch

from dynadepth import load_policy, load_shortcuts, save_policy
from dynadepth.errors import CheckpointError, ConfigError, ShortcutError
from dynadepth.models.fingerprint import fingerprint
from dynadepth.shortcuts.save_load import CONFIG_NAME, WEIGHTS_NAME, save_shortcuts
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from tests.tiny import random_batch, tiny_model
from tests.tiny_menus import random_menu
from tests.tiny_routers import random_routers
from tests.tiny_shortcuts import random_shortcuts

_PLANS = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0]], dtype=np.uint8)


def random_policy(kind, model, **parts):
    parts = {"fingerprint": fingerprint(model), **parts}
    if kind == "routers":
        return random_routers(**parts)
    return random_menu(layers=(1,), hidden_size=32, plans=_PLANS, **parts)


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def batch():
    return random_batch([9, 6], seed=1)


@pytest.fixture(params=["routers", "menu"])
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, model, tmp_path):
    policy = random_policy(kind, model, shortcuts=random_shortcuts(model), base_model="tiny")
    return save_policy(tmp_path / "base" / "routers", policy)


def last(model, batch):
    ids, mask = batch
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False).logits[:, -1]


def traces(model):
    return [(name, type(each), tuple(each.__dict__)) for name, each in model.named_modules()]


def test_they_are_loaded_with_the_policy(model, batch, folder):
    assert {file.name for file in folder.iterdir()} >= {CONFIG_NAME, WEIGHTS_NAME}
    shortcuts = random_shortcuts(model)
    model.name_or_path = str(folder.parent)
    model.config._name_or_path = str(folder.parent)
    outputs = []
    for routers in (folder, str(folder.parent), load_policy(folder), None):
        wrap_model(model, budget=0.7, routers=routers)
        assert model.dynadepth.shortcuts.digest == shortcuts.digest
        outputs.append(last(model, batch))
        plans = model.dynadepth.last_plans
        unwrap_model(model)
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert (plans == 0).any()
    # Its plans with the same maps by hand.
    wrap_model(model, plan="0-3", shortcuts=shortcuts)
    with model.dynadepth.plans(plans):
        assert torch.equal(last(model, batch), outputs[0])


def test_the_budget_can_be_moved(model, batch, folder):
    wrap_model(model, budget=0.7, routers=folder)
    model.dynadepth.budget = 0.5
    assert model.dynadepth.shortcuts is not None
    assert bool(torch.isfinite(last(model, batch)).all())


def test_the_same_ones_given_again_are_accepted(model, folder):
    for given in (folder, random_shortcuts(model), load_shortcuts(folder)):
        wrap_model(model, budget=0.7, routers=folder, shortcuts=given)
        unwrap_model(model)


def test_running_without_or_with_others_is_refused(model, folder):
    before = traces(model)
    own = random_shortcuts(model).digest
    others = random_shortcuts(model, seed=1)
    for given, words in ((False, "without shortcuts"), (others, others.digest)):
        with pytest.raises(ShortcutError) as error:
            wrap_model(model, budget=0.7, routers=folder, shortcuts=given)
        assert f"the policy was calibrated with shortcuts {own}, but is to run" in str(error.value)
        assert words in str(error.value)
        assert traces(model) == before


def test_a_policy_without_any_refuses_them(kind, model, tmp_path):
    plain = save_policy(tmp_path / "plain", random_policy(kind, model))
    before = traces(model)
    message = "the policy was calibrated without shortcuts, but is to run with shortcuts"
    with pytest.raises(ShortcutError, match=message):
        wrap_model(model, budget=0.7, routers=plain, shortcuts=random_shortcuts(model))
    assert traces(model) == before
    wrap_model(model, budget=0.7, routers=plain, shortcuts=False)
    assert model.dynadepth.shortcuts is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda folder: (folder / CONFIG_NAME).unlink(),
            "there is no shortcut_config.json; copy the whole folder",
        ),
        (lambda folder: (folder / WEIGHTS_NAME).unlink(), "shortcuts.safetensors is missing"),
        (
            lambda folder: [(folder / name).unlink() for name in (CONFIG_NAME, WEIGHTS_NAME)],
            "was calibrated with shortcuts",
        ),
        (lambda folder: (folder / WEIGHTS_NAME).write_bytes(b"{}"), "is damaged"),
    ],
)
def test_a_folder_without_their_files_is_refused(model, folder, change, words):
    change(folder)
    before = traces(model)
    for given in (None, False):
        with pytest.raises((CheckpointError, ShortcutError), match=words):
            wrap_model(model, budget=0.7, routers=folder, shortcuts=given)
    assert traces(model) == before


def test_a_folder_whose_shortcuts_were_exchanged_is_refused(model, folder, tmp_path):
    others = save_shortcuts(tmp_path / "others", random_shortcuts(model, seed=1))
    shutil.copy(others / WEIGHTS_NAME, folder / WEIGHTS_NAME)
    with pytest.raises(ShortcutError, match="copy both files together"):
        wrap_model(model, budget=0.7, routers=folder)
    shutil.copy(others / CONFIG_NAME, folder / CONFIG_NAME)
    message = "was calibrated with shortcuts .*, but those beside it are .*; copy the whole"
    with pytest.raises(CheckpointError, match=message):
        wrap_model(model, budget=0.7, routers=folder)
    assert "dynadepth" not in model.__dict__


@pytest.mark.parametrize("digest", [None, 1, True, []])
def test_a_digest_that_is_no_text_is_refused(model, folder, digest):
    file = folder / "router_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "shortcuts": digest}))
    with pytest.raises(CheckpointError, match="shortcuts is .*; expected text"):
        load_policy(folder)


def test_what_is_saved_again_carries_them(kind, model, folder, tmp_path):
    again = save_policy(tmp_path / "again", load_policy(folder))
    assert (again / WEIGHTS_NAME).read_bytes() == (folder / WEIGHTS_NAME).read_bytes()
    assert load_policy(again, model=model).shortcuts.digest == random_shortcuts(model).digest
    # A policy without any replace them whole.
    save_policy(again, random_policy(kind, model))
    assert not (again / CONFIG_NAME).exists()
    assert not (again / WEIGHTS_NAME).exists()


def test_a_fine_tuned_model_is_accepted_for_both_at_once(folder):
    other = tiny_model(seed=1)
    accepted = load_policy(folder, model=other, accept_mismatch=True)
    wrap_model(other, budget=0.7, routers=accepted)
    assert other.dynadepth.shortcuts.accepted


def test_those_of_another_number_of_layers_are_refused(kind, model):
    with pytest.raises(ConfigError, match="the shortcuts are for 5 layers, the policy for 4"):
        random_policy(kind, model, shortcuts=random_shortcuts(tiny_model(num_layers=5)))
