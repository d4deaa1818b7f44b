"""The files of shortcuts: round trips, and everything that is refused because it is not what was written."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import dynadepth
from dynadepth.errors import ShortcutError
from dynadepth.shortcuts.maps import LinearShortcut, Shortcuts
from dynadepth.shortcuts.save_load import load_shortcuts, save_shortcuts, shortcut_files
from tests.tiny import tiny_model
from tests.tiny_shortcuts import random_shortcuts

CONFIG, WEIGHTS = "shortcut_config.json", "shortcuts.safetensors"


def in_dtype(shortcuts, dtype, **parts):
    maps = [
        each
        and LinearShortcut(
            *(None if part is None else part.to(dtype) for part in (each.A, each.B, each.b))
        )
        for each in shortcuts.maps
    ]
    known = {"fingerprint": shortcuts.fingerprint, "rank": 3, "base_model": "org/base"}
    return Shortcuts(maps=maps, **{**known, **parts})


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def shortcuts(model):
    """Maps of every kind, and one layer without."""
    return in_dtype(
        random_shortcuts(model, without=(3,)),
        torch.float32,
        revision="abc",
        layers=[{"layer": layer, "divergence": 0.25, "mapped": layer < 3} for layer in range(4)],
        training={"prompts": 20, "asked": {"dtype": "float32", "ridges": [1e-4]}},
    )


@pytest.fixture
def folder(tmp_path, shortcuts):
    return save_shortcuts(tmp_path / "maps", shortcuts)


def edit(folder, change):
    file = folder / CONFIG
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_tensors(folder, change):
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_what_is_saved_comes_back(folder, shortcuts, model):
    assert sorted(file.name for file in folder.iterdir()) == [CONFIG, WEIGHTS]
    loaded = load_shortcuts(folder, model=model)
    assert loaded.digest == shortcuts.digest
    assert loaded.mapped_layers == (0, 1, 2)
    for name in ("rank", "base_model", "revision", "layers", "training", "fingerprint"):
        assert getattr(loaded, name) == getattr(shortcuts, name), name
    assert (loaded.folder, loaded.accepted) == (folder, False)
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    for one, other in zip(loaded.maps, shortcuts.maps, strict=True):
        assert (one is None and other is None) or torch.equal(one(states), other(states))
    assert dynadepth.load_shortcuts is load_shortcuts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_comes_back_as_it_is(tmp_path, shortcuts, dtype):
    kept = in_dtype(shortcuts, dtype)
    loaded = load_shortcuts(save_shortcuts(tmp_path / "new", kept))
    assert loaded.digest == kept.digest
    tensors = loaded.tensors()
    assert set(tensors) == set(kept.tensors())
    for name, tensor in kept.tensors().items():
        assert tensors[name].dtype == dtype
        assert torch.equal(tensors[name], tensor)


@pytest.mark.parametrize("rank", [0, 8, "full"])
def test_a_rank_of_every_kind_comes_back(tmp_path, shortcuts, rank):
    kept = in_dtype(shortcuts, torch.float32, rank=rank)
    assert load_shortcuts(save_shortcuts(tmp_path / "new", kept)).rank == rank


def test_tensors_that_are_views_or_need_gradients_are_saved(tmp_path):
    base = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    maps = [
        LinearShortcut(base.T, None, base[1].requires_grad_()),
        LinearShortcut(None, None, base[0]),
    ]
    kept = Shortcuts(maps=maps, fingerprint={}, rank="full")
    assert load_shortcuts(save_shortcuts(tmp_path / "new", kept)).digest == kept.digest


def test_the_same_shortcuts_are_the_same_bytes(shortcuts):
    files = shortcut_files(shortcuts)
    assert list(files) == [WEIGHTS, CONFIG]
    assert shortcut_files(shortcuts) == files


def test_saving_again_replaces_both_files(folder, shortcuts):
    other = in_dtype(shortcuts, torch.bfloat16)
    assert save_shortcuts(str(folder), other) == folder
    assert load_shortcuts(folder).digest == other.digest
    assert sorted(file.name for file in folder.iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize(
    "parts",
    [
        {"layers": [{"divergence": math.nan}] * 4},
        {"layers": [{"divergence": math.inf}] * 4},
        {"training": {"where": torch.zeros(1)}},
        {"fingerprint": {"weights": {1, 2}}},
    ],
)
def test_what_is_no_json_is_refused_before_anything_is_written(tmp_path, shortcuts, parts):
    bad = in_dtype(shortcuts, torch.float32, **parts)
    with pytest.raises(ShortcutError, match="cannot be written as JSON: .*plain, finite values"):
        save_shortcuts(tmp_path / "new", bad)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c.update(ranks=1), "has an unknown key 'ranks'; expected base_model, digest"),
        (lambda c: c.pop("rank"), "lacks the key 'rank'"),
        (lambda c: c.pop("dynadepth_version"), "lacks the key 'dynadepth_version'"),
        (lambda c: c.update(rank=-1), "rank is -1; expected a whole number of 0 or more"),
        (lambda c: c.update(rank="half"), "rank is 'half'; expected a whole number"),
        (lambda c: c.update(rank=True), "rank has a wrong form; it is damaged"),
        (lambda c: c.update(rank=2.5), "rank has a wrong form"),
        (lambda c: c.update(digest=None), "digest has a wrong form"),
        (lambda c: c.update(layers={}), "layers has a wrong form"),
        (lambda c: c.update(layers=[1, 2, 3, 4]), "base_model or layers has a wrong form"),
        (lambda c: c.update(training=[]), "training has a wrong form"),
        (lambda c: c.update(base_model="tiny"), "base_model has a wrong form"),
        (lambda c: c["base_model"].pop("name"), "base_model or layers has a wrong form"),
        (lambda c: c["base_model"].update(extra=1), "base_model or layers has a wrong form"),
        (lambda c: c["base_model"].update(name=None), "base_model or layers has a wrong form"),
        (lambda c: c["base_model"].update(revision=1), "base_model or layers has a wrong form"),
        (lambda c: c["base_model"].update(fingerprint=[]), "base_model or layers has a wrong"),
        (lambda c: c.update(layers=[]), "tensor 'layers.0.A' is unknown; expected layers 0 to -1"),
        (lambda c: c.update(layers=[{}, {}]), "tensor 'layers.2.b' is unknown; expected layers 0"),
        (lambda c: c.update(digest="0" * 16), "describes 0000000000000000; copy both files"),
    ],
)
def test_an_altered_configuration_is_refused(folder, change, text):
    edit(folder, change)
    with pytest.raises(ShortcutError) as error:
        load_shortcuts(folder)
    assert text in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("version", "text"),
    [
        (2, "has schema version 2 (written by dynadepth .*); this dynadepth reads up to 1: update"),
        (0, "has schema_version 0; expected a whole number from 1 on: it is damaged"),
        ("1", "has schema_version '1'; expected a whole number"),
        (True, "has schema_version True; expected a whole number"),
        (None, "has schema_version None; expected a whole number"),
    ],
)
def test_another_schema_version_is_refused(folder, version, text):
    edit(folder, lambda content: content.update(schema_version=version))
    with pytest.raises(ShortcutError, match=text.replace("(", r"\(").replace(")", r"\)")):
        load_shortcuts(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"rank": NaN}', '{"rank": 1, "rank": 2}', "\udc80"]
)
def test_a_configuration_that_is_no_json_object_is_refused(folder, text):
    (folder / CONFIG).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ShortcutError, match=CONFIG):
        load_shortcuts(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("layers.0.b"), "tensor 'layers.0.b' is missing; fit the shortcuts again"),
        (lambda t: t.pop("layers.0.B"), "a shortcut was given A (32, 3), B None and b (32,)"),
        (lambda t: t.pop("layers.0.A"), "a shortcut was given A None, B (3, 32)"),
        (lambda t: t.update(more=torch.zeros(1)), "tensor 'more' is unknown; expected layers 0"),
        (lambda t: t.update({"layers.4.b": t["layers.0.b"] + 1}), "tensor 'layers.4.b' is unknown"),
        (lambda t: t.update({"layers.01.b": t["layers.0.b"] + 1}), "'layers.01.b' is unknown"),
        (lambda t: t["layers.1.A"].fill_(math.nan), "A of a shortcut holds values that are not"),
        (lambda t: t["layers.2.b"].fill_(math.inf), "b of a shortcut holds values that are not"),
        (lambda t: t.update({"layers.2.b": torch.zeros(5)}), "shortcuts of widths [5, 32] for 4"),
        (lambda t: t.clear(), "shortcuts of widths [] for 4 layers were given"),
        (lambda t: t["layers.0.b"].add_(1.0), "has digest "),
        (lambda t: t.pop("layers.2.b"), "has digest "),
        (lambda t: t.update({"layers.2.b": t["layers.2.b"].double()}), "has digest "),
        (
            lambda t: t.update({"layers.3.b": t["layers.2.b"].clone()}),
            "but shortcut_config.json describes",
        ),
    ],
)
def test_altered_weights_are_refused(folder, change, text):
    edit_tensors(folder, change)
    with pytest.raises(ShortcutError) as error:
        load_shortcuts(folder)
    assert text in str(error.value)
    assert str(folder / WEIGHTS) in str(error.value)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_cut_weights_are_refused(folder, length):
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ShortcutError, match=r"shortcuts.safetensors is damaged \(.*copy it again"):
        load_shortcuts(folder)


def test_a_pointer_of_git_lfs_is_named(folder):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(ShortcutError, match="is a Git LFS pointer, not the file itself"):
        load_shortcuts(folder)


def test_missing_files(folder, tmp_path):
    for nothing in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no .*make it with `dynadepth short"):
            load_shortcuts(nothing)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ShortcutError, match=r"safetensors is missing; the folder is incomplete"):
        load_shortcuts(folder)
    (folder / WEIGHTS).mkdir()
    with pytest.raises(ShortcutError, match=r"safetensors is missing"):
        load_shortcuts(folder)


def test_files_of_two_fits_are_not_mixed(folder, shortcuts, model, tmp_path):
    other = save_shortcuts(
        tmp_path / "other", in_dtype(random_shortcuts(model, seed=1, without=(3,)), torch.float32)
    )
    shutil.copy(other / WEIGHTS, folder / WEIGHTS)
    with pytest.raises(ShortcutError, match="has digest .* describes .*copy both files together"):
        load_shortcuts(folder)
    shutil.copy(other / CONFIG, folder / CONFIG)
    assert load_shortcuts(folder).digest != shortcuts.digest


def test_a_kill_between_the_files_leaves_no_pair_that_loads(folder, shortcuts, monkeypatch):
    """The weights of a new fit beside the configuration of the old one."""
    from dynadepth.shortcuts import save_load

    write = save_load.write_bytes_atomic

    def killed(path, data):
        if path.name == CONFIG:
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(save_load, "write_bytes_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        save_shortcuts(folder, in_dtype(shortcuts, torch.bfloat16))
    with pytest.raises(ShortcutError, match="copy both files together, or fit the shortcuts again"):
        load_shortcuts(folder)


class TestTheBaseModel:
    def test_another_one_is_refused_or_accepted_knowingly(self, folder):
        other = tiny_model(seed=1)
        with pytest.raises(ShortcutError) as error:
            load_shortcuts(folder, model=other)
        said = str(error.value)
        assert f"the shortcuts in {folder} belong to another base model" in said
        assert "they were made with org/base, and here weights of" in said
        assert f"shortcuts=load_shortcuts('{folder}', model=model, accept_mismatch=True)" in said
        loaded = load_shortcuts(folder, model=other, accept_mismatch=True)
        assert loaded.accepted
        loaded.check_model(other)
        # Without the model nothing is checked yet; whoever uses them checks.
        with pytest.raises(ShortcutError, match="belong to another base model"):
            load_shortcuts(folder).check_model(other)

    def test_another_shape_is_never_accepted(self, folder):
        for other in (tiny_model(num_layers=3), tiny_model("gpt2", num_layers=5)):
            with pytest.raises(ShortcutError, match="they need 4 layers of width 32"):
                load_shortcuts(folder, model=other, accept_mismatch=True)
