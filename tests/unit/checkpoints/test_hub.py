"""Pushing routers: what is checked before anything is sent, and every way in which the hub can refuse."""

import socket
import sys

import pytest
from huggingface_hub import constants

from dynadepth import load_policy, push_policy, save_policy
from dynadepth.checkpoints import hub as hub_module
from dynadepth.checkpoints.save_load import export_policy
from dynadepth.errors import CheckpointError, ConfigError, HubError
from tests import fake_hub
from tests.fake_hub import READER, TOKEN, FakeHub
from tests.tiny_hub import KINDS, OWN_FILES, contents, save_whole, six_layers, trained, truncate

REPO = "org/routers"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with fake_hub.running(monkeypatch, tmp_path / "home") as running:
        yield running
        assert running.unknown == []


@pytest.fixture(scope="module")
def model():
    return six_layers()


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, model, tmp_path):
    return save_whole(tmp_path / "mine", trained(kind, model))


@pytest.fixture
def routers_folder(model, tmp_path):
    return save_policy(tmp_path / "mine", trained("routers", model))


def test_exactly_the_folders_own_files_go_in_one_commit(hub, folder, kind):
    (folder / "notes.txt").write_text("mine")
    (folder / "deeper").mkdir()
    (folder / "deeper/README.md").write_text("mine too")
    url = push_policy(folder, REPO, token=TOKEN)
    repository = hub.repositories[REPO]
    what = {"routers": "routers", "menu": "a menu"}[kind]
    assert repository.titles == ["initial", f"Upload {what} for org/base with dynadepth"]
    assert url == f"{hub.url}/{REPO}/commit/{repository.branches['main']}"
    assert not repository.private
    assert sorted(hub.files(REPO)) == OWN_FILES
    assert hub.files(REPO) == {name: contents(folder)[name] for name in OWN_FILES}


def test_large_files_go_the_way_of_lfs_before_the_commit(hub, folder):
    hub.lfs = True
    push_policy(folder, REPO, token=TOKEN)
    assert hub.files(REPO) == contents(folder)
    assert set(hub.blobs.values()) == {
        contents(folder)[name] for name in ("routers.onnx", "routers.safetensors")
    }
    assert [path for _, path in hub.writes()][-1] == f"/api/models/{REPO}/commit/main"
    assert len(hub.repositories[REPO].titles) == 2


def test_routers_in_memory_are_sent_with_card_and_onnx_file(hub, model, kind):
    policy = trained(kind, model)
    push_policy(policy, REPO, token=TOKEN)
    assert sorted(hub.files(REPO)) == OWN_FILES
    assert b"org/base" in hub.files(REPO)["README.md"]


def test_without_onnx_routers_in_memory_are_sent_without_its_file(hub, model, kind, monkeypatch):
    monkeypatch.setattr(hub_module, "find_spec", lambda _: None)
    push_policy(trained(kind, model), REPO, token=TOKEN)
    assert sorted(hub.files(REPO)) == [name for name in OWN_FILES if name != "routers.onnx"]


def test_the_folder_of_a_base_model_stands_for_the_routers_in_it(hub, model, tmp_path):
    save_policy(tmp_path / "base/routers", trained("routers", model))
    (tmp_path / "base/config.json").write_text("{}")
    push_policy(tmp_path / "base", REPO, token=TOKEN)
    assert hub.files(REPO) == contents(tmp_path / "base/routers")


def test_a_second_push_takes_the_onnx_file_of_other_routers_away(hub, model, tmp_path):
    push_policy(save_whole(tmp_path / "one", trained("routers", model)), REPO, token=TOKEN)
    other = save_policy(tmp_path / "two", trained("menu", model, seed=3))
    push_policy(other, REPO, token=TOKEN, commit_message="now a menu")
    assert hub.files(REPO) == contents(other)
    assert hub.repositories[REPO].titles[2:] == ["now a menu"]


def test_the_same_files_again_make_no_commit(hub, folder):
    first = push_policy(folder, REPO, token=TOKEN)
    assert push_policy(folder, REPO, token=TOKEN) == first
    assert len(hub.repositories[REPO].titles) == 2


def test_a_branch_is_made_if_it_is_missing_and_main_stays(hub, folder):
    for _ in range(2):
        push_policy(folder, REPO, revision="v2/try", token=TOKEN)
        assert hub.files(REPO, "v2/try") == contents(folder)
        assert hub.files(REPO) == {}


def test_a_tag_and_a_commit_cannot_be_pushed_to(hub, routers_folder):
    sha = hub.make(REPO).branches["main"]
    hub.repositories[REPO].tags["v1"] = sha
    with pytest.raises(HubError, match="revision v1 of org/routers is a tag, .* give a branch"):
        push_policy(routers_folder, REPO, revision="v1", token=TOKEN)
    seen = len(hub.requests)
    for revision in (sha, ""):
        with pytest.raises(ConfigError, match="expected the name of a branch"):
            push_policy(routers_folder, REPO, revision=revision, token=TOKEN)
    assert len(hub.requests) == seen
    assert hub.files(REPO) == {}


def test_a_pull_request_leaves_the_branch_alone(hub, folder):
    hub.make("others/routers")
    url = push_policy(folder, "others/routers", create_pr=True, token=TOKEN)
    assert hub.files("others/routers") == {}
    assert hub.files("others/routers", "refs/pr/1") == contents(folder)
    assert url.endswith(hub.repositories["others/routers"].branches["refs/pr/1"])


def test_a_new_repository_is_private_if_asked_for(hub, routers_folder):
    for _ in range(2):
        push_policy(routers_folder, REPO, private=True, token=TOKEN)
    assert hub.repositories[REPO].private
    with pytest.raises(HubError, match="is private, but private=False asks for a public one"):
        push_policy(routers_folder, REPO, private=False, token=TOKEN)


def test_nothing_private_goes_into_a_public_repository(hub, routers_folder):
    hub.make(REPO)
    with pytest.raises(HubError, match="exists and is public, but private=True asks for a private"):
        push_policy(routers_folder, REPO, private=True, token=TOKEN)
    assert hub.files(REPO) == {}
    assert [path for _, path in hub.writes()] == ["/api/repos/create"]


def test_the_card_of_a_model_is_never_replaced(hub, routers_folder):
    model_files = {"README.md": b"# The model", "config.json": b"{}", "model.safetensors": b"w"}
    hub.put("org/base", model_files)
    with pytest.raises(HubError, match=r"holds 'config\.json' and more and no routers.*--beside-m"):
        push_policy(routers_folder, "org/base", token=TOKEN)
    assert hub.files("org/base") == model_files
    push_policy(routers_folder, "org/base", token=TOKEN, beside_model=True)
    pushed = {f"routers/{name}": data for name, data in contents(routers_folder).items()}
    assert hub.files("org/base") == {**model_files, **pushed}


def test_a_repository_with_a_card_and_a_licence_only_is_free(hub, routers_folder):
    hub.put(REPO, {"README.md": b"# soon", "LICENSE": b"Apache"})
    push_policy(routers_folder, REPO, token=TOKEN)
    assert hub.files(REPO) == {**contents(routers_folder), "LICENSE": b"Apache"}


@pytest.mark.parametrize("name", OWN_FILES[1:])
def test_a_truncated_file_is_named_and_nothing_is_sent(hub, folder, name):
    damaged = truncate(folder / name)
    with pytest.raises(CheckpointError) as caught:
        push_policy(folder, REPO, token=TOKEN)
    assert str(damaged) in str(caught.value)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["README.md", "routers.safetensors"])
def test_a_folder_that_lacks_a_file_is_not_sent(hub, folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError) as caught:
        push_policy(folder, REPO, token=TOKEN)
    assert str(folder / name) in str(caught.value)
    assert "missing" in str(caught.value)
    assert hub.requests == []


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe"])
def test_a_card_that_says_nothing_is_not_sent(hub, routers_folder, content):
    (routers_folder / "README.md").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"README\.md, the model card, is"):
        push_policy(routers_folder, REPO, token=TOKEN)
    assert hub.requests == []


def test_an_onnx_file_of_other_routers_is_not_sent(hub, folder, kind, model):
    export_policy(trained(kind, model, seed=8), folder / "routers.onnx")
    with pytest.raises(CheckpointError, match=r"routers\.onnx was made from other routers"):
        push_policy(folder, REPO, token=TOKEN)
    assert hub.requests == []


def test_an_onnx_file_that_cannot_be_checked_is_not_sent(hub, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match="onnxruntime is not installed"):
        push_policy(folder, REPO, token=TOKEN)
    assert hub.requests == []


def test_a_folder_that_is_not_there_or_holds_no_routers_is_named(hub, tmp_path):
    for path in (tmp_path / "nowhere", "org/name"):
        with pytest.raises(FileNotFoundError, match=f"there is no folder {path}; expected a rout"):
            push_policy(path, REPO, token=TOKEN)
    with pytest.raises(FileNotFoundError, match=r"has neither router_config\.json nor"):
        push_policy(tmp_path, REPO, token=TOKEN)
    assert hub.requests == []


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "", "org/", "https://there.org/a/b", "a b/c"])
def test_what_is_no_hub_id_is_refused(hub, routers_folder, repo_id):
    with pytest.raises(ConfigError, match=f"repo_id is '{repo_id}'; expected a hub id like org/n"):
        push_policy(routers_folder, repo_id, token=TOKEN)
    assert hub.requests == []


def test_what_the_client_itself_refuses_is_our_error(hub, routers_folder):
    with pytest.raises(HubError, match="the hub rejects the request"):
        push_policy(routers_folder, "org/two--dashes", token=TOKEN)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("repo_id", "token", "text"),
    [
        (REPO, None, "does not know who is pushing; log in with `hf auth login`, or give a token"),
        (REPO, READER, "the token may not write there"),
        ("others/theirs", TOKEN, "the token may not write there"),
    ],
)
def test_a_token_that_may_not_write_is_explained(hub, routers_folder, repo_id, token, text):
    with pytest.raises(HubError) as caught:
        push_policy(routers_folder, repo_id, token=token)
    message = str(caught.value)
    assert message.startswith(f"cannot push {routers_folder} to {repo_id}: ")
    assert text in message
    assert "\n" not in message
    assert str(token) not in message
    assert hub.repositories == {}


def test_a_repository_that_costs_money_is_explained(hub, routers_folder):
    hub.failures["POST", "/repos/create"] = (402, "pay first")
    with pytest.raises(HubError, match="the hub requires a paid plan .* push to another one"):
        push_policy(routers_folder, REPO, token=TOKEN)
    assert hub.repositories == {}


def test_an_endpoint_that_is_no_hub_is_named(hub, routers_folder, monkeypatch):
    monkeypatch.setattr(FakeHub, "make", lambda *_: {}["not a hub"])
    with pytest.raises(HubError, match="check the network, a proxy and HF_ENDPOINT"):
        push_policy(routers_folder, REPO, token=TOKEN)


def test_a_pull_request_to_a_branch_that_is_not_there_is_refused(hub, routers_folder):
    hub.make(REPO)
    with pytest.raises(HubError, match="at revision v9: there is no such repository or revision"):
        push_policy(routers_folder, REPO, revision="v9", create_pr=True, token=TOKEN)
    assert list(hub.repositories[REPO].branches) == ["main"]


@pytest.mark.parametrize(
    ("request_of", "status", "text"),
    [
        (("POST", "/commit/"), 412, "someone else has pushed in between; .* push again"),
        (("POST", "/commit/"), 400, "the hub rejects the request"),
        (("POST", "/commit/"), 503, "the hub has failed; push again later"),
        (("POST", "/preupload/"), 403, "the token may not write there"),
        (("POST", "/repos/create"), 429, "too many requests; push again later"),
        (("POST", "/validate-yaml"), 400, "rejects the request; .* Invalid metadata"),
        (("PUT", "/lfs/"), 403, "the token may not write there"),
        (("GET", "/api/models/"), 404, "no such repository or revision"),
    ],
)
def test_a_push_that_fails_at_any_step_leaves_the_former_routers(
    hub, folder, kind, model, request_of, status, text
):
    hub.lfs = True
    push_policy(folder, REPO, token=TOKEN)
    before = hub.files(REPO)
    hub.failures[request_of] = (status, "not now")
    with pytest.raises(HubError, match=text) as caught:
        push_policy(trained(kind, model, seed=4), REPO, token=TOKEN)
    assert caught.value.__cause__ is not None
    assert hub.files(REPO) == before
    assert len(hub.repositories[REPO].titles) == 2


def test_a_push_in_between_is_not_mixed_with(hub, folder, monkeypatch):
    hub.make(REPO)
    genuine = hub_module._commit

    def late(*arguments, **options):
        hub.put(REPO, {"router_config.json": b"theirs"})
        return genuine(*arguments, **options)

    monkeypatch.setattr(hub_module, "_commit", late)
    with pytest.raises(HubError, match="someone else has pushed in between"):
        push_policy(folder, REPO, token=TOKEN)
    assert hub.files(REPO) == {"router_config.json": b"theirs"}


def test_offline_mode_is_named(hub, routers_folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="is in offline mode; to push, unset HF_HUB_OFFLINE"):
        push_policy(routers_folder, REPO, token=TOKEN)
    assert hub.requests == []


def test_no_network_is_named(routers_folder, monkeypatch, tmp_path):
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        fake_hub.point_at(f"http://127.0.0.1:{closed.getsockname()[1]}", monkeypatch, tmp_path)
        with pytest.raises(HubError, match="the hub cannot be reached; check the network"):
            push_policy(routers_folder, REPO, token=TOKEN)
        with pytest.raises(FileNotFoundError, match=f"there is no folder {REPO}, and the hub repo"):
            load_policy(REPO)
    fake_hub.close_session()


def test_a_revision_of_a_folder_here_is_refused(routers_folder):
    with pytest.raises(ConfigError, match="revision is 'v1', but .* is a folder on this machine"):
        load_policy(routers_folder, revision="v1")
