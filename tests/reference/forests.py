"""Ways to drive a forest in tests: rewards by table, tells in any order, random settings."""

import zlib

import numpy as np
from hypothesis import strategies as st

from dynadepth.tree_search.forest import EditPrior, SearchConfig


def table_reward(seed, tree_key, plan, *, grain=0.0):
    """A reward that only depends on the seed, the key and the plan; in steps of `grain` if it is not 0."""
    text = f"{seed} {tree_key} {bytes(int(action) for action in plan)!r}"
    rng = np.random.default_rng(zlib.crc32(text.encode()))
    reward = float(rng.normal())
    return round(reward / grain) * grain if grain else reward


@st.composite
def search_configs(draw, num_layers, **fixed):
    """Settings that any forest of `num_layers` layers takes."""
    settings = {
        "max_evaluations": draw(st.integers(1, 30)),
        "depth_penalty": draw(st.sampled_from([0.0, 0.3, 2.0])),
        "exploration": draw(st.sampled_from([0.0, 0.5, 3.0])),
        "selection": draw(st.sampled_from(["posterior", "puct", "drllm"])),
        "protect": tuple(draw(st.lists(st.integers(0, num_layers - 1), max_size=2))),
        "max_depth": draw(st.sampled_from([1.0, 1.25, 2.0])),
        "max_repeats": draw(st.integers(0, 3)),
        "max_edits": draw(st.integers(0, 4)),
        "virtual_loss": draw(st.sampled_from([0.0, 0.03, 1.0])),
        "probe_trees": draw(st.integers(0, 3)),
        "round_size": draw(st.integers(1, 6)),
        "temperature": draw(st.sampled_from([0.1, 1.0, 4.0])),
        "prior_weight": draw(st.sampled_from([0.0, 0.5, 3.0])),
        "random_child": draw(st.sampled_from([0.0, 0.0, 0.3])),
        "interaction": draw(st.sampled_from([0.0, 0.03, 1.0])),
        "noise": draw(st.sampled_from([0.01, 0.5])),
        "stop_at": draw(st.sampled_from([0.0, 0.0, 1.0])),
    }
    return SearchConfig(**{**settings, **fixed})


def random_prior(num_layers, seed):
    """A prior that measures every edit."""
    rng = np.random.default_rng(seed)
    return EditPrior(rng.normal(size=2 * num_layers), rng.random(2 * num_layers), 5)


def finish(forest, reward, *, max_plans=64):
    """Drive a forest to its end; `reward(tree, plan)` judges each plan."""
    while not forest.finished:
        batch = forest.ask(max_plans)
        forest.tell(
            batch.ticket, [reward(*row) for row in zip(batch.tree, batch.plans, strict=True)]
        )
    return forest
