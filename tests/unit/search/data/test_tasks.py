import json

import pytest

from dynadepth.errors import TaskError
from dynadepth_search.data.chat_template import as_chat
from dynadepth_search.data.splits import write_task
from dynadepth_search.data.tasks import Example, Task, read_task
from dynadepth_search.scoring.scorer import Scorer
from tests.tiny import tiny_model

CHOICES = {"prompt": "Water is", "choices": ["wet", "dry"], "answer": 0}


def write(tmp_path, *lines):
    path = tmp_path / "task.jsonl"
    path.write_text(
        "".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines), "utf-8"
    )
    return path


def test_reads_every_kind(tmp_path):
    task = read_task(write(tmp_path, CHOICES, {**CHOICES, "prompt": "Sand is", "answer": 1}))
    assert task.name == "task"
    assert task.kind == "choices"
    assert task.examples == (
        Example("Water is", ("wet", "dry"), 0),
        Example("Sand is", ("wet", "dry"), 1),
    )
    task = read_task(write(tmp_path, {"prompt": "1 + 1 =", "completion": "2"}))
    assert task.kind == "completion"
    assert task.examples == (Example("1 + 1 =", completion="2"),)
    line = {"prompt": "1 + 1 =", "completion": "so 2", "solution": "2"}
    solved = read_task(write(tmp_path, line))
    assert solved.kind == "solution"
    assert solved.examples == (Example("1 + 1 =", completion="so 2", solution="2"),)
    # Another solution is another task, but the prompt keeps its name.
    other = read_task(write(tmp_path, {**line, "solution": "3"}))
    assert other.sha256 != solved.sha256
    assert other.examples[0].prompt_id == solved.examples[0].prompt_id
    write_task(tmp_path / "again.jsonl", solved.examples)
    assert read_task(tmp_path / "again.jsonl").sha256 == solved.sha256
    task = read_task(
        write(tmp_path, {"prompt": "Once upon"}, "   ", {"prompt": "a time"}), name="tales"
    )
    assert (task.kind, task.name, len(task.examples)) == ("prompt", "tales", 2)


def test_limit_stops_reading_before_later_lines(tmp_path):
    path = write(tmp_path, {"prompt": "a"}, {"prompt": "b"}, "not JSON")
    assert [item.prompt for item in read_task(path, limit=2).examples] == ["a", "b"]
    with pytest.raises(TaskError, match="line 3: not JSON"):
        read_task(path, limit=3)
    with pytest.raises(
        TaskError, match="a task of 0 examples was asked for; expected a limit of 1"
    ):
        read_task(path, limit=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'prompt': 'x'}", "line 2: not JSON ("),
        ('{"prompt": "x"', "line 2: not JSON ("),
        ("[1, 2]", "line 2: a JSON list; expected an object with `prompt`"),
        ({"choices": ["a", "b"], "answer": 0}, "line 2: `prompt` is missing; expected text"),
        ({**CHOICES, "prompt": "  "}, 'line 2: `prompt` is "  "; expected text that is not blank'),
        ({**CHOICES, "prompt": 3}, "line 2: `prompt` is 3; expected text"),
        (
            {"prompt": "x", "choises": ["a", "b"]},
            "line 2: unknown key 'choises' (did you mean 'choices'?); expected prompt, choices, answer, completion, "
            "solution",
        ),
        (
            {**CHOICES, "choices": ["a"]},
            'line 2: `choices` is ["a"]; expected a list of two or more texts',
        ),
        ({**CHOICES, "choices": "ab"}, 'line 2: `choices` is "ab"; expected a list'),
        ({**CHOICES, "choices": ["a", 1]}, 'line 2: `choices` is ["a", 1]; expected a list'),
        ({**CHOICES, "choices": ["a", " "]}, "none of them blank"),
        ({**CHOICES, "choices": ["a", "a"]}, "line 2: two of the `choices` are the same"),
        ({"prompt": "x", "choices": ["a", "b"]}, "line 2: `answer` is missing; expected the index"),
        (
            {**CHOICES, "answer": 2},
            "line 2: `answer` is 2; expected the index of the right choice, a whole number from 0 to 1",
        ),
        ({**CHOICES, "answer": -1}, "line 2: `answer` is -1; expected the index"),
        ({**CHOICES, "answer": True}, "line 2: `answer` is true; expected the index"),
        ({**CHOICES, "answer": 1.0}, "line 2: `answer` is 1.0; expected the index"),
        ({**CHOICES, "completion": "wet"}, "line 2: both `choices` and `completion` are given"),
        ({"prompt": "x", "completion": ""}, 'line 2: `completion` is ""; expected text'),
        ({"prompt": "x", "answer": 0}, "line 2: `answer` is given without `choices`"),
        (
            {"prompt": "x", "solution": "4"},
            "line 2: `solution` is given without `completion`; give a right answer in words",
        ),
        ({**CHOICES, "solution": "4"}, "line 2: `solution` is given without `completion`"),
        (
            {"prompt": "x", "completion": "4", "solution": 4},
            "line 2: `solution` is 4; expected text that is not blank",
        ),
        (
            {"prompt": "x", "completion": "4", "solution": " "},
            'line 2: `solution` is " "; expected text that is not blank',
        ),
        (
            {"prompt": "x", "completion": "4", "solution": "4"},
            "line 2: this is a solution example, but the file began with choices examples",
        ),
        (
            r'{"prompt": "x", "completion": "4", "solution": "\ud83d"}',
            r"line 2: `solution` holds '\ud83d'",
        ),
        (
            {"prompt": "x"},
            "line 2: this is a prompt example, but the file began with choices examples",
        ),
        (CHOICES, "line 2: same prompt and same choices as line 1"),
        # Legal JSON that is no text, no number of ours, or says two things at once.
        (r'{"prompt": "a\ud800"}', r"line 2: `prompt` holds '\ud800' at character 1, half of a"),
        (r'{"prompt": "\udfff\ud800"}', r"line 2: `prompt` holds '\udfff' at character 0, half of"),
        (
            r'{"prompt": "x", "choices": ["a", "b\udc00"], "answer": 0}',
            r"line 2: `choices` holds '\udc00' at character 1, half of a surrogate pair",
        ),
        (r'{"prompt": "x", "completion": "\ud83d"}', r"line 2: `completion` holds '\ud83d'"),
        (
            r'{"prompt": "x", "choices": "\ud83d"}',
            r'line 2: `choices` is "\ud83d"; expected a list',
        ),
        (r'{"prompt": "x", "\ud83d": 1}', r"line 2: unknown key '\ud83d'"),
        (
            '{"prompt": "x", "choices": ["a", "b"], "answer": ' + "9" * 5000 + "}",
            "line 2: not JSON (",
        ),
        ('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 2: not JSON ("),
        ('{"prompt": "x", "prompt": "y"}', "line 2: key 'prompt' is given twice; give it once"),
        ({**CHOICES, "answer": float("nan")}, "line 2: `answer` is NaN; expected the index"),
        ({"prompt": "\u2003\u2028"}, "expected text that is not blank"),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path, line, message):
    path = write(tmp_path, CHOICES, line)
    with pytest.raises(TaskError) as caught:
        read_task(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert message in str(caught.value)
    str(caught.value).encode()  # it can be printed and written anywhere


def test_same_prompt_with_other_choices_is_another_example(tmp_path):
    # PIQA asks about "machete" three times, each time with other answers.
    task = read_task(write(tmp_path, CHOICES, {**CHOICES, "choices": ["blue", "red"]}))
    assert task.examples[0].prompt_id != task.examples[1].prompt_id


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(
        TaskError, match=r"empty\.jsonl holds no examples; expected one JSON object a line"
    ):
        read_task(path)


def test_missing_file_and_broken_encoding(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_task(tmp_path / "none.jsonl")
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "é"}\n'.encode("latin-1"))
    with pytest.raises(TaskError, match="line 1: not JSON"):
        read_task(path)


def test_scoring_is_checked(tmp_path):
    path = write(tmp_path, CHOICES)
    with pytest.raises(TaskError, match=r"'normalised' is unknown \(did you mean 'normalized'\?\)"):
        read_task(path, scoring="normalised")
    many = {**CHOICES, "choices": [str(i) for i in range(27)]}
    with pytest.raises(TaskError, match="27 choices; letter scoring has letters for 26"):
        read_task(write(tmp_path, many), scoring="letter")
    assert read_task(write(tmp_path, many), scoring="raw").scoring == "raw"


def test_hashes_see_what_they_must():
    one = Example("p", ("a", "b"), 0)
    assert len(one.prompt_id) == 16
    assert one.prompt_id == Example("p", ("a", "b"), 1).prompt_id
    # Texts that only differ in where they are cut.
    assert one.prompt_id != Example("p", ("a\x00b", ""), 0).prompt_id
    assert Example("p", completion="ab").prompt_id != Example("pa", completion="b").prompt_id
    task = Task("t", (one,), "raw")
    assert task.sha256 == Task("other", (one,), "raw").sha256
    assert task.sha256 != Task("t", (one,), "letter").sha256
    assert task.sha256 != Task("t", (Example("p", ("a", "b"), 1),), "raw").sha256


def test_a_text_gives_a_prompt_for_each_line(tmp_path):
    path = tmp_path / "tales.txt"
    path.write_text("Once upon\n\n  a time \nOnce upon\r\n\tlived é\n", "utf-8")
    task = read_task(path)
    assert (task.name, task.kind) == ("tales", "prompt")
    assert task.examples == (Example("Once upon"), Example("a time"), Example("lived é"))
    assert read_task(path, limit=2).examples == task.examples[:2]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "tales.txt holds no prompts"), (b" \n\n", "holds no prompts"), (b"\xff\n", "not UTF-8")],
)
def test_a_text_without_prompts_is_refused(tmp_path, content, message):
    path = tmp_path / "tales.txt"
    path.write_bytes(content)
    with pytest.raises(TaskError, match=message):
        read_task(path)
    with pytest.raises(FileNotFoundError):
        read_task(tmp_path / "other.txt")


def test_a_whole_pair_of_surrogates_is_a_character(tmp_path):
    task = read_task(write(tmp_path, r'{"prompt": "\ud83d\ude00"}', {"prompt": "a\x00b"}))
    assert [item.prompt for item in task.examples] == ["\U0001f600", "a\x00b"]


def test_surrogates_that_are_written_as_bytes_are_no_text(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_bytes(b'{"prompt": "\xed\xa0\x80"}\n')
    with pytest.raises(TaskError, match="line 1: not JSON"):
        read_task(path)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("bad", ["\u200b", "x" * 3000, "\x00"])
def test_what_a_tokenizer_cannot_read_is_named_by_file_and_line(tmp_path, chat, bad):
    class Deaf:
        chat_template = "{{ messages[0]['content'] }}"
        eos_token_id = bos_token_id = None

        def __call__(self, text, **_):
            if "\x00" in text:
                raise TypeError("embedded null character")
            return {"input_ids": [5] * len(text.replace("\u200b", ""))}

        def apply_chat_template(self, messages, *, tokenize, **_):
            text = messages[-1]["content"]
            return self(text)["input_ids"] if tokenize else text

    path = write(tmp_path, {"prompt": "fine"}, {"prompt": bad})
    task, tokenizer = read_task(path), Deaf()
    task = as_chat(task, tokenizer) if chat else task
    scorer = Scorer(tiny_model(), tokenizer, chat=task.chat)
    scorer.encode(task.examples[0])
    with pytest.raises(TaskError) as caught:
        scorer.encode(task.examples[1])
    assert str(caught.value).startswith(f"{path}, line 2: ")
