"""Synthetic models whose rewards are known, to measure how well a search searches.

Each oracle judges plans of 28 layers for many prompts: `reward(prompt, plans)` with plans of shape (rows, 28).
"""

from dataclasses import dataclass

import numpy as np

NUM_LAYERS = 28


@dataclass
class SkippableOracle:
    """A few layers of each prompt can be skipped at no loss; any other skip, and any repeat, harms.

    Which layers they are differs from prompt to prompt, so what a probe learns on others is of no help.
    """

    harm: np.ndarray
    repeat_harm: np.ndarray
    base_reward = -0.5
    depth_penalty = 1.0

    @classmethod
    def draw(cls, num_prompts, fraction, *, seed):
        rng = np.random.default_rng(seed)
        harm = rng.uniform(0.2, 2.0, (num_prompts, NUM_LAYERS))
        for row in harm:
            row[rng.choice(NUM_LAYERS, round(fraction * NUM_LAYERS), replace=False)] = 0.0
        return cls(harm, rng.uniform(0.0, 1.0, (num_prompts, NUM_LAYERS)))

    def reward(self, prompt, plans):
        skipped = ((plans == 0) * self.harm[prompt]).sum(axis=1)
        repeated = ((plans == 2) * self.repeat_harm[prompt]).sum(axis=1)
        return self.base_reward - skipped - repeated


@dataclass
class SharedOracle:
    """Effects of edits that prompts share in part, with sparse interactions of pairs of edits."""

    effect: np.ndarray
    pairs: np.ndarray
    depth_penalty = 0.5

    @classmethod
    def draw(cls, num_prompts, *, seed):
        rng = np.random.default_rng(seed)
        num_edits = 2 * NUM_LAYERS
        shared = rng.normal(-0.5, 0.7, num_edits)
        effect = shared + rng.normal(0.0, 0.5, (num_prompts, num_edits))
        shape = (num_prompts, num_edits, num_edits)
        pairs = np.triu((rng.random(shape) < 0.05) * rng.normal(0.0, 0.4, shape), 1)
        return cls(effect, pairs)

    def reward(self, prompt, plans):
        edits = np.concatenate([plans == 0, plans == 2], axis=1).astype(np.float64)
        alone = edits @ self.effect[prompt]
        together = np.einsum("ni,ij,nj->n", edits, self.pairs[prompt], edits)
        return alone + together

    def achievable(self, prompt, config):
        """The value that a local search with full knowledge reaches: one or two layers changed at a time."""
        plan = np.ones(NUM_LAYERS, dtype=np.uint8)
        value = self._values(prompt, plan[None])[0]
        while True:
            changed = self._neighbours(plan, config)
            values = self._values(prompt, changed)
            if values.max() <= value + 1e-12:
                return float(value)
            plan, value = changed[values.argmax()], values.max()

    def _values(self, prompt, plans):
        return self.reward(prompt, plans) - self.depth_penalty * plans.sum(axis=1) / NUM_LAYERS

    def _neighbours(self, plan, config):
        first, second = np.triu_indices(NUM_LAYERS)
        plans = np.repeat(plan[None], 9 * len(first), axis=0)
        rows = np.arange(len(plans))
        pair, actions = np.divmod(rows, 9)
        plans[rows, first[pair]] = actions // 3
        plans[rows, second[pair]] = actions % 3
        legal = (
            (plans.sum(axis=1) <= config.max_depth * NUM_LAYERS)
            & ((plans == 2).sum(axis=1) <= config.max_repeats)
            & ((plans != 1).sum(axis=1) <= config.max_edits)
            & plans.any(axis=1)
        )
        return plans[legal]


def search(forest, oracle):
    """Drive a forest to its end on an oracle's rewards."""
    while not forest.finished:
        batch = forest.ask(1 << 16)
        rewards = np.empty(len(batch))
        for prompt in np.unique(batch.tree):
            rows = batch.tree == prompt
            rewards[rows] = oracle.reward(prompt, batch.plans[rows])
        forest.tell(batch.ticket, rewards)
    return forest
