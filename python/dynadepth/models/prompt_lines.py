"""Lines of files of prompts, which are JSON lines or text: the one way to tell which, and where a line ends."""

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

__all__ = ["prompt_lines"]

# By file name extension, in any case; a file with another extension, or none, is recognised by its first line.
_JSON_ENDINGS = (".jsonl", ".json", ".ndjson")
_TEXT_ENDINGS = (".txt", ".text", ".md")
_OBJECT = re.compile(rb'\s*\{\s*"')
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def prompt_lines(file: Path, stream: Iterable[bytes]) -> tuple[bool, Iterator[tuple[int, bytes]]]:
    r"""Say whether a file holds JSON lines, and return those of its lines that are not blank.

    A name that ends in .jsonl, .json or .ndjson, in any case, is that of JSON lines; one that ends in .txt, .text or
    .md that of text. Any other file (a pipe, say) holds JSON lines if its first line that is not blank begins with
    `{"`. A line ends at a line feed and nowhere else; a byte order mark is left out.

    Args:
        file: The file, of which only the name is looked at.
        stream: The file, opened for reading bytes; it is read once, as far as the lines are asked for.

    Returns:
        True for JSON lines, False for text; and the lines with their numbers, from 1.

    Example:
        >>> prompt_lines(Path("pipe"), [b"\n", b'{"prompt": "a"}\n'])[0]
        True
    """
    lines = _numbered(stream)
    first = next(lines, None)
    ending = file.suffix.lower()
    if ending in _JSON_ENDINGS or ending in _TEXT_ENDINGS:
        as_json = ending in _JSON_ENDINGS
    else:
        as_json = first is not None and _OBJECT.match(first[1]) is not None
    return as_json, chain([] if first is None else [first], lines)


def _numbered(stream: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    # Binary streams are split at line feeds only.
    for number, line in enumerate(stream, start=1):
        content = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
        if content.strip():
            yield number, content
