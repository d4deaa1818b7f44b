"""`dynadepth generate --task`: all prompts of a file, grouped by plan; killed at any moment, it goes on."""

import json
import shutil

import pytest
from filelock import FileLock
from transformers import AutoTokenizer

from dynadepth.cli import generate as verb
from dynadepth.cli import main as cli
from dynadepth.cli.prompts import read_prompts
from dynadepth.errors import TaskError

WORDS = ("the river is deep", "snow", "a cat sat on the mat today", "why", "blue sky and sea")
PROMPTS = [f"{WORDS[number % 5]} {number}" for number in range(11)]


def run(capsys, *argv):
    code = cli.main([str(each) for each in argv])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def tiny_copy(tiny_base, tmp_path):
    return shutil.copytree(tiny_base, tmp_path / "base")


@pytest.fixture
def task(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f"{json.dumps({'prompt': prompt})}\n" for prompt in PROMPTS))
    return file


def options(model, task, out, *more):
    given = ("generate", "--model", model, "--task", task, "--out", out)
    return (*given, "--budget", 0.7, "--max-new-tokens", 5, "--batch-size", 3, *more)


def answers_in(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.filterwarnings("ignore::dynadepth.errors.DynadepthWarning")
def test_every_answer_is_that_of_its_prompt_alone(capsys, tiny_routed, task, tmp_path):
    out = tmp_path / "new" / "answers.jsonl"
    code, printed, err = run(capsys, *options(tiny_routed, task, out, "--json"))
    assert code == 0, err
    summary = json.loads(printed)
    assert summary["out"] == str(out)
    assert summary["prompts"] == len(PROMPTS)
    found = answers_in(out)
    assert [answer["prompt"] for answer in found] == PROMPTS
    assert [answer["index"] for answer in found] == list(range(len(PROMPTS)))
    assert len({answer["plan"] for answer in found}) == summary["plans"] > 1
    for answer in found:
        alone = ("generate", "--model", tiny_routed, "--prompt", answer["prompt"])
        code, one, _ = run(capsys, *alone, "--budget", 0.7, "--max-new-tokens", 5, "--json")
        assert code == 0
        expected = json.loads(one)
        for name in ("text", "plan", "depth", "new_tokens"):
            assert answer[name] == expected[name]
    assert sorted(path.name for path in out.parent.iterdir()) in (
        ["answers.jsonl"],
        ["answers.jsonl", "answers.jsonl.lock"],
    )


@pytest.mark.filterwarnings("ignore::dynadepth.errors.DynadepthWarning")
@pytest.mark.parametrize("killed_at", [0, 1, 3])
@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("temperature", [0, 2])
def test_a_killed_run_goes_on(
    capsys, monkeypatch, tiny_routed, task, tmp_path, killed_at, torn, temperature
):
    more = ("--temperature", temperature, "--seed", 3)
    whole = tmp_path / "whole.jsonl"
    assert run(capsys, *options(tiny_routed, task, whole, *more))[0] == 0
    original, calls = verb._Answering.answer, []

    def answer(self, prompts, tokens, rows):
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        calls.append(rows)
        return original(self, prompts, tokens, rows)

    out = tmp_path / "answers.jsonl"
    monkeypatch.setattr(verb._Answering, "answer", answer)
    assert run(capsys, *options(tiny_routed, task, out, *more))[0] == 130
    assert not out.exists()
    if torn:
        with (tmp_path / "answers.jsonl.partial").open("ab") as file:
            file.write(b'{"index": 1, "te')
    again = []

    def counted(self, prompts, tokens, rows):
        again.append(rows)
        return original(self, prompts, tokens, rows)

    monkeypatch.setattr(verb._Answering, "answer", counted)
    assert run(capsys, *options(tiny_routed, task, out, *more))[0] == 0
    assert not {tuple(rows) for rows in calls} & {tuple(rows) for rows in again}
    assert out.read_text() == whole.read_text()


@pytest.mark.filterwarnings("ignore::dynadepth.errors.DynadepthWarning")
def test_what_cannot_go_on_is_refused(capsys, tiny_routed, task, tmp_path):
    out = tmp_path / "answers.jsonl"
    partial = tmp_path / "answers.jsonl.partial"
    assert run(capsys, *options(tiny_routed, task, out))[0] == 0
    code, _, err = run(capsys, *options(tiny_routed, task, out))
    assert (code, "exists; give a new file" in err) == (1, True)
    out.unlink()
    partial.write_text('{"settings": {"seed": 1}}\n')
    code, _, err = run(capsys, *options(tiny_routed, task, out))
    assert (code, "was begun with other settings" in err) == (1, True)
    partial.write_text("{}\n")
    code, _, err = run(capsys, *options(tiny_routed, task, out))
    assert (code, "is damaged; remove it" in err) == (1, True)
    partial.unlink()
    with FileLock(tmp_path / "answers.jsonl.lock"):
        code, _, err = run(capsys, *options(tiny_routed, task, out))
    assert (code, "another process is writing" in err) == (1, True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--budget", 0.7), "give either --prompt or --task"),
        (("--budget", 0.7, "--prompt", "a", "--task", "x"), "give either --prompt or --task"),
        (("--budget", 0.7, "--task", "x"), "--task and --out go together"),
        (("--budget", 0.7, "--prompt", "x", "--out", "y"), "--task and --out go together"),
        (("--budget", 0.7, "--prompt", "x", "--dtype", "float"), "--dtype"),
    ],
)
def test_options_that_do_not_go_together(capsys, argv, message):
    code, out, err = run(capsys, "generate", "--model", "no-model", *argv)
    assert (code, out) == (2, "")
    assert message in err


def test_limits_and_dtypes_of_the_command_line(capsys, tiny_base):
    given = ("generate", "--model", tiny_base, "--prompt", "the sky", "--plan", "1121")
    code, _, err = run(capsys, *given, "--max-depth", 1.0)
    assert (code, "max_depth allows 4" in err) == (1, True)
    code, out, _ = run(capsys, *given, "--max-depth", 1.25, "--dtype", "bfloat16", "--json")
    assert (code, json.loads(out)["plan"]) == (0, "1121")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'\xef\xbb\xbf{"prompt": "a\\u2028b"}\n\n{"prompt": "c", "answer": 1}'),
        ("a.JSONL", '{"prompt": "a\u2028b"}\r\n{"prompt": "c"}\n'.encode()),
        ("pipe", '{"prompt": "a\u2028b"}\n{"prompt": "c"}\n'.encode()),
        ("prompts", "a\u2028b\nc\n".encode()),
        ("a.txt", "a\u2028b\r\nc\n".encode()),
    ],
)
def test_prompts_are_read_line_by_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read_prompts(tmp_path / name) == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    "line",
    [b"[1]", b"{}", b'{"prompt": 3}', b'{"prompt": " "}', b'{"prompt"', b"\xff", b"1" * 5000],
)
def test_a_wrong_line_is_named(tmp_path, line):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"prompt": "a"}\n' + line + b"\n")
    with pytest.raises(TaskError, match=r"a\.jsonl, line 2: .*expected an object with a `prompt`"):
        read_prompts(file)


def test_a_file_without_prompts_and_prompts_without_tokens(capsys, tiny_base, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("\n")
    with pytest.raises(TaskError, match="holds no prompts"):
        read_prompts(file)
    file.write_text('{"prompt": "a"}\n{"prompt": "\\ud800"}\n')
    given = ("generate", "--model", tiny_base, "--task", file, "--out", tmp_path / "b")
    code, _, err = run(capsys, *given, "--plan", "1111")
    assert (code, "prompt 2: " in err) == (1, True)
    assert not (tmp_path / "b").exists()


def test_bake_keeps_the_tokenizer_as_it_was(capsys, tiny_copy, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_copy, padding_side="right")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tiny_copy)
    given = ("bake", "--model", tiny_copy, "--plan", "0-1,3", "--out", tmp_path / "baked")
    code, _, err = run(capsys, *given)
    assert code == 0, err
    baked = AutoTokenizer.from_pretrained(tmp_path / "baked")
    assert (baked.padding_side, baked.pad_token) == ("right", None)
