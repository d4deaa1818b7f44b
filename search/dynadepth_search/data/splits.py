"""Training and held-out prompts: a seeded split in which no prompt is on both sides, and the writing of task files."""

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

    Of examples with the same prompt, only the first takes part: no prompt that a policy sees in training
    is in the held-out part, whatever its choices.

    Args:
        examples: The examples to draw from.
        train: Number of training examples wanted.
        heldout: Number of held-out examples wanted.
        seed: Seed of the draw.

    Returns:
        Training and held-out examples.

    Raises:
        TaskError: Fewer than one example is wanted on a side, or there are not enough distinct prompts.
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
    """Return a short hash of each distinct prompt, sorted; plans, score tables and policies store such hashes.

    The prompt is hashed as the user wrote it, whether or not it is in chat form.

    Args:
        examples: The examples; choices and answers are not hashed.

    Returns:
        12 hexadecimal digits each.
    """
    return sorted({sha256_text(example.prompt.strip())[:12] for example in examples})


def check_held_out(
    examples: Sequence[Example], seen: Mapping[str, Iterable[str]], *, what: str = "held-out"
) -> None:
    """Refuse held-out prompts that took part in making what is to be evaluated on them.

    Args:
        examples: The prompts.
        seen: Hashes of the prompts that took part, see `prompt_hashes`, by the user's name of the file that holds them.
        what: What the message calls the prompts.

    Raises:
        TaskError: Some took part; the message says how many are in which file.
    """
    hashes = set(prompt_hashes(examples))
    shared = {name: len(hashes.intersection(known)) for name, known in seen.items()}
    found = [f"{number} in {name}" for name, number in shared.items() if number]
    if found:
        raise TaskError(
            f"of {len(hashes)} different {what} prompts, some took part in what they evaluate: {', '.join(found)}; "
            "give prompts that took no part in search or training"
        )


def write_task(path: str | os.PathLike[str], examples: Sequence[Example]) -> None:
    """Write examples as a task file of JSON lines, whole or not at all.

    Args:
        path: The file to write.
        examples: The examples, at least one.
    """
    lines = []
    for example in examples:
        row: dict[str, object] = {"prompt": example.prompt}
        if example.choices is not None:
            row |= {"choices": list(example.choices), "answer": example.answer}
        elif example.completion is not None:
            row["completion"] = example.completion
            if example.solution is not None:
                row["solution"] = example.solution
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text_atomic(path, "".join(lines))
