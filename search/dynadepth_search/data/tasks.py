"""Tasks: the questions that a search, a training or an evaluation is about.

Owns the reading of task files and their checks, line by line. Knows nothing of models or tokenizers: how an example
becomes tokens is `prompts`, how it becomes a reward is `scoring`.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from dynadepth.config import did_you_mean
from dynadepth.errors import TaskError

__all__ = [
    "ChatForm",
    "Example",
    "Kind",
    "Scoring",
    "Task",
    "check_scoring",
    "read_task",
    "read_text_task",
]

Scoring = Literal["raw", "normalized", "letter"]
Kind = Literal["choices", "completion", "prompt"]

_KEYS = ("prompt", "choices", "answer", "completion")
_LETTERS = 26


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt, with what its answer is judged by.

    Args:
        prompt: What the model is given; the only part of the example that a policy sees.
        choices: Answers to choose from, or None.
        answer: Index of the right choice; None if there are no choices.
        completion: The right continuation, or None. Neither choices nor completion: only `preserve` can be asked for.
    """

    prompt: str
    choices: tuple[str, ...] | None = None
    answer: int | None = None
    completion: str | None = None

    @property
    def kind(self) -> Kind:
        """What the example is judged by."""
        if self.choices is not None:
            return "choices"
        return "prompt" if self.completion is None else "completion"

    @property
    def prompt_id(self) -> str:
        """Hash of the prompt with its choices or completion, 16 hexadecimal digits; the answer is no part of it."""
        return _digest([self.prompt, self.choices, self.completion])[:16]


@dataclass(frozen=True, slots=True)
class ChatForm:
    """The chat that every prompt of a task is the user's turn of.

    Args:
        template: Hash of the chat template, hexadecimal: another one makes other tokens of the same prompts.
        system: What the system's turn says; None leaves it to the template.
    """

    template: str
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """Examples of one kind, and how their choices are scored.

    Args:
        name: What messages and reports call it.
        examples: In the order of the file; no two with the same `prompt_id`.
        scoring: `raw`: log-probability of a choice's tokens given the prompt. `normalized`: that, for each byte of the
            choice. `letter`: the prompt lists the choices under letters, and the letters are scored. Without choices
            it has no effect.
        chat: The chat that the prompts are turns of; None: each stands alone. The examples are the same in either case.
    """

    name: str
    examples: tuple[Example, ...]
    scoring: Scoring = "raw"
    chat: ChatForm | None = None

    @property
    def kind(self) -> Kind:
        """What all its examples are judged by."""
        return self.examples[0].kind

    @property
    def sha256(self) -> str:
        """Hash of every example, of the scoring and of the chat form; the name is no part of it."""
        rows = [[item.prompt, item.choices, item.answer, item.completion] for item in self.examples]
        content: list[Any] = [self.scoring, rows]
        if self.chat is not None:
            content.append([self.chat.template, self.chat.system])
        return _digest(content)


def check_scoring(scoring: str) -> Scoring:
    """Return the scoring if there is one of that name.

    Raises:
        TaskError: There is none.
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
    """Read a task from a file of JSON lines.

    Every line is an object with `prompt` and either `choices` (a list of strings) with `answer` (the index of the
    right one), or `completion`, or neither. All lines of a file are of one kind. Blank lines are passed over.

    Args:
        path: The file, UTF-8.
        scoring: How choices are scored, see `Task`.
        limit: Read no more examples than this; the lines behind them are not looked at. None reads all.
        name: Name of the task; None takes the file's name without its ending.

    Returns:
        The task.

    Raises:
        FileNotFoundError: There is no such file.
        TaskError: The file is empty, or a line is not what it must be; the message names the file and the line.
    """
    file = Path(path)
    checked = check_scoring(scoring)
    if limit is not None and limit < 1:
        raise TaskError(
            f"a task of {limit} examples was asked for; expected a limit of 1 or more, or none"
        )
    examples: list[Example] = []
    seen: dict[str, int] = {}
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            example = _read_line(line, where, checked)
            if examples and example.kind != examples[0].kind:
                raise TaskError(
                    f"{where}: this is a {example.kind} example, but the file began with {examples[0].kind} examples; "
                    "a task holds one kind, since their rewards cannot be averaged: split the file"
                )
            first = seen.setdefault(example.prompt_id, number)
            if first != number:
                raise TaskError(
                    f"{where}: same prompt and same {example.kind} as line {first}; remove one"
                )
            examples.append(example)
            if len(examples) == limit:
                break
    if not examples:
        raise TaskError(
            f"{file} holds no examples; expected one JSON object a line with `prompt` and "
            "`choices` + `answer`, or `completion`"
        )
    return Task(name=file.stem if name is None else name, examples=tuple(examples), scoring=checked)


def read_text_task(path: str | os.PathLike[str], *, limit: int | None = None) -> Task:
    """Read prompts alone from a text file, one a line; each text once, blank lines passed over.

    Args:
        path: The file, UTF-8.
        limit: Read no more prompts than this; None reads all.

    Returns:
        The task.

    Raises:
        FileNotFoundError: There is no such file.
        TaskError: The file is empty or no UTF-8 text.
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise TaskError(f"{file}: not UTF-8 text ({error}); convert it") from error
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))[:limit]
    if not prompts:
        raise TaskError(f"{file} holds no prompts; expected one on each line")
    return Task(name=file.stem, examples=tuple(Example(prompt=prompt) for prompt in prompts))


def _read_line(line: bytes, where: str, scoring: Scoring) -> Example:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
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
    choices, completion = row.get("choices"), row.get("completion")
    if choices is not None and completion is not None:
        raise TaskError(f"{where}: both `choices` and `completion` are given; expected one of them")
    if completion is not None and (not isinstance(completion, str) or not completion.strip()):
        raise TaskError(
            f"{where}: `completion` is {_show(row, 'completion')}; expected text that is not blank"
        )
    if choices is None:
        if row.get("answer") is not None:
            raise TaskError(
                f"{where}: `answer` is given without `choices`; expected both or neither"
            )
        return Example(prompt=prompt, completion=completion)
    _check_choices(row, where, scoring)
    return Example(prompt=prompt, choices=tuple(choices), answer=row["answer"])


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
    # bool is an int to Python, but `true` is no index.
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise TaskError(
            f"{where}: `answer` is {_show(row, 'answer')}; expected the index of the right choice, "
            f"a whole number from 0 to {len(choices) - 1}"
        )


def _show(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return "missing"
    text = json.dumps(row[key], ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _digest(content: Any) -> str:
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
