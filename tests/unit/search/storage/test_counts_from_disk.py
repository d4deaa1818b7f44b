"""Counts and settings that are read from disk: no size of theirs is trusted, and none that is missing goes unsaid."""

import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dynadepth.errors import LabelError
from dynadepth_search.search.per_prompt import search_prompts
from dynadepth_search.search.static import MENU, StaticSpec, read_static, search_static
from dynadepth_search.storage.label_manifest import MANIFEST
from dynadepth_search.storage.labels import read_labels
from tests.tiny import tiny_model
from tests.tiny_search import tiny_spec, tiny_task
from tests.tiny_text import word_tokenizer
from tests.unit.search.search.test_static import NUM_LAYERS, SPEC, varied_task


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """A reader that makes something of a count's size fails here, and does not take the machine with it."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize("count", [10**9, 10**30])
def test_a_huge_number_of_prompts(tmp_path: Path, count: int) -> None:
    model = tiny_model(dtype=torch.float32)
    search_prompts(model, word_tokenizer(), tiny_task(4), tmp_path, tiny_spec())
    path = tmp_path / MANIFEST
    content = json.loads(path.read_text())
    content["task"]["prompts"] = count
    path.write_text(json.dumps(content))
    with pytest.raises(LabelError, match=f"is unfinished: 4 of {count} prompts"):
        read_labels(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../x", "part-1.parquet", "part-00004.parquet", "part-+0000.parquet", "part-" + "9" * 5000],
)
def test_names_that_are_no_shards(tmp_path: Path, name: str) -> None:
    model = tiny_model(dtype=torch.float32)
    search_prompts(model, word_tokenizer(), tiny_task(4), tmp_path, tiny_spec())
    path = tmp_path / MANIFEST
    content = json.loads(path.read_text())
    content["shards"][0]["name"] = name
    path.write_text(json.dumps(content))
    with pytest.raises(LabelError, match=r"manifest\.json is damaged \(shards\[0\]\.name is "):
        read_labels(tmp_path)


@pytest.mark.parametrize("whole", [False, True])
def test_plans_that_do_not_say_their_objective(tmp_path: Path, whole: bool) -> None:
    model = tiny_model(num_layers=NUM_LAYERS, dtype=torch.float32)
    spec = StaticSpec(**SPEC)  # type: ignore[arg-type]
    task = varied_task()  # type: ignore[no-untyped-call]
    search_static(model, word_tokenizer(), task, tmp_path, spec)
    path = tmp_path / MENU
    content = json.loads(path.read_text())
    if whole:
        content["asked"]["search"] = {}
    else:
        del content["asked"]["search"]["objective"]
    path.write_text(json.dumps(content))
    with pytest.raises(LabelError, match=r"menu\.json is damaged \(asked\.search has no 'objecti"):
        read_static(tmp_path)


def test_a_label_that_is_not_the_best_plan(tmp_path: Path) -> None:
    def stop(stage: str, done: int, _total: int) -> None:
        if stage == "search" and done:
            raise KeyboardInterrupt

    model = tiny_model(dtype=torch.float32)
    with pytest.raises(KeyboardInterrupt):
        search_prompts(model, word_tokenizer(), tiny_task(18), tmp_path, tiny_spec(), progress=stop)
    path = tmp_path / "journal.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    other = next(
        place
        for place, plan in enumerate(rows[0]["plans"])
        if plan not in (*rows[0]["candidates"], rows[0]["raw_label"], "1111")
    )
    rows[0]["rewards"][other] = 7.0
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        LabelError,
        match=r"journal\.jsonl, line 1 is damaged \(raw_label is .*expected a plan of value",
    ):
        read_labels(tmp_path, accept_partial=True)
