"""The search replayed on tables: what is complete, what is found, and that halves are never mixed."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynadepth.errors import ConfigError
from dynadepth.plans import identity_plan, plan_depth
from dynadepth.tree_search.config import SearchConfig
from dynadepth_search.search.per_prompt_spec import PromptSearchSpec
from dynadepth_search.tuning.replay import ReplayTable, skip_subsets
from dynadepth_search.tuning.search_tuning import SearchTuning
from dynadepth_search.tuning.space import StudyTrial
from dynadepth_search.tuning.studies import run_study
from tests.tiny_scores import made_up_scores

LAYERS = (1, 3, 4, 6, 7)
NEVER = lambda step, value: False  # noqa: E731


def made_up(count: int = 40, *, layers: Any = LAYERS, seed: int = 0, gain: float = 0.1) -> Any:
    """Return a table in which skips cost each prompt something of its own; some gain."""
    rng = np.random.default_rng(seed)
    plans = skip_subsets(layers, 9)
    own = rng.normal(gain, 0.3, (count, len(layers)))
    values = (plans[:, list(layers)] == 0).astype(float) @ own.T
    return ReplayTable(plans=plans, values=values.T.astype(np.float32))


@given(st.sets(st.integers(0, 7), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_every_subset_is_there_once_and_found_in_any_order(layers: Any, shuffle: Any) -> None:
    plans = skip_subsets(sorted(layers), 8)
    assert len(np.unique(plans, axis=0)) == 2 ** len(layers)
    assert plans[0].tolist() == identity_plan(8).tolist()
    order = list(range(len(plans)))
    shuffle.shuffle(order)
    plans = plans[order]
    table = ReplayTable(plans=plans, values=np.arange(2 * len(plans)).reshape(2, -1))
    assert table.layers == tuple(sorted(layers))
    for row in (0, 1):
        found = table.rewards(np.full(len(plans), row), plans)
        assert found.tolist() == [row * len(plans) + column for column in range(len(plans))]


@pytest.mark.parametrize(
    ("layers", "num_layers"),
    [((), 8), ((3,), 8), ((0, 8), 8), ((-1, 2), 8), (tuple(range(13)), 30), ((0, 1, 2), 3)],
)
def test_layers_that_no_table_can_have(layers: Any, num_layers: int) -> None:
    with pytest.raises(ConfigError, match="expected 2 to"):
        skip_subsets(layers, num_layers)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"plans": skip_subsets(LAYERS, 9)[1:]}, "every subset"),
        ({"plans": skip_subsets(LAYERS, 9)[[0, 0, *range(2, 32)]]}, "every subset"),
        ({"plans": 2 * skip_subsets(LAYERS, 9)}, "only skip"),
        ({"plans": np.ones((0, 9))}, "only skip"),
        ({"values": np.zeros((4, 31))}, "finite numbers of shape"),
        ({"values": np.full((4, 32), np.nan)}, "not finite"),
        ({"names": ["a"]}, "1 entries for 4 prompts"),
    ],
)
def test_tables_that_cannot_be_replayed(change: dict[str, Any], says: str) -> None:
    content = {"plans": skip_subsets(LAYERS, 9), "values": np.zeros((4, 32))}
    with pytest.raises(ConfigError, match=says):
        ReplayTable(**{**content, **change})


def test_a_score_table_is_replayed_by_what_the_search_maximises() -> None:
    plans = skip_subsets((1, 3), 6)
    scores = made_up_scores(20, plans=plans, layers=(), graded=True)
    assert np.allclose(ReplayTable.from_scores(scores, "preserve").values, -scores.divergence)
    assert np.allclose(ReplayTable.from_scores(scores, "reward").values, scores.reward)
    with pytest.raises(ConfigError, match="right answers"):
        ReplayTable.from_scores(made_up_scores(20, plans=plans, layers=()), "reward")
    with pytest.raises(ConfigError, match="score --subsets"):
        ReplayTable.from_scores(made_up_scores(20), "preserve")


def test_a_search_with_all_evaluations_finds_the_best_and_never_more() -> None:
    table = made_up()
    penalty = table.penalty()
    best = table.best_gains(penalty)
    by_hand = table.values - penalty * plan_depth(table.plans)
    assert best == pytest.approx(by_hand.max(axis=1) - by_hand[:, 0], abs=1e-6)
    every = table.search(SearchConfig(max_evaluations=32, max_depth=1.0), penalty=penalty, seed=0)
    assert every == pytest.approx(best, abs=1e-6)
    few = table.search(SearchConfig(max_evaluations=5), penalty=penalty, seed=0)
    assert (few <= best + 1e-6).all()
    assert (few >= -1e-6).all()
    assert few.mean() < best.mean() - 1e-3
    again = table.search(SearchConfig(max_evaluations=5), penalty=penalty, seed=0)
    assert np.array_equal(few, again)


def test_the_price_of_depth_is_the_probes() -> None:
    table = made_up()
    losses = [
        (table.values[:, 0] - table.values[:, 1 << index]).mean() for index in range(len(LAYERS))
    ]
    assert table.penalty() == pytest.approx(max(0.0, 9 * float(np.median(losses))), rel=1e-5)


class TestTuning:
    @pytest.fixture(scope="class")
    def tuning(self) -> SearchTuning:
        return SearchTuning(made_up(), evaluations=8)

    def test_the_default_is_that_of_the_search(self, tuning: SearchTuning) -> None:
        config = PromptSearchSpec().config
        default = tuning.default()
        assert default == {
            setting.name: getattr(config, setting.name) for setting in tuning.settings
        }
        for setting in tuning.settings:
            assert setting.low <= default[setting.name] <= setting.high

    def test_the_probe_is_paid_for(self, tuning: SearchTuning) -> None:
        default = tuning.default()
        # 8 probed prompts, 19 plans each, shared by 240 prompts: 0.63 evaluations.
        assert tuning.config(default).max_evaluations == 7
        assert tuning.config({**default, "probe_trees": 1}).max_evaluations == 8
        small = SearchTuning(made_up(), evaluations=8, task_prompts=40)
        assert small.config(default).max_evaluations == 4

    def test_a_value_is_a_share_of_the_gain_and_follows_from_the_settings(
        self, tuning: SearchTuning
    ) -> None:
        steps: list[Any] = []
        found = tuning.evaluate(tuning.default(), lambda *step: bool(steps.append(step)))
        assert found is not None
        assert 0 < found.values[0] <= 1 + 1e-6
        assert [step for step, _ in steps] == [0, 1, 2, 3, 4]
        again = SearchTuning(made_up(), evaluations=8).evaluate(tuning.default(), NEVER)
        assert again == found
        assert tuning.evaluate(tuning.default(), lambda step, value: step == 2) is None

    def test_the_halves_share_no_prompt_and_only_the_other_one_compares(self) -> None:
        """What trials see does not change with the other half, and the comparison does not with theirs."""
        table = made_up(40)
        names = [f"prompt {index // 2}" for index in range(40)]
        named = ReplayTable(plans=table.plans, values=table.values, names=names)
        tuning = SearchTuning(named, evaluations=6)
        first, second = tuning._halves
        assert set(first.names).isdisjoint(second.names)
        assert len(first) == len(second) == 20
        held = np.isin(names, list(second.names))
        tried, other = (
            SearchTuning(
                replace_values(named, np.where(part[:, None], named.values**3, named.values)),
                evaluations=6,
            )
            for part in (~held, held)
        )
        default = tuning.default()
        assert tuning.evaluate(default, NEVER) == other.evaluate(default, NEVER)
        assert tuning.evaluate(default, NEVER) != tried.evaluate(default, NEVER)
        trials = [
            StudyTrial(
                number=0, state="complete", params=default, values=(0.5,), default=True, notes={}
            )
        ]
        assert tuning.findings(trials) == tried.findings(trials)
        assert tuning.findings(trials) != other.findings(trials)

    def test_a_study_compares_on_the_other_half(self, tuning: SearchTuning, tmp_path: Any) -> None:
        trials = run_study(tmp_path, tuning, trials=14)[1]
        ended = [each for each in trials if each.values]
        found = tuning.findings(ended)["comparison"]
        assert found["difference"]["n"] == 20
        assert found["difference"]["mean"] == pytest.approx(found["tuned"] - found["default"])
        only = tuning.findings([each for each in ended if each.default])["comparison"]
        assert only["difference"]["mean"] == 0.0

    @pytest.mark.parametrize(
        ("wrong", "says"),
        [
            ({"evaluations": 3}, "3 evaluations"),
            ({"task_prompts": 0}, "a task of 0 prompts"),
            ({"table": made_up(15)}, "15 different prompts"),
            ({"round_size": 0}, "round_size is 0"),
        ],
    )
    def test_wrong_settings(self, wrong: dict[str, Any], says: str) -> None:
        with pytest.raises(ConfigError, match=says):
            SearchTuning(**{"table": made_up(20), "evaluations": 8, **wrong})

    def test_nothing_to_find(self) -> None:
        flat = ReplayTable(plans=skip_subsets(LAYERS, 9), values=np.zeros((20, 32)))
        with pytest.raises(ConfigError, match="nothing to search for"):
            SearchTuning(flat)


def replace_values(table: ReplayTable, values: Any) -> ReplayTable:
    return ReplayTable(plans=table.plans, values=values, names=table.names)
