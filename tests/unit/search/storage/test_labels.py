"""Reading labels, and what is said of damaged or foreign ones. Crashes are in `tests/property/test_labels.py`."""

import json

import numpy as np
import pytest
import torch

from dynadepth.errors import LabelError
from dynadepth.plans import plan_text
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.files.locking import locked
from dynadepth_search.search.per_prompt import search_prompts
from dynadepth_search.storage.label_manifest import MANIFEST
from dynadepth_search.storage.labels import read_labels
from tests.tiny import tiny_model
from tests.tiny_search import folder_bytes, tiny_spec, tiny_task
from tests.tiny_text import word_tokenizer

COUNT = 18  # two whole shards of 8, and a rest


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float32)


@pytest.fixture(scope="module")
def searched(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched") / "labels"
    search_prompts(model, word_tokenizer(), tiny_task(COUNT), folder, tiny_spec())
    return folder


@pytest.fixture
def folder(searched, tmp_path):
    copy = tmp_path / "labels"
    copy.mkdir()
    for name, data in folder_bytes(searched).items():
        (copy / name).write_bytes(data)
    return copy


def search_again(folder, model, *, task=None, **changes):
    return search_prompts(
        model, word_tokenizer(), task or tiny_task(COUNT), folder, tiny_spec(**changes)
    )


def change_manifest(folder, **changes):
    path = folder / MANIFEST
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def test_what_is_read(searched, model):
    labels = read_labels(searched, model=model)
    assert sorted(folder_bytes(searched)) == [
        "manifest.json",
        "part-00000.parquet",
        "part-00001.parquet",
        "part-00002.parquet",
    ]
    assert len(labels) == COUNT
    assert labels.examples == tiny_task(COUNT).examples
    assert [shard.prompts for shard in labels.manifest.shards] == [8, 8, 2]
    assert labels.manifest.objective == "preserve"
    penalty = labels.manifest.depth_penalty
    assert (labels.base_rewards == 0).all()
    assert labels.evaluations == 8
    for index, tried in enumerate(labels.evaluated):
        assert (tried.plans[0] == 1).all()
        np.testing.assert_array_equal(tried.depths, tried.visits / 4)
        values = tried.rewards - penalty * tried.depths
        best = np.flatnonzero((tried.plans == labels.raw_plans[index]).all(axis=1))
        assert len(best) == 1
        assert values[best[0]] == values.max() == labels.raw_values[index]
        chosen = np.flatnonzero((tried.plans == labels.plans[index]).all(axis=1))
        assert values[chosen[0]] == labels.values[index]
        assert labels.rewards[index] == tried.rewards[chosen[0]]
        assert labels.depths[index] == tried.depths[chosen[0]]
        known = {plan_text(labels.plans[index]), plan_text(labels.raw_plans[index]), "1111"}
        assert known <= {item.plan for item in labels.candidates[index]}
        assert labels.margins[index] >= 0
    assert labels.identity_rate == (labels.depths == 1).mean()
    np.testing.assert_array_equal(labels.plans.sum(axis=1) / 4, labels.depths)


def test_no_labels_there(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"holds no labels: there is no manifest\.json; run a search"
    ):
        read_labels(tmp_path)


class TestShards:
    @pytest.mark.parametrize("damage", ["cut", "altered", "emptied"])
    def test_damage_is_named_and_can_be_repaired(self, folder, model, damage):
        before = folder_bytes(folder)
        path = folder / "part-00001.parquet"
        data = path.read_bytes()
        flipped = bytes([data[60] ^ 1])
        path.write_bytes(
            {
                "cut": data[: len(data) // 2],
                "altered": data[:60] + flipped + data[61:],
                "emptied": b"",
            }[damage]
        )
        damaged = folder_bytes(folder)
        message = (
            r"shard .*part-00001\.parquet is not the file that was written \(cut off or altered\): "
            "delete it and run the same search again; only its 8 prompts are searched again"
        )
        with pytest.raises(LabelError, match=message):
            read_labels(folder)
        with pytest.raises(LabelError, match=message):
            search_again(folder, model)
        assert folder_bytes(folder) == damaged
        path.unlink()
        with pytest.raises(
            LabelError,
            match=r"part-00001\.parquet is missing: run the same search again; only its 8",
        ):
            read_labels(folder)
        summary = search_again(folder, model)
        assert summary.searched == 8
        assert summary.probe_evaluations == 0
        assert folder_bytes(folder) == before

    def test_nothing_to_do(self, folder, model):
        before = folder_bytes(folder)
        summary = search_again(folder, model)
        assert (summary.prompts, summary.searched, summary.evaluations) == (COUNT, 0, 0)
        assert folder_bytes(folder) == before


class TestUnfinished:
    def interrupt(self, folder, model, *, after):
        def stop(stage, done, _total):
            if stage == "search" and done >= after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            search_prompts(
                model, word_tokenizer(), tiny_task(COUNT), folder, tiny_spec(), progress=stop
            )

    def test_partial_labels(self, model, searched, tmp_path):
        self.interrupt(tmp_path, model, after=12)
        assert (tmp_path / "journal.jsonl").read_bytes().count(b"\n") == 4
        with pytest.raises(
            LabelError,
            match="is unfinished: 12 of 18 prompts have a label; run the same search again",
        ):
            read_labels(tmp_path)
        partial = read_labels(tmp_path, accept_partial=True)
        assert partial.examples == tiny_task(12).examples
        search_again(tmp_path, model)
        assert folder_bytes(tmp_path) == folder_bytes(searched)

    def test_nothing_finished_yet(self, model, tmp_path):
        self.interrupt(tmp_path, model, after=0)
        with pytest.raises(LabelError, match="has not finished a single prompt"):
            read_labels(tmp_path, accept_partial=True)

    def test_a_torn_last_line_is_searched_again(self, model, searched, tmp_path):
        self.interrupt(tmp_path, model, after=12)
        path = tmp_path / "journal.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:3]) + lines[3][:-20])
        assert len(read_labels(tmp_path, accept_partial=True)) == 11
        search_again(tmp_path, model)
        assert folder_bytes(tmp_path) == folder_bytes(searched)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (
                b'{"prompt_id": "a',
                r"journal\.jsonl, line 2 cannot be read .* a kill damages only the last line",
            ),
            (b"7", r"journal\.jsonl, line 2 cannot be read \(a JSON int\)"),
            (
                b'{"a": 1}',
                r"journal\.jsonl, line 2 is damaged \(it has unknown key 'a'\): remove that line and run the same "
                "search again; only its prompt is searched again",
            ),
        ],
    )
    def test_an_altered_line_in_the_middle(self, model, tmp_path, line, message):
        self.interrupt(tmp_path, model, after=12)
        path = tmp_path / "journal.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([lines[0], line + b"\n", *lines[2:]]))
        before = folder_bytes(tmp_path)
        for act in (
            lambda: read_labels(tmp_path, accept_partial=True),
            lambda: search_again(tmp_path, model),
        ):
            with pytest.raises(LabelError, match=message):
                act()
        assert folder_bytes(tmp_path) == before

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"plans": ["7111"]},
                r'plans\[0\] is "7111"; expected a plan of 4 digits, each 0 .skip.',
            ),
            ({"plans": ["111"]}, r'plans\[0\] is "111"; expected a plan of 4 digits'),
            (
                {"raw_label": "0222"},
                'raw_label is "0222"; expected one of the plans that were evaluated',
            ),
            ({"label": "0222"}, 'label is "0222"; expected [01]+, which the stored rewards choose'),
            ({"candidates": ["0222"]}, r"candidates is .*, the best of the plans"),
            ({"rewards": []}, "rewards has 0 entries; expected 8"),
            ({"rewards": 0.5}, "rewards is 0.5; expected a list"),
            ({"rewards": ["0.5"] * 8}, r'rewards\[0\] is "0.5"; expected a finite number'),
            ({"base_reward": True}, "base_reward is true; expected a finite number"),
            ({"index": 18}, "index is 18; expected less than 18, the prompts of the task"),
            ({"index": "1"}, 'index is "1"; expected a whole number, 0 or more'),
            ({"extra": 1}, "it has unknown key 'extra'"),
        ],
    )
    def test_a_value_that_is_none_of_its_kind(self, model, tmp_path, change, message):
        self.interrupt(tmp_path, model, after=12)
        path = tmp_path / "journal.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        # Also the last line: it is whole, so no kill has made it.
        for number in (1, 3):
            row = json.dumps({**json.loads(lines[number]), **change}) + "\n"
            path.write_text("".join([*lines[:number], row, *lines[number + 1 :]]))
            before = folder_bytes(tmp_path)
            for act in (
                lambda: read_labels(tmp_path, accept_partial=True),
                lambda: search_again(tmp_path, model),
            ):
                with pytest.raises(
                    LabelError,
                    match=rf"journal\.jsonl, line {number + 1} is damaged \({message}.*: remove that line and run",
                ):
                    act()
            assert folder_bytes(tmp_path) == before

    def test_a_missing_reward_one_that_is_none_and_a_line_that_is_twice(self, model, tmp_path):
        self.interrupt(tmp_path, model, after=12)
        path = tmp_path / "journal.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        row = json.loads(lines[1])
        del row["rewards"]
        for line, message in (
            (json.dumps(row) + "\n", r"line 2 is damaged \(it has no 'rewards'\): remove"),
            (
                lines[1].replace('"rewards":[', '"rewards":[NaN,'),
                "line 2 cannot be read .NaN is no num",
            ),
            (
                lines[0],
                r"line 2 is damaged \(prompt [0-9a-f]{16} is on an earlier line too\): remove",
            ),
        ):
            path.write_text("".join([lines[0], line, *lines[2:]]))
            with pytest.raises(LabelError, match=message):
                search_again(tmp_path, model)

    def test_a_line_with_the_place_of_another(self, model, tmp_path):
        self.interrupt(tmp_path, model, after=12)
        path = tmp_path / "journal.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[1]["index"] = rows[2]["index"]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(LabelError, match="two of its labels are of one prompt, or claim one"):
            read_labels(tmp_path, accept_partial=True)
        with pytest.raises(LabelError, match="with index 10; expected 9, its place in the task"):
            search_again(tmp_path, model)

    def test_a_line_of_another_task(self, model, tmp_path):
        self.interrupt(tmp_path, model, after=12)
        path = tmp_path / "journal.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[1]["prompt_id"] = "0123456789abcdef"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(LabelError, match="line 2 is damaged .prompt_id is .*which names its"):
            search_again(tmp_path, model)
        rows[1]["prompt"] = "Another prompt"
        other = Example(rows[1]["prompt"], tuple(rows[1]["choices"])).prompt_id
        rows[1]["prompt_id"] = other
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(LabelError, match=f"holds prompt {other}, which the task has not"):
            search_again(tmp_path, model)


class TestForeign:
    def test_another_model(self, folder, searched):
        other = tiny_model(seed=1, dtype=torch.float32)
        for act in (lambda: read_labels(folder, model=other), lambda: search_again(folder, other)):
            with pytest.raises(
                LabelError, match="belong to another base model than this .*weights"
            ):
                act()
        longer = tiny_model(num_layers=5, dtype=torch.float32)
        with pytest.raises(
            LabelError, match="another base model than this .*num_hidden_layers.*5.*4"
        ):
            read_labels(folder, model=longer)
        assert len(read_labels(folder, model=other, accept_mismatch=True)) == COUNT
        assert folder_bytes(folder) == folder_bytes(searched)

    def test_another_dtype_is_the_same_model(self, folder):
        model = tiny_model(dtype=torch.float32).double()
        assert len(read_labels(folder, model=model)) == COUNT
        with pytest.raises(
            LabelError, match=r'made with dtype = "float32", but now it is "float64"'
        ):
            search_again(folder, model)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"seed": 1},
                "made with search.seed = 0, but now it is 1; results of different searches do not mix",
            ),
            (
                {"config": {"max_evaluations": 9}},
                "made with search.config.max_evaluations = 8, but now it is 9",
            ),
            (
                {"config": {"protect": (0,)}},
                r"made with search.config.protect = \[\], but now it is \[0\]",
            ),
            (
                {"objective": "reward"},
                'made with search.objective = "preserve", but now it is "reward"',
            ),
            ({"depth_penalty": 0.5}, "made with search.depth_penalty = null, but now it is 0.5"),
            ({"task": tiny_task(17)}, "made with task.prompts = 18, but now it is 17"),
            ({"task": Task("t", tiny_task(18).examples[::-1])}, "made with task.sha256 = "),
            (
                {"task": Task("t", tiny_task(18).examples, "normalized")},
                'made with task.scoring = "raw", but now it is "norm',
            ),
            (
                {"task": tiny_task(18, kind="completion")},
                'made with task.kind = "choices", but now it is "completion"',
            ),
        ],
    )
    def test_another_search(self, folder, searched, model, changes, message):
        with pytest.raises(LabelError, match=message):
            search_again(folder, model, **changes)
        assert folder_bytes(folder) == folder_bytes(searched)

    def test_a_task_may_be_renamed(self, folder, model):
        assert search_again(folder, model, task=tiny_task(COUNT, name="paints")).searched == 0

    def test_no_manifest(self, folder, model):
        (folder / MANIFEST).unlink()
        before = folder_bytes(folder)
        with pytest.raises(
            LabelError,
            match=r"holds labels but no manifest\.json, so nothing says what they were made",
        ):
            search_again(folder, model)
        assert folder_bytes(folder) == before

    def test_another_process(self, folder, searched, model):
        with (
            locked(folder),
            pytest.raises(LabelError, match="another process is writing to .*; wait for it"),
        ):
            search_again(folder, model)
        assert search_again(folder, model).searched == 0


class TestGeneratedAnswers:
    """Answers of plans, and whether they are right, as an editor may change them."""

    @pytest.fixture(scope="class")
    def answered(self, model, tmp_path_factory):
        def stop(stage, done, _total):
            if stage == "search" and done >= 4:
                raise KeyboardInterrupt

        folder = tmp_path_factory.mktemp("answered")
        spec = tiny_spec(objective="reward", new_tokens=6, depth_penalty=0.5)
        task = tiny_task(8, kind="solution")
        with pytest.raises(KeyboardInterrupt):
            search_prompts(model, word_tokenizer(), task, folder, spec, progress=stop)
        return folder

    def test_they_are_read_back(self, answered):
        labels = read_labels(answered, accept_partial=True)
        assert labels.examples == tiny_task(4, kind="solution").examples
        for candidates in labels.candidates:
            assert all(len(item.answers) == len(item.right) == 2 for item in candidates)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda row: row["generated"].pop(), r"generated has \d entries; expected \d"),
            (lambda row: row["generated"][0].pop(), r"generated\[0\] has 1 entries; expected 2"),
            (lambda row: row["generated"][0].__setitem__(0, 7), r"generated\[0\]\[0\] is 7; expec"),
            (lambda row: row["right"][1].append(True), r"right\[1\] has 3 entries; expected 2"),
            (
                lambda row: row["right"][1].__setitem__(0, 1),
                r"right\[1\]\[0\] is 1; expected true or",
            ),
            (
                lambda row: row.update(
                    generated=[["7", "7"] for _ in row["generated"]],
                    right=[[True, False] for _ in row["right"]],
                ),
                r"right\[0\] is .*; expected one judgement of '7', which is generated several times",
            ),
            (
                # Whatever the label is, another plan is the only one that is right.
                lambda row: row.update(
                    generated=[[f"{n}", f"{n}"] for n in range(len(row["right"]))],
                    right=[[plan == other(row)] * 2 for plan in row["candidates"]],
                ),
                "label is .*, which the stored answers and rewards choose",
            ),
            (
                lambda row: row.update(solution=None),
                "solution is None, but manifest.json says that",
            ),
            (
                lambda row: row.update(completion=None),
                "a solution and no completion; expected both",
            ),
            (lambda row: row.pop("right"), "it has no 'right'"),
        ],
    )
    def test_what_does_not_fit(self, answered, tmp_path, change, message):
        for name, data in folder_bytes(answered).items():
            (tmp_path / name).write_bytes(data)
        path = tmp_path / "journal.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        row = json.loads(lines[1])
        change(row)
        path.write_text("".join([lines[0], json.dumps(row) + "\n", *lines[2:]]))
        with pytest.raises(LabelError, match=message):
            read_labels(tmp_path, accept_partial=True)

    def test_answers_that_nothing_asked_for(self, model, tmp_path):
        TestUnfinished().interrupt(tmp_path, model, after=4)
        path = tmp_path / "journal.jsonl"
        row, *others = path.read_text().splitlines(keepends=True)
        given = {**json.loads(row), "generated": [["a"]]}
        path.write_text("".join([json.dumps(given) + "\n", *others]))
        with pytest.raises(LabelError, match="generated has 1 entries; expected 0"):
            read_labels(tmp_path, accept_partial=True)


def other(row):
    """Return a candidate that is not the label."""
    return next(plan for plan in row["candidates"] if plan != row["label"])


class TestManifest:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"schema_version": 4},
                "schema version 4; this dynadepth reads up to 3: update dynadepth",
            ),
            (
                {"schema_version": 2},
                "has schema version 2; this dynadepth reads 3: run the search again in a new folder",
            ),
            (
                {"schema_version": 0},
                "schema_version 0; expected a whole number from 1 on: .* run the search again in a new",
            ),
            ({"sherds": []}, r"unknown key 'sherds' \(did you mean 'shards'\?\)"),
            ({"shards": [{"name": "x"}]}, "is damaged"),
            (
                {"task": {}},
                r"manifest\.json is damaged \(task has no 'kind'\): run the search in a new",
            ),
            ({"task": None}, "task is null; expected an object"),
            ({"num_layers": "4"}, 'num_layers is "4"; expected a whole number, 1 or more'),
            ({"num_layers": 5}, "prior.mean has 8 entries; expected 10"),
            ({"depth_penalty": -1.0}, "depth_penalty is -1.0; expected a finite number, 0 or more"),
            ({"base_model": {"weights": "none"}}, "base_model has no 'scheme'"),
            ({"base_model": []}, r"base_model is \[\]; expected an object"),
            ({"prior": {"mean": [0.0]}}, r"is damaged \(prior has no 'variance'\)"),
        ],
    )
    def test_damage(self, folder, changes, message):
        change_manifest(folder, **changes)
        with pytest.raises(LabelError, match=message):
            read_labels(folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"name": "../part-00000.parquet"},
                "expected a file of the folder, such as part-00000",
            ),
            ({"name": "/etc/passwd"}, "expected a file of the folder"),
            ({"name": "part-00001.parquet"}, "part-00001.parquet is named twice; expected each"),
            ({"sha256": "x" * 64}, "expected 64 hexadecimal digits"),
            ({"prompts": "8"}, 'prompts is "8"; expected a whole number from 1 to 18'),
            ({"prompts": 9}, "its shards hold more prompts than the 18 of its task"),
        ],
    )
    def test_a_shard_that_is_none(self, folder, model, change, message):
        shards = json.loads((folder / MANIFEST).read_text())["shards"]
        change_manifest(folder, shards=[{**shards[0], **change}, *shards[1:]])
        for act in (lambda: read_labels(folder), lambda: search_again(folder, model)):
            with pytest.raises(LabelError, match=rf"manifest\.json is damaged .*{message}"):
                act()

    def test_a_shard_of_another_size(self, folder, model):
        shards = json.loads((folder / MANIFEST).read_text())["shards"]
        change_manifest(folder, shards=[{**shards[0], "prompts": 7}, *shards[1:]])
        with pytest.raises(
            LabelError, match="it holds 8 prompts; expected 7, as manifest.json says"
        ):
            read_labels(folder)
        with pytest.raises(LabelError, match="part-00000.parquet has 7 prompts; expected 8"):
            search_again(folder, model)

    def test_a_missing_key(self, folder):
        path = folder / MANIFEST
        content = json.loads(path.read_text())
        del content["prior"]
        path.write_text(json.dumps(content))
        with pytest.raises(LabelError, match=r"is damaged \(it has no 'prior'\): run"):
            read_labels(folder)

    def test_not_json(self, folder):
        path = folder / MANIFEST
        path.write_text(path.read_text()[:100])
        with pytest.raises(LabelError, match=r"manifest\.json is not JSON"):
            read_labels(folder)
