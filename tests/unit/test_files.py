"""Files are written whole or not at all."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dynadepth import files
from dynadepth.errors import CheckpointError, ConfigError

ROOT = Path(__file__).parents[2]


def test_a_file_is_written_with_its_folder_and_read_back(tmp_path):
    target = tmp_path / "new" / "folder" / "x.bin"
    files.write_bytes_atomic(target, b"\x00\xff")
    assert target.read_bytes() == b"\x00\xff"
    files.write_text_atomic(target, "naïve\n")
    assert target.read_bytes() == "naïve\n".encode()
    assert [path.name for path in target.parent.iterdir()] == ["x.bin"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_and_folders_have_the_mode_that_the_umask_says(tmp_path, umask):
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from dynadepth.files import make_folder_beside, write_text_atomic\n"
        f"os.umask({umask})\n"
        "place = Path(sys.argv[1])\n"
        "write_text_atomic(place / 'folder' / 'file', 'secret')\n"
        "make_folder_beside(place / 'routers').rename(place / 'routers')\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    for name, full in (("folder/file", 0o666), ("folder", 0o777), ("routers", 0o777)):
        assert (tmp_path / name).stat().st_mode & 0o777 == full & ~umask, name
    assert not list(tmp_path.rglob(".*"))


def test_nothing_else_sets_modes_or_makes_files_that_are_private_for_ever():
    """`mkstemp` and `mkdtemp` ignore the umask, and a `chmod` after them does too."""
    for package in ("python/dynadepth", "search/dynadepth_search"):
        for path in (ROOT / package).rglob("*.py"):
            found = re.findall(r"mkstemp|mkdtemp|chmod", path.read_text(encoding="utf-8"))
            assert not found, path


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_content_and_no_temporary_file(tmp_path, monkeypatch, step):
    target = tmp_path / "x"
    target.write_text("old")

    def fail(*_args):
        raise OSError("disk full")

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_text_atomic(target, "new")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_kill_while_writing_leaves_one_of_the_written_contents(tmp_path):
    target = tmp_path / "x"
    program = (
        "import itertools, sys\n"
        "from dynadepth.files import write_text_atomic\n"
        "for count in itertools.count():\n"
        "    write_text_atomic(sys.argv[1], str(count % 10) * 300_000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(target)]) as writer:
        give_up = time.monotonic() + 60
        while not target.exists() and time.monotonic() < give_up:
            time.sleep(0.01)
        time.sleep(0.2)
        writer.send_signal(signal.SIGKILL)
    content = target.read_text()
    assert len(content) == 300_000
    assert len(set(content)) == 1


def test_json_is_sorted_indented_and_finite(tmp_path):
    target = tmp_path / "x.json"
    files.write_json_atomic(target, {"b": 1, "a": [0.5]})
    assert target.read_text() == '{\n  "a": [\n    0.5\n  ],\n  "b": 1\n}\n'
    assert files.read_json(target, ConfigError) == {"a": [0.5], "b": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json_atomic(target, {"a": float("nan")})
    assert files.read_json(target, ConfigError) == {"a": [0.5], "b": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": ', "is not JSON .*damaged: write it again"),
        (b"", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[1, 2]", "holds a JSON list; expected an object"),
        (b"null", "holds a JSON NoneType; expected an object"),
    ],
)
def test_a_file_that_is_no_json_object_raises_the_callers_error(tmp_path, content, message):
    target = tmp_path / "x.json"
    target.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        files.read_json(target, CheckpointError)
    assert str(target) in str(caught.value)


def test_a_missing_file_stays_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.read_json(tmp_path / "x.json", ConfigError)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_a_file_has_the_hash_of_its_content(tmp_path, size):
    content = bytes(index % 251 for index in range(size))
    (tmp_path / "x").write_bytes(content)
    assert files.sha256_file(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_text_is_hashed_as_utf8():
    expected = hashlib.sha256("é".encode()).hexdigest()
    assert files.sha256_text("é") == expected


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "[Infinity]",
        '{"a": -Infinity}',
        "1e999",
        '{"a": 1, "a": 2}',
        "[" * 200_000,
        "1" * 5000,
        b"\xff",
        b"\xef\xbb\xbf{}",
        "",
        "{} {}",
    ],
)
def test_what_is_no_json(text, tmp_path):
    with pytest.raises(ValueError, match=r"."):
        files.parse_json(text)
    target = tmp_path / "x.json"
    target.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=r"x\.json is not JSON \(.*\); it is damaged"):
        files.read_json(target, ConfigError)


def test_what_is_json():
    assert files.parse_json(b'{"a": [1, 0.5, null, true, "\xc3\xa4"]}') == {
        "a": [1, 0.5, None, True, "\u00e4"]
    }
