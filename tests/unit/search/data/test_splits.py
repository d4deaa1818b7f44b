"""Splits of examples, and task files written and read again."""

from pathlib import Path

import pytest

from dynadepth.errors import TaskError
from dynadepth_search.data.splits import check_held_out, prompt_hashes, split_examples, write_task
from dynadepth_search.data.tasks import Example, read_task


def _questions(count: int) -> list[Example]:
    return [
        Example(f"Question {index // 2}", (f"a{index}", "b"), index % 2) for index in range(count)
    ]


def test_no_prompt_is_on_both_sides_of_a_split() -> None:
    train, heldout = split_examples(_questions(40), train=12, heldout=8, seed=0)
    assert (len(train), len(heldout)) == (12, 8)
    prompts = [example.prompt for example in train + heldout]
    assert len(set(prompts)) == 20


def test_a_split_follows_its_seed() -> None:
    def ids(seed: int) -> list[str]:
        train, heldout = split_examples(_questions(40), train=10, heldout=10, seed=seed)
        return [example.prompt_id for example in train + heldout]

    assert ids(0) == ids(0)
    assert ids(0) != ids(1)
    assert ids(0) != sorted(ids(0))


@pytest.mark.parametrize(
    ("train", "heldout", "message"),
    [(15, 6, "but the task has 20 different prompts"), (0, 5, "expected 1 or more of each")],
)
def test_a_split_that_cannot_be_drawn(train: int, heldout: int, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        split_examples(_questions(40), train=train, heldout=heldout, seed=0)


@pytest.mark.parametrize(
    "examples",
    [
        [Example("é\nx", ("a", "b"), 1), Example("y", ("a", "b"), 0)],
        [Example("x", completion=" y")],
        [Example("x"), Example("y")],
    ],
)
def test_a_written_task_reads_as_it_was(tmp_path: Path, examples: list[Example]) -> None:
    path = tmp_path / "deep" / "task.jsonl"
    write_task(path, examples)
    assert list(read_task(path).examples) == examples


def test_prompts_that_took_part_are_named_by_file_and_number() -> None:
    heldout = [*_questions(20), Example("  Question 3 ", completion="other")]
    seen = {
        "plans/menu.json": prompt_hashes([Example("Question 3", completion="x"), Example("else")]),
        "nothing": [],
        "scores/scores.json": prompt_hashes(_questions(6)),
        "elsewhere": prompt_hashes([Example("question 3")]),
    }
    with pytest.raises(
        TaskError,
        match=r"of 10 different held-out prompts, some took part in what they evaluate: 1 in plans/menu\.json, "
        r"3 in scores/scores\.json; give prompts that took no part",
    ):
        check_held_out(heldout, seen)
    check_held_out(heldout, {"nothing": [], "elsewhere": prompt_hashes([Example("question 3")])})
