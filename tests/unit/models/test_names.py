"""Path-like names never reach the hub."""

from pathlib import Path

import pytest

from dynadepth import load_policy
from dynadepth.models.names import is_hub_id, is_path_like


@pytest.fixture
def hub(monkeypatch):
    """A hub that counts who asks it."""
    import huggingface_hub

    asked = []

    def download(repo, **_):
        asked.append(repo)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


@pytest.mark.parametrize(
    "name",
    [
        "./routers",
        "../routers",
        "~/routers",
        "/routers",
        "runs/demo/menu",
        "runs/",
        r"runs\menu",
        ".",
    ],
)
def test_a_mistyped_path_is_a_missing_folder_and_asks_nobody(name, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_path_like(name)
    with pytest.raises(FileNotFoundError):
        load_policy(name)
    assert hub == []


def test_a_folder_of_the_first_name_makes_the_second_one_a_path(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("runs/menu")
    with pytest.raises(FileNotFoundError, match="the hub repository"):
        load_policy("runs/menu")
    assert hub == ["runs/menu"]
    Path("runs").mkdir()
    assert not is_hub_id("runs/menu")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_policy("runs/menu")
    assert hub == ["runs/menu"]


def test_a_path_object_is_a_path_and_a_bare_name_is_none(tmp_path):
    assert is_path_like(Path("org/name"))
    assert not is_hub_id(Path("org/name"))
    assert not is_path_like("gpt2")
    assert not is_hub_id("gpt2")
