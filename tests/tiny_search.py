"""A tiny task and a tiny search of it."""

from pathlib import Path
from typing import Any

from dynadepth.tree_search.forest import SearchConfig
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.search.per_prompt_spec import PromptSearchSpec

_WORDS = ["red", "green", "blue", "grey", "black", "white"]


def tiny_task(count: int, *, kind: str = "choices", name: str = "colours") -> Task:
    """Return questions of different lengths; the first ones are the same for every count.

    Args:
        count: Number of questions.
        kind: What they ask for, see `Task`; the solution of `solution` is a digit.
        name: Of the task.
    """
    examples = []
    for number in range(count):
        prompt = f"Number {number}{' and so on' * (number % 3)}:"
        right, wrong = _WORDS[number % 6], _WORDS[(number * 5 + 1) % 6]
        choices = (right, wrong if wrong != right else "none")
        examples.append(
            {
                "choices": Example(prompt, choices, number % 2),
                "completion": Example(prompt, completion=right),
                "solution": Example(prompt, completion=right, solution=str(number % 10)),
                "prompt": Example(prompt),
            }[kind]
        )
    return Task(name, tuple(examples))


def tiny_spec(*, config: dict[str, Any] | None = None, **changes: Any) -> PromptSearchSpec:
    """Return a spec whose shards hold 8 prompts, 2 blocks each."""
    forest = {"max_evaluations": 8, "probe_trees": 2, "round_size": 3, **(config or {})}
    return PromptSearchSpec(
        config=SearchConfig(**forest), **{"block_size": 4, "blocks_per_shard": 2, **changes}
    )


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Return the content of every file that counts; the lock is empty and has no meaning."""
    return {
        file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != ".lock"
    }
