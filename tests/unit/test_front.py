"""The static front: its greedy choices against a plain search, and its resumption."""

import json

import numpy as np
import pytest
import torch

from dynadepth.errors import ConfigError, LabelError, TaskError
from dynadepth.fronts import removed_layers
from dynadepth.plans import plan_depth, plan_text
from dynadepth_search.front import FRONT, FrontSpec, read_front, search_front
from dynadepth_search.labels import read_labels
from dynadepth_search.scoring import Scorer
from dynadepth_search.searching import run_search
from tests.tiny import tiny_model
from tests.tiny_search import tiny_spec, tiny_task
from tests.tiny_text import word_tokenizer

NUM_LAYERS = 6
SPEC = {
    "min_depth": 0.5,
    "num_prompts": 8,
    "num_screened": 3,
    "num_candidates": 4,
    "num_finalists": 2,
    "num_confirmed": 0,
}


@pytest.fixture(scope="module")
def scorer():
    return Scorer(tiny_model(num_layers=NUM_LAYERS, dtype=torch.float32), word_tokenizer())


def greedy(scorer, examples, steps, objective="preserve", protect=()):
    """Every candidate on every prompt."""
    plan = np.ones(NUM_LAYERS, dtype=np.uint8)
    plans, rewards, errors = [plan], [0.0], [0.0]
    count = len(examples)
    base = scorer.base(examples).of(objective)
    rewards[0] = base.mean()
    for _ in range(steps):
        best = None
        for layer in np.flatnonzero(plan).tolist():
            if layer in protect:
                continue
            tried = plan.copy()
            tried[layer] = 0
            given = scorer.outcomes(examples, np.tile(tried, (count, 1)), np.arange(count)).of(
                objective
            )
            if best is None or given.mean() > best[1].mean() + 1e-9:
                best = tried, given
        plan = best[0]
        plans.append(plan)
        rewards.append(best[1].mean())
        errors.append((best[1] - base).std(ddof=1) / np.sqrt(count))
    return np.stack(plans), np.array(rewards), np.array(errors)


class TestConfirmation:
    def test_the_means_are_those_of_prompts_that_chose_nothing(self, scorer, tmp_path):
        task = tiny_task(20)
        front = search_front(scorer, task, tmp_path, FrontSpec(**{**SPEC, "num_confirmed": 9}))
        chosen = json.loads((tmp_path / FRONT).read_text())["prompts"]
        order = np.random.default_rng(0).permutation(20)[8:17]
        others = [task.examples[index] for index in np.sort(order)]
        assert not {item.prompt_id for item in others} & set(chosen)
        assert front.prompts == 9
        rewards = np.stack(
            [
                scorer.outcomes(others, np.tile(plan, (9, 1)), np.arange(9)).of("preserve")
                for plan in front.plans
            ]
        )
        np.testing.assert_allclose(front.rewards, rewards.mean(axis=1), atol=1e-4)
        changes = rewards - rewards[0]
        errors = changes.std(axis=1, ddof=1) / 3
        np.testing.assert_allclose(front.standard_errors, errors, atol=1e-4)
        assert front.evaluations == 8 + (6 + 4 + 4) * 3 + 3 * 2 * 5 + 9 * 4

    def test_killed_between_its_blocks_it_goes_on_to_the_same_file(
        self, scorer, tmp_path, monkeypatch
    ):
        monkeypatch.setattr("dynadepth_search.front._CONFIRMED_BLOCK", 4)
        task, spec = tiny_task(20), FrontSpec(**{**SPEC, "num_confirmed": 12})
        search_front(scorer, task, tmp_path / "whole", spec)

        def strike(stage, done, total):
            if stage.startswith("front, measured") and done == 8:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            search_front(scorer, task, tmp_path / "killed", spec, progress=strike)
        with pytest.raises(LabelError, match="unfinished"):
            read_front(tmp_path / "killed")
        search_front(scorer, task, tmp_path / "killed", spec)
        whole, killed = ((tmp_path / name / FRONT).read_bytes() for name in ("whole", "killed"))
        assert whole == killed


class TestChoices:
    @pytest.mark.parametrize("objective", ["preserve", "reward"])
    def test_without_a_race_it_is_greedy_search(self, scorer, tmp_path, objective):
        task = tiny_task(7)
        spec = FrontSpec(
            objective=objective,
            min_depth=0.5,
            num_prompts=7,
            num_candidates=6,
            num_finalists=6,
            num_screened=2,
        )
        front = search_front(scorer, task, tmp_path, spec)
        plans, rewards, errors = greedy(scorer, task.examples, 3, objective)
        np.testing.assert_array_equal(front.plans, plans)
        np.testing.assert_allclose(front.rewards, rewards, atol=1e-4)
        np.testing.assert_allclose(front.standard_errors, errors, atol=1e-4)
        assert (front.prompts, front.objective, front.seed) == (7, objective, 0)
        assert front.evaluations == 7 * (1 + 6 + 5 + 4)

    def test_the_front_is_nested_and_costs_what_it_says(self, scorer, tmp_path):
        front = search_front(scorer, tiny_task(20), tmp_path, FrontSpec(**SPEC))
        assert len(removed_layers(front.plans)) == 3
        np.testing.assert_allclose(plan_depth(front.plans), [1, 5 / 6, 4 / 6, 3 / 6])
        # The base; all 6 layers at first, then 4; and 2 finalists on the other 5 prompts.
        assert front.evaluations == 8 + (6 + 4 + 4) * 3 + 3 * 2 * 5
        assert front.standard_errors[0] == 0
        assert (front.standard_errors[1:] > 0).all()

    @pytest.mark.parametrize(
        ("min_depth", "plans"), [(1.0, 1), (0.84, 1), (5 / 6, 2), (0.5, 4), (0.01, 6)]
    )
    def test_where_it_ends(self, scorer, tmp_path, min_depth, plans):
        front = search_front(
            scorer, tiny_task(4), tmp_path, FrontSpec(**{**SPEC, "min_depth": min_depth})
        )
        assert len(front.plans) == plans
        assert (front.plans.sum(axis=1) > 0).all()

    def test_protected_layers_stay(self, scorer, tmp_path):
        free = search_front(scorer, tiny_task(4), tmp_path / "free", FrontSpec(**SPEC))
        protect = tuple(removed_layers(free.plans)[:2])
        spec = FrontSpec(**{**SPEC, "protect": protect, "min_depth": 0.01})
        front = search_front(scorer, tiny_task(4), tmp_path / "kept", spec)
        assert (front.plans[:, protect] == 1).all()
        assert len(front.plans) == 5

    def test_a_prior_saves_the_first_screening(self, scorer, tmp_path):
        task = tiny_task(12)
        run_search(
            scorer.model, scorer.tokenizer, task, tmp_path, tiny_spec(config={"probe_trees": 12})
        )
        prior = read_labels(tmp_path).manifest.prior
        blind = search_front(scorer, task, tmp_path / "blind", FrontSpec(**SPEC))
        told = search_front(scorer, task, tmp_path, FrontSpec(**SPEC), prior=prior)
        assert told.evaluations == blind.evaluations - 2 * 3
        best = set(np.argsort(-prior.mean[:NUM_LAYERS])[:4].tolist())
        assert removed_layers(told.plans)[0] in best

    def test_ties_go_to_the_lowest_layer(self, tmp_path):
        model = tiny_model(num_layers=4, dtype=torch.float32)
        with torch.no_grad():
            for layer in model.model.layers:
                # Layers that add nothing to the residual stream.
                layer.mlp.down_proj.weight.zero_()
                layer.self_attn.o_proj.weight.zero_()
        spec = FrontSpec(**{**SPEC, "min_depth": 0.25})
        front = search_front(Scorer(model, word_tokenizer()), tiny_task(4), tmp_path, spec)
        assert [plan_text(plan) for plan in front.plans] == ["1111", "0111", "0011", "0001"]
        assert (front.rewards == 0).all()


class TestFiles:
    def interrupt(self, scorer, folder, *, after, spec=SPEC):
        def stop(_stage, done, _total):
            if done >= after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            search_front(scorer, tiny_task(12), folder, FrontSpec(**spec), progress=stop)

    def test_it_goes_on_step_by_step(self, scorer, tmp_path):
        whole = search_front(scorer, tiny_task(12), tmp_path / "whole", FrontSpec(**SPEC))
        told = []
        for after in (0, 1, 2):
            self.interrupt(scorer, tmp_path, after=after)
            with pytest.raises(
                LabelError, match=r"front\.json is unfinished: run it again to go on"
            ):
                read_front(tmp_path)
        front = search_front(
            scorer,
            tiny_task(12),
            tmp_path,
            FrontSpec(**SPEC),
            progress=lambda *state: told.append(state),
        )
        assert told == [("front", 2, 3), ("front", 3, 3)]
        assert (tmp_path / FRONT).read_bytes() == (tmp_path / "whole" / FRONT).read_bytes()
        assert front.evaluations == whole.evaluations

    def test_a_finished_front_is_only_read(self, scorer, tmp_path):
        first = search_front(scorer, tiny_task(12), tmp_path, FrontSpec(**SPEC))
        before = (tmp_path / FRONT).stat().st_mtime_ns
        again = search_front(scorer, tiny_task(12), tmp_path, FrontSpec(**SPEC))
        assert (tmp_path / FRONT).stat().st_mtime_ns == before
        np.testing.assert_array_equal(first.plans, again.plans)
        np.testing.assert_array_equal(first.rewards, read_front(tmp_path).rewards)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"seed": 3}, "made with front.seed = 0, but now it is 3"),
            ({"protect": (1,)}, r"made with front.protect = \[\], but now it is \[1\]"),
        ],
    )
    def test_another_spec(self, scorer, tmp_path, changes, message):
        self.interrupt(scorer, tmp_path, after=1)
        before = (tmp_path / FRONT).read_bytes()
        with pytest.raises(LabelError, match=message):
            search_front(scorer, tiny_task(12), tmp_path, FrontSpec(**{**SPEC, **changes}))
        assert (tmp_path / FRONT).read_bytes() == before

    def test_another_task_or_model(self, scorer, tmp_path):
        search_front(scorer, tiny_task(12), tmp_path, FrontSpec(**SPEC))
        with pytest.raises(LabelError, match="made with task.prompts = 12, but now it is 13"):
            search_front(scorer, tiny_task(13), tmp_path, FrontSpec(**SPEC))
        other = Scorer(
            tiny_model(num_layers=NUM_LAYERS, seed=1, dtype=torch.float32), word_tokenizer()
        )
        with pytest.raises(LabelError, match="made with base_model = "):
            search_front(other, tiny_task(12), tmp_path, FrontSpec(**SPEC))

    def test_damage(self, scorer, tmp_path):
        with pytest.raises(FileNotFoundError):
            read_front(tmp_path)
        search_front(scorer, tiny_task(4), tmp_path, FrontSpec(**SPEC))
        path = tmp_path / FRONT
        content = json.loads(path.read_text())
        for changes, message in [
            ({"schema_version": 2}, "schema version 2; this one reads 1"),
            ({"steps": [{"plan": "11x"}]}, "is damaged .*delete it and search the front again"),
            ({"steps": []}, "is damaged"),
            ({"asked": {}}, "is damaged"),
        ]:
            path.write_text(json.dumps({**content, **changes}))
            with pytest.raises(LabelError, match=message):
                read_front(tmp_path)
        path.write_text("{")
        with pytest.raises(LabelError, match=r"front\.json is not JSON"):
            read_front(tmp_path)

    def test_a_step_races_few_candidates_unless_asked(self):
        spec = FrontSpec()
        assert (spec.num_candidates, spec.num_finalists) == (9, 3)

    def test_prompts_alone_have_no_reward(self, scorer, tmp_path):
        with pytest.raises(TaskError, match="has prompts alone"):
            search_front(
                scorer, tiny_task(4, kind="prompt"), tmp_path / "x", FrontSpec(objective="reward")
            )
        assert not (tmp_path / "x").exists()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"min_depth": 0.0}, "FrontSpec.min_depth is 0.0; expected more than 0 and at most 1"),
            ({"min_depth": 1.5}, "FrontSpec.min_depth is 1.5"),
            ({"num_prompts": 0}, "FrontSpec.num_prompts is 0; expected 1 or more"),
            ({"num_finalists": "2"}, "FrontSpec.num_finalists is '2'"),
            ({"seed": -1}, "FrontSpec.seed is -1; expected 0 or more"),
            ({"objective": "best"}, "FrontSpec.objective is 'best'"),
        ],
    )
    def test_bad_specs(self, changes, message):
        with pytest.raises(ConfigError, match=message):
            FrontSpec(**{**SPEC, **changes})
