"""Score tables: figures against forwards of baked models, resuming, damage to files, and bad input."""

import itertools
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dynadepth.errors import (
    ConfigError,
    LabelError,
    PlanError,
    SearchError,
    TaskError,
    UnsupportedModelError,
    WrapError,
)
from dynadepth.models.fingerprint import fingerprint
from dynadepth.plans import prefix_numbers
from dynadepth.wrapping.bake import bake
from dynadepth.wrapping.wrap import wrap_model
from dynadepth_search.data.encoding import prompt_text
from dynadepth_search.data.splits import prompt_hashes
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.files.locking import locked
from dynadepth_search.scoring import score_table
from dynadepth_search.scoring.score_table import (
    MANIFEST,
    menu_data,
    read_scores,
    score_prompts,
)
from dynadepth_search.scoring.score_work import ScoreWork
from dynadepth_search.storage import score_store
from tests.tiny import tiny_model
from tests.tiny_search import folder_bytes, tiny_task
from tests.tiny_text import word_tokenizer

COUNT = 35  # two whole blocks of 16, and a rest
PLANS = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 2, 1], [1, 1, 0, 0]], dtype=np.uint8)
FIGURES = ("agreement", "total_variation", "divergence", "reward", "correct")
FILES = [f"part-{n:05d}.{kind}" for n in range(3) for kind in ("parquet", "safetensors")]
# Figures are stored in float32.
CLOSE = {"rtol": 1e-6, "atol": 1e-7}


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float32)


@pytest.fixture(scope="module")
def scored(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored") / "scores"
    score(model, folder)
    return folder


@pytest.fixture
def folder(scored, tmp_path):
    return shutil.copytree(scored, tmp_path / "scores")


def score(model, folder, *, task=None, plans=PLANS, layers=(0, 2), num_windows=1, **more):
    return score_prompts(
        model,
        word_tokenizer(),
        task or tiny_task(COUNT),
        plans,
        folder,
        layers=layers,
        num_windows=num_windows,
        **more,
    )


def assert_same(first, second, *, prompts=None):
    rows = slice(prompts)
    assert first.examples[rows] == second.examples
    np.testing.assert_array_equal(first.plans, second.plans)
    for name in ("given", *FIGURES):
        np.testing.assert_array_equal(getattr(first, name)[rows], getattr(second, name))
    assert list(first.views) == list(second.views)
    for layer, view in first.views.items():
        assert torch.equal(view[rows], second.views[layer])


def change_manifest(folder, change):
    path = folder / MANIFEST
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


class Naive:
    """Figures of one plan from one unpadded forward of the baked model for each answer."""

    def __init__(self, model, tokenizer, scoring, plan):
        self.model, self.tokenizer, self.scoring = bake(model, plan), tokenizer, scoring
        self.known = {}

    def rows(self, item, answer):
        """Return the answer's tokens, and the log-probabilities where each is said. Shape (tokens, vocabulary)."""
        if (item, answer) not in self.known:
            self.known[item, answer] = self.run(item, answer)
        return self.known[item, answer]

    def run(self, item, answer):
        text = prompt_text(item, self.scoring)
        ids = self.tokenizer(text)["input_ids"]
        joined = answer if text[-1].isspace() or not answer else f" {answer}"
        tail = self.tokenizer(joined, add_special_tokens=False)["input_ids"] if answer else []
        with torch.no_grad():
            logits = self.model(torch.tensor([ids + tail])).logits[0]
        first = len(ids) - 1
        return tail, torch.log_softmax(logits, dim=-1)[first : first + max(1, len(tail))]

    def scores(self, item):
        letters = "ABCD"[: len(item.choices)]
        answers = letters if self.scoring == "letter" else item.choices
        scores = []
        for answer in answers:
            tail, table = self.rows(item, answer)
            total = table[range(len(tail)), tail].sum()
            scores.append(total / (len(answer.encode()) if self.scoring == "normalized" else 1))
        return torch.stack(scores)


def naive_figures(base, given, item):
    if item.kind == "choices":
        scores = given.scores(item)
        compared = [torch.log_softmax(each.scores(item), dim=0)[None] for each in (base, given)]
        more = {
            "reward": float(torch.log_softmax(scores, dim=0)[item.answer]),
            "correct": float(int(scores.argmax()) == item.answer),
        }
    else:
        tail, table = given.rows(item, item.completion or "")
        compared = [base.rows(item, item.completion or "")[1], table]
        more = {}
        if item.kind == "completion":
            said = table[range(len(tail)), tail]
            more["reward"] = float(said.mean())
            more["correct"] = float(table.argmax(dim=1).tolist() == tail)
    old, new = compared
    agreement = float((old.argmax(dim=1) == new.argmax(dim=1)).double().mean())
    return {
        "given": int(new[0].argmax()),
        "agreement": agreement,
        "divergence": float((old.exp() * (old - new)).sum(dim=1).mean()),
        "total_variation": float((old.exp() - new.exp()).abs().sum(dim=1).mean() / 2),
        "reward": np.nan,
        "correct": agreement,
        **more,
    }


@pytest.mark.parametrize(
    ("kind", "scoring"),
    [
        ("choices", "raw"),
        ("choices", "normalized"),
        ("choices", "letter"),
        ("completion", "raw"),
        ("prompt", "raw"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_figures_are_those_of_separate_forwards(family, kind, scoring, tmp_path):
    model, tokenizer = tiny_model(family), word_tokenizer(bos=True)
    examples = list(tiny_task(16, kind=kind).examples)
    if kind == "choices":
        examples.append(Example("Which?", ("a b c", "a b", "z", "yes"), 3))
    if kind == "completion":
        # What the model itself says, so that some plan is right: the identity at least.
        prompt = tokenizer("a b c d")["input_ids"]
        said = model.generate(torch.tensor([prompt]), max_new_tokens=2, do_sample=False)
        own = tokenizer.decode(said[0, len(prompt) :].tolist()).removeprefix(" ")
        examples.append(Example("a b c d", completion=own if own.strip() else "x"))
    rng = np.random.default_rng(5)
    plans = rng.choice([0, 1, 1, 2], size=(5, 4)).astype(np.uint8)
    plans = np.unique(np.concatenate([plans[plans.any(axis=1)], PLANS]), axis=0)
    first = (plans == 1).all(axis=1)
    plans = np.concatenate([plans[first], plans[~first]])
    task = Task("any", tuple(examples), scoring)
    table = score_prompts(model, tokenizer, task, plans, tmp_path, layers=[1])
    assert len(table) == len(examples) == 16 + (kind != "prompt")
    assert table.examples == task.examples
    assert table.graded == (kind != "prompt")
    naive = [Naive(model, tokenizer, scoring, plan) for plan in plans]
    for column, given in enumerate(naive):
        for row, item in enumerate(examples):
            expected = naive_figures(naive[0], given, item)
            for name, value in expected.items():
                found = getattr(table, name)[row, column]
                np.testing.assert_allclose(found, value, **CLOSE, err_msg=f"{name} {row} {column}")
    assert (table.divergence[:, 0] == 0).all()
    assert (table.total_variation[:, 0] == 0).all()
    assert (table.agreement[:, 0] == 1).all()
    # The figures tell plans apart, else a wrong column would pass.
    assert table.agreement.min() < table.agreement.max() == 1
    assert ((table.divergence > 1e-3).sum(axis=0) > 0)[1:].all()
    if kind == "completion":
        assert len(np.unique(table.agreement)) > 2


class TestTable:
    def test_what_is_read(self, model, scored):
        table = read_scores(scored, model=model)
        assert sorted(folder_bytes(scored)) == sorted([MANIFEST, *FILES])
        assert table.examples == tiny_task(COUNT).examples
        np.testing.assert_array_equal(table.plans, PLANS)
        assert table.plans.dtype == np.uint8
        for name in FIGURES:
            assert getattr(table, name).shape == (COUNT, len(PLANS))
            assert getattr(table, name).dtype == np.float64
        assert table.given.dtype == np.int64
        assert (table.num_windows, table.graded) == (1, True)
        assert table.fingerprint == fingerprint(model)
        for layer, view in table.views.items():
            prefixes = prefix_numbers(PLANS, layer).max() + 1
            assert view.shape == (COUNT, prefixes, 2, 32)
            assert view.dtype == torch.float32
            assert view.isfinite().all()
        assert list(table.views) == [0, 2]

    def test_states_of_each_block_stand_at_its_prompts(self, model, scored):
        table = read_scores(scored)
        tokenizer = word_tokenizer()
        baked = [bake(model, plan) for plan in ([1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 1, 1])]
        for row in (0, 15, 16, 31, 32, 34):
            ids = torch.tensor([tokenizer(table.examples[row].prompt)["input_ids"]])
            for number, (each, entered) in enumerate(zip(baked, (2, 1, 1), strict=True)):
                with torch.no_grad():
                    states = each(ids, output_hidden_states=True).hidden_states[entered][0]
                expected = torch.stack([states.mean(dim=0), states[-1]])
                assert torch.allclose(table.views[2][row, number], expected, atol=1e-4)

    def test_the_model_is_left_as_it_was(self, model, tmp_path):
        before = [(type(module), set(module.__dict__)) for module in model.modules()]
        score(model, tmp_path, task=tiny_task(3))
        assert [(type(module), set(module.__dict__)) for module in model.modules()] == before

    def test_no_states_are_asked_for(self, model, tmp_path):
        table = score(model, tmp_path, task=tiny_task(3), layers=[])
        assert table.views == {}
        assert_same(table, read_scores(tmp_path))

    def test_layers_are_a_set(self, model, tmp_path, folder):
        before = folder_bytes(folder)
        assert list(score(model, folder, layers=[2, 0, 2]).views) == [0, 2]
        assert folder_bytes(folder) == before

    def test_a_plan_alone_is_the_identity(self, model, tmp_path):
        table = score(model, tmp_path, task=tiny_task(3), plans=PLANS[:1])
        assert table.agreement.tolist() == [[1], [1], [1]]

    def test_a_task_may_be_renamed(self, model, folder):
        before = folder_bytes(folder)
        score(model, folder, task=tiny_task(COUNT, name="moved"))
        assert folder_bytes(folder) == before

    def test_bfloat16_states_are_kept_as_they_are(self, tmp_path):
        table = score(tiny_model(dtype=torch.bfloat16), tmp_path, task=tiny_task(3))
        assert {view.dtype for view in table.views.values()} == {torch.bfloat16}


class TestResuming:
    @pytest.mark.parametrize(
        "gone",
        [subset for n in range(1, 7) for subset in itertools.combinations(range(6), n)],
        ids=lambda gone: "".join(map(str, gone)),
    )
    def test_files_that_are_gone_come_back_the_same(self, model, folder, gone):
        before = folder_bytes(folder)
        for index in gone:
            (folder / FILES[index]).unlink()
        seen = []
        score(model, folder, progress=lambda *report: seen.append(report))
        assert folder_bytes(folder) == before
        sizes = [min(16, COUNT - 16 * block) for block in sorted({index // 2 for index in gone})]
        done = [COUNT - sum(sizes[number:]) for number in range(len(sizes) + 1)]
        assert seen == [("scoring plans", number, COUNT) for number in done]

    def test_a_block_depends_on_nothing_before_it(self, model, tmp_path):
        """Also where a prompt comes again: what is known of it would not be swept, and leave no states."""
        examples = tiny_task(16).examples
        # No other plan comes to layer 2 as the identity does.
        task = Task("t", (*examples, examples[3]))
        table = score(model, tmp_path, task=task, plans=PLANS[:3])
        for layer, view in table.views.items():
            assert torch.allclose(view[16], view[3], atol=1e-4), layer
        np.testing.assert_allclose(table.divergence[16], table.divergence[3], atol=1e-4)

    def test_nothing_is_scored_twice(self, model, folder, monkeypatch):
        (folder / FILES[2]).unlink()
        scored = []
        score_block = ScoreWork._score

        def count(work, scorer, hidden_size, job):
            scored.append((job.number, len(job.examples)))
            return score_block(work, scorer, hidden_size, job)

        monkeypatch.setattr(ScoreWork, "_score", count)
        score(model, folder)
        assert scored == [(1, 16)]

    @pytest.mark.parametrize("written", range(7))
    @pytest.mark.parametrize("moment", ["before", "after"])
    def test_a_kill_at_any_write(self, model, scored, tmp_path, monkeypatch, written, moment):
        before = folder_bytes(scored)
        writes = 0

        def killed(write):
            def wrapped(path, content):
                nonlocal writes
                if writes == written and moment == "before":
                    (path.parent / f".{path.name}.x.tmp").write_bytes(b"half")
                    raise KeyboardInterrupt
                write(path, content)
                writes += 1
                if writes == written + 1 and moment == "after":
                    raise KeyboardInterrupt

            return wrapped

        with monkeypatch.context() as patch:
            for module, name in (
                (score_store, "write_bytes_atomic"),
                (score_table, "write_json_atomic"),
            ):
                patch.setattr(module, name, killed(getattr(module, name)))
            with pytest.raises(KeyboardInterrupt):
                score(model, tmp_path)
        assert writes == written + (moment == "after")
        for name, data in folder_bytes(tmp_path).items():
            assert before.get(name, b"half") == data
        # The manifest, then two files of each block.
        blocks = (writes - 1) // 2
        if not writes:
            with pytest.raises(FileNotFoundError):
                read_scores(tmp_path)
        elif not blocks:
            with pytest.raises(LabelError, match="holds no scored prompts yet: run the scoring"):
                read_scores(tmp_path)
        else:
            prompts = min(16 * blocks, COUNT)
            found = read_scores(tmp_path, accept_partial=True)
            assert_same(read_scores(scored), found, prompts=prompts)
            if prompts < COUNT:
                with pytest.raises(LabelError, match=f"{prompts} of {COUNT} prompts are scored"):
                    read_scores(tmp_path)
        score(model, tmp_path)
        assert folder_bytes(tmp_path) == before

    def test_an_unfinished_table_ends_before_the_first_gap(self, folder):
        whole = read_scores(folder)
        for name in FILES[2:4]:
            (folder / name).unlink()
        with pytest.raises(
            LabelError,
            match=f"is unfinished: 16 of {COUNT} prompts are scored; score the same again .*--accept-partial",
        ):
            read_scores(folder)
        assert_same(whole, read_scores(folder, accept_partial=True), prompts=16)
        (folder / FILES[1]).unlink()
        for accept in (True, False):
            with pytest.raises(LabelError, match="holds no scored prompts yet"):
                read_scores(folder, accept_partial=accept)


class TestWhoTookPart:
    def test_prompts_are_remembered_before_they_are_scored(self, folder):
        every = prompt_hashes(tiny_task(COUNT).examples)
        assert list(read_scores(folder).prompt_hashes) == every
        for part in folder.glob("part-00001*"):
            part.unlink()
        unfinished = read_scores(folder, accept_partial=True)
        assert len(unfinished) < COUNT
        assert list(unfinished.prompt_hashes) == every
        assert list(unfinished.take([0]).prompt_hashes) == every

    def test_those_that_chose_the_plans_add_up(self, model, tmp_path):
        assert score(model, tmp_path, plan_prompts=["b", "a"]).plan_prompt_hashes == ("a", "b")
        assert score(model, tmp_path).plan_prompt_hashes == ("a", "b")
        assert score(model, tmp_path, plan_prompts=["c", "a"]).plan_prompt_hashes == ("a", "b", "c")

    def test_an_older_table_says_what_it_can(self, folder):
        def forget(content):
            del content["prompt_hashes"], content["plan_prompt_hashes"]

        change_manifest(folder, forget)
        table = read_scores(folder)
        assert list(table.prompt_hashes) == prompt_hashes(table.examples)
        assert table.plan_prompt_hashes == ()

    @pytest.mark.parametrize("key", ["prompt_hashes", "plan_prompt_hashes"])
    @pytest.mark.parametrize("value", [None, 3, "abc", [1], {"a": 1}])
    def test_what_is_no_list_of_hashes(self, folder, key, value):
        change_manifest(folder, lambda content: content.update({key: value}))
        with pytest.raises(LabelError, match="is damaged"):
            read_scores(folder)


class TestOtherQuestions:
    @pytest.mark.parametrize(
        ("changes", "field"),
        [
            ({"plans": PLANS[:3]}, "plans"),
            ({"plans": PLANS[[0, 2, 1, 3]]}, "plans"),
            ({"task": tiny_task(COUNT - 1)}, r"task\.prompts"),
            ({"task": Task("t", tiny_task(COUNT).examples[::-1])}, r"task\.sha256"),
            ({"task": Task("t", tiny_task(COUNT).examples, "letter")}, r"task\.scoring"),
            ({"task": tiny_task(COUNT, kind="prompt")}, r"task\.kind"),
            ({"layers": [0]}, "layers"),
            ({"num_windows": 0}, "num_windows"),
        ],
    )
    def test_a_folder_holds_one_table(self, model, folder, changes, field):
        before = folder_bytes(folder)
        with pytest.raises(LabelError, match=f"was made with {field} = .*use another folder"):
            score(model, folder, **changes)
        assert folder_bytes(folder) == before

    def test_another_model(self, folder):
        before, other = folder_bytes(folder), tiny_model(seed=1, dtype=torch.float32)
        with pytest.raises(LabelError, match="was made with base_model = "):
            score(other, folder)
        with pytest.raises(
            LabelError,
            match=r"belong to another base model than this LlamaForCausalLM: .* score the prompts",
        ):
            read_scores(folder, model=other)
        with pytest.raises(LabelError, match='was made with dtype = "float32"'):
            score(tiny_model(dtype=torch.bfloat16), folder)
        assert folder_bytes(folder) == before

    def test_a_folder_in_use(self, model, folder):
        before = folder_bytes(folder)
        (folder / FILES[0]).unlink()
        with locked(folder), pytest.raises(LabelError, match="another process is writing to"):
            score(model, folder)
        assert not (folder / FILES[0]).exists()
        score(model, folder)
        assert folder_bytes(folder) == before

    def test_parts_of_another_table_do_not_mix_in(self, model, folder):
        """The advice for a damaged manifest is to score again, which must not take the old blocks for its own."""
        (folder / MANIFEST).unlink()
        expected = score(model, folder.parent / "other", plans=PLANS[[0, 3]], layers=[1])
        try:
            found = score(model, folder, plans=PLANS[[0, 3]], layers=[1])
        except LabelError:
            return
        assert_same(expected, found)

    def test_a_block_moved_to_another_place_is_not_read(self, model, folder):
        for kind in ("parquet", "safetensors"):
            shutil.copy(folder / f"part-00000.{kind}", folder / f"part-00001.{kind}")
        with pytest.raises(LabelError):
            read_scores(folder)


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"layers": [4]}, ConfigError, r"states of layers \[4\] with 1 windows .*from 0 to 3"),
            ({"layers": [0, -1]}, ConfigError, "expected layers from 0 to 3"),
            ({"num_windows": -1}, ConfigError, "0 windows or more"),
            ({"plans": PLANS[1:]}, PlanError, "the first plan is 0111; expected the identity plan"),
            ({"plans": PLANS[[0, 1, 2, 1]]}, PlanError, "plan 0111 is given twice"),
            ({"plans": PLANS[[0, 1, 0]]}, PlanError, "plan 1111 is given twice"),
            ({"plans": PLANS[:, :3]}, PlanError, "names 3 layers, but the model has 4"),
            ({"plans": [[1, 1, 1, 1], [1, 1, 1, 3]]}, PlanError, "plan 1 has action 3 at layer 3"),
            ({"plans": [[1, 1, 1, 1], [0, 0, 0, 0]]}, PlanError, "plan 1 skips all 4 layers"),
            ({"plans": [[1.0, 1, 1, 1]]}, PlanError, "expected whole numbers"),
            ({"plans": []}, PlanError, "expected whole numbers"),
            ({"plans": np.zeros((0, 4), dtype=np.uint8)}, PlanError, "plan"),
            (
                {"task": Task("t", (*tiny_task(17).examples, Example("x " * 90)))},
                TaskError,
                "tokens long; the model has positions for 128",
            ),
            ({"task": Task("t", (Example(""),))}, TaskError, "has no tokens"),
            (
                {"task": Task("t", (Example("Q", ("a", "b"), 0),), "letters")},
                TaskError,
                "scoring 'letters' is unknown",
            ),
        ],
    )
    def test_is_named_before_anything_is_written(self, model, tmp_path, changes, error, message):
        with pytest.raises(error, match=message):
            score(model, tmp_path / "scores", **{"task": tiny_task(3), **changes})
        assert list(tmp_path.iterdir()) == []

    def test_numpy_layers_are_numbers_too(self, model, tmp_path):
        table = score(model, tmp_path, task=tiny_task(3), layers=np.array([0, 2]))
        assert list(table.views) == [0, 2]

    def test_a_wrapped_model(self, tmp_path):
        model = tiny_model(dtype=torch.float32)
        wrap_model(model, plan=[1, 1, 1, 1])
        with pytest.raises(WrapError):
            score(model, tmp_path, task=tiny_task(3))
        assert not list(tmp_path.glob("part-*"))

    def test_not_a_language_model(self, tmp_path):
        with pytest.raises(UnsupportedModelError):
            score(torch.nn.Linear(2, 2), tmp_path / "scores")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("value", [float("nan"), 1e38])
    @pytest.mark.parametrize("kind", ["choices", "completion", "prompt"])
    def test_figures_that_are_not_finite(self, tmp_path, kind, value):
        model = tiny_model(dtype=torch.float32)
        # Only the second visit of layer 3 overflows, or everything does.
        with torch.no_grad():
            model.model.layers[3].mlp.down_proj.weight[0] = value
        with pytest.raises(
            SearchError, match=r"plan \d{4} gives prompt 'Number 0.*logits overflow"
        ):
            score(model, tmp_path, task=tiny_task(20, kind=kind), layers=[0])
        assert sorted(folder_bytes(tmp_path)) == [MANIFEST]
        with pytest.raises(LabelError, match="holds no scored prompts yet"):
            read_scores(tmp_path)

    def test_no_table(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            read_scores(tmp_path)
        with pytest.raises(FileNotFoundError):
            read_scores(tmp_path / "nowhere")
        assert list(tmp_path.iterdir()) == []


class TestDamagedFiles:
    @pytest.mark.parametrize("name", FILES[2:4])
    @pytest.mark.parametrize("how", ["cut", "emptied", "text", "begun"])
    def test_is_named_and_can_be_repaired(self, model, folder, name, how):
        before = folder_bytes(folder)
        data = before[name]
        new = {
            "cut": data[:-1],
            "emptied": b"",
            "text": b"{}",
            "begun": b"\xff" * 16 + data[16:],
        }[how]
        (folder / name).write_bytes(new)
        message = "(?s)part-00001.*delete both files of this block and score again"
        for call in (read_scores, lambda place: score(model, place)):
            with pytest.raises(LabelError, match=message):
                call(folder)
        assert folder_bytes(folder) == {**before, name: new}
        for each in FILES[2:4]:
            (folder / each).unlink()
        score(model, folder)
        assert folder_bytes(folder) == before

    def test_states_that_lost_a_bit(self, folder):
        path = folder / FILES[3]
        data = path.read_bytes()
        for place in range(0, len(data), 997):
            path.write_bytes(_flipped(data, place))
            with pytest.raises(LabelError, match=r"is not the file that part-00001\.parquet names"):
                read_scores(folder)

    def test_figures_that_lost_a_bit(self, folder):
        """A flipped bit is seen, or is of no matter; figures never change in silence."""
        expected = read_scores(folder)
        path = folder / FILES[2]
        data = path.read_bytes()
        silent = []
        for place in range(0, len(data), 23):
            path.write_bytes(_flipped(data, place))
            try:
                assert_same(expected, read_scores(folder))
            except LabelError:
                pass
            except AssertionError:
                silent.append(place)
        assert not silent, f"bytes {silent} change figures unseen"

    def test_states_of_another_block(self, folder):
        shutil.copy(folder / FILES[1], folder / FILES[3])
        with pytest.raises(LabelError, match=r"is not the file that part-00001\.parquet names"):
            read_scores(folder)

    def test_a_column_is_gone(self, folder):
        path = folder / FILES[2]
        table = pq.read_table(path)
        pq.write_table(table.drop_columns(["divergence"]), path)
        with pytest.raises(LabelError, match="delete both files of this block"):
            read_scores(folder)

    @pytest.mark.parametrize(
        "content", [b"", b"{", b"[]", b"\xff\xfe", b"{}", b'{"schema_version": 2}', b"null"]
    )
    def test_the_manifest_is_not_one(self, model, folder, content):
        (folder / MANIFEST).write_bytes(content)
        before = folder_bytes(folder)
        for call in (read_scores, lambda place: score(model, place)):
            with pytest.raises(LabelError, match=r"scores\.json"):
                call(folder)
        assert folder_bytes(folder) == before

    @pytest.mark.parametrize(
        "change",
        [
            lambda content: content.pop("asked"),
            lambda content: content.pop("base_model"),
            lambda content: content["asked"].pop("layers"),
            lambda content: content["asked"].pop("num_windows"),
            lambda content: content["asked"].update(layers=3),
            lambda content: content["asked"].update(layers=[0, 3]),
            lambda content: content["asked"].update(plans=[]),
            lambda content: content["asked"].update(plans=["1111", "0x11"]),
            lambda content: content["asked"].update(plans=["1111", "0111"]),
            lambda content: content["asked"]["task"].update(prompts="many"),
            lambda content: content["asked"]["task"].pop("prompts"),
        ],
    )
    def test_the_manifest_lacks_something(self, folder, change):
        change_manifest(folder, change)
        with pytest.raises(LabelError):
            read_scores(folder)


class TestMenuData:
    @pytest.fixture(scope="class")
    def table(self, model, tmp_path_factory):
        plans = np.ones((6, 4), dtype=np.uint8)
        for row, layer in enumerate([0, 1, 1, 3, 2], start=1):
            plans[row, layer] = 0
        plans[3, 2] = 2
        folder = tmp_path_factory.mktemp("menu")
        return score(model, folder, task=tiny_task(21), plans=plans, layers=[1, 2, 3])

    @pytest.mark.parametrize("columns", [None, [0], [0, 4], [0, 3, 1], np.array([0, 5, 2, 3])])
    def test_states_stay_with_their_plans(self, table, columns):
        data = menu_data(table, columns)
        taken = range(6) if columns is None else columns
        np.testing.assert_array_equal(data.plans, table.plans[list(taken)])
        assert list(data.views) == [1, 2, 3]
        for layer, view in data.views.items():
            old, new = prefix_numbers(table.plans, layer), prefix_numbers(data.plans, layer)
            np.testing.assert_array_equal(data.prefixes(layer), new)
            assert view.shape[1] == new.max() + 1
            for column, plan in enumerate(taken):
                assert torch.equal(view[:, new[column]], table.views[layer][:, old[plan]])
        for name in ("agreement", "total_variation"):
            wanted = getattr(table, name)[:, list(taken)]
            np.testing.assert_array_equal(getattr(data, name), wanted)
        np.testing.assert_allclose(data.reward, np.exp(table.reward[:, list(taken)]))
        assert data.groups == [example.prompt for example in table.examples]

    def test_prompts_alone_have_no_reward(self, model, tmp_path):
        task = Task("t", tuple(Example(f"\n {n} ") for n in range(20)))
        data = menu_data(score(model, tmp_path, task=task))
        assert data.reward is None
        assert data.groups == [str(n) for n in range(20)]

    @pytest.mark.parametrize("rows", [[3], [20, 0, 7], np.arange(21), []])
    def test_some_prompts_of_a_table(self, table, rows):
        taken = table.take(rows)
        assert len(taken) == len(rows)
        assert taken.examples == tuple(table.examples[row] for row in rows)
        for name in ("given", *FIGURES):
            wanted = getattr(table, name)[list(rows)]
            np.testing.assert_array_equal(getattr(taken, name), wanted)
        for layer, view in taken.views.items():
            assert torch.equal(view, table.views[layer][list(rows)])
        np.testing.assert_array_equal(taken.plans, table.plans)
        assert taken.manifest == table.manifest


def _flipped(data, place):
    return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]
