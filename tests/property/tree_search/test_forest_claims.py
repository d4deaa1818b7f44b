"""How well the search searches, on synthetic models, with fixed seeds.

The published search, a random walk, finds a shorter plan without loss for 3, 9 and 30 % of prompts when 10, 25 and 50 %
of 28 layers can be skipped, at 50 simulations.
"""

from dataclasses import replace

import numpy as np
import pytest

from dynadepth.tree_search.forest import Forest, SearchConfig
from tests.reference.oracles import NUM_LAYERS, SharedOracle, SkippableOracle, search

NUM_PROMPTS = 200


def share_of_shorter_plans_without_loss(oracle, config):
    forest = search(Forest(NUM_LAYERS, NUM_PROMPTS, config=config, seed=1), oracle)
    best = [forest.best(tree) for tree in range(NUM_PROMPTS)]
    found = [plan.visits < NUM_LAYERS and plan.reward >= oracle.base_reward for plan in best]
    return np.mean(found)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("probe_trees", [0, 16])
def test_fifty_evaluations_find_a_shorter_plan_without_loss(fraction, probe_trees):
    oracle = SkippableOracle.draw(NUM_PROMPTS, fraction, seed=7)
    config = SearchConfig(
        max_evaluations=50, depth_penalty=oracle.depth_penalty, probe_trees=probe_trees
    )
    assert share_of_shorter_plans_without_loss(oracle, config) > 0.9


class Shared:
    """The shared oracle on 40 prompts, what could be gained on each, and what a probe finds out."""

    num_prompts = 40
    config = SearchConfig(
        max_evaluations=50, depth_penalty=SharedOracle.depth_penalty, probe_trees=0
    )

    def __init__(self):
        self.oracle = SharedOracle.draw(self.num_prompts, seed=3)
        self.achievable = [
            self.oracle.achievable(tree, self.config) for tree in range(self.num_prompts)
        ]
        probe = replace(self.config, max_evaluations=1, probe_trees=16)
        self.prior = search(self.forest(probe, prior=None), self.oracle).prior()

    def forest(self, config, *, prior):
        return Forest(NUM_LAYERS, self.num_prompts, config=config, seed=1, prior=prior)

    def shares(self, at, *, prior, **settings):
        """Gain over the identity plan after some evaluations, as a mean share of the achievable one."""
        config = replace(self.config, **settings)
        forest = search(self.forest(config, prior=prior), self.oracle)
        shares = []
        for tree, achievable in enumerate(self.achievable):
            told = forest.evaluated(tree)
            values = np.maximum.accumulate(told.rewards - config.depth_penalty * told.depths)
            gains = [values[count - 1] - values[0] for count in at]
            shares.append(np.array(gains) / (achievable - values[0]))
        return np.mean(shares, axis=0)


@pytest.fixture(scope="module")
def shared():
    return Shared()


def test_a_prior_gets_most_of_the_gain_at_few_evaluations(shared):
    at_24, at_50 = shared.shares((24, 50), prior=shared.prior)
    assert at_24 > 0.8
    assert at_50 > 0.87


def test_the_rule_beats_the_published_one(shared):
    published = shared.shares((24, 50), prior=shared.prior, selection="drllm", exploration=1.8)
    assert (shared.shares((24, 50), prior=shared.prior) > published + 0.3).all()


def test_the_prior_helps(shared):
    assert shared.shares((24,), prior=shared.prior) > shared.shares((24,), prior=None) + 0.2


def test_measuring_each_edit_in_its_own_tree_helps(shared):
    puct = {"selection": "puct", "exploration": 0.5}
    by_prior_alone = shared.shares((50,), prior=shared.prior, prior_weight=1e6, **puct)
    assert shared.shares((50,), prior=shared.prior, **puct) > by_prior_alone


def test_the_posterior_beats_puct(shared):
    puct = shared.shares((24, 50), prior=shared.prior, selection="puct", exploration=0.5)
    assert (shared.shares((24, 50), prior=shared.prior) > puct).all()
