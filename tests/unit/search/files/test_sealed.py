"""Files that carry a hash of themselves, and the steps that are remembered in one."""

import json
from pathlib import Path
from typing import Any

import pytest

from dynadepth.errors import ConfigError, LabelError
from dynadepth_search.files.sealed import read_sealed, write_sealed
from dynadepth_search.storage.steps import Steps

CONTENT: dict[str, Any] = {"b": [0.1, {"2": None, "10": "ä"}], "a": (1, 2)}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_sealed(path, {**CONTENT, "numbers": {10: 1, 9: 2}})
    assert read_sealed(path, ConfigError, make_again="again") == {
        "b": CONTENT["b"],
        "a": [1, 2],
        "numbers": {"10": 1, "9": 2},
    }


def test_an_altered_value_breaks_the_seal(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_sealed(path, CONTENT)
    path.write_text(path.read_text().replace("0.1", "0.2"))
    with pytest.raises(
        ConfigError, match=r"x\.json is damaged .*its seal is broken\): do it again"
    ):
        read_sealed(path, ConfigError, make_again="do it again")


def test_a_file_that_is_older_than_seals(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"a": 1}))
    assert read_sealed(path, ConfigError, make_again="again") == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"asked": {}}, "it has no 'steps'"),
        ({"asked": {}, "steps": []}, r"steps is \[\]; expected an object"),
        ({"asked": {}, "steps": {"a": {"seconds": 1.0}}}, "steps.a has no 'report'"),
        ({"asked": {}, "steps": {"a": {"seconds": -1, "report": {}}}}, "steps.a.seconds is -1"),
        ({"asked": {}, "steps": {"a": {"seconds": 1, "report": 3}}}, "steps.a.report is 3"),
        (
            {"asked": {}, "steps": {}, "stops": {}},
            r"unknown key 'stops' \(did you mean 'steps'\?\)",
        ),
        ({"asked": 3, "steps": {}}, "asked is 3; expected an object"),
    ],
)
def test_steps_that_are_none(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "steps.json"
    path.write_text(json.dumps(content))
    with pytest.raises(
        LabelError, match=rf"steps\.json is damaged .*{message}.*: use another folder"
    ):
        Steps(path, {})
