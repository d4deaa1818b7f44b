"""Training and held-out prompts: a seeded split in which no prompt is on both sides.

Owns the split and the writing of task files. Knows nothing of models.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dynadepth.errors import TaskError
from dynadepth.files import sha256_text, write_text_atomic
from dynadepth_search.data.tasks import Example

__all__ = ["check_held_out", "prompt_hashes", "split_examples", "write_task"]


def split_examples(
    examples: Sequence[Example], *, train: int, heldout: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Draw training and held-out examples.

    Examples with the same prompt are one group, of which the first alone takes part: what a policy
    sees in training it never sees in the test, whatever the choices.

    Args:
        examples: To draw from.
        train: Training examples wanted.
        heldout: Held-out examples wanted.
        seed: Of the draw.

    Returns:
        Training and held-out examples.

    Raises:
        TaskError: Fewer than one wanted, or not enough different prompts.
    """
    if train < 1 or heldout < 1:
        raise TaskError(
            f"{train} training and {heldout} held-out prompts wanted; expected 1 or more of each"
        )
    groups: dict[str, Example] = {}
    for example in examples:
        groups.setdefault(example.prompt.strip(), example)
    if len(groups) < train + heldout:
        raise TaskError(
            f"{train} training and {heldout} held-out prompts wanted, but the task has {len(groups)} "
            "different prompts; ask for fewer, or give more"
        )
    distinct = list(groups.values())
    drawn = np.random.default_rng(seed).permutation(len(distinct))[: train + heldout].tolist()
    chosen = [distinct[index] for index in drawn]
    return chosen[:train], chosen[train:]


def prompt_hashes(examples: Sequence[Example]) -> list[str]:
    """Return a short hash of each different prompt, sorted: what plans, score tables and policies remember of theirs.

    It is that of the prompt as the user wrote it, whatever form it was put into.

    Args:
        examples: Their choices and answers are not in it.

    Returns:
        12 hexadecimal digits each.
    """
    return sorted({sha256_text(example.prompt.strip())[:12] for example in examples})


def check_held_out(
    examples: Sequence[Example], seen: Mapping[str, Iterable[str]], *, what: str = "held-out"
) -> None:
    """Refuse prompts as held out that took part in making what they are to judge.

    Args:
        examples: The prompts.
        seen: Hashes of the prompts that took part, see `prompt_hashes`, by what the user calls the file that says so.
        what: What the prompts are called.

    Raises:
        TaskError: Some took part; the message says how many of them are in which file.
    """
    hashes = set(prompt_hashes(examples))
    shared = {name: len(hashes.intersection(known)) for name, known in seen.items()}
    found = [f"{number} in {name}" for name, number in shared.items() if number]
    if found:
        raise TaskError(
            f"of {len(hashes)} different {what} prompts some took part in what they are to judge: {', '.join(found)}; "
            "give prompts that took no part in search or training"
        )


def write_task(path: str | os.PathLike[str], examples: Sequence[Example]) -> None:
    """Write examples as a task file of JSON lines, whole or not at all.

    Args:
        path: Where it goes.
        examples: At least one.
    """
    lines = []
    for example in examples:
        row: dict[str, object] = {"prompt": example.prompt}
        if example.choices is not None:
            row |= {"choices": list(example.choices), "answer": example.answer}
        elif example.completion is not None:
            row["completion"] = example.completion
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text_atomic(path, "".join(lines))
