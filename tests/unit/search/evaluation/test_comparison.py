"""Who is compared with whom, on outcomes that follow from the plans."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynadepth.errors import BudgetError, ConfigError
from dynadepth.plans import Plans, identity_plan, plan_depth
from dynadepth_search.evaluation.baselines import random_plans, removal_plans
from dynadepth_search.evaluation.comparison import ComparedRun, Comparison, Front, PlannedPolicy
from dynadepth_search.evaluation.metrics import action_shares, findings, policy_metrics
from dynadepth_search.evaluation.outcome_cache import Table

LAYERS, PROMPTS = 6, 8
# Removal goes 5, 0, 4, 1, 3; layer 2 stays.
INFLUENCE = np.array([0.2, 0.4, 0.9, 0.5, 0.3, 0.1])


def _nested(order: list[int]) -> Plans:
    plans = [identity_plan(LAYERS)]
    for layer in order:
        plans.append(plans[-1].copy())
        plans[-1][layer] = 0
    return np.array(plans)


FRONT = Front(_nested([3, 4, 1]), np.array([0.0, -0.1, -0.9, -1.0]))  # plan 2 is under the hull


def _entrant(plans: Plans, kind: str = "routed", budget: float = 0.8) -> PlannedPolicy:
    return PlannedPolicy(name=f"{kind} {budget:.2f}", kind=kind, budget=budget, plans=plans)  # type: ignore[arg-type]


def _contest(*policies: PlannedPolicy, draws: int = 5) -> Comparison:
    return Comparison(
        policies=policies,
        front=FRONT,
        influence=INFLUENCE,
        num_prompts=PROMPTS,
        random_draws=draws,
        seed=0,
    )


def _table(comparison: Comparison) -> Table:
    """Each executed layer is worth its number, times one and a half for odd prompts."""
    worth = np.arange(1, LAYERS + 1) * np.where(np.arange(PROMPTS) % 2, 1.5, 1.0)[:, None]
    stack = np.stack(list(comparison.sets.values()))
    quality = (stack * worth).sum(axis=-1) - worth.sum(axis=-1)
    same = (stack == 1).all(axis=-1).astype(float)
    rows = {name: row for row, name in enumerate(comparison.sets)}
    return Table(rows=rows, values={"preserve": quality, "agreement": same})


def _by_name(comparison: Comparison) -> dict[str, ComparedRun]:
    return {item.run.name: item for item in comparison.compared(_table(comparison), "preserve")}


def _plans(visits: list[int]) -> Plans:
    """Plans that skip from the last layer on."""
    return np.array([[1] * count + [0] * (LAYERS - count) for count in visits], dtype=np.uint8)


def test_every_routed_policy_meets_baselines_of_its_own_depth() -> None:
    routed = _entrant(_plans([6, 6, 5, 5, 4, 4, 4, 3]))
    depth = routed.mean_depth
    found = _by_name(_contest(routed))
    assert list(found) == [
        "base",
        "routed 0.80",
        "static mixture 0.80",
        "ShortGPT 0.80",
        "random 0.80",
        "oracle 0.80",
    ]
    for name in ("routed 0.80", "static mixture 0.80", "ShortGPT 0.80", "random 0.80"):
        assert found[name].run.mean_depth == pytest.approx(depth, abs=1e-9), name
    assert found["oracle 0.80"].run.mean_depth <= depth + 1e-9
    assert found["base"].run.mean_depth == 1.0
    static = found["static mixture 0.80"].run
    for name in ("routed 0.80", "ShortGPT 0.80", "random 0.80"):
        compared = found[name].static
        assert compared is not None
        assert compared.metrics["preserve"] == pytest.approx(static.metrics["preserve"])
    assert found["oracle 0.80"].static is None


def test_the_mixture_is_made_of_the_hull_and_weighs_outcomes() -> None:
    comparison = _contest(_entrant(_plans([5, 4] * 4)))  # mean depth 0.75
    table = _table(comparison)
    static = _by_name(comparison)["static mixture 0.80"].run
    first, third = table.of("front 1")["preserve"], table.of("front 3")["preserve"]
    assert static.metrics["preserve"] == pytest.approx(0.75 * first + 0.25 * third)
    assert "front 2" not in comparison.sets
    figures = policy_metrics(static, static, None, seed=0)
    assert figures["plans"] == ["101001", "111011"]
    assert figures["weights"] == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize(
    ("layers", "prompts", "visits"), [(10, 18, 9), (30, 100, 24), (28, 200, 25)]
)
def test_prompts_of_one_depth_have_a_mixture_that_was_scored(
    layers: int, prompts: int, visits: int
) -> None:
    plans = np.tril(np.ones((layers, layers), dtype=np.uint8))[::-1]
    routed = np.tile(plans[layers - visits], (prompts, 1))
    comparison = Comparison(
        policies=[PlannedPolicy(name="routed 0.80", kind="routed", budget=0.8, plans=routed)],
        front=Front(plans, -((1.0 - plan_depth(plans)) ** 2)),
        influence=np.arange(layers, dtype=np.float64),
        num_prompts=prompts,
        random_draws=1,
        seed=0,
    )
    stack = np.stack(list(comparison.sets.values()))
    rows = {name: row for row, name in enumerate(comparison.sets)}
    table = Table(rows=rows, values={"preserve": stack.sum(axis=-1).astype(np.float64)})
    for item in comparison.compared(table, "preserve"):
        assert item.run.metrics["preserve"] == pytest.approx(item.run.depth * layers), item.run.name


def test_budgets_that_differ_little_keep_their_own_rows() -> None:
    policies = [
        PlannedPolicy(
            name=f"routed {budget}", kind="routed", budget=budget, plans=_plans([visits] * 8)
        )
        for budget, visits in ((0.801, 5), (0.804, 4))
    ]
    found = _by_name(_contest(*policies))
    assert [name for name in found if name.endswith("0.801")] == [
        f"{kind} 0.801" for kind in ("routed", "static mixture", "ShortGPT", "random", "oracle")
    ]
    assert found["random 0.801"].run.mean_depth != found["random 0.804"].run.mean_depth


@pytest.mark.parametrize("name", ["routed 0.80", "base"])
def test_two_policies_of_one_name_are_refused(name: str) -> None:
    first = _entrant(_plans([5] * PROMPTS))
    second = PlannedPolicy(name=name, kind="preset", budget=0.8, plans=_plans([4] * PROMPTS))
    with pytest.raises(ConfigError, match=f"two policies of the comparison are named '{name}'"):
        _contest(first, second)


def test_front_plans_deeper_than_any_policy_are_scored_for_the_line_of_the_plot() -> None:
    comparison = _contest(_entrant(_plans([6] * 7 + [5])))
    assert [name for name in comparison.sets if name.startswith("front")] == ["front 1", "front 0"]
    line = comparison.front_metrics(_table(comparison))
    assert [point["depth"] for point in line] == pytest.approx([5 / 6, 1.0])
    assert line[1]["metrics"] == {"preserve": 0.0, "agreement": 1.0}


def test_a_depth_that_no_static_plan_reaches_is_not_compared_and_said_so() -> None:
    comparison = _contest(_entrant(_plans([2] * PROMPTS)))
    found = _by_name(comparison)
    assert found["routed 0.80"].static is None
    assert "static mixture 0.80" not in found
    assert "ShortGPT 0.80" in found
    figures = [
        policy_metrics(item.run, found["base"].run, item.static, seed=0) for item in found.values()
    ]
    assert findings(figures, "preserve")[0].startswith(
        "routed 0.80 (mean depth 0.333, n = 8) has no static mixture of equal depth to be compared with. It"
    )


def test_a_policy_deeper_than_the_base_has_no_baselines_that_skip() -> None:
    plans = _plans([6] * PROMPTS)
    plans[:, 0] = 2
    found = _by_name(_contest(_entrant(plans, budget=1.1)))
    assert list(found) == ["base", "routed 1.10", "oracle 1.10"]


def test_a_preset_is_compared_at_its_own_depth_without_a_row_for_each_baseline() -> None:
    preset = _entrant(_plans([6] * 6 + [5] * 2), kind="preset")
    found = _by_name(_contest(_entrant(_plans([5] * PROMPTS)), preset))
    assert [name for name in found if "0.80" in name][-1] == "preset 0.80"
    compared = found["preset 0.80"].static
    assert compared is not None
    assert compared.mean_depth == pytest.approx(preset.mean_depth)


def test_the_oracle_is_at_least_as_good_as_every_policy_of_its_depth() -> None:
    found = _by_name(_contest(_entrant(_plans([6, 5, 4, 3] * 2))))
    oracle = found["oracle 0.80"].run.metrics["preserve"].mean()
    routed = found["routed 0.80"].run.metrics["preserve"].mean()
    assert oracle >= routed - 1e-9
    assert (
        policy_metrics(found["oracle 0.80"].run, found["base"].run, None, seed=0)["ranked"] is False
    )


@given(st.integers(1, 12), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99))
def test_random_plans_have_the_depth_asked_for(
    layers: int, prompts: int, where: float, seed: int
) -> None:
    depth = 1 / layers + where * (1 - 1 / layers)
    plans = random_plans(layers, prompts, depth, seed=seed)
    visits = plans.sum(axis=1)
    assert plans.shape == (prompts, layers)
    assert set(np.unique(plans)) <= {0, 1}
    assert abs(plan_depth(plans).mean() - depth) <= 0.5 / (layers * prompts) + 1e-9
    assert visits.max() - visits.min() <= 1
    assert visits.min() >= 1


def test_random_plans_differ_between_prompts_and_seeds() -> None:
    plans = random_plans(20, 50, 0.7, seed=0)
    assert len(np.unique(plans, axis=0)) > 40
    assert (plans.mean(axis=0) > 0.4).all()
    assert (plans.mean(axis=0) < 0.95).all()
    assert (plans == random_plans(20, 50, 0.7, seed=0)).all()
    assert (plans != random_plans(20, 50, 0.7, seed=1)).any()


def test_random_plans_cannot_be_deeper_than_the_base() -> None:
    with pytest.raises(BudgetError, match=r"mean depth 1\.1; expected a depth from 0\.2500 to 1"):
        random_plans(4, 3, 1.1, seed=0)


def test_shortgpt_removes_the_least_influential_layer_first() -> None:
    plans = removal_plans(INFLUENCE)
    assert ["".join(map(str, plan)) for plan in plans] == [
        "111111",
        "111110",
        "011110",
        "011100",
        "001100",
        "001000",
    ]


def test_action_shares_add_up() -> None:
    plans = np.array([[0, 1, 2], [0, 1, 1]], dtype=np.uint8)
    assert action_shares(plans) == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.5, 0.5]]
