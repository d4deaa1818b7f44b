"""Prompts from plain text: one a line, each once; and how the verbs tell a text from JSON lines."""

import json
import os
import threading

import numpy as np
import pytest

from dynadepth.errors import TaskError
from dynadepth_search.data.tasks import Example, read_task


def test_every_line_is_a_prompt_and_each_text_is_taken_once(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(
        "Why is the sky blue?\n\n  Boil water.  \nWhy is the sky blue?\nÜber\n", "utf-8"
    )
    task = read_task(path)
    assert [example.prompt for example in task.examples] == [
        "Why is the sky blue?",
        "Boil water.",
        "Über",
    ]
    assert (task.kind, task.name) == ("prompt", "prompts")
    assert len(read_task(path, limit=2).examples) == 2


@pytest.mark.parametrize("content", [b"", b" \n\t\n"])
def test_a_text_without_prompts_is_refused(tmp_path, content):
    (tmp_path / "empty.txt").write_bytes(content)
    with pytest.raises(TaskError, match="holds no prompts; expected one on each line"):
        read_task(tmp_path / "empty.txt")


def test_what_is_no_text_is_refused(tmp_path):
    (tmp_path / "photo.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TaskError, match="not UTF-8 text"):
        read_task(tmp_path / "photo.txt")
    with pytest.raises(FileNotFoundError):
        read_task(tmp_path / "missing.txt")


@pytest.mark.parametrize("ending", ["jsonl", "json", "ndjson", "JSONL", "Json"])
def test_the_ending_says_what_a_file_is(tmp_path, ending):
    line = json.dumps({"prompt": "Boil water.", "completion": " Heat it."})
    (tmp_path / f"task.{ending}").write_text(line + "\n")
    (tmp_path / "task.txt").write_text(line + "\n")
    assert read_task(tmp_path / f"task.{ending}").kind == "completion"
    assert read_task(tmp_path / "task.txt").examples[0].prompt == line


LINES = b'{"prompt": "Boil water."}\n{"prompt": "Melt ice."}\n'
PROMPTS = [Example("Boil water."), Example("Melt ice.")]


@pytest.mark.parametrize("ending", ["txt", "TXT", "text", "md"])
def test_the_ending_of_a_text_says_what_it_is(tmp_path, ending):
    path = tmp_path / f"task.{ending}"
    path.write_bytes(LINES)
    assert [item.prompt for item in read_task(path).examples] == LINES.decode().splitlines()


@pytest.mark.parametrize("name", ["task", "task.bak", "task.jsonl.1"])
def test_the_first_line_says_what_a_file_without_a_known_ending_is(tmp_path, name):
    path = tmp_path / name
    for before in (b"", b"\n \n  ", b"\xef\xbb\xbf"):
        path.write_bytes(before + LINES)
        assert list(read_task(path).examples) == PROMPTS
    path.write_bytes(b'{ "prompt": "Boil water."}\n')
    assert list(read_task(path).examples) == PROMPTS[:1]
    # A damaged first line is no text.
    path.write_bytes(b'{"prompt": "Boil water."\n')
    with pytest.raises(TaskError, match="line 1: not JSON"):
        read_task(path)
    for content in (b"Boil water.\nMelt ice.", b"Boil water.\r\nMelt ice.\r\n"):
        path.write_bytes(content)
        assert list(read_task(path).examples) == PROMPTS
    path.write_bytes(b"{name} is\n")
    assert read_task(path).examples == (Example("{name} is"),)


@pytest.mark.parametrize("content", [LINES, b"Boil water.\nMelt ice.\n", b"\xef\xbb\xbf" + LINES])
@pytest.mark.parametrize("limit", [None, 1])
def test_a_pipe_is_read_once(content, limit):
    reading, writing = os.pipe()
    with os.fdopen(reading), os.fdopen(writing, "wb") as end:
        thread = threading.Thread(target=lambda: (end.write(content), end.close()))
        thread.start()
        task = read_task(f"/dev/fd/{reading}", limit=limit)
        thread.join()
    assert list(task.examples) == PROMPTS[:limit]


@pytest.mark.parametrize("name", ["task.jsonl", "task.txt", "task"])
def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path, name):
    content = b"Boil water.\nMelt ice.\n" if name.endswith("txt") else LINES
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert list(read_task(tmp_path / name).examples) == PROMPTS


@pytest.mark.parametrize("name", ["task.jsonl", "task.txt", "task"])
def test_another_encoding_is_named(tmp_path, name):
    # As Windows' shells write what they redirect.
    (tmp_path / name).write_bytes("Boil water.\n".encode("utf-16"))
    with pytest.raises(TaskError, match=r"task.*, line 1: .*'utf-8' codec can't decode"):
        read_task(tmp_path / name)


SEPARATORS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"]


@pytest.mark.parametrize("separator", SEPARATORS)
def test_only_a_line_feed_ends_a_line(tmp_path, separator):
    prompt = f"Boil{separator}water."
    (tmp_path / "task.txt").write_text(f"{prompt}\nMelt ice.\n", "utf-8", newline="")
    line = json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n"
    (tmp_path / "task.jsonl").write_text(line, "utf-8", newline="")
    assert read_task(tmp_path / "task.txt").examples[0].prompt == prompt
    assert read_task(tmp_path / "task.jsonl").examples[0].prompt == prompt


@pytest.mark.parametrize("limit", [0, -1, -5, True, 2.5, "3"])
@pytest.mark.parametrize("name", ["task.jsonl", "task.txt"])
def test_a_limit_that_is_none_is_refused(tmp_path, name, limit):
    (tmp_path / name).write_bytes(LINES)
    with pytest.raises(
        TaskError, match=f"a task of {limit} examples was asked for; expected a limit"
    ):
        read_task(tmp_path / name, limit=limit)


@pytest.mark.parametrize("name", ["task.jsonl", "task.txt", "task"])
def test_a_limit_takes_the_first_different_prompts(tmp_path, name):
    content = LINES if name == "task.jsonl" else b"Boil water.\n\nBoil water.\nMelt ice.\n"
    (tmp_path / name).write_bytes(content + (b"more\n" if name != "task.jsonl" else b"no JSON\n"))
    for limit in (1, 2, np.int64(2)):
        assert list(read_task(tmp_path / name, limit=limit).examples) == PROMPTS[:limit]


def test_examples_know_their_lines(tmp_path):
    for name, content in (("task.jsonl", LINES), ("task.txt", b"Boil water.\nMelt ice.\n")):
        (tmp_path / name).write_bytes(b"\n" + content)
        where = [item.where for item in read_task(tmp_path / name).examples]
        assert where == [f"{tmp_path / name}, line {number}" for number in (2, 3)]
