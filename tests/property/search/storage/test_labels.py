"""No crash loses a finished prompt or changes a byte of the labels, wherever it strikes."""

import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dynadepth import files
from dynadepth.plans import plan_depth, plan_text
from dynadepth.tree_search.forest import EditPrior, Evaluated
from dynadepth_search.data.tasks import Example
from dynadepth_search.files import journal
from dynadepth_search.files.journal import Journal, read_journal
from dynadepth_search.storage import label_store
from dynadepth_search.storage.choice import Candidate, Choice
from dynadepth_search.storage.compatibility import task_fields
from dynadepth_search.storage.label_manifest import Manifest
from dynadepth_search.storage.label_store import LabelStore
from dynadepth_search.storage.labels import (
    label_row,
    read_labels,
    read_shard,
    shard_bytes,
)
from tests.tiny_search import folder_bytes, tiny_task

NUM_LAYERS = 3
PENALTY = 1.0
TEXT = st.text(max_size=12)


class Crash(BaseException):
    """Not an Exception: nothing may handle it, as nothing handles SIGKILL."""


class Disk:
    """Counts the writes of a store; at one of them the process dies before, after or in the middle."""

    def __init__(self, strike: int, how: str) -> None:
        self.left, self.how = strike, how

    def write(self, whole, torn):
        self.left -= 1
        if self.left != 0:
            return whole()
        if self.how == "torn":
            torn()
        elif self.how == "after":
            whole()
        raise Crash

    @contextmanager
    def mounted(self):
        real_write, real_append, real_unlink = files.write_bytes_atomic, Journal.append, Path.unlink

        def write(path, data):
            # A torn atomic write leaves its temporary file behind.
            litter = Path(path).with_name(f".{Path(path).name}.x.tmp")
            self.write(
                lambda: real_write(path, data), lambda: litter.write_bytes(data[: len(data) // 2])
            )

        def append(this, *rows):
            def torn():
                with this._path.open("ab") as file:
                    lines = b"".join(map(journal._line, rows))
                    file.write(lines[: max(1, len(lines) * 2 // 3)])

            self.write(lambda: real_append(this, *rows), torn)

        def unlink(this, *, missing_ok=False):
            self.write(lambda: real_unlink(this, missing_ok=missing_ok), lambda: None)

        with (
            mock.patch.object(files, "write_bytes_atomic", write),
            mock.patch.object(label_store, "write_bytes_atomic", write),
            mock.patch.object(journal, "write_bytes_atomic", write),
            mock.patch.object(Journal, "append", append),
            mock.patch.object(Path, "unlink", unlink),
        ):
            yield


def row_of(index, example):
    generator = np.random.default_rng(index)
    # The identity comes first, as it sorts and as a search asks it.
    drawn = generator.integers(1, 3, size=(4, NUM_LAYERS)).astype(np.uint8)
    plans = np.unique(np.vstack([np.ones((1, NUM_LAYERS), np.uint8), drawn]), axis=0)
    rewards = generator.standard_normal(len(plans))
    visits = plans.sum(axis=1).astype(np.uint32)
    values = rewards - PENALTY * plan_depth(plans)
    best = int(values.argmax())
    price = PENALTY * float(plan_depth(plans)[best])
    label = Candidate(plan_text(plans[best]), float(rewards[best]), (), price)
    return label_row(
        index,
        example,
        Evaluated(plans, rewards, plan_depth(plans), visits),
        base_reward=float(rewards[0]),
        choice=Choice(label, label),
    )


def manifest_of(task):
    prior = EditPrior(np.array([0.5, np.nan] * NUM_LAYERS), np.array([0.1, np.nan] * NUM_LAYERS), 2)
    return Manifest(
        base_model={"scheme": 1, "architecture": {}, "quantization": None, "weights": {}},
        num_layers=NUM_LAYERS,
        dtype="float32",
        task={"name": task.name, **task_fields(task)},
        search={"objective": "preserve", "config": {}},
        depth_penalty=PENALTY,
        prior=prior,
        versions={},
    )


def work(folder, task, *, shard_size, block_size, order, together, stored):
    """Store as a search does: blocks in any order, their prompts at once or one after the other."""
    store = LabelStore(folder, [item.prompt_id for item in task.examples], shard_size)
    if store.manifest is None:
        store.create(manifest_of(task))
    store.open()
    assert stored <= store.done, "a finished prompt was lost"
    for number in dict.fromkeys(index // block_size for index in order):
        rows = [
            row_of(index, task.examples[index])
            for index in order
            if index // block_size == number and not store.holds(task.examples[index].prompt_id)
        ]
        for batch in [rows] if together else [[row] for row in rows]:
            store.append(*batch)
            stored.update(row["prompt_id"] for row in batch)
            assert store.num_done == len(store.done)
        store.compact()
    store.compact()


@st.composite
def searches(draw):
    count, block_size = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    return {
        "task": tiny_task(count),
        "block_size": block_size,
        "shard_size": block_size * draw(st.integers(1, 3)),
        "together": draw(st.booleans()),
        "orders": draw(st.lists(st.permutations(range(count)), min_size=4, max_size=4)),
    }


def run(folder, search, order, stored, disk):
    with disk.mounted():
        work(
            folder,
            search["task"],
            shard_size=search["shard_size"],
            block_size=search["block_size"],
            order=search["orders"][order % 4],
            together=search["together"],
            stored=stored,
        )


@given(
    searches(),
    st.lists(
        st.tuples(st.integers(1, 12), st.sampled_from(["before", "torn", "after"])), max_size=6
    ),
)
def test_crashes_change_nothing(search, crashes):
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name, "whole"), Path(name, "killed")
        whole.mkdir()
        killed.mkdir()
        run(whole, search, 0, set(), Disk(0, "never"))
        stored: set[str] = set()
        for number, (strike, how) in enumerate(crashes):
            with suppress(Crash):
                run(killed, search, number, stored, Disk(strike, how))
        run(killed, search, 3, stored, Disk(0, "never"))
        content = folder_bytes(killed)
        assert content == folder_bytes(whole)
        assert "journal.jsonl" not in content
        labels = read_labels(killed)
        assert labels.examples == search["task"].examples


def test_every_single_crash_is_survived():
    """All strikes, not a sample: 9 prompts in shards of 4 make less than 40 writes."""
    search = {
        "task": tiny_task(9),
        "block_size": 2,
        "shard_size": 4,
        "together": False,
        "orders": [tuple(range(9))] * 4,
    }
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name, "whole")
        whole.mkdir()
        run(whole, search, 0, set(), Disk(0, "never"))
        crashed = 0
        for how in ("before", "torn", "after"):
            for strike in range(1, 40):
                killed = Path(name, f"{how}-{strike}")
                killed.mkdir()
                stored: set[str] = set()
                try:
                    run(killed, search, 0, stored, Disk(strike, how))
                except Crash:
                    crashed += 1
                run(killed, search, 0, stored, Disk(0, "never"))
                assert folder_bytes(killed) == folder_bytes(whole), (how, strike)
        assert crashed > 45


def read_any(path):
    return read_journal(path, lambda line: line.value, advice="nothing")


@given(
    st.lists(
        st.dictionaries(TEXT, TEXT | st.floats(allow_nan=False, allow_infinity=False), max_size=3)
    ),
    st.data(),
)
def test_a_journal_cut_anywhere_keeps_its_whole_lines(rows, data):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "journal.jsonl")
        written = Journal(path, 0)
        ends = [0]
        for row in rows:
            written.append(row)
            ends.append(path.stat().st_size)
        cut = data.draw(st.integers(0, ends[-1]))
        if path.exists():
            path.write_bytes(path.read_bytes()[:cut])
        left, length = read_any(path)
        whole = max(index for index, end in enumerate(ends) if end <= cut)
        assert left == rows[:whole]
        assert length == ends[whole]
        Journal(path, length).append({"next": 1})
        assert read_any(path)[0] == [*rows[:whole], {"next": 1}]


@given(
    TEXT,
    st.none() | st.lists(TEXT, min_size=2, max_size=4),
    st.none() | TEXT,
    st.integers(0, 2**40),
)
def test_rows_come_back_from_a_shard_as_they_were(prompt, choices, completion, index):
    example = Example(prompt, None if choices is None else tuple(choices), None, completion)
    row = row_of(index, example)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "part.parquet")
        path.write_bytes(shard_bytes([row, row]))
        assert read_shard(path) == [row, row]
    assert shard_bytes([row]) == shard_bytes([row])
