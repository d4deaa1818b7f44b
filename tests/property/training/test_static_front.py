"""The static part of the logits walks any nested front exactly."""

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynadepth.plans import plan_depth
from dynadepth.policies.base import actions_of
from dynadepth.policies.router_heads import RouterConfig, RouterHeads
from dynadepth.policies.router_policy import RouterPolicy
from dynadepth.training.static_front import (
    front_bias,
    front_calibration,
    removed_layers,
)


@st.composite
def fronts(draw: st.DrawFn) -> np.ndarray:
    """Nested plans from the identity on, each with one more layer skipped, at least one layer left."""
    num_layers = draw(st.integers(2, 80))
    order = draw(st.permutations(range(num_layers)))
    plans = [np.ones(num_layers, dtype=np.uint8)]
    for layer_idx in order[: draw(st.integers(0, num_layers - 1))]:
        plans.append(plans[-1].copy())
        plans[-1][layer_idx] = 0
    return np.array(plans)


_SCALES = st.floats(1e-3, 1e3)


@given(fronts(), _SCALES)
def test_growing_penalties_walk_the_front_step_by_step(front, scale):
    bias = front_bias(front, scale=scale)
    thresholds = sorted({float(-value) for value in bias[:, 0]})
    between = [low + (high - low) / 2 for low, high in pairwise(thresholds)]
    penalties = sorted([0.0, *between, *thresholds])
    walked = [actions_of(bias, penalty).numpy().astype(np.uint8) for penalty in penalties]
    on_front = [plan for plan in walked if plan.any()]
    assert all((plan < 2).all() for plan in walked), "REPEAT must never win"
    steps = [plan for i, plan in enumerate(on_front) if i == 0 or (plan != on_front[i - 1]).any()]
    # What the front never removes goes after all of it, at once.
    assert np.array_equal(np.array(steps)[: len(front)], front)
    assert len(steps) == len(front)


@given(fronts(), _SCALES)
def test_every_budget_on_the_front_gives_its_plan(front, scale):
    bias = front_bias(front, scale=scale)
    table = front_calibration(front, bias)
    assert table.range == (float(plan_depth(front[-1])), 1.0)
    num_layers = front.shape[1]
    config = RouterConfig(num_layers=num_layers, hidden_size=1, bottleneck=1)
    shapes = RouterHeads.expected_shapes(config)
    heads = RouterHeads.from_state_dict(config, {n: torch.ones(s) for n, s in shapes.items()})
    for plan in front:
        penalty = table.penalty_for(float(plan_depth(plan)))
        policy = RouterPolicy(heads, bias, shrinkage=0.0, penalty=penalty)
        assert np.array_equal(policy.initial_plans(1)[0], plan)


@given(fronts())
def test_the_removed_layers_rebuild_the_front(front):
    removed = removed_layers(front)
    for step in range(len(front)):
        assert set(np.flatnonzero(front[step] == 0)) == set(removed[:step])
