"""What holds for every forest, whatever its settings and rewards."""

import itertools
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dynadepth.plans import plan_depth
from dynadepth.tree_search.forest import EditPrior, Forest, SearchConfig
from tests.reference.forests import finish, random_prior, search_configs, table_reward


def keyed_reward(seed, keys):
    return lambda tree, plan: table_reward(seed, keys[tree], plan)


def asked_plans(forest, tree):
    return [tuple(plan) for plan in forest.evaluated(tree).plans.tolist()]


def keeps_caps(plan, config):
    return (
        sum(plan) >= 1
        and sum(plan) <= config.max_depth * len(plan) + 1e-9
        and plan.count(2) <= config.max_repeats
        and len(plan) - plan.count(1) <= config.max_edits
        and all(plan[layer] == 1 for layer in config.protect)
    )


@given(st.data())
def test_enough_evaluations_find_the_best_plan_of_all(data):
    num_layers = data.draw(st.integers(1, 4))
    config = data.draw(search_configs(num_layers, max_evaluations=200, stop_at=0.0))
    seed = data.draw(st.integers(0, 1000))
    forest = Forest(num_layers, 1, config=config, seed=seed)
    finish(forest, keyed_reward(seed, [seed]))
    ranked = [
        (
            table_reward(seed, seed, plan) - config.depth_penalty * float(plan_depth(plan)),
            -sum(plan),
            [-action for action in plan],
        )
        for plan in itertools.product((0, 1, 2), repeat=num_layers)
        if keeps_caps(plan, config)
    ]
    value, visits, negated = max(ranked)
    best = forest.best(0)
    assert best.plan.tolist() == [-action for action in negated]
    assert best.value == value
    assert best.visits == -visits
    assert best.depth == plan_depth(best.plan)
    assert best.reward == table_reward(seed, seed, best.plan)


@given(st.data())
def test_plans_come_once_and_keep_the_caps(data):
    num_layers = data.draw(st.integers(2, 7))
    config = data.draw(search_configs(num_layers))
    seed = data.draw(st.integers(0, 1000))
    prior = random_prior(num_layers, seed) if data.draw(st.booleans()) else None
    forest = Forest(num_layers, 2, config=config, seed=seed, prior=prior)
    finish(forest, keyed_reward(seed, [0, 1]), max_plans=data.draw(st.integers(1, 20)))
    for tree in range(2):
        plans = asked_plans(forest, tree)
        assert len(set(plans)) == len(plans)
        assert plans[0] == (1,) * num_layers
        outside = [plan for plan in plans if not keeps_caps(plan, config)]
        assert all(len(plan) - plan.count(1) == plan.count(2) == 1 for plan in outside)
        assert not outside or (prior is None and config.probe_trees)
        for plan in [forest.best(tree), *forest.pareto(tree)]:
            assert keeps_caps(plan.plan.tolist(), config)


@given(st.data())
def test_a_label_depends_on_the_prompt_alone(data):
    """Other blocks, other batches, tells in pieces and backwards: the same plans, in the same order."""
    num_layers = data.draw(st.integers(2, 8))
    config = data.draw(search_configs(num_layers, max_evaluations=20))
    seed = data.draw(st.integers(0, 1000))
    prior = random_prior(num_layers, seed)
    keys = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=5, unique=True))

    def make(some):
        tree_keys = np.array(some, dtype=np.uint64)
        return Forest(
            num_layers, len(some), config=config, seed=seed, prior=prior, tree_keys=tree_keys
        )

    together = make(keys)
    while not together.finished:
        batch = together.ask(data.draw(st.integers(1, 30)))
        for row in reversed(range(len(batch))):
            reward = table_reward(seed, keys[batch.tree[row]], batch.plans[row])
            together.tell(batch.ticket[row : row + 1], [reward])
    for tree, key in enumerate(keys):
        alone = finish(make([key]), keyed_reward(seed, [key]))
        assert asked_plans(alone, 0) == asked_plans(together, tree)
        np.testing.assert_array_equal(alone.best(0).plan, together.best(tree).plan)


@given(st.data())
def test_the_unit_of_the_reward_does_not_matter(data):
    """Rewards, penalty and prior in another unit (a power of two, so that nothing rounds): the same plans."""
    num_layers = data.draw(st.integers(2, 6))
    rule = data.draw(st.sampled_from(["posterior", "puct"]))
    config = data.draw(search_configs(num_layers, selection=rule))
    seed = data.draw(st.integers(0, 1000))
    assume(config.depth_penalty > 0 or config.probe_trees > 0)
    unit = data.draw(st.sampled_from([2.0**-12, 2.0**9]))
    scaled = {**config.to_dict(), "depth_penalty": config.depth_penalty * unit}
    forests = [
        finish(
            Forest(num_layers, 2, config=settings, seed=seed),
            lambda tree, plan, unit=factor: table_reward(seed, int(tree), plan) * unit,
        )
        for settings, factor in [(config, 1.0), (type(config).from_dict(scaled), unit)]
    ]
    for tree in range(2):
        assert asked_plans(forests[0], tree) == asked_plans(forests[1], tree)


@given(st.data())
def test_a_search_that_stops_early_is_the_beginning_of_one_that_does_not(data):
    """Stopping only ends a search: what was asked before does not depend on it."""
    num_layers = data.draw(st.integers(2, 8))
    config = data.draw(search_configs(num_layers, selection="posterior", max_evaluations=40))
    seed = data.draw(st.integers(0, 1000))
    prior = random_prior(num_layers, seed) if data.draw(st.booleans()) else None
    asked = []
    for stop_at in (data.draw(st.sampled_from([0.1, 0.5, 1.5, 3.0])), 0.0):
        settings = replace(config, stop_at=stop_at)
        forest = Forest(num_layers, 2, config=settings, seed=seed, prior=prior)
        finish(forest, keyed_reward(seed, [0, 1]))
        asked.append([asked_plans(forest, tree) for tree in range(2)])
    for tree in range(2):
        early, never = (plans[tree] for plans in asked)
        assert early == never[: len(early)]


def test_a_prompt_with_nothing_to_gain_stops_at_once():
    """Where the probe says that every edit harms, and it does, a label takes few evaluations; else it goes on."""
    harm = EditPrior(np.full(24, -1.0), np.full(24, 0.04), 16)
    config = SearchConfig(max_evaluations=60, depth_penalty=0.1, stop_at=1.5)
    counts = []
    for effect in (-1.0, 0.5):
        forest = Forest(12, 1, config=config, seed=0, prior=harm if effect < 0 else None)
        finish(forest, lambda _, plan, effect=effect: effect * float((plan != 1).sum()))
        counts.append(len(forest.evaluated(0)))
    assert counts[0] < 5 < counts[1]


@given(st.data())
def test_the_front_is_what_no_plan_beats(data):
    num_layers = data.draw(st.integers(1, 5))
    config = data.draw(search_configs(num_layers))
    seed = data.draw(st.integers(0, 1000))
    forest = finish(Forest(num_layers, 1, config=config, seed=seed), keyed_reward(seed, [0]))
    told = forest.evaluated(0)
    within = [
        (int(visits), float(reward))
        for plan, visits, reward in zip(told.plans.tolist(), told.visits, told.rewards, strict=True)
        if keeps_caps(plan, config)
    ]
    front = [(plan.visits, plan.reward) for plan in forest.pareto(0)]
    expected = {
        (visits, reward)
        for visits, reward in within
        if not any(
            other <= visits and better >= reward and (other, better) != (visits, reward)
            for other, better in within
        )
    }
    assert front == sorted(expected)
    assert max(reward - config.depth_penalty * visits / num_layers for visits, reward in front) == (
        pytest.approx(forest.best(0).value)
    )


@given(st.lists(st.one_of(st.none(), st.floats(-10, 10)), min_size=2, max_size=8))
def test_a_prior_survives_json(entries):
    numbers = [np.nan if entry is None else entry for entry in entries]
    prior = EditPrior(np.array(numbers), np.abs(numbers), 3)
    read = EditPrior.from_dict(prior.to_dict())
    np.testing.assert_array_equal(read.mean, prior.mean)
    np.testing.assert_array_equal(read.variance, prior.variance)
    assert read.count == 3


def test_threads_share_a_forest():
    """Four threads that ask and tell at once: every plan is handed out once, and the result is that of one thread."""
    config = SearchConfig(max_evaluations=60, probe_trees=4)
    reward = keyed_reward(0, range(8))
    forest = Forest(6, 8, config=config, seed=0)
    tickets = []

    def work():
        while not forest.finished:
            batch = forest.ask(3)
            tickets.extend(batch.ticket.tolist())
            forest.tell(
                batch.ticket, [reward(*row) for row in zip(batch.tree, batch.plans, strict=True)]
            )

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(tickets)) == len(tickets)
    alone = finish(Forest(6, 8, config=config, seed=0), reward)
    for tree in range(8):
        assert asked_plans(forest, tree) == asked_plans(alone, tree)
