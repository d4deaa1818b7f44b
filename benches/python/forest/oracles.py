"""Models whose best plans are known: synthetic ones, and the table of a real one."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dynadepth.plans import EXECUTE, REPEAT, SKIP
from dynadepth.tree_search.forest import EditPrior, Forest, SearchConfig
from forest.table import Table

NUM_PROBED = 16
# The caps of every search here: the forest's own.
CAPS = SearchConfig()
# Rows of branch and bound beyond which an optimum is not proved.
MOST_ROWS = 30_000
KINDS = ("additive", "pairs", "repeats", "shared", "noisy")


@dataclass
class Oracle:
    """Judges plans of prompts; the last `NUM_PROBED` prompts are there to be probed.

    Args:
        effect: What each edit adds to the reward: edit l skips layer l, edit num_layers + l repeats it. Shape (prompts,
            edits), float64.
        pairs: What two edits add together: symmetric, zero between the two edits of one layer. Shape (prompts, edits,
            edits), float64; None: nothing.
        noise: Standard deviation of what a search sees around the truth; the same plan is always seen the same.
        depth_penalty: Lambda.
        protect: Layers that no search may edit.
        max_repeats: Most repeats of a plan.
    """

    effect: np.ndarray
    pairs: np.ndarray | None = None
    noise: float = 0.0
    depth_penalty: float = 0.5
    protect: tuple[int, ...] = ()
    max_repeats: int = CAPS.max_repeats

    @property
    def num_prompts(self) -> int:
        return len(self.effect) - NUM_PROBED

    @property
    def num_layers(self) -> int:
        return self.effect.shape[1] // 2

    @property
    def caps(self) -> SearchConfig:
        return replace(CAPS, protect=self.protect, max_repeats=self.max_repeats)

    @property
    def free(self) -> np.ndarray:
        return np.setdiff1d(np.arange(self.num_layers), self.protect)

    def truth(self, prompt: int, plans: np.ndarray) -> np.ndarray:
        """Return the rewards of plans, without noise."""
        edits = edits_of(plans)
        alone = edits @ self.effect[prompt]
        if self.pairs is None:
            return np.asarray(alone)
        return np.asarray(alone + np.einsum("ni,ij,nj->n", edits, self.pairs[prompt], edits) / 2)

    def seen(self, prompt: int, plans: np.ndarray) -> np.ndarray:
        """Return the rewards that a search is told."""
        rewards = self.truth(prompt, plans)
        return rewards + self.noise * noise_of(prompt, plans) if self.noise else rewards

    def gains(self, prompt: int, plans: np.ndarray, rewards: np.ndarray) -> np.ndarray:
        """Return what plans gain in value over the identity plan, whose true reward is 0."""
        del prompt
        return np.asarray(rewards + self.depth_penalty * (1 - plans.sum(axis=1) / self.num_layers))

    def prior(self, seed: int) -> EditPrior:
        """Return what single edits do over the prompts that no search is judged by."""
        config = replace(
            self.caps, max_evaluations=1, probe_trees=NUM_PROBED, depth_penalty=self.depth_penalty
        )
        forest = Forest(self.num_layers, NUM_PROBED, config=config, seed=seed)
        return searched(self.seen, forest, first=self.num_prompts).prior()

    def best_gain(self, prompt: int, known: float = 0.0) -> tuple[float, bool]:
        """Return the highest gain of any plan within the caps, and whether it is proved.

        Branch and bound, one layer after the other: what an undecided edit may still add is its gain beside the edits
        taken, plus half of all that undecided edits might add to it.

        Args:
            prompt: The prompt.
            known: The gain of a plan that is known.
        """
        caps, num_layers = self.caps, self.num_layers
        step = self.depth_penalty / num_layers
        alone = self.effect[prompt] + np.repeat([step, -step], num_layers)
        pairs = np.zeros((2 * num_layers,) * 2) if self.pairs is None else self.pairs[prompt]
        helpful = np.maximum(pairs, 0.0)
        hopes = np.maximum(alone + helpful.sum(axis=1), 0.0).reshape(2, num_layers).max(axis=0)
        order = self.free[np.argsort(-hopes[self.free])]
        plans = np.full((1, num_layers), EXECUTE)
        gains, marginal, best = np.zeros(1), alone[None], known
        for place, layer in enumerate(order):
            edits = (layer, num_layers + layer)
            gains = np.concatenate([gains, *(gains + marginal[:, edit] for edit in edits)])
            marginal = np.concatenate([marginal, *(marginal + pairs[edit] for edit in edits)])
            plans = np.tile(plans, (3, 1))
            plans[:, layer] = np.repeat([EXECUTE, SKIP, REPEAT], len(plans) // 3)
            best = max(best, gains[within(plans, caps)].max(initial=0.0))
            rest = np.concatenate([order[place + 1 :], num_layers + order[place + 1 :]])
            more = marginal[:, rest] + helpful[np.ix_(rest, rest)].sum(axis=1) / 2
            skips, repeats = np.split(np.maximum(more, 0.0), 2, axis=1)
            edits_left = caps.max_edits - (plans != EXECUTE).sum(axis=1)
            repeats_left = caps.max_repeats - (plans == REPEAT).sum(axis=1)
            bound = gains + highest(skips, edits_left) + highest(repeats, repeats_left)
            kept = (edits_left >= 0) & (repeats_left >= 0) & (bound > best + 1e-12)
            plans, gains, marginal = plans[kept], gains[kept], marginal[kept]
            if len(plans) > MOST_ROWS:
                return float(best), False
        return float(best), True


@dataclass
class Replay(Oracle):
    """The rewards of a table; the plans are sets of skips of its layers."""

    table: Table | None = None

    @classmethod
    def of(cls, table: Table) -> "Replay":
        rewards = table.rewards
        others = np.setdiff1d(np.arange(rewards.num_layers), rewards.layers)
        return cls(
            np.zeros((len(rewards) + NUM_PROBED, 2 * rewards.num_layers)),
            depth_penalty=table.depth_penalty,
            protect=tuple(others.tolist()),
            max_repeats=0,
            table=table,
        )

    def truth(self, prompt: int, plans: np.ndarray) -> np.ndarray:
        assert self.table is not None
        rewards = self.table.rewards
        both = np.concatenate([np.full((1, self.num_layers), EXECUTE), plans])
        found = rewards.rewards(np.full(len(both), prompt), both)
        return found[1:] - found[0]

    def prior(self, seed: int) -> EditPrior:
        del seed
        assert self.table is not None
        return self.table.prior

    def best_gain(self, prompt: int, known: float = 0.0) -> tuple[float, bool]:
        del known
        assert self.table is not None
        plans = self.table.rewards.plans
        return float(self.gains(prompt, plans, self.truth(prompt, plans)).max()), True


def draw(kind: str, num_layers: int, num_prompts: int, seed: int) -> Oracle:
    """Draw an oracle.

    Args:
        kind: `additive`: each prompt its own effects, mean -0.5, sd 0.86; all others share effects of sd 0.7 and add
            the prompt's own of sd 0.5. `shared`: one pair of edits in twenty interacts, sd 0.4; `noisy`: the same, seen
            with noise of sd 0.3; `repeats`: the same, where a fifth of the repeats gains 1.5 more; `pairs`: three pairs
            in ten interact, mean -0.1, sd 0.4. `nothing`: every edit harms. `few`: a tenth of the layers, others for
            each prompt, can be skipped at no loss, lambda 1; any other edit harms.
        num_layers: Number of layers.
        num_prompts: Prompts that searches are judged by.
        seed: Seed of the draw.
    """
    rng = np.random.default_rng([seed, num_layers])
    edits, total = 2 * num_layers, num_prompts + NUM_PROBED
    if kind == "few":
        harm = rng.uniform(0.2, 2.0, (total, num_layers))
        for row in harm:
            row[rng.choice(num_layers, round(0.1 * num_layers), replace=False)] = 0.0
        repeats = rng.uniform(0.0, 1.0, (total, num_layers))
        return Oracle(-np.concatenate([harm, repeats], axis=1), depth_penalty=1.0)
    if kind == "additive":
        return Oracle(rng.normal(-0.5, 0.86, (total, edits)))
    effect = rng.normal(-0.5, 0.7, edits) + rng.normal(0.0, 0.5, (total, edits))
    if kind == "nothing":
        return Oracle(-np.abs(effect) - depth_step(num_layers))
    if kind == "repeats":
        useful = rng.choice(num_layers, num_layers // 5, replace=False)
        effect[:, num_layers + useful] += 1.5
    share, mean = (0.3, -0.1) if kind == "pairs" else (0.05, 0.0)
    shape = (total, edits, edits)
    pairs = np.triu((rng.random(shape) < share) * rng.normal(mean, 0.4, shape), 1)
    layer = np.arange(edits) % num_layers
    pairs[:, layer[:, None] == layer] = 0.0
    return Oracle(effect, pairs + pairs.transpose(0, 2, 1), noise=0.3 if kind == "noisy" else 0.0)


def depth_step(num_layers: int) -> float:
    return Oracle.depth_penalty / num_layers


def searched(
    reward: Callable[[int, np.ndarray], np.ndarray], forest: Forest, first: int = 0
) -> Forest:
    """Drive a forest to its end; its trees are the prompts from `first` on."""
    while not forest.finished:
        batch = forest.ask(1 << 16)
        rewards = np.empty(len(batch))
        for tree in np.unique(batch.tree):
            rows = batch.tree == tree
            rewards[rows] = reward(first + int(tree), batch.plans[rows])
        forest.tell(batch.ticket, rewards)
    return forest


def edits_of(plans: np.ndarray) -> np.ndarray:
    """Return which edits plans contain. Shape (rows, 2 * num_layers), float64."""
    return np.concatenate([plans == SKIP, plans == REPEAT], axis=1).astype(np.float64)


def noise_of(prompt: int, plans: np.ndarray) -> np.ndarray:
    """Return a standard normal number for each plan of a prompt, from a hash of both."""
    keys = np.random.default_rng(prompt).integers(1 << 62, size=plans.shape[1], dtype=np.uint64)
    hashed = (plans.astype(np.uint64) * keys).sum(axis=1, dtype=np.uint64)
    draws = [np.random.default_rng([prompt, int(each)]).normal() for each in hashed]
    return np.asarray(draws)


def highest(numbers: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the sum of the `counts[row]` highest numbers of each row."""
    ranked = np.sort(numbers, axis=1)[:, ::-1]
    chosen = np.arange(numbers.shape[1]) < counts[:, None]
    return np.asarray(np.where(chosen, ranked, 0.0).sum(axis=1))


def within(plans: np.ndarray, caps: SearchConfig) -> np.ndarray:
    """Return which plans keep the caps."""
    visits = plans.sum(axis=1)
    return np.asarray(
        (visits >= 1)
        & (visits <= caps.max_depth * plans.shape[1])
        & ((plans == REPEAT).sum(axis=1) <= caps.max_repeats)
        & ((plans != EXECUTE).sum(axis=1) <= caps.max_edits)
        & (plans[:, list(caps.protect)] == EXECUTE).all(axis=1)
    )
