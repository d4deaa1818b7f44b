"""Files of prompts to answer, and files of answers that a killed run continues."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dynadepth.errors import ConfigError, TaskError
from dynadepth.files import parse_json, write_bytes_atomic
from dynadepth.models.prompt_lines import prompt_lines

__all__ = ["AnswerFile", "read_prompts"]

_EXPECTED = "expected an object with a `prompt` that is not blank"


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Read prompts from JSON lines, or from text with one prompt per line.

    Which of both it is, `prompt_lines` says, as for the tasks of a search. Each JSON line is an object with a `prompt`;
    other keys are for evaluations and are ignored here.

    Args:
        path: The file, UTF-8.

    Returns:
        The prompts in the order of the file, including repeated ones.

    Raises:
        FileNotFoundError: There is no such file.
        TaskError: There are no prompts, or a line is invalid; the message names the file and the line.
    """
    file = Path(path)
    with file.open("rb") as stream:
        as_json, lines = prompt_lines(file, stream)
        prompts = [_prompt_of(line, f"{file}, line {number}", as_json) for number, line in lines]
    if not prompts:
        raise TaskError(f"{file} holds no prompts; expected one on each line")
    return prompts


def _prompt_of(line: bytes, where: str, as_json: bool) -> str:  # noqa: FBT001 - private
    try:
        prompt = parse_json(line)["prompt"] if as_json else line.decode().strip()
    except (ValueError, TypeError, KeyError) as error:
        raise TaskError(f"{where}: {error}; {_EXPECTED}") from error
    if not isinstance(prompt, str) or not prompt.strip():
        raise TaskError(f"{where}: the prompt is {prompt!r}; {_EXPECTED}")
    return prompt


class AnswerFile:
    """Answers as JSON lines: collected batch by batch in a file beside it, and written in order once all are there.

    Args:
        out: The file that is written at the end; it must not exist yet.
        settings: What the answers depend on, as values that JSON can hold; a killed run can only be continued with the
            same settings.

    Raises:
        ConfigError: The file exists.

    Attributes:
        answers: The answers that exist, by the index of their prompt.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        if out.exists():
            raise ConfigError(f"{out} exists; give a new file as --out, or remove it")
        self._out, self._settings = out, dict(settings)
        self._partial = out.with_name(f"{out.name}.partial")
        self.answers: dict[int, dict[str, Any]] = {}

    @contextmanager
    def open(self) -> Iterator["AnswerFile"]:
        """Lock the file for one run, which continues what an earlier run left.

        Raises:
            ConfigError: Another process has locked it, or an earlier run left a damaged file or had other settings.
        """
        from filelock import FileLock, Timeout

        self._out.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._out.with_name(f"{self._out.name}.lock"))
        try:
            with lock.acquire(timeout=0):
                self._begin()
                yield self
        except Timeout as error:
            raise ConfigError(
                f"another process is writing {self._out}; wait for it, or give another --out"
            ) from error

    def _begin(self) -> None:
        if not self._partial.exists():
            self._append([{"settings": self._settings}])
            return
        # A run that was killed may have left half a line.
        *lines, _ = self._partial.read_bytes().split(b"\n")
        try:
            settings, *kept = [json.loads(line) for line in lines]
            settings = settings["settings"]
            self.answers = {answer["index"]: answer for answer in kept}
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{self._partial} is damaged; remove it to begin again") from error
        if settings != self._settings:
            changed = sorted(
                name
                for name in {*settings, *self._settings}
                if settings.get(name) != self._settings.get(name)
            )
            raise ConfigError(
                f"{self._partial} was begun with other settings ({', '.join(changed)}); remove it to begin again, or "
                "give the settings that it was begun with"
            )
        write_bytes_atomic(self._partial, b"".join(line + b"\n" for line in lines))

    def add(self, answers: Sequence[dict[str, Any]]) -> None:
        """Store the answers of a batch; each has the index of its prompt as `index`."""
        self._append(answers)
        self.answers.update({answer["index"]: answer for answer in answers})

    def finish(self) -> None:
        """Write all answers in the order of their prompts."""
        write_bytes_atomic(
            self._out, _as_lines([self.answers[key] for key in sorted(self.answers)])
        )
        self._partial.unlink()

    def _append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with self._partial.open("ab") as file:
            file.write(_as_lines(rows))
            file.flush()
            os.fsync(file.fileno())


def _as_lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(
        f"{json.dumps(row, ensure_ascii=False, sort_keys=True)}\n" for row in rows
    ).encode()
