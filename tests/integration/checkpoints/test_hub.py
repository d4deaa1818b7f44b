"""From a folder to the hub and back: the same decisions, and every damage on the way a typed error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dynadepth import load_policy, push_policy, save_policy, unwrap_model, wrap_model
from dynadepth.cli import main as cli
from dynadepth.errors import CheckpointError
from dynadepth.onnx.menu_policy import OnnxMenuPolicy
from dynadepth.onnx.router_policy import OnnxRouterPolicy
from tests import fake_hub
from tests.fake_hub import TOKEN
from tests.tiny import random_batch, tiny_model
from tests.tiny_folder import save_tiny_base
from tests.tiny_hub import KINDS, OWN_FILES, contents, save_whole, six_layers, trained, truncate

REPO = "org/routers"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with fake_hub.running(monkeypatch, tmp_path / "home") as running:
        yield running


@pytest.fixture(scope="module")
def model():
    return six_layers(dtype=torch.float32)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, model, tmp_path):
    return save_whole(tmp_path / "mine", trained(kind, model))


@pytest.fixture(params=["folder", "hub"])
def place(request, hub, folder):
    """Put the folder, as it is by then, where it is loaded from; returns that place."""

    def publish():
        if request.param == "folder":
            return folder
        # As if damaged on the way: `push_policy` would not send it.
        hub.put(REPO, contents(folder))
        return REPO

    return publish


def decisions(model, routers, backend):
    """Return plans and logits at three budgets."""
    ids, mask = random_batch([5, 9, 2, 7], seed=3)
    found = []
    for budget in (0.5, 0.7, 0.9):
        wrap_model(model, budget=budget, routers=routers, router_backend=backend)
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask).logits
        found.append((model.dynadepth.last_plans.copy(), logits))
        unwrap_model(model)
    return found


@pytest.mark.parametrize("lfs", [False, True])
def test_what_is_pushed_comes_back_and_decides_the_same(hub, model, kind, folder, lfs, tmp_path):
    hub.lfs = lfs
    push_policy(folder, REPO, token=TOKEN)
    loaded = load_policy(REPO, model=model)
    assert loaded.folder is not None
    assert loaded.folder.is_relative_to(tmp_path / "home/cache")
    assert sorted(contents(loaded.folder)) == OWN_FILES
    assert contents(loaded.folder) == contents(folder)
    local = load_policy(folder, model=model)
    assert loaded.tensors().keys() == local.tensors().keys()
    for name, tensor in local.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor)
    kinds = {"routers": OnnxRouterPolicy, "menu": OnnxMenuPolicy}
    assert isinstance(loaded.policy(0.7, backend="onnx"), kinds[kind])
    for backend in ("torch", "onnx"):
        there, here = (decisions(model, each, backend) for each in (REPO, local))
        for (plans, logits), (expected_plans, expected_logits) in zip(there, here, strict=True):
            assert (plans == expected_plans).all()
            assert torch.equal(logits, expected_logits)


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, model, kind, tmp_path):
    first, second, third = (trained(kind, model, seed=seed) for seed in (1, 2, 3))
    url = push_policy(save_policy(tmp_path / "one", first), REPO, token=TOKEN)
    sha = url.rpartition("/")[2]
    hub.repositories[REPO].tags["v1"] = sha
    push_policy(save_policy(tmp_path / "two", second), REPO, token=TOKEN)
    push_policy(save_policy(tmp_path / "three", third), REPO, token=TOKEN, revision="next")
    expected = {None: second, "main": second, "v1": first, sha: first, "next": third}
    for revision, policy in expected.items():
        loaded = load_policy(REPO, model=model, revision=revision)
        for name, tensor in policy.tensors().items():
            assert torch.equal(loaded.tensors()[name], tensor), revision
    with pytest.raises(FileNotFoundError, match=r"at revision v9: 404 .* Revision Not Found"):
        load_policy(REPO, revision="v9")


def test_the_cache_serves_when_the_hub_does_not(hub, folder, monkeypatch):
    push_policy(folder, REPO, token=TOKEN)
    load_policy(REPO)
    monkeypatch.setattr(fake_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert contents(load_policy(REPO).folder) == contents(folder)
    assert len(hub.requests) == asked
    with pytest.raises(FileNotFoundError, match="hub repository of that name cannot be read"):
        load_policy("org/never-asked-for")


def test_what_the_hub_does_not_show_or_have_is_not_found(hub, folder):
    push_policy(folder, REPO, token=TOKEN, private=True)
    for repo_id in (REPO, "org/nothing"):
        with pytest.raises(FileNotFoundError, match=f"{repo_id}.*cannot be read.*Repository Not F"):
            load_policy(repo_id)
    hub.put("org/empty", {"README.md": b"soon"})
    with pytest.raises(FileNotFoundError, match=r"org/empty has neither router_config\.json nor"):
        load_policy("org/empty")


@pytest.mark.parametrize("name", ["router_config.json", "routers.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_named(place, folder, name, share):
    truncate(folder / name, share)
    with pytest.raises(CheckpointError, match=rf"{name} is (damaged|not JSON).*damaged|damaged"):
        load_policy(place())


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_onnx_file_is_named_before_the_model_is_touched(place, folder, model, share):
    truncate(folder / "routers.onnx", share)
    for act in (
        lambda: load_policy(place()).policy(0.7, backend="onnx"),
        lambda: wrap_model(model, budget=0.7, routers=place(), router_backend="onnx"),
    ):
        with pytest.raises(CheckpointError, match=r"routers\.onnx"):
            act()
    assert not hasattr(model, "dynadepth")


def test_missing_weights_are_named(place, folder):
    (folder / "routers.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"routers\.safetensors is missing; the folder is in"):
        load_policy(place())


@pytest.mark.parametrize("accept", [False, True])
def test_another_number_of_layers_is_never_accepted(place, accept):
    with pytest.raises(CheckpointError, match="they need 6 layers of width 32") as caught:
        load_policy(place(), model=tiny_model(num_layers=4), accept_mismatch=accept)
    assert "num_hidden_layers is 4, expected 6" in str(caught.value)
    assert "accept_mismatch" not in str(caught.value)


@pytest.mark.parametrize("accept", [False, True])
def test_another_width_is_never_accepted(place, folder, kind, model, accept):
    save_policy(folder, trained(kind, model, hidden_size=40))
    with pytest.raises(CheckpointError, match="they need 6 layers of width 40") as caught:
        load_policy(place(), model=model, accept_mismatch=accept)
    assert "accept_mismatch" not in str(caught.value)


def test_other_weights_are_refused_and_can_be_accepted_knowingly(place):
    tuned = six_layers(dtype=torch.float32)
    with torch.no_grad():
        tuned.model.layers[3].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(CheckpointError, match=r"weights of model\.layers\.3 differ"):
        load_policy(place(), model=tuned)
    with pytest.raises(CheckpointError, match=r"weights of model\.layers\.3 differ"):
        wrap_model(tuned, budget=0.7, routers=place())
    load_policy(place(), model=tuned, accept_mismatch=True).check_model(tuned)


def test_routers_are_found_beside_a_base_model_on_the_hub(hub, kind, tmp_path):
    base = save_tiny_base(tmp_path / "base", num_layers=6)
    hub.put("org/tiny", contents(base))
    bare = hub.repositories["org/tiny"].branches["main"]
    local = AutoModelForCausalLM.from_pretrained(base)
    routers = trained(kind, local, base_model="org/tiny")
    push_policy(routers, "org/tiny", token=TOKEN, beside_model=True)
    expected = decisions(local, routers, "torch")

    model = AutoModelForCausalLM.from_pretrained("org/tiny")
    asked = len(hub.requests)
    found = decisions(model, None, "torch")
    fetched = {path for _, path in hub.requests[asked:] if "/resolve/" in path}
    head = hub.repositories["org/tiny"].branches["main"]
    assert fetched == {f"/org/tiny/resolve/{head}/routers/{name}" for name in OWN_FILES}
    for (plans, logits), (expected_plans, expected_logits) in zip(found, expected, strict=True):
        assert (plans == expected_plans).all()
        assert torch.equal(logits, expected_logits)
    # The repository's own id is as good a name for them.
    assert torch.equal(decisions(model, "org/tiny", "onnx")[0][1], expected[0][1])

    # transformers does not note the commit of a model; where it is noted, its own routers are looked for.
    model.config._commit_hash = bare
    with pytest.raises(FileNotFoundError, match=r"org/tiny has no routers/router_config\.json"):
        wrap_model(model, budget=0.7)


def test_the_verb_push_prints_the_commit(hub, folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    argv = ["push", "--routers", str(folder), "--repo", REPO]
    assert cli.main(argv) == 0
    url = f"{hub.url}/{REPO}/commit/{hub.repositories[REPO].branches['main']}"
    assert capsys.readouterr().out == f"{url}\n"
    assert cli.main([*argv, "--revision", "next", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"repo": REPO, "revision": "next", "url": url}
    assert cli.main([*argv, "--private"]) == 1
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "private=True asks for a private one" in streams.err.splitlines()[-1]


def test_the_verb_push_of_what_is_no_folder_or_damaged_sends_nothing(hub, folder, capsys):
    assert cli.main(["push", "--routers", "org/name", "--repo", REPO]) == 2
    assert "--routers org/name is not a folder" in capsys.readouterr().err
    damaged = truncate(folder / "routers.safetensors")
    assert cli.main(["push", "--routers", str(folder), "--repo", REPO]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {damaged} is damaged")
    assert error.count("\n") == 1
    assert hub.requests == []


def test_a_process_of_its_own_pushes_as_its_environment_says(hub, model, tmp_path):
    folder = save_policy(tmp_path / "mine", trained("menu", model))
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home-of-it"),
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN,
    }
    program = "import sys; from dynadepth.cli.main import main; sys.exit(main(sys.argv[1:]))"
    result = subprocess.run(
        [sys.executable, "-c", program, "push", "--routers", str(folder), "--repo", REPO],
        env=environment,
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{hub.url}/{REPO}/commit/")
    assert hub.files(REPO) == contents(folder)
