"""Shared plans: what the beam finds, what it keeps to, resuming at every write, and bad input."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch

from dynadepth.errors import ConfigError, LabelError, SearchError, TaskError
from dynadepth_search.data.chat_template import as_chat
from dynadepth_search.data.splits import prompt_hashes
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.files.locking import locked
from dynadepth_search.scoring import score_table
from dynadepth_search.scoring.score_table import read_scores
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.search import static
from dynadepth_search.search.static import MENU, StaticSpec, read_static, search_static
from dynadepth_search.storage import score_store
from tests.tiny import tiny_model
from tests.tiny_search import folder_bytes, tiny_task
from tests.tiny_text import word_tokenizer

NUM_LAYERS = 6
SPEC = {
    "beam": 2,
    "size": 4,
    "min_depth": 0.5,
    "num_prompts": 6,
    "num_screened": 3,
    "num_candidates": 4,
    "num_confirmed": 21,
}


def varied_task(count=45, *, kind="choices"):
    """Return prompts that end in different tokens, so that no state is the same for all."""
    examples = []
    for number in range(count):
        prompt = f"Number {number}{' and so on' * (number % 3)} {number * 7 % 11}"
        words = (("red", "green", "blue")[number % 3], ("up", "down")[number % 2])
        examples.append(
            {
                "choices": Example(prompt, words, number % 2),
                "completion": Example(prompt, completion=words[0]),
                "prompt": Example(prompt),
            }[kind]
        )
    return Task("varied", tuple(examples))


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_layers=NUM_LAYERS, dtype=torch.float32)


@pytest.fixture(scope="module")
def found(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("found") / "plans"
    search(model, folder)
    return folder


@pytest.fixture
def folder(found, tmp_path):
    return shutil.copytree(found, tmp_path / "plans")


def search(model, folder, *, task=None, progress=None, **changes):
    return search_static(
        model,
        word_tokenizer(),
        task or varied_task(),
        folder,
        StaticSpec(**{**SPEC, **changes}),
        **({} if progress is None else {"progress": progress}),
    )


def everything(folder):
    pool = folder / "pool"
    files = folder_bytes(pool) if pool.exists() else {}
    top = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    top.pop(".lock", None)
    return {**top, **{f"pool/{name}": data for name, data in files.items()}}


def skips(plan):
    return frozenset(np.flatnonzero(plan == 0).tolist())


class Seen:
    """A scorer that remembers whom it was asked about, as the search and its pool use it."""

    def __init__(self, monkeypatch):
        self.prompts, self.plans, self.visits = [], [], []
        inner = Scorer.outcomes

        def outcomes(scorer, examples, plans, example, **more):
            found = inner(scorer, examples, plans, example, **more)
            # The pool is measured with states, and is read from its table.
            if not more:
                self.prompts.append(tuple(examples))
                self.plans.append(np.asarray(plans).copy())
                self.visits.append((found.naive_visits, found.executed_visits))
            return found

        monkeypatch.setattr(Scorer, "outcomes", outcomes)


class TestFound:
    @pytest.mark.parametrize(
        ("kind", "objective"),
        [
            ("choices", "preserve"),
            ("choices", "reward"),
            ("completion", "reward"),
            ("prompt", "preserve"),
        ],
    )
    def test_what_is_read(self, model, tmp_path, kind, objective):
        task = varied_task(kind=kind)
        result = search(model, tmp_path, task=task, objective=objective)
        assert (result.pool[0] == 1).all()
        assert (result.pool <= 1).all()
        # The identity, all candidates alone, and a beam of each further depth.
        assert len({bytes(plan) for plan in result.pool}) == len(result.pool) == 1 + 4 + 2 + 2
        table = read_scores(tmp_path / "pool", model=model)
        np.testing.assert_array_equal(table.plans, result.pool)
        assert result.prompts == len(table) == 21
        values = table.agreement if objective == "preserve" else table.reward
        np.testing.assert_allclose(result.pool_values, values.mean(axis=0), rtol=0, atol=1e-12)
        # A chain from the identity down, all of it in the pool.
        assert [len(skips(plan)) for plan in result.front] == [0, 1, 2, 3]
        for above, below in itertools.pairwise(result.front):
            assert skips(above) < skips(below)
        rows = [result.pool.tolist().index(plan) for plan in result.front.tolist()]
        np.testing.assert_array_equal(result.front_values, result.pool_values[rows])
        changes = values[:, rows] - values[:, :1]
        errors = changes.std(axis=0, ddof=1) / np.sqrt(21)
        np.testing.assert_allclose(result.front_errors, errors, rtol=0, atol=1e-12)
        assert result.front_errors[0] == 0
        menu = result.menu.tolist()
        assert menu[0] == [1] * NUM_LAYERS
        assert len({tuple(plan) for plan in menu}) == len(menu) >= 2
        assert all(plan in result.pool.tolist() for plan in menu)
        depths = result.menu.mean(axis=1)
        assert (np.diff(depths) <= 0).all()
        assert result.objective == objective
        assert result.asked["search"]["num_candidates"] == 4

    @pytest.mark.parametrize("num_screened", [2, 6])
    def test_a_beam_that_holds_everything_finds_the_best_of_each_depth(
        self, model, tmp_path, monkeypatch, num_screened
    ):
        seen = Seen(monkeypatch)
        result = search(model, tmp_path, beam=20, num_candidates=6, num_screened=num_screened)
        content = json.loads((tmp_path / MENU).read_text())
        examples = list({example: None for each in seen.prompts for example in each})
        assert len(examples) == 6
        monkeypatch.undo()
        scorer = Scorer(model, word_tokenizer())
        for number, level in enumerate(content["levels"], start=1):
            sets = [frozenset(each) for each in itertools.combinations(range(NUM_LAYERS), number)]
            plans = np.ones((len(sets), NUM_LAYERS), dtype=np.uint8)
            for plan, each in zip(plans, sets, strict=True):
                plan[list(each)] = 0
            found = scorer.outcomes(
                examples,
                np.repeat(plans, len(examples), axis=0),
                np.tile(np.arange(len(examples)), len(plans)),
            )
            values = 0.75 * found.agreement + 0.25 * (1 - found.total_variation)
            values = values.reshape(len(plans), -1)
            expected = dict(zip(sets, values.mean(axis=1), strict=True))
            assert {frozenset(item["skips"]) for item in level} == set(sets)
            for item in level:
                assert item["value"] == pytest.approx(expected[frozenset(item["skips"])], abs=1e-4)
            listed = [item["value"] for item in level]
            assert listed == sorted(listed, reverse=True)
        assert len(result.pool) == 1 + 6 + 15 + 20

    @pytest.mark.parametrize("seed", range(4))
    def test_the_front_is_the_best_chain_of_the_pool(self, tmp_path, seed):
        model = tiny_model(num_layers=NUM_LAYERS, seed=seed, dtype=torch.float32)
        result = search(model, tmp_path, beam=5, num_candidates=6)
        levels = json.loads((tmp_path / MENU).read_text())["levels"]
        values = [{frozenset(item["skips"]): item["value"] for item in level} for level in levels]
        chains = [
            chain
            for chain in itertools.product(*values)
            if all(above < below for above, below in itertools.pairwise(chain))
        ]
        best = max(
            sum(level[each] for level, each in zip(values, chain, strict=True)) for chain in chains
        )
        chain = [skips(plan) for plan in result.front]
        assert chain[0] == frozenset()
        total = sum(level[each] for level, each in zip(values, chain[1:], strict=True))
        assert total == pytest.approx(best, abs=1e-12)
        assert len(chains) > 1

    def test_the_pool_is_measured_on_prompts_that_chose_nothing(self, model, tmp_path, monkeypatch):
        seen = Seen(monkeypatch)
        search(model, tmp_path)
        chose = {example for examples in seen.prompts for example in examples}
        measured = set(read_scores(tmp_path / "pool").examples)
        assert len(chose) == 6
        assert len(measured) == 21
        assert not chose & measured
        assert chose | measured <= set(varied_task().examples)
        # The first prompts screen, and half a beam more than is carried on sees the rest.
        assert {len(examples) for examples in seen.prompts} == {3}
        content = json.loads((tmp_path / MENU).read_text())
        scored = sum(len(plans) for plans in seen.plans)
        assert content["evaluations"] == scored + 21 * len(content["pool"])

    def test_few_prompts_are_shared_out(self, model, tmp_path, monkeypatch):
        seen = Seen(monkeypatch)
        result = search(model, tmp_path, task=varied_task(40), num_prompts=1000, num_confirmed=1000)
        chose = {example for examples in seen.prompts for example in examples}
        assert len(chose) == 13
        assert result.prompts == 27

    def test_another_seed_takes_other_prompts(self, model, found, tmp_path):
        search(model, tmp_path, seed=1)
        first, second = (set(read_scores(place / "pool").examples) for place in (found, tmp_path))
        assert first != second

    def test_the_same_search_twice(self, model, found, tmp_path):
        search(model, tmp_path)
        assert everything(tmp_path) == everything(found)

    def test_the_model_is_left_as_it_was(self, model, tmp_path):
        before = [(type(module), set(module.__dict__)) for module in model.modules()]
        search(model, tmp_path)
        assert [(type(module), set(module.__dict__)) for module in model.modules()] == before

    def test_prompts_whose_first_states_are_all_the_same(self, model, tmp_path):
        """All end in a colon, and a plan edits layer 0: the state that the menu is chosen by tells nothing."""
        result = search(model, tmp_path, task=tiny_task(45), num_candidates=6, beam=6)
        assert (result.pool[:, 0] == 0).any()
        assert len(result.menu) >= 2


class TestPromptsThatRepeat:
    """Examples of one prompt with other choices are one prompt, wherever prompts are divided."""

    def repeated(self, counts):
        examples = varied_task(sum(counts)).examples
        prompts = [f"Prompt {index}" for index, count in enumerate(counts) for _ in range(count)]
        return Task(
            "repeated",
            tuple(
                Example(prompt, (*item.choices, f"not {index}"), item.answer)
                for index, (prompt, item) in enumerate(zip(prompts, examples, strict=True))
            ),
        )

    def test_one_text_is_no_task(self, model, tmp_path):
        with pytest.raises(TaskError, match="1 different prompts cannot choose plans for all"):
            search(model, tmp_path / "out", task=self.repeated([24]))
        assert not (tmp_path / "out").exists()

    def test_a_prompt_of_many_examples_leaves_the_others_enough(self, model, tmp_path):
        task = self.repeated([300, *[1] * 44])
        found = search(model, tmp_path / "out", task=task)
        measured = {item.prompt for item in read_scores(tmp_path / "out" / "pool").examples}
        assert len(measured) >= 20
        assert len(found.prompt_hashes) > len(measured)

    def test_too_few_different_ones_are_found_before_the_work(self, model, tmp_path):
        with pytest.raises(
            TaskError,
            match="30 of 600 examples were drawn, those of one prompt together, which gave",
        ):
            search(model, tmp_path / "out", task=self.repeated([15] * 40), num_confirmed=30)
        assert not (tmp_path / "out").exists()


class TestWhoTookPart:
    def test_the_prompts_that_chose_the_plans_are_remembered(self, model, tmp_path):
        task = varied_task(60, kind="prompt")
        changes = {"num_prompts": 12, "num_confirmed": 20}
        search(model, tmp_path / "plans", task=task, **changes)
        found = read_static(tmp_path / "plans")
        table = read_scores(tmp_path / "plans" / "pool")
        # Twelve grew the plans and twenty others measured them; the rest can still be held out.
        assert len(found.prompt_hashes) == 32
        assert set(found.prompt_hashes) < set(prompt_hashes(task.examples))
        assert set(prompt_hashes(table.examples)) < set(found.prompt_hashes)
        assert set(table.plan_prompt_hashes) == set(found.prompt_hashes)

    def test_the_form_of_a_prompt_does_not_matter(self, model, tmp_path):
        tokenizer = word_tokenizer()
        tokenizer.chat_template = "({{ messages[0]['role'] }}) {{ messages[0]['content'] }}"
        task, known = varied_task(kind="prompt"), []
        for form in (task, as_chat(task, tokenizer), as_chat(task, tokenizer, system="Be brief.")):
            folder = tmp_path / str(len(known))
            spec = StaticSpec(size=3, beam=1, num_prompts=5, num_screened=3, num_candidates=2)
            known.append(search_static(model, tokenizer, form, folder, spec).prompt_hashes)
        assert known[0] == known[1] == known[2]
        assert set(known[0]) <= set(prompt_hashes(task.examples))

    def test_an_older_folder_does_not_say(self, folder):
        content = json.loads((folder / MENU).read_text())
        del content["prompt_hashes"]
        (folder / MENU).write_text(json.dumps(content))
        assert read_static(folder).prompt_hashes is None


class TestLimits:
    @pytest.mark.parametrize(
        ("changes", "deepest"),
        [
            ({"min_depth": 0.5}, 3),
            ({"min_depth": 0.51}, 2),
            ({"min_depth": 1 / 3}, 4),
            ({"min_depth": 0.01}, 4),
            ({"min_depth": 0.01, "num_candidates": 6}, 5),
            ({"num_candidates": 1}, 1),
            ({"num_candidates": 99, "beam": 1}, 3),
            ({"from_layer": 4}, 2),
            ({"from_layer": 5}, 1),
            ({"protect": (0, 1, 2, 3, 4)}, 1),
            ({"from_layer": 2, "protect": (3, 5)}, 2),
        ],
    )
    def test_are_kept_to_and_reached(self, model, tmp_path, changes, deepest):
        result = search(model, tmp_path, **changes)
        spec = StaticSpec(**{**SPEC, **changes})
        assert (result.pool.mean(axis=1) >= spec.min_depth).all()
        assert (result.pool[:, : spec.from_layer] == 1).all()
        assert (result.pool[:, list(spec.protect)] == 1).all()
        assert int((result.pool == 0).sum(axis=1).max()) == deepest == len(result.front) - 1
        each = np.bincount((result.pool == 0).sum(axis=1))
        free = [n for n in range(spec.from_layer, NUM_LAYERS) if n not in spec.protect]
        assert each[:2].tolist() == [1, min(len(free), spec.num_candidates)]
        assert (each[2:] <= spec.beam).all()
        assert len({layer for plan in result.pool for layer in skips(plan)}) <= spec.num_candidates

    def test_a_depth_that_is_a_share_of_the_layers_is_reached(self, tmp_path):
        """0.56 of 25 layers are 14, though a little more in floating point."""
        model = tiny_model(num_layers=25, dtype=torch.float32)
        result = search(model, tmp_path, min_depth=0.56, num_candidates=11, beam=1)
        assert result.front.sum(axis=1).tolist() == list(range(25, 13, -1))

    @pytest.mark.parametrize(
        "changes",
        [
            {"from_layer": 6},
            {"from_layer": 99},
            {"protect": (0, 1, 2, 3, 4, 5)},
            {"from_layer": 3, "protect": (3, 4, 5)},
            {"min_depth": 0.9},
        ],
    )
    def test_nothing_can_be_removed(self, model, tmp_path, changes):
        with pytest.raises(ConfigError, match="nothing can be removed: .*free more layers or"):
            search(model, tmp_path, **changes)
        assert everything(tmp_path) == {}

    @pytest.mark.parametrize("protect", [(-1,), (6,), (0, 99)])
    def test_a_protected_layer_that_is_none(self, model, tmp_path, protect):
        """-1 would be read as the last layer, which is then removed in silence."""
        with pytest.raises(ConfigError, match="protect"):
            search(model, tmp_path, protect=protect)


class TestResuming:
    def test_a_kill_at_any_write(self, model, found, tmp_path, monkeypatch):
        before = everything(found)
        levels = len(json.loads((found / MENU).read_text())["levels"])
        # Candidates, the levels, the pool's manifest and two blocks of two files; the whole.
        total = 1 + levels + 1 + 4 + 1
        states = set()
        for written in range(total):
            folder = tmp_path / str(written)
            count = 0

            def killed(write, *, last=written):
                def wrapped(path, content):
                    nonlocal count
                    if count == last:
                        raise KeyboardInterrupt
                    count += 1
                    write(path, content)

                return wrapped

            with monkeypatch.context() as patch:
                patch.setattr(static, "write_json_atomic", killed(static.write_json_atomic))
                for module, name in (
                    (score_store, "write_bytes_atomic"),
                    (score_table, "write_json_atomic"),
                ):
                    patch.setattr(module, name, killed(getattr(module, name)))
                with pytest.raises(KeyboardInterrupt):
                    search(model, folder)
            assert count == written
            if written:
                with pytest.raises(LabelError, match="is unfinished: run it again to go on"):
                    read_static(folder)
            else:
                with pytest.raises(FileNotFoundError):
                    read_static(folder)
            states.add((folder / MENU).read_bytes() if written else b"")
            search(model, folder)
            assert everything(folder) == before, written
        assert len(states) == levels + 2
        folder = tmp_path / "whole"
        search(model, folder)
        assert everything(folder) == before

    def test_a_kill_at_every_write_of_one_search(self, model, found, tmp_path, monkeypatch):
        """Each run writes one more file and is killed: nothing is done twice, and the whole is the same."""
        write_json, write_bytes = static.write_json_atomic, score_store.write_bytes_atomic

        def once(write):
            def wrapped(path, content):
                write(path, content)
                raise KeyboardInterrupt

            return wrapped

        monkeypatch.setattr(static, "write_json_atomic", once(write_json))
        monkeypatch.setattr(score_table, "write_json_atomic", once(write_json))

        def parquet_ends_a_block(path, data):
            write_bytes(path, data)
            if path.suffix == ".parquet":
                raise KeyboardInterrupt

        monkeypatch.setattr(score_store, "write_bytes_atomic", parquet_ends_a_block)
        for _ in range(1 + 3 + 1 + 2 + 1):
            with pytest.raises(KeyboardInterrupt):
                search(model, tmp_path)
        assert everything(tmp_path) == everything(found)
        search(model, tmp_path)
        assert everything(tmp_path) == everything(found)

    def test_a_kill_at_any_report(self, model, found, tmp_path):
        reports = []
        search(model, tmp_path / "whole", progress=lambda *report: reports.append(report))
        assert [stage for stage, _, _ in reports[:4]] == [
            "removing single layers",
            *["growing plans"] * 3,
        ]
        for last in range(len(reports)):
            seen = []

            def stop(*report, last=last, seen=seen):
                seen.append(report)
                if len(seen) > last:
                    raise KeyboardInterrupt

            folder = tmp_path / str(last)
            with pytest.raises(KeyboardInterrupt):
                search(model, folder, progress=stop)
            assert seen == reports[: last + 1]
            search(model, folder)
            assert everything(folder) == everything(found)

    def test_a_step_costs_the_same_whatever_was_scored_before_it(
        self, model, tmp_path, monkeypatch
    ):
        """Else float noise of another batch could choose another plan after a kill."""
        seen = Seen(monkeypatch)
        search(model, tmp_path / "whole")
        whole = list(seen.visits)

        def stop(stage, done, _total):
            if (stage, done) == ("growing plans", 1):
                raise KeyboardInterrupt

        seen.visits.clear()
        with pytest.raises(KeyboardInterrupt):
            search(model, tmp_path / "parts", progress=stop)
        assert 0 < len(seen.visits) < len(whole)
        search(model, tmp_path / "parts")
        assert seen.visits == whole

    def test_a_finished_search_is_not_run_again(self, model, folder, monkeypatch):
        before = everything(folder)
        seen = Seen(monkeypatch)
        search(model, folder)
        assert seen.prompts == []
        assert everything(folder) == before

    def test_protected_layers_are_the_same_when_read_again(self, model, tmp_path):
        search(model, tmp_path, protect=(5, 0))
        before = everything(tmp_path)
        search(model, tmp_path, protect=(5, 0))
        assert everything(tmp_path) == before


class TestOtherQuestions:
    @pytest.mark.parametrize(
        ("changes", "field"),
        [
            ({"beam": 3}, r"search\.beam"),
            ({"objective": "reward"}, r"search\.objective"),
            ({"protect": (1,)}, r"search\.protect"),
            ({"seed": 1}, r"search\.seed"),
            ({"task": varied_task(44)}, r"task\.prompts"),
            ({"task": varied_task(kind="prompt")}, r"task\.kind"),
        ],
    )
    @pytest.mark.parametrize("finished", [True, False])
    def test_a_folder_holds_one_search(self, model, folder, changes, field, finished):
        if not finished:
            content = json.loads((folder / MENU).read_text())
            (folder / MENU).write_text(json.dumps({**content, "complete": False}))
        before = everything(folder)
        with pytest.raises(LabelError, match=f"was made with {field} = .*use another folder"):
            search(model, folder, **changes)
        assert everything(folder) == before

    def test_another_model(self, folder):
        other = tiny_model(num_layers=NUM_LAYERS, seed=1, dtype=torch.float32)
        with pytest.raises(LabelError, match="was made with base_model = "):
            search(other, folder)
        with pytest.raises(
            LabelError, match="the plans in .* belong to another base model than this Llama"
        ) as info:
            read_static(folder, model=other)
        # The file is as good as it was: deleting it would be bad advice.
        assert "damaged" not in str(info.value)

    def test_the_same_model(self, model, folder):
        assert len(read_static(folder, model=model).menu) >= 2

    def test_a_folder_in_use(self, model, folder):
        before = everything(folder)
        with locked(folder), pytest.raises(LabelError, match="another process is writing to"):
            search(model, folder)
        assert everything(folder) == before


class TestBadInput:
    @pytest.mark.parametrize(
        ("task", "changes", "message"),
        [
            (
                varied_task(39),
                {},
                "39 different prompts cannot choose plans for all; give 40 or more",
            ),
            (varied_task(kind="prompt"), {"objective": "reward"}, "no labelled reward"),
            (Task("t", varied_task().examples, "letters"), {}, "scoring 'letters' is unknown"),
        ],
    )
    def test_tasks(self, model, tmp_path, task, changes, message):
        with pytest.raises(TaskError, match=message):
            search(model, tmp_path / "plans", task=task, **changes)
        assert not (tmp_path / "plans" / MENU).exists()

    @pytest.mark.parametrize("place", [0, 4])
    def test_a_prompt_that_is_too_long(self, model, tmp_path, place):
        """Whether it grows the plans or measures them, it is found before hours are spent on the others."""
        examples = list(varied_task().examples)
        examples[place] = Example(f"{place} " * 90, ("a", "b"), 0)
        task = Task("t", tuple(examples))
        with pytest.raises(TaskError, match="tokens long; the model has positions for 128"):
            search(model, tmp_path, task=task, num_prompts=15, num_confirmed=30)
        assert everything(tmp_path) == {}

    @pytest.mark.parametrize("objective", ["preserve", "reward"])
    def test_values_that_are_not_finite(self, tmp_path, objective):
        model = tiny_model(num_layers=NUM_LAYERS, dtype=torch.float32)
        with torch.no_grad():
            model.model.layers[3].mlp.down_proj.weight[0] = float("nan")
        with pytest.raises(SearchError, match=r"plan \d{6} gives prompt .*logits overflow"):
            search(model, tmp_path, objective=objective)
        assert everything(tmp_path) == {}

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"objective": "accuracy"}, "objective"),
            ({"min_depth": 0}, "min_depth is 0; expected more than 0 and less than 1"),
            ({"min_depth": 1}, "min_depth is 1; expected more than 0 and less than 1"),
            ({"min_depth": float("nan")}, "min_depth"),
            ({"min_depth": "0.5"}, "min_depth"),
            ({"from_layer": -1}, "from_layer is -1; expected 0 or more"),
            ({"size": 1}, "size is 1; expected 2 or more"),
            ({"beam": 0}, "beam is 0; expected 1 or more"),
            ({"beam": True}, "beam"),
            ({"beam": 2.5}, "beam"),
            ({"num_candidates": 0}, "num_candidates is 0; expected 1 or more"),
            ({"num_prompts": 0}, "num_prompts is 0; expected 1 or more"),
            ({"num_screened": 0}, "num_screened is 0; expected 1 or more"),
            ({"num_confirmed": 19}, "num_confirmed is 19; expected 20 or more"),
            ({"seed": -1}, "seed is -1; expected 0 or more"),
            ({"protect": [1]}, "protect"),
            ({"protect": (1.0,)}, "protect"),
        ],
    )
    def test_specs(self, changes, message):
        with pytest.raises(ConfigError, match=message):
            StaticSpec(**changes)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            read_static(tmp_path)


class TestSkipCosts:
    @pytest.mark.parametrize(
        "data",
        [b"", b"{", b"[]", b"\xff", b"{}", b'{"schema_version": 2}', b'{"schema_version": 1}'],
    )
    def test_a_file_that_is_none(self, model, folder, data):
        (folder / MENU).write_bytes(data)
        before = everything(folder)
        for call in (read_static, lambda place: search(model, place)):
            with pytest.raises(LabelError, match=r"menu\.json"):
                call(folder)
        assert everything(folder) == before

    @pytest.mark.parametrize(
        "change",
        [
            lambda content: content.pop("pool"),
            lambda content: content.pop("menu"),
            lambda content: content.pop("front"),
            lambda content: content.pop("asked"),
            lambda content: content.pop("confirmed"),
            lambda content: content.update(pool=[]),
            lambda content: content.update(menu=[0, 99]),
            lambda content: content.update(front="0"),
            lambda content: content["pool"][1].update(plan="1111x1"),
            lambda content: content["pool"][1].update(plan="11111"),
            lambda content: content["pool"][1].pop("value"),
            lambda content: content["asked"]["search"].update(objective="accuracy"),
            lambda content: content.update(prompt_hashes=3),
            lambda content: content.update(prompt_hashes=["a", 3]),
        ],
    )
    def test_a_file_that_lacks_something(self, folder, change):
        content = json.loads((folder / MENU).read_text())
        change(content)
        (folder / MENU).write_text(json.dumps(content))
        with pytest.raises(LabelError, match=r"menu\.json is damaged .*delete it and search again"):
            read_static(folder)

    def test_searching_again_after_deleting_it(self, model, folder):
        """The advice that is given, followed; the measured pool is still good."""
        before = everything(folder)
        (folder / MENU).unlink()
        search(model, folder)
        assert everything(folder) == before
