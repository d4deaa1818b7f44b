"""Tasks: the prompts of a search, a training or an evaluation, with their right answers if any.

Task files are read and checked line by line. `dynadepth_search.data.encoding` turns an example into tokens,
`dynadepth_search.scoring` into a reward.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, cast, get_args

from dynadepth.config import did_you_mean
from dynadepth.errors import TaskError
from dynadepth.models.encoding import lone_surrogate
from dynadepth.models.prompt_lines import prompt_lines

__all__ = [
    "ChatForm",
    "Example",
    "Kind",
    "Scoring",
    "Task",
    "check_scoring",
    "located",
    "read_task",
]

Scoring = Literal["raw", "normalized", "letter"]
Kind = Literal["choices", "completion", "solution", "prompt"]

_KEYS = ("prompt", "choices", "answer", "completion", "solution")
# What tells two examples with the same prompt apart.
_OWN = {**{kind: kind for kind in get_args(Kind)}, "solution": "completion"}
_LETTERS = 26


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and, if any, the right answer.

    Args:
        prompt: What the model is given; the only part of the example that a policy sees.
        choices: Answers to choose from, or None.
        answer: Index of the right choice; None if there are no choices.
        completion: The right continuation, or None. Without choices or completion, only the objective `preserve` is
            possible.
        solution: The value that a generated answer has to end with, such as `42`, or None. Then the completion is one
            way to answer, by which plans are screened.
        where: File and line that the example was read from, for messages; empty if there is none. It is ignored when
            examples are compared.
    """

    prompt: str
    choices: tuple[str, ...] | None = None
    answer: int | None = None
    completion: str | None = None
    solution: str | None = None
    where: str = field(default="", compare=False, repr=False)

    @property
    def kind(self) -> Kind:
        """Whether the right answer is one of several choices, a completion, a value to be generated, or missing."""
        if self.choices is not None:
            return "choices"
        if self.solution is not None:
            return "solution"
        return "prompt" if self.completion is None else "completion"

    @property
    def prompt_id(self) -> str:
        """Hash of the prompt with its choices or completion, 16 hexadecimal digits, but not of answer or solution."""
        return _digest([self.prompt, self.choices, self.completion])[:16]


@dataclass(frozen=True, slots=True)
class ChatForm:
    """The chat in which every prompt of a task is the user's turn.

    Args:
        template: Hash of the chat template, in hexadecimal; another template gives other tokens for the same prompts.
        system: Text of the system's turn; None: that of the template.
    """

    template: str
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """Examples of one kind, and how their choices are scored.

    Args:
        name: Name of the task in messages and reports.
        examples: The examples, in the order of the file; no two have the same `prompt_id`.
        scoring: `raw`: log-probability of a choice's tokens given the prompt. `normalized`: the same, divided by the
            bytes of the choice. `letter`: the prompt lists the choices under letters, and the letters are scored.
            Without choices it has no effect.
        chat: The chat form of the prompts; None: they are not turns of a chat. The examples are the same in both cases.
    """

    name: str
    examples: tuple[Example, ...]
    scoring: Scoring = "raw"
    chat: ChatForm | None = None

    @property
    def kind(self) -> Kind:
        """The kind of all its examples."""
        return self.examples[0].kind

    @property
    def sha256(self) -> str:
        """Hash of the examples, the scoring and the chat form, but not of the name."""
        rows = [[item.prompt, item.choices, item.answer, item.completion] for item in self.examples]
        content: list[Any] = [self.scoring, rows]
        if self.kind == "solution":
            content.append([item.solution for item in self.examples])
        if self.chat is not None:
            content.append([self.chat.template, self.chat.system])
        return _digest(content)


@contextmanager
def located(example: Example) -> Iterator[None]:
    """Make errors about an example name the file and line that it was read from.

    Raises:
        TaskError: As raised inside, preceded by file and line.
    """
    try:
        yield
    except TaskError as error:
        if not example.where:
            raise
        raise TaskError(f"{example.where}: {error}") from error


def check_scoring(scoring: str) -> Scoring:
    """Check the name of a scoring and return it.

    Raises:
        TaskError: There is no scoring of that name.
    """
    if scoring not in get_args(Scoring):
        raise TaskError(
            f"scoring {scoring!r} is unknown{did_you_mean(scoring, get_args(Scoring))}; "
            f"expected one of {', '.join(get_args(Scoring))}"
        )
    return cast("Scoring", scoring)


def read_task(
    path: str | os.PathLike[str],
    *,
    scoring: str = "raw",
    limit: int | None = None,
    name: str | None = None,
) -> Task:
    """Read a task from a file of JSON lines, or of text with one prompt a line.

    A file whose name ends in .jsonl, .json or .ndjson, in any case, holds JSON lines; one whose name ends in .txt,
    .text or .md holds text. Anything else (a pipe, for example) is read as JSON lines if its first line that is not
    blank begins with `{"`. A line ends only at a line feed; blank lines and a byte order mark are skipped.

    A JSON line is an object with `prompt` and either `choices` (a list of strings) with `answer` (the index of the
    right one), or `completion`, which may come with `solution`, or neither. All lines of a file are of one kind. In a
    text file, repeated prompts are read once, and white space around a prompt is removed.

    Args:
        path: The file, UTF-8; it is read once, from its beginning.
        scoring: How choices are scored, see `Task`.
        limit: Maximum number of examples; later lines are not read. None: no limit.
        name: Name of the task; None: the name of the file without its extension.

    Returns:
        The task.

    Raises:
        FileNotFoundError: There is no such file.
        TaskError: The file is empty, or a line is not what it must be; the message names the file and the line.
    """
    file = Path(path)
    checked = check_scoring(scoring)
    if limit is not None and (
        not isinstance(limit, Integral) or isinstance(limit, bool) or limit < 1
    ):
        raise TaskError(
            f"a task of {limit} examples was asked for; expected a limit of 1 or more, or none"
        )
    with file.open("rb") as stream:
        as_json, lines = prompt_lines(file, stream)
        found = _json_examples(file, lines, checked) if as_json else _text_examples(file, lines)
        examples = tuple(islice(found, limit))
    if not examples:
        expected = (
            "holds no examples; expected one JSON object a line with `prompt` and `choices` + `answer`, or `completion`"
            if as_json
            else "holds no prompts; expected one on each line"
        )
        raise TaskError(f"{file} {expected}")
    return Task(name=file.stem if name is None else name, examples=examples, scoring=checked)


def _json_examples(
    file: Path, lines: Iterable[tuple[int, bytes]], scoring: Scoring
) -> Iterator[Example]:
    kind: Kind | None = None
    seen: dict[str, int] = {}
    for number, line in lines:
        where = f"{file}, line {number}"
        example = _read_line(line, where, scoring)
        kind = kind or example.kind
        if example.kind != kind:
            raise TaskError(
                f"{where}: this is a {example.kind} example, but the file began with {kind} examples; "
                "a task holds one kind, since their rewards cannot be averaged: split the file"
            )
        first = seen.setdefault(example.prompt_id, number)
        if first != number:
            raise TaskError(
                f"{where}: same prompt and same {_OWN[example.kind]} as line {first}; remove one"
            )
        yield example


def _text_examples(file: Path, lines: Iterable[tuple[int, bytes]]) -> Iterator[Example]:
    seen: set[str] = set()
    for number, line in lines:
        where = f"{file}, line {number}"
        try:
            prompt = line.decode().strip()
        except UnicodeDecodeError as error:
            raise TaskError(f"{where}: not UTF-8 text ({error}); convert it") from error
        if prompt and prompt not in seen:
            seen.add(prompt)
            yield Example(prompt=prompt, where=where)


def _read_line(line: bytes, where: str, scoring: Scoring) -> Example:
    try:
        row = json.loads(line.decode(), object_pairs_hook=partial(_object, where))
    except TaskError:
        raise
    # Besides invalid JSON: numbers of thousands of digits, and lists nested too deeply.
    except (ValueError, RecursionError) as error:
        raise TaskError(
            f"{where}: not JSON ({error}); expected one JSON object on each line"
        ) from error
    if not isinstance(row, dict):
        raise TaskError(f"{where}: a JSON {type(row).__name__}; expected an object with `prompt`")
    for key in row:
        if key not in _KEYS:
            raise TaskError(
                f"{where}: unknown key {key!r}{did_you_mean(key, _KEYS)}; expected {', '.join(_KEYS)}"
            )
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise TaskError(
            f"{where}: `prompt` is {_show(row, 'prompt')}; expected text that is not blank"
        )
    choices, completion, solution = (row.get(key) for key in ("choices", "completion", "solution"))
    if choices is not None and completion is not None:
        raise TaskError(f"{where}: both `choices` and `completion` are given; expected one of them")
    for key in ("completion", "solution"):
        given = row.get(key)
        if given is not None and (not isinstance(given, str) or not given.strip()):
            raise TaskError(
                f"{where}: `{key}` is {_show(row, key)}; expected text that is not blank"
            )
    if solution is not None and completion is None:
        raise TaskError(
            f"{where}: `solution` is given without `completion`; give a right answer in words as `completion` too, "
            "since plans are screened by its log-probability before answers are generated"
        )
    if choices is None:
        if row.get("answer") is not None:
            raise TaskError(
                f"{where}: `answer` is given without `choices`; expected both or neither"
            )
        _check_characters(where, prompt=prompt, completion=completion, solution=solution)
        return Example(prompt=prompt, completion=completion, solution=solution, where=where)
    _check_choices(row, where, scoring)
    for choice in choices:
        _check_characters(where, prompt=prompt, choices=choice)
    return Example(prompt=prompt, choices=tuple(choices), answer=row["answer"], where=where)


def _object(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise TaskError(f"{where}: key {twice!r} is given twice; give it once")
    return row


def _check_characters(where: str, **texts: str | None) -> None:
    """Refuse text that JSON can express and UTF-8 cannot: it can be neither tokenised nor stored."""
    for key, text in texts.items():
        place = None if text is None else lone_surrogate(text)
        if text is not None and place is not None:
            raise TaskError(
                f"{where}: `{key}` holds {text[place]!a} at character {place}, half of a surrogate pair, which is not "
                "a character; write complete characters"
            )


def _check_choices(row: dict[str, Any], where: str, scoring: Scoring) -> None:
    choices, answer = row["choices"], row.get("answer")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice.strip() for choice in choices)
    ):
        raise TaskError(
            f"{where}: `choices` is {_show(row, 'choices')}; expected a list of two or more texts, none of them blank"
        )
    if len(set(choices)) < len(choices):
        raise TaskError(f"{where}: two of the `choices` are the same; no score can tell them apart")
    if scoring == "letter" and len(choices) > _LETTERS:
        raise TaskError(
            f"{where}: {len(choices)} choices; letter scoring has letters for {_LETTERS}"
        )
    # bool is an int in Python, but `true` is not an index.
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise TaskError(
            f"{where}: `answer` is {_show(row, 'answer')}; expected the index of the right choice, "
            f"a whole number from 0 to {len(choices) - 1}"
        )


def _show(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return "missing"
    text = json.dumps(row[key], ensure_ascii=False)
    if lone_surrogate(text) is not None:
        text = json.dumps(row[key])
    return text if len(text) <= 60 else f"{text[:57]}..."


def _digest(content: Any) -> str:
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
