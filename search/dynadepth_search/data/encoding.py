"""From an example to tokens: what the model reads, and where its answer is scored.

This includes the text of lettered prompts and the boundary between prompt and answer. The prompt's
tokens are those of `dynadepth.models.encoding`, so a policy sees the same tokens in scoring and in
use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dynadepth.errors import TaskError
from dynadepth.models.encoding import chat_text, encode_prompt, encode_text
from dynadepth_search.data.tasks import ChatForm, Example, Scoring
from dynadepth_search.data.variants import ContinuedExample

__all__ = ["EncodedExample", "check_tokenizer", "encode_example", "letters", "prompt_text"]


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """Token rows that together score one example, and the places (positions) where they are read.

    Answers are stored as a tree: a row is the prompt followed by an answer without its last token
    (nothing is read after that one), answers that begin alike share places, and a place is read once
    however many answers share it.

    Args:
        prompt_ids: Tokens of the prompt. Shape (prompt,), int64.
        rows: Token rows; each begins with the prompt. Lengths differ, int64.
        places: Row, and position within the row, of every place that is read; place 0 is the last token
            of the prompt. Shape (places, 2), int64.
        entry_place: Place of each answer token that is scored, sorted by answer. Shape (entries,), int64.
        entry_token: The token scored there. Shape (entries,), int64.
        starts: Where the entries of each answer begin. Shape (answers,), int64.
        divisors: The score of an answer is the sum of its log-probabilities divided by this. Shape
            (answers,), float64.
    """

    prompt_ids: npt.NDArray[np.int64]
    rows: tuple[npt.NDArray[np.int64], ...]
    places: npt.NDArray[np.int64]
    entry_place: npt.NDArray[np.int64]
    entry_token: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    divisors: npt.NDArray[np.float64]

    @property
    def num_answers(self) -> int:
        """Number of choices; 1 for a completion; 0 for a prompt alone."""
        return len(self.starts)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest row."""
        return max(len(row) for row in self.rows)


def letters(count: int) -> list[str]:
    """Return the first letters: A, B, C and so on."""
    return [chr(ord("A") + index) for index in range(count)]


def prompt_text(example: Example, scoring: Scoring) -> str:
    r"""Return the text that the model is given before it answers; in a chat, the user's turn.

    With letter scoring it lists the choices, one per line, and ends with `Answer:`:

        {prompt}\nA. {first choice}\nB. {second choice}\nAnswer:

    In every other case it is the unchanged prompt.

    Args:
        example: The example.
        scoring: How the task's choices are scored.

    Returns:
        The prompt.
    """
    if scoring != "letter" or example.choices is None:
        return example.prompt
    listed = zip(letters(len(example.choices)), example.choices, strict=True)
    return "\n".join([example.prompt, *(f"{letter}. {text}" for letter, text in listed), "Answer:"])


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse a tokenizer after whose prompts no answer can follow.

    Raises:
        TaskError: The tokenizer ends every text with the end-of-sequence token.
    """
    ids = encode_text(tokenizer, "a")
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        raise TaskError(
            f"the tokenizer ends every text with {tokenizer.eos_token!r}, so no answer can follow a "
            "prompt; load it with add_eos_token=False"
        )


def encode_example(
    tokenizer: Any, example: Example, scoring: Scoring, chat: ChatForm | None = None
) -> EncodedExample:
    """Turn an example into token rows.

    The prompt is tokenised alone, or as the user's turn of a chat; letter scoring lists the choices in
    it. In a chat, the answer is the beginning of the model's turn. The answer follows the prompt after
    one space, unless the prompt ends or the answer begins with white space. Prompt and answer are
    tokenised together if the result begins with the prompt's own tokens, otherwise the answer is
    tokenised alone: so the prompt is a prefix of every row, whatever the tokenizer merges across the
    boundary. The tokens of a `ContinuedExample` follow the prompt's as they are, and it is read after each of them.

    Args:
        tokenizer: Tokenizer of the base model.
        example: The example.
        scoring: How its choices are scored.
        chat: The chat form of the prompt; None: it is not a turn of a chat.

    Returns:
        The rows, and where they are read.

    Raises:
        TaskError: A prompt or an answer has no tokens or cannot be tokenised, the chat template cannot be applied, or
            a letter is not one token.

    Source:
        lm-evaluation-harness divides by characters for `acc_norm`; deviation: `normalized` divides by
        UTF-8 bytes (the same for ASCII), so that no script is favoured. The harness also moves white
        space from the end of a prompt to its answer; here the prompt keeps its own tokens.
    """
    said = prompt_text(example, scoring)
    system = None if chat is None else chat.system
    prompt = encode_prompt(tokenizer, said, chat=chat is not None, system=system)
    if isinstance(example, ContinuedExample):
        first, *others = example.continuation
        # Every place scores the token after it; after the last token that is any, since only the vocabulary is read.
        return _tree([*prompt, first], [[*others, first]], np.ones(1))
    text = said if chat is None else chat_text(tokenizer, said, system=system)
    answers: list[str] = []
    if example.choices is not None:
        lettered = scoring == "letter"
        answers = letters(len(example.choices)) if lettered else list(example.choices)
    elif example.completion is not None:
        answers = [example.completion]
    # A template writes its own special tokens.
    special = chat is None
    tails = [
        _answer_ids(tokenizer, text, prompt, answer, special_tokens=special) for answer in answers
    ]
    if scoring == "letter" and example.choices is not None:
        _check_letters(answers, tails)
    divisors = np.ones(len(answers))
    if example.completion is not None:
        divisors[0] = len(tails[0])
    elif scoring == "normalized":
        divisors[:] = [len(answer.encode()) for answer in answers]
    return _tree(prompt, tails, divisors)


def _answer_ids(
    tokenizer: Any, text: str, prompt: list[int], answer: str, *, special_tokens: bool
) -> list[int]:
    joined = answer if text[-1:].isspace() or answer[0].isspace() else f" {answer}"
    whole = encode_text(tokenizer, text + joined, special_tokens=special_tokens)
    if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
        return whole[len(prompt) :]
    alone = encode_text(tokenizer, joined, special_tokens=False)
    if not alone:
        raise TaskError(f"the answer {_short(answer)} has no tokens; give an answer that has")
    return alone


def _check_letters(answers: Sequence[str], tails: Sequence[Sequence[int]]) -> None:
    for letter, tail in zip(answers, tails, strict=True):
        if len(tail) != 1:
            raise TaskError(
                f"letter {letter!r} is {len(tail)} tokens to this tokenizer; letter scoring needs one "
                "token for each letter: use raw or normalized scoring"
            )
    if len({tail[0] for tail in tails}) < len(tails):
        raise TaskError(
            "two letters are the same token to this tokenizer; use raw or normalized scoring"
        )


def _tree(
    prompt: Sequence[int], tails: Sequence[Sequence[int]], divisors: npt.NDArray[np.float64]
) -> EncodedExample:
    bodies: list[tuple[int, ...]] = []
    # The longest first, so that an answer that is the beginning of another one finds its places there.
    for tail in sorted(tails, key=len, reverse=True):
        body = tuple(tail[:-1])
        if not any(known[: len(body)] == body for known in bodies):
            bodies.append(body)
    bodies = bodies or [()]
    places: dict[tuple[int, ...], tuple[int, int]] = {(): (0, len(prompt) - 1)}
    numbers: dict[tuple[int, ...], int] = {(): 0}
    entry_place: list[int] = []
    entry_token: list[int] = []
    starts: list[int] = []
    for tail in tails:
        starts.append(len(entry_place))
        for index, token in enumerate(tail):
            before = tuple(tail[:index])
            if before not in numbers:
                row = next(r for r, body in enumerate(bodies) if body[:index] == before)
                numbers[before] = len(places)
                places[before] = (row, len(prompt) - 1 + index)
            entry_place.append(numbers[before])
            entry_token.append(token)
    return EncodedExample(
        prompt_ids=np.array(prompt, dtype=np.int64),
        rows=tuple(np.array([*prompt, *body], dtype=np.int64) for body in bodies),
        places=np.array(list(places.values()), dtype=np.int64),
        entry_place=np.array(entry_place, dtype=np.int64),
        entry_token=np.array(entry_token, dtype=np.int64),
        starts=np.array(starts, dtype=np.int64),
        divisors=divisors,
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
