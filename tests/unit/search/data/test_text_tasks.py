"""Prompts from plain text: one a line, each once; and how the verbs tell a text from JSON lines."""

import json

import pytest

from dynadepth.errors import TaskError
from dynadepth_search.cli.options import load_task
from dynadepth_search.data.tasks import read_text_task


def test_every_line_is_a_prompt_and_each_text_is_taken_once(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(
        "Why is the sky blue?\n\n  Boil water.  \nWhy is the sky blue?\nÜber\n", "utf-8"
    )
    task = read_text_task(path)
    assert [example.prompt for example in task.examples] == [
        "Why is the sky blue?",
        "Boil water.",
        "Über",
    ]
    assert (task.kind, task.name) == ("prompt", "prompts")
    assert len(read_text_task(path, limit=2).examples) == 2


@pytest.mark.parametrize("content", [b"", b" \n\t\n"])
def test_a_text_without_prompts_is_refused(tmp_path, content):
    (tmp_path / "empty.txt").write_bytes(content)
    with pytest.raises(TaskError, match="holds no prompts; expected one on each line"):
        read_text_task(tmp_path / "empty.txt")


def test_what_is_no_text_is_refused(tmp_path):
    (tmp_path / "photo.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TaskError, match="not UTF-8 text"):
        read_text_task(tmp_path / "photo.txt")
    with pytest.raises(FileNotFoundError):
        read_text_task(tmp_path / "missing.txt")


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_the_ending_says_what_a_file_is(tmp_path, ending):
    line = json.dumps({"prompt": "Boil water.", "completion": " Heat it."})
    (tmp_path / f"task.{ending}").write_text(line + "\n")
    (tmp_path / "task.txt").write_text(line + "\n")
    assert load_task(tmp_path / f"task.{ending}", None).kind == "completion"
    assert load_task(tmp_path / "task.txt", None).examples[0].prompt == line
