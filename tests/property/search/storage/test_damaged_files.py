"""Whatever becomes of a file that we wrote: reading it gives the same content, or an error of ours.

Each kind of file is damaged in every way that the machine or an editor damages files: cut, a bit flipped, a value of
another type, out of range or gone, an entry or a line twice.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dynadepth.errors import ConfigError, DynadepthError
from dynadepth.files import sha256_file, sha256_text
from dynadepth.plans import plan_text
from dynadepth_search.evaluation.evaluating import read_evaluation
from dynadepth_search.evaluation.outcome_cache import OutcomeCache
from dynadepth_search.files.sealed import write_sealed
from dynadepth_search.report.report import read_run
from dynadepth_search.scoring.score_table import read_scores, score_prompts
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.search.per_prompt import search_prompts
from dynadepth_search.search.static import StaticSpec, read_static, search_static
from dynadepth_search.storage import score_store
from dynadepth_search.storage.label_store import LabelStore
from dynadepth_search.storage.labels import read_labels
from dynadepth_search.storage.steps import Steps
from tests.tiny import tiny_model
from tests.tiny_evaluation import made_up
from tests.tiny_search import tiny_spec, tiny_task
from tests.tiny_text import word_tokenizer

LABELLED, SCORED = 10, 18
ASKED = {"seed": 0, "model": "tiny"}
Read = Callable[[Path], Any]


@dataclass(frozen=True)
class Kind:
    """A kind of file: where it is, and everything that is read of it."""

    file: str
    read: Read
    again: Read | None = None  # as whoever goes on writing reads it


def _labels(folder: Path) -> Any:
    found = read_labels(folder, accept_partial=True)
    evaluated = [
        [each.plans.tolist(), each.rewards.tolist(), each.depths.tolist(), each.visits.tolist()]
        for each in found.evaluated
    ]
    columns = [found.base_rewards, found.plans, found.rewards, found.values, found.depths]
    manifest = found.manifest.to_dict()
    return [manifest, found.examples, evaluated, *(column.tolist() for column in columns)]


def _store(folder: Path) -> Any:
    ids = [example.prompt_id for example in tiny_task(LABELLED).examples]
    store = LabelStore(folder, ids, 8)
    store.open()
    return sorted(store.done)


def _scores(folder: Path) -> Any:
    found = read_scores(folder, accept_partial=True)
    columns = [found.plans, found.given, *(getattr(found, name) for name in score_store.METRICS)]
    views = {layer: view.tolist() for layer, view in found.views.items()}
    return [found.manifest, found.examples, views, *(column.tolist() for column in columns)]


def _static(folder: Path) -> Any:
    found = read_static(folder)
    arrays = [found.menu, found.front, found.pool, found.front_values, found.front_errors]
    scalars = [found.objective, found.prompts, found.evaluations, found.asked, found.prompt_hashes]
    return [*scalars, found.pool_values.tolist(), *(array.tolist() for array in arrays)]


def _outcomes(folder: Path) -> Any:
    model = tiny_model(dtype=torch.float32)
    cache = OutcomeCache(
        Scorer(model, word_tokenizer()), tiny_task(LABELLED), folder / "outcomes.jsonl"
    )
    return sorted((example, sorted(plans.items())) for example, plans in cache._known.items())


def _steps(folder: Path) -> Any:
    steps = Steps(folder / "steps.json", ASKED)
    return [steps.seconds, steps.run("first", dict), steps.run("second", dict)]


KINDS = {
    "labels manifest": Kind("labels/manifest.json", _labels, _store),
    "labels journal": Kind("unfinished/journal.jsonl", _labels, _store),
    "labels shard": Kind("labels/part-00000.parquet", _labels, _store),
    "scores manifest": Kind("scores/scores.json", _scores),
    "scores metrics": Kind("scores/part-00001.parquet", _scores),
    "scores states": Kind("scores/part-00001.safetensors", _scores),
    "plans": Kind("plans/menu.json", _static),
    "outcomes": Kind("evaluation/outcomes.jsonl", _outcomes),
    "evaluation": Kind("evaluation/evaluation.json", read_evaluation),
    "report": Kind("evaluation/report.json", read_run),
    "steps": Kind("evaluation/steps.json", _steps),
}
JSON_KINDS = sorted(name for name, kind in KINDS.items() if kind.file.endswith(".json"))
LINE_KINDS = sorted(name for name, kind in KINDS.items() if kind.file.endswith(".jsonl"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder with a file of every kind."""
    place = tmp_path_factory.mktemp("made")
    model, tokenizer = tiny_model(dtype=torch.float32), word_tokenizer()
    task = tiny_task(LABELLED)
    search_prompts(model, tokenizer, task, place / "labels", tiny_spec())

    def stop(stage: str, done: int, _total: int) -> None:
        if stage == "search" and done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_prompts(model, tokenizer, task, place / "unfinished", tiny_spec(), progress=stop)
    plans = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 2, 1], [1, 1, 0, 0]], dtype=np.uint8)
    score_prompts(
        model, tokenizer, tiny_task(SCORED), plans, place / "scores", layers=[0, 2], num_windows=1
    )
    spec = StaticSpec(
        min_depth=0.5, size=3, beam=2, num_prompts=9, num_screened=3, num_confirmed=32
    )
    search_static(model, tokenizer, tiny_task(45), place / "plans", spec)
    path = place / "evaluation" / "outcomes.jsonl"
    path.parent.mkdir()
    scorer = Scorer(model, tokenizer)
    for row in plans:
        OutcomeCache(scorer, task, path).score(
            {"a": np.tile(row, (LABELLED, 1))}, progress=lambda done, total: None
        )
    evaluation = {**made_up(), "schema_version": 2}
    write_sealed(place / "evaluation" / "evaluation.json", evaluation)
    run = {"evaluation": evaluation, "run": {"search": {"plans": 3, "note": "none"}}}
    write_sealed(place / "evaluation" / "report.json", run)
    steps = Steps(place / "evaluation" / "steps.json", ASKED)
    steps.run("first", lambda: {"prompts": 4, "share": 0.5, "names": ["a", "b"]})
    steps.run("second", dict)
    return place


@pytest.fixture(scope="module")
def whole(made: Path) -> dict[str, Any]:
    """What is read of every kind while it is whole."""
    return {
        name: (_plain(kind.read(_folder(made, kind))), _again(kind, _folder(made, kind)))
        for name, kind in KINDS.items()
    }


def _folder(made: Path, kind: Kind) -> Path:
    return made / Path(kind.file).parent


def _again(kind: Kind, folder: Path) -> str | None:
    return None if kind.again is None else _plain(kind.again(folder))


def _plain(value: Any) -> str:
    """A short text that tells values of different type or sign apart; NaN equals itself in it."""
    return sha256_text(repr(value))


def _check(made: Path, whole: dict[str, Any], name: str, data: bytes, *, same: bool = True) -> bool:
    """Read a damaged file; returns whether it was refused."""
    kind = KINDS[name]
    path = made / kind.file
    before = path.read_bytes()
    path.write_bytes(data)
    refused = False
    try:
        for number, read in enumerate((kind.read, kind.again)):
            if read is None:
                continue
            try:
                found = _plain(read(_folder(made, kind)))
            except DynadepthError:
                refused = True
            else:
                assert not same or found == whole[name][number]
    finally:
        path.write_bytes(before)
    return refused


@given(data=st.data())
@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_file_that_is_cut(name: str, made: Path, whole: dict[str, Any], data: Any) -> None:
    content = (made / KINDS[name].file).read_bytes()
    cut = data.draw(st.integers(0, len(content) - 1))
    # Of a journal the lines that are whole are left, and the next run does the others again.
    _check(made, whole, name, content[:cut], same=name not in LINE_KINDS)


@given(data=st.data())
@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_file_that_lost_a_bit(name: str, made: Path, whole: dict[str, Any], data: Any) -> None:
    content = bytearray((made / KINDS[name].file).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    # A letter of a name, or a digit of a figure, may be another one: of files that have a hash it may not.
    hashed = name in ("evaluation", "report", "steps") or not KINDS[name].file.endswith("json")
    _check(made, whole, name, bytes(content), same=hashed and name not in LINE_KINDS)


@given(data=st.data(), foreign=st.binary(max_size=40))
@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_file_with_foreign_bytes(
    name: str, made: Path, whole: dict[str, Any], data: Any, foreign: bytes
) -> None:
    content = (made / KINDS[name].file).read_bytes()
    place, length = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 40))
    _check(made, whole, name, content[:place] + foreign + content[place + length :], same=False)


# What a value is replaced by, by its own type: of another type, or out of any range.
_NAN, _HUGE = "__nan__", "__huge__"
_FLIPS: dict[type, list[Any]] = {
    str: [7, ["x"], {"a": "x"}, True, 0.5, "\ud800", None],
    bool: [0, 1, "true", None, [True]],
    int: ["7", 0.5, -7, True, [1], {}, _NAN, _HUGE, None],
    float: ["x", [0.5], {}, True, _NAN, _HUGE, None],
    list: [{}, "x", 3, None, True],
    dict: [[], "x", 3, None, True],
    type(None): [7, "x", True, {"a": 1}, [1], _NAN],
}
# Settings that may be missing or empty, names that can be any, measurements that may be none.
_FREE = {"search", "versions", "architecture", "weights", "prompt_hashes", "plan_prompt_hashes"}
_OPTIONAL = {"mean", "variance", "quantization", "depth_penalty", "choices", "answer", "completion"}


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    entries = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, entry in entries:
        yield from _paths(entry, (*path, key))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _damages(content: Any, path: tuple[Any, ...]) -> Iterator[Any]:
    """Yield the content with one value damaged in every way that no value of its place has."""
    value, names = _at(content, path), set(path)
    for other in _FLIPS[type(value)]:
        loose = other is None or (value is None and not names.isdisjoint({*_OPTIONAL, *_FREE}))
        if loose and not names.isdisjoint({*_OPTIONAL, *_FREE}):
            continue
        if "architecture" in names and isinstance(value, int | str) and not isinstance(other, dict):
            continue
        changed = deepcopy(content)
        _at(changed, path[:-1])[path[-1]] = other
        yield changed
    # Fewer shards are an unfinished search, and fewer plans another menu or front, each as good as the one that was.
    if names.isdisjoint(_FREE) and path[-2:-1] not in (("shards",), ("menu",), ("front",)):
        changed = deepcopy(content)
        del _at(changed, path[:-1])[path[-1]]
        yield changed
    if isinstance(value, dict):
        changed = deepcopy(content)
        _at(changed, path)["unheard of"] = {"a": [1]}
        yield changed
    if isinstance(path[-1], int) and names.isdisjoint({*_FREE, "given"}):
        changed = deepcopy(content)
        _at(changed, path[:-1]).append(value)
        yield changed


def _written(content: Any) -> bytes:
    text = json.dumps(content)
    return text.replace(f'"{_NAN}"', "NaN").replace(f'"{_HUGE}"', "1e999").encode()


@given(data=st.data())
@pytest.mark.parametrize("name", JSON_KINDS)
def test_a_value_that_is_another(name: str, made: Path, whole: dict[str, Any], data: Any) -> None:
    content = json.loads((made / KINDS[name].file).read_text())
    paths = [path for path in _paths(content) if path != ("seal",)]
    _check(made, whole, name, _written(_drawn(data, content, paths)))


def _drawn(data: Any, content: Any, paths: list[tuple[Any, ...]]) -> Any:
    """Draw a damage: first the value, then what becomes of it."""
    path = data.draw(st.sampled_from(paths))
    damages = [*_damages(content, path)]
    assume(damages)
    return data.draw(st.sampled_from(damages))


@given(data=st.data())
@pytest.mark.parametrize("name", LINE_KINDS)
def test_a_value_of_a_line_that_is_another(
    name: str, made: Path, whole: dict[str, Any], data: Any
) -> None:
    lines = (made / KINDS[name].file).read_text().splitlines()
    number = data.draw(st.integers(0, len(lines) - 1))
    content = json.loads(lines[number])
    damaged = _written(_drawn(data, content, [*_paths(content)])).decode()
    # A last line that is no JSON is one that a crash left, and is done again.
    torn = number == len(lines) - 1 and ("NaN" in damaged or "1e999" in damaged)
    text = "\n".join([*lines[:number], damaged, *lines[number + 1 :]]) + "\n"
    assert _check(made, whole, name, text.encode(), same=not torn) or torn


@given(data=st.data())
@pytest.mark.parametrize("name", LINE_KINDS)
def test_lines_that_are_twice_or_swapped(
    name: str, made: Path, whole: dict[str, Any], data: Any
) -> None:
    lines = (made / KINDS[name].file).read_text().splitlines()
    number = data.draw(st.integers(0, len(lines) - 1))
    text = "\n".join([*lines, lines[number]]) + "\n"
    assert _check(made, whole, name, text.encode())
    order = data.draw(st.permutations(lines))
    _check(made, whole, name, ("\n".join(order) + "\n").encode())


class TestRowsWithTheirHashes:
    """Rows of Parquet files that were altered by somebody who also made the hashes anew."""

    @pytest.fixture
    def copy(self, made: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(made, tmp_path / "copy"))

    def _row(self, path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        table = pq.ParquetFile(path).read()
        rows = table.to_pylist()
        change(rows[1])
        changed = pa.Table.from_pylist(rows, schema=table.schema)
        if "figures_sha256" in {key.decode() for key in table.schema.metadata or {}}:
            seals = {
                **table.schema.metadata,
                b"figures_sha256": score_store._seal(changed).encode(),
            }
            changed = changed.replace_schema_metadata(seals)
        pq.write_table(changed, path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda row: row["plans"].__setitem__(1, "7111"),
                r"plans\[1\] is \"7111\"; expected a plan of 4",
            ),
            (
                lambda row: row["plans"].__setitem__(1, "111"),
                r"plans\[1\] is \"111\"; expected a plan of 4",
            ),
            (
                lambda row: row["plans"].__setitem__(1, "0000"),
                r"plans\[1\] is \"0000\"; .* one of them not 0",
            ),
            (lambda row: row["plans"].__setitem__(1, row["plans"][2]), "twice; expected each once"),
            (
                lambda row: row.update(raw_label="0222"),
                "raw_label is .*expected one of the plans that were eval",
            ),
            (
                lambda row: row.update(label="0222"),
                "label is .*, which the stored rewards choose",
            ),
            (lambda row: row["rewards"].pop(), r"rewards has \d+ entries; expected"),
            (
                lambda row: row["rewards"].__setitem__(1, float("nan")),
                r"rewards\[1\] is NaN; expected a fin",
            ),
            (lambda row: row["depths"].__setitem__(1, 0.1), "has . visits and depth 0.1; expected"),
            (lambda row: row["visits"].__setitem__(1, 9), "has 9 visits and depth .*; expected"),
            (
                lambda row: row.update(base_reward=-1.0),
                "base_reward is -1.0 and the reward of 1111 is 0",
            ),
            (
                lambda row: row.update(label_value=9.0),
                "label_value is 9.0; expected .* its reward less",
            ),
            (
                lambda row: row.update(raw_value=9.0),
                "raw_value is 9.0; expected .* its reward less",
            ),
            (
                lambda row: row.update(raw_label="1111"),
                "raw_(value|label) is .*; expected",
            ),
            (lambda row: row["candidates"].reverse(), "candidates is .*the best of the plans that"),
            (lambda row: row["candidates"].pop(), "candidates is .*the best of the plans that"),
            (
                lambda row: row["variant_rewards"][1].append(0.5),
                r"variant_rewards\[1\] has 2 entries; expected 1",
            ),
            (
                lambda row: row["variant_rewards"][0].__setitem__(0, float("inf")),
                r"variant_rewards\[0\]\[0\] is Infinity; expected a finite number",
            ),
            (
                lambda row: row["confirmed_values"].__setitem__(0, 9.0),
                "confirmed_values is .*the mean of its rewards less its price",
            ),
            (
                lambda row: row.update(label=min({*row["plans"]} - {row["label"]})),
                "label is .*expected .*, which the stored rewards choose",
            ),
            (lambda row: row.update(answer=5), "answer is 5; expected a whole number from 0 to 1"),
            (
                lambda row: row.update(choices=None),
                "answer is .; expected nothing, since there are no",
            ),
            (lambda row: row.update(completion="x"), "both choices and a completion"),
            (lambda row: row.update(prompt="Another"), "prompt_id is .* which names its prompt"),
            (lambda row: row.update(index=-1), "index is -1; expected a whole number, 0 or more"),
            (lambda row: row.update(index=99), "index is 99; expected less than 10"),
            (lambda row: row.update(index=0), "claim one place in the task"),
        ],
    )
    def test_labels(self, copy: Path, change: Any, message: str) -> None:
        path = copy / "labels" / "part-00000.parquet"
        self._row(path, change)
        manifest = json.loads((copy / "labels" / "manifest.json").read_text())
        manifest["shards"][0]["sha256"] = sha256_file(path)
        (copy / "labels" / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(DynadepthError, match=message):
            read_labels(copy / "labels")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda row: row["given"].pop(), "given has 3 entries; expected 4"),
            (
                lambda row: row["given"].__setitem__(0, -1),
                r"given\[0\] is -1; expected a whole number",
            ),
            (
                lambda row: row["agreement"].__setitem__(2, 7.0),
                r"agreement\[2\] is 7.0; .* from 0.0 to 1.0",
            ),
            (
                lambda row: row["divergence"].__setitem__(2, -1.0),
                r"divergence\[2\] is -1.0; .* 0.0 or more",
            ),
            (
                lambda row: row["reward"].__setitem__(2, float("nan")),
                r"reward\[2\] is NaN; expected a finite",
            ),
            (lambda row: row.update(prompt="Another"), "prompt_id is .* which names its prompt"),
            (lambda row: row.update(answer=2), "answer is 2; expected a whole number from 0 to 1"),
        ],
    )
    def test_scores(self, copy: Path, change: Any, message: str) -> None:
        self._row(copy / "scores" / "part-00001.parquet", change)
        with pytest.raises(DynadepthError, match=message):
            read_scores(copy / "scores")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda m: m.update(task={}), "task has no 'kind'"),
            (
                lambda m: m["shards"][0].update(name="../x"),
                r"name is \"../x\"; expected a file of the folder",
            ),
            (lambda m: m["shards"][0].update(name="/etc/passwd"), "expected a file of the folder"),
            (
                lambda m: m["shards"].append(dict(m["shards"][0])),
                "is named twice; expected each shard once",
            ),
            (
                lambda m: m["shards"][0].update(prompts=7),
                "it holds 8 prompts; expected 7, as manifest.json",
            ),
            (
                lambda m: m["shards"][0].update(prompts=9),
                "hold more prompts than the 10 of its task",
            ),
            (lambda m: m.update(num_layers=5), r"prior.mean has 8 entries; expected 10"),
            (
                lambda m: m["search"].update(objective="accuracy"),
                "search.objective is .*one of preserve",
            ),
        ],
    )
    def test_manifest_of_labels(self, copy: Path, change: Any, message: str) -> None:
        path = copy / "labels" / "manifest.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        with pytest.raises(
            DynadepthError, match=f"manifest.json.* is damaged .*{message}|{message}"
        ):
            read_labels(copy / "labels")


def test_what_a_message_says(made: Path, tmp_path: Path) -> None:
    """File, line, what was found, what was expected, what to do."""
    folder = Path(shutil.copytree(made / "evaluation", tmp_path / "copy"))
    path = folder / "outcomes.jsonl"
    lines = path.read_text().splitlines()
    row = json.loads(lines[3])
    row["preserve"][0] = 4
    path.write_text("\n".join([*lines[:3], json.dumps(row), *lines[4:]]) + "\n")
    with pytest.raises(DynadepthError) as found:
        _outcomes(folder)
    assert str(found.value) == (
        f"{path}, line 4 is damaged (preserve[0] is 4; expected a finite number, 1e-06 or less): remove that line and "
        "evaluate again; only its outcomes are scored again"
    )
    path.write_text("\n".join([*lines[:3], lines[3] + lines[4], *lines[5:]]) + "\n")
    with pytest.raises(DynadepthError, match="line 4 cannot be read .Extra data"):
        _outcomes(folder)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    evaluation["policies"][0]["depth"] = 0.5
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    with pytest.raises(
        ConfigError, match="evaluation.json is damaged .*seal is broken.: evaluate again"
    ):
        read_evaluation(folder)


def test_the_plans_of_the_made_files_are_what_they_seem(made: Path) -> None:
    assert {plan_text(plan) for plan in read_scores(made / "scores").plans} == {
        "1111",
        "0111",
        "1021",
        "1100",
    }
