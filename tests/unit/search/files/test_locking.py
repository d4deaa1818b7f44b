"""One writer for a folder, and no trace of one that wrote nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from dynadepth.errors import LabelError
from dynadepth_search.files.locking import locked

HOLD = """
import sys
from pathlib import Path
from dynadepth_search.files.locking import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("place", ["new", "a/b/c"])
def test_a_run_that_writes_nothing_leaves_nothing(tmp_path: Path, place: str) -> None:
    with locked(tmp_path / place):
        assert (tmp_path / place).is_dir()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / place):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_stays(tmp_path: Path) -> None:
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        (tmp_path / "labels").touch()
    held = sorted(file.name for file in tmp_path.iterdir())
    assert "labels" in held
    with locked(tmp_path):
        pass
    assert sorted(file.name for file in tmp_path.iterdir()) == held


def test_another_process_is_refused_until_it_is_killed(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(LabelError, match="another process is writing to"), locked(tmp_path):
        pass
    process.kill()
    process.communicate()
    with locked(tmp_path):
        pass


def test_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(LabelError, match="is no folder .*; name a folder"), locked(place):
            pass
    assert (tmp_path / "file").read_text() == "mine"
