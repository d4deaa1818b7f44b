"""The Rust forest does, step by step, what its plain-Python reference does."""

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dynadepth.tree_search.forest import Forest
from tests.reference.forests import random_prior, search_configs, table_reward
from tests.reference.mcts import ReferenceForest, SplitMix64


@given(st.data())
def test_asks_and_bests_agree_step_by_step(data):
    num_layers = data.draw(st.integers(1, 6), label="num_layers")
    config = data.draw(search_configs(num_layers), label="config")
    seed = data.draw(st.integers(0, 2**64 - 1), label="seed")
    keys = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4), label="keys")
    prior = random_prior(num_layers, seed) if data.draw(st.booleans(), label="prior") else None
    grain = data.draw(st.sampled_from([0.0, 0.5]), label="grain")
    order = random.Random(seed)

    forest = Forest(
        num_layers,
        len(keys),
        config=config,
        seed=seed,
        prior=prior,
        tree_keys=np.array(keys, dtype=np.uint64),
    )
    reference = ReferenceForest(num_layers, keys, config=config, seed=seed, prior=prior)
    waiting = []
    while not reference.finished:
        max_plans = order.randint(1, 20)
        asked = reference.ask(max_plans)
        batch = forest.ask(max_plans)
        rows = zip(batch.tree.tolist(), batch.ticket.tolist(), batch.plans.tolist(), strict=True)
        assert [(tree, ticket, tuple(plan)) for tree, ticket, plan in rows] == asked
        waiting += [
            (ticket, table_reward(seed, keys[tree], plan, grain=grain))
            for tree, ticket, plan in asked
        ]
        order.shuffle(waiting)
        now = len(waiting) if not asked else order.randint(0, len(waiting))
        told, waiting = waiting[:now], waiting[now:]
        forest.tell([ticket for ticket, _ in told], [reward for _, reward in told])
        reference.tell([ticket for ticket, _ in told], [reward for _, reward in told])
        assert forest.finished == reference.finished
    for tree in range(len(keys)):
        assert tuple(forest.best(tree).plan.tolist()) == reference.trees[tree].best()
        plans = forest.evaluated(tree).plans.tolist()
        assert [tuple(plan) for plan in plans] == [
            one.plan for one in reference.trees[tree].evaluations
        ]
    if reference.prior is not None:
        np.testing.assert_array_equal(forest.prior().mean, reference.prior.mean)
        np.testing.assert_array_equal(forest.prior().variance, reference.prior.variance)


@given(st.data())
def test_visits_of_a_node_are_its_own_and_those_of_its_edges(data):
    """The bookkeeping that both share: every told reward is counted once at each node of its path, and nowhere else."""
    num_layers = data.draw(st.integers(2, 5))
    rule = data.draw(st.sampled_from(["puct", "drllm"]))
    config = data.draw(search_configs(num_layers, selection=rule))
    seed = data.draw(st.integers(0, 1000))
    reference = ReferenceForest(num_layers, [seed], config=config, seed=seed)
    while not reference.finished:
        asked = reference.ask(5)
        reference.tell(
            [ticket for _, ticket, _ in asked],
            [table_reward(seed, seed, plan, grain=0.25) for *_, plan in asked],
        )
    tree = reference.trees[0]
    inside = [one for one in tree.evaluations if one.path is not None]
    own = {one.plan: 1 for one in inside}
    for plan, node in tree.nodes.items():
        below = sum(edge.count for (parent, _), edge in tree.edges.items() if parent == plan)
        assert node.count == own[plan] + below
        assert node.open == 0
    root = tree.nodes[tree.rules.identity]
    assert root.count == len(inside)
    told = sum(reference.rules.signal(one.plan, one.reward) for one in inside)
    assert root.total == told or abs(root.total - told) < 1e-9


def test_the_generator_is_the_published_one():
    rng = SplitMix64(1234567)
    assert [rng.next() for _ in range(2)] == [6457827717110365317, 3203168211198807973]
