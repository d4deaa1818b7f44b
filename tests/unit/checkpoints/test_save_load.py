"""The routers folder: strict reading, whole writing, and the right base model."""

import json
import math
import shutil
from pathlib import Path

import huggingface_hub
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dynadepth import load_policy, save_policy
from dynadepth.checkpoints import paths
from dynadepth.checkpoints.save_load import (
    Routers,
    base_model_name,
    export_policy,
    find_routers,
)
from dynadepth.errors import BudgetError, CheckpointError, ConfigError
from dynadepth.models.fingerprint import fingerprint
from dynadepth.onnx.router_policy import OnnxRouterPolicy, export_onnx
from dynadepth.policies.router_policy import RouterPolicy
from tests.tiny import tiny_model
from tests.tiny_menus import random_menu
from tests.tiny_routers import CALIBRATION, random_routers, seen

METRICS = {
    "table": [
        {"policy": "base", "depth": 1.0, "reward": -0.5},
        {"policy": "routed | 0.8", "depth": 0.8012345, "reward": -0.51, "interval": [-0.02, 0.01]},
    ],
    "prompts": 200,
}


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def routers(model):
    return random_routers(
        fingerprint=fingerprint(model),
        protect=(3, 0),
        base_model="org/base",
        revision="abc",
        metrics=METRICS,
        training={"seed": 1},
    )


@pytest.fixture
def folder(tmp_path, routers):
    return save_policy(tmp_path / "routers", routers)


def edit(folder: Path, change):
    file = folder / "router_config.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_tensors(folder: Path, change):
    file = folder / "routers.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def entries(folder: Path):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_what_is_saved_comes_back(folder, routers, model):
    assert sorted(entries(folder)) == ["README.md", "router_config.json", "routers.safetensors"]
    loaded = load_policy(folder, model=model)
    for name, tensor in routers.heads.state_dict().items():
        assert torch.equal(loaded.heads.state_dict()[name], tensor)
    assert torch.equal(loaded.bias, routers.bias)
    for name in ("config", "shrinkage", "calibration", "protect", "fingerprint", "base_model"):
        assert getattr(loaded, name) == getattr(routers, name), name
    for name in ("revision", "metrics", "training"):
        assert getattr(loaded, name) == getattr(routers, name), name
    assert loaded.protect == (0, 3)
    assert loaded.folder == folder
    assert [path.name for path in folder.parent.iterdir()] == ["routers"]


def test_loaded_routers_decide_as_saved_ones(folder, routers):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 9, 32, generator=generator)
    mask = torch.ones(5, 9, dtype=torch.bool)
    for budget in (0.5, 0.8, 1.0):
        kept, loaded = routers.policy(budget), load_policy(folder).policy(budget)
        assert isinstance(loaded, RouterPolicy)
        assert loaded.penalty == CALIBRATION.penalty_for(budget)
        for layer in range(4):
            assert (
                kept.decide(layer, hidden, seen(mask)) == loaded.decide(layer, hidden, seen(mask))
            ).all()


def test_a_budget_out_of_range_is_refused(routers):
    with pytest.raises(BudgetError, match=r"within the calibrated range, 0\.5 to 1\.0"):
        routers.policy(1.5)
    with pytest.raises(ConfigError, match="backend is 'tensorrt'; expected 'torch' or 'onnx'"):
        routers.policy(0.8, backend="tensorrt")


def test_the_card_shows_the_table(folder):
    card = (folder / "README.md").read_text()
    assert "base_model: org/base" in card
    assert "| policy | depth | reward | interval |" in card
    assert "| routed \\| 0.8 | 0.8012 | -0.51 | [-0.02, 0.01] |" in card
    assert "- prompts: 200" in card
    assert "0.5 to 1" in card
    assert "protected layers: 0, 3" in card


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c.update(shrinkag=1), "unknown key 'shrinkag' (did you mean 'shrinkage'"),
        (
            lambda c: c["base_model"].update(nam=1),
            "unknown key 'base_model.nam' (did you mean 'name'",
        ),
        (lambda c: c["router"].update(num_window=1), "did you mean 'num_windows'"),
        (lambda c: c["calibration"].update(depth=1), "did you mean 'depths'"),
        (lambda c: c.pop("protect"), "lacks the key 'protect'"),
        (lambda c: c.update(action_order=["execute", "skip", "repeat"]), "only knows"),
        (lambda c: c.update(windows="overlapping"), "windows is 'overlapping'"),
        (lambda c: c.update(shrinkage=2.0), "shrinkage is 2.0; expected a number from 0 to 1"),
        (lambda c: c.update(shrinkage=math.nan), "NaN is no number of JSON"),
        (lambda c: c.update(shrinkage="1"), "shrinkage is '1'; expected a number"),
        (lambda c: c.update(protect=[4]), "protect names layer 4; expected numbers from 0 to 3"),
        (lambda c: c.update(protect=["0"]), "protect names layer '0'"),
        (lambda c: c.update(base_model="org/base"), "base_model is 'org/base'; expected an object"),
        (lambda c: c["base_model"].update(fingerprint=3), "base_model.fingerprint is 3"),
        (lambda c: c.update(schema_version="1"), "schema_version '1'; expected a whole number"),
        (lambda c: c.pop("schema_version"), "schema_version None"),
        (
            lambda c: c.update(kind="forest"),
            "kind is 'forest'; expected one of exits, menu, routers",
        ),
        (lambda c: c.pop("kind"), "kind is None"),
        (lambda c: c.update(kind="menu"), "unknown key 'action_order'"),
        (lambda c: c["router"].update(num_layers=5), "'bias' is torch.float32 of shape (4, 3)"),
        (lambda c: c["router"].update(hidden_size=31), "torch.float32 of shape (4, 31, 16)"),
        (lambda c: c["router"].update(last_token=False), "is unknown; expected exactly"),
        (lambda c: c["calibration"].update(lowest=0.1), "expected a range within its depths"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(folder, change, text):
    edit(folder, change)
    with pytest.raises(CheckpointError) as caught:
        load_policy(folder)
    assert text in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_newer_schema_names_both_versions(folder):
    edit(folder, lambda c: c.update(schema_version=9, dynadepth_version="8.1", novelty=1))
    with pytest.raises(
        CheckpointError, match=r"schema version 9 \(written by dynadepth 8\.1\).* reads up to 2"
    ):
        load_policy(folder)


def test_an_older_schema_says_to_train_again(folder):
    edit(folder, lambda c: c.update(schema_version=1, dynadepth_version="0.0.9"))
    with pytest.raises(
        CheckpointError,
        match=r"schema version 1 \(written by dynadepth 0\.0\.9\).* reads 2: train the routers again",
    ):
        load_policy(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("bias"), "tensor 'bias' is missing"),
        (lambda t: t.pop("last.first_bias"), "'last.first_bias' is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "'extra' is unknown"),
        (
            lambda t: t.update({"bias": torch.zeros(3, 4)}),
            "'bias' is torch.float32 of shape (3, 4)",
        ),
        (lambda t: t["bias"].fill_(math.nan), "'bias' holds values that are not finite"),
        (lambda t: t["windows.first_weight"][1, 2].fill_(math.nan), "not finite"),
        (lambda t: t.update({"last.second_bias": t["last.second_bias"].half()}), "torch.float16"),
    ],
)
def test_wrong_weights_are_refused_by_name(folder, change, text):
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError) as caught:
        load_policy(folder)
    assert text in str(caught.value)
    assert str(folder / "routers.safetensors") in str(caught.value)


@pytest.mark.parametrize("name", ["router_config.json", "routers.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_named(folder, name, share):
    file = folder / name
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(CheckpointError) as caught:
        load_policy(folder)
    assert str(file) in str(caught.value)
    assert "damaged" in str(caught.value)


def test_missing_weights_are_named(folder):
    (folder / "routers.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"routers\.safetensors is missing; the folder is incomplete"
    ):
        load_policy(folder)


def test_another_base_model_is_refused_and_can_be_accepted_knowingly(folder):
    tuned = tiny_model()
    with torch.no_grad():
        tuned.model.layers[2].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(CheckpointError) as caught:
        load_policy(folder, model=tuned)
    text = str(caught.value)
    assert "weights of model.layers.2 differ" in text
    assert "made with org/base" in text
    assert f"load_policy({str(folder)!r}, model=model, accept_mismatch=True)" in text
    accepted = load_policy(folder, model=tuned, accept_mismatch=True)
    accepted.check_model(tuned)
    with pytest.raises(CheckpointError, match=r"weights of model\.layers\.2 differ"):
        load_policy(folder).check_model(tuned)


@pytest.mark.parametrize("accept", [False, True])
def test_a_model_that_the_routers_do_not_fit_is_never_accepted(folder, accept):
    with pytest.raises(CheckpointError) as caught:
        load_policy(folder, model=tiny_model(num_layers=6), accept_mismatch=accept)
    assert "they need 4 layers of width 32" in str(caught.value)
    assert "num_hidden_layers is 6, expected 4" in str(caught.value)
    assert "accept_mismatch" not in str(caught.value)


def test_saving_again_replaces_everything(folder, routers):
    export_onnx(routers, folder / "routers.onnx")
    other = random_routers(seed=5)
    save_policy(folder, other)
    assert sorted(entries(folder)) == ["README.md", "router_config.json", "routers.safetensors"]
    assert torch.equal(load_policy(folder).bias, other.bias)


def test_a_folder_with_other_files_is_left_alone(folder, routers):
    (folder / "notes.txt").write_text("mine")
    before = entries(folder)
    with pytest.raises(CheckpointError, match=r"holds 'notes\.txt', which routers do not"):
        save_policy(folder, routers)
    file = folder / "notes.txt"
    with pytest.raises(CheckpointError, match="is a file; give a folder"):
        save_policy(file, routers)
    assert entries(folder) == before


@pytest.mark.parametrize("name", ["README.md", "routers.onnx", "routers.safetensors"])
def test_a_folder_with_a_file_that_routers_could_have_but_no_routers_is_left_alone(
    tmp_path, routers, name
):
    target = tmp_path / "project"
    target.mkdir()
    (target / name).write_text("mine")
    with pytest.raises(CheckpointError, match=f"holds '{name}'"):
        save_policy(target, routers)
    assert entries(target) == {name: b"mine"}


def test_metrics_that_are_not_json_change_nothing(folder, routers):
    before = entries(folder)
    for metrics in ({"a": math.nan}, {"a": torch.zeros(1)}):
        with pytest.raises(CheckpointError, match="cannot be written as JSON"):
            save_policy(folder, random_routers(metrics=metrics))
    assert entries(folder) == before


@pytest.mark.parametrize("failing", ["write_bytes_atomic", "rename"])
def test_a_failing_disk_leaves_the_former_routers(folder, monkeypatch, failing):
    before = entries(folder)
    calls = []

    def fail_late(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return genuine(*arguments)

    if failing == "rename":
        genuine = Path.rename
        monkeypatch.setattr(Path, "rename", fail_late)
    else:
        genuine = paths.write_bytes_atomic
        monkeypatch.setattr(paths, "write_bytes_atomic", fail_late)
    with pytest.raises(OSError, match="No space left"):
        save_policy(folder, random_routers(seed=5))
    assert len(calls) >= 2
    assert entries(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["routers"]


def test_a_kill_between_the_two_renames_is_mended_by_the_next_save(folder, routers):
    backup = folder.with_name(".routers.replaced")
    folder.rename(backup)
    with pytest.raises(
        FileNotFoundError, match=r"an interrupted save left the previous ones in .*replaced"
    ):
        load_policy(folder)
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        save_policy(folder, random_routers(metrics={"a": math.inf}))
    save_policy(folder, routers)
    assert [path.name for path in folder.parent.iterdir()] == ["routers"]
    load_policy(folder)
    shutil.copytree(folder, backup)  # as a kill before the clean-up leaves it
    save_policy(folder, routers)
    assert [path.name for path in folder.parent.iterdir()] == ["routers"]


def test_a_save_that_fails_after_a_kill_gives_the_former_routers_back(folder, routers, monkeypatch):
    before = entries(folder)
    folder.rename(folder.with_name(".routers.replaced"))

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(paths, "write_bytes_atomic", fail)
    with pytest.raises(OSError, match="No space left"):
        save_policy(folder, routers)
    assert entries(folder) == before


def test_a_linked_folder_stays_a_link(folder, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(folder)
    other = random_routers(seed=5)
    save_policy(link, other)
    assert link.is_symlink()
    assert torch.equal(load_policy(folder).bias, other.bias)


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"bias": torch.zeros(4, 2)}, "the bias has shape (4, 2)"),
        ({"bias": torch.full((4, 3), math.inf)}, "not finite"),
        ({"shrinkage": -0.1}, "shrinkage is -0.1"),
        ({"protect": (True,)}, "protect names layer True"),
    ],
)
def test_wrong_parts_are_refused(part, text):
    with pytest.raises(ConfigError) as caught:
        random_routers(**part)
    assert text in str(caught.value)


def test_routers_are_found_beside_a_local_base_model(tiny_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    model = AutoModelForCausalLM.from_pretrained(base)
    assert base_model_name(model) == "base"
    with pytest.raises(
        FileNotFoundError, match=r"base/routers/router_config\.json beside the base model"
    ):
        find_routers(model)
    save_policy(base / "routers", random_routers(fingerprint=fingerprint(model)))
    assert find_routers(model) == base / "routers"
    # The base model's folder itself is as good a name for them.
    assert load_policy(base, model=model).folder == base / "routers"
    shutil.rmtree(base)
    with pytest.raises(FileNotFoundError, match="which no longer exists"):
        find_routers(model)


def test_a_model_from_nowhere_has_no_routers(model):
    assert base_model_name(model) == ""
    with pytest.raises(FileNotFoundError, match="does not come from a folder or the hub"):
        find_routers(model)


class Hub:
    """`snapshot_download` of one repository."""

    def __init__(self, folder):
        self.folder, self.calls = folder, []

    def __call__(self, repo_id, *, revision=None, allow_patterns=None):
        self.calls.append((repo_id, revision, allow_patterns))
        if repo_id != "org/base":
            raise huggingface_hub.errors.LocalEntryNotFoundError(
                "offline and not in the cache\nmore"
            )
        return str(self.folder)


def test_routers_are_found_on_the_hub(folder, model, monkeypatch):
    hub = Hub(folder.parent)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    model.config._name_or_path = "org/base"
    model.config._commit_hash = "f00"
    assert base_model_name(model) == "org/base"
    assert find_routers(model) == folder
    assert hub.calls == [("org/base", "f00", ["routers/*"])]
    assert load_policy("org/base", model=model).folder == folder
    assert set(hub.calls[-1][2]) > {"routers/*", "router_config.json", "routers.safetensors"}
    model.config._name_or_path = "org/other"
    with pytest.raises(
        FileNotFoundError, match="org/other, and the hub .* offline and not in the cache"
    ):
        find_routers(model)
    shutil.rmtree(folder)
    model.config._name_or_path = "org/base"
    with pytest.raises(FileNotFoundError, match=r"org/base has no routers/router_config\.json"):
        find_routers(model)


def test_offline_the_cache_is_asked_and_nothing_else():
    with pytest.raises(FileNotFoundError, match="hub repository of that name cannot be read"):
        load_policy("dynadepth-tests/there-is-none")


@pytest.mark.parametrize("path", ["/nowhere/routers", "nowhere", Path("org/name"), "a/b/c"])
def test_a_path_that_is_not_there_is_named(path):
    with pytest.raises(FileNotFoundError, match=f"there is no folder {path}; expected a routers"):
        load_policy(path)


def test_a_folder_without_routers_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"neither router_config\.json nor routers/router_con"
    ):
        load_policy(tmp_path)


def test_the_onnx_backend_takes_the_file_beside_or_makes_one(folder, routers):
    hidden = torch.randn(6, 5, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(6, 5, dtype=torch.bool)
    loaded = load_policy(folder)
    made = loaded.policy(0.7, backend="onnx")
    assert isinstance(made, OnnxRouterPolicy)
    export_onnx(loaded, folder / "routers.onnx")
    read = loaded.policy(0.7, backend="onnx")
    protected = dict.fromkeys(loaded.protect)
    for layer in range(4):
        assert (
            made.decide(layer, hidden, seen(mask)) == read.decide(layer, hidden, seen(mask))
        ).all()
        if layer not in protected:
            torch_actions = loaded.policy(0.7).decide(layer, hidden, seen(mask))
            assert (torch_actions == read.decide(layer, hidden, seen(mask))).all()
    export_onnx(random_routers(seed=9), folder / "routers.onnx")
    with pytest.raises(CheckpointError, match=r"routers\.onnx was made from other routers"):
        loaded.policy(0.7, backend="onnx")


def test_routers_are_immutable(routers):
    assert isinstance(routers, Routers)
    with pytest.raises(AttributeError):
        routers.shrinkage = 0.0


@pytest.mark.parametrize("kind", ["routers", "menu"])
def test_a_graph_that_was_changed_is_refused_whatever_its_metadata_says(folder, kind):
    """The metadata's digest is that of the weights; the graph decides otherwise."""
    trained = random_routers() if kind == "routers" else random_menu()
    save_policy(folder, trained)
    export_policy(trained, folder / "routers.onnx")
    assert load_policy(folder).policy(0.8, backend="onnx").num_layers == trained.num_layers
    model = onnx.load(folder / "routers.onnx")
    constant = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    changed = onnx.numpy_helper.to_array(constant).copy()
    changed.flat[0] += 0.5
    constant.CopyFrom(onnx.numpy_helper.from_array(changed, constant.name))
    onnx.save(model, folder / "routers.onnx")
    with pytest.raises(CheckpointError, match=r"routers\.onnx was made from other routers"):
        load_policy(folder).policy(0.8, backend="onnx")


@pytest.mark.parametrize("name", ["routers.safetensors", "routers.onnx"])
def test_a_pointer_of_git_lfs_is_named_as_one(folder, name):
    routers = random_routers()
    save_policy(folder, routers)
    export_policy(routers, folder / "routers.onnx")
    (folder / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 12345\n"
    )
    with pytest.raises(CheckpointError, match=rf"{name}.* is a Git LFS pointer.*git lfs pull"):
        load_policy(folder).policy(0.8, backend="onnx")
