"""Policies: static plans, and the formula that routers decide by."""

import copy

import numpy as np
import pytest
import torch

from dynadepth.config import RouterConfig
from dynadepth.errors import ConfigError, PlanError
from dynadepth.plans import identity_plan
from dynadepth.policies import RouterPolicy, StaticPolicy, actions_of
from dynadepth.routers import RouterHeads, pool
from tests.tiny_routers import seen

CONFIG = RouterConfig(num_layers=4, hidden_size=6, num_windows=3, bottleneck=5)


@pytest.fixture
def heads():
    generator = torch.Generator().manual_seed(3)
    shapes = RouterHeads.expected_shapes(CONFIG)
    return RouterHeads.from_state_dict(
        CONFIG, {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    )


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(16, 7, 6, generator=generator)
    mask = torch.rand(16, 7, generator=generator) > 0.3
    mask[:, 2] = True
    return hidden, mask


def test_a_static_policy_gives_its_plan_to_every_row():
    policy = StaticPolicy([1, 0, 2, 1])
    assert (policy.num_layers, policy.decision_layers) == (4, ())
    plans = policy.initial_plans(3)
    assert plans.dtype == np.uint8
    assert plans.tolist() == [[1, 0, 2, 1]] * 3
    plans[0, 0] = 0
    assert policy.initial_plans(1).tolist() == [[1, 0, 2, 1]]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([0, 0, 0], "plan 0 skips all 3 layers"),
        ([1, 3], "plan 0 has action 3 at layer 1"),
        ([[1, 1]], r"array of shape \(1, 2\); expected one plan of shape \(num_layers,\)"),
        (1, r"array of shape \(\); expected one plan"),
    ],
)
def test_a_static_policy_refuses_what_is_no_plan(plan, message):
    with pytest.raises(PlanError, match=message):
        StaticPolicy(plan)


def test_a_static_policy_decides_nothing(batch):
    with pytest.raises(PlanError, match="static policy was asked to decide layer 1"):
        StaticPolicy([1, 1]).decide(1, batch[0], seen(batch[1]))


def test_actions_follow_the_formula_and_ties_go_down():
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 3.0], [5.0, 0.0, 0.0], [0.0, 2.0, 2.5]])
    assert actions_of(logits, 1.0).tolist() == [0, 2, 0, 1]
    assert actions_of(logits, 0.0).tolist() == [2, 2, 0, 2]
    assert actions_of(logits, 100.0).tolist() == [0, 0, 0, 0]
    assert actions_of(logits, -100.0).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("shrinkage", [0.25, 1.0])
@pytest.mark.parametrize("penalty", [-2.0, 0.0, 1.5])
def test_a_router_policy_decides_by_the_formula(heads, batch, shrinkage, penalty):
    bias = torch.randn(4, 3, generator=torch.Generator().manual_seed(5))
    policy = RouterPolicy(heads, bias, shrinkage=shrinkage, penalty=penalty)
    assert policy.decision_layers == (0, 1, 2, 3)
    hidden, mask = batch
    given = set()
    for layer_idx in policy.decision_layers:
        actions = policy.decide(layer_idx, hidden, seen(mask))
        h = heads.logits(layer_idx, pool(hidden, mask, CONFIG))
        scores = bias[layer_idx] + shrinkage * h - penalty * torch.tensor([0.0, 1.0, 2.0])
        assert actions.dtype == np.uint8
        assert actions[:, 0].tolist() == scores.argmax(dim=1).tolist()
        given |= set(actions[:, 0].tolist())
    assert len(given) > 1, "the case must tell actions apart"


def test_without_shrinkage_no_state_is_read_and_the_plan_is_static(heads):
    bias = torch.tensor([[-1.0, 0.0, -9.0], [-2.0, 0.0, -9.0], [-3.0, 0.0, -9.0], [1.0, 0.0, -9.0]])
    policy = RouterPolicy(heads, bias, shrinkage=0.0, penalty=2.5)
    assert policy.decision_layers == ()
    assert policy.initial_plans(2).tolist() == [[0, 0, 1, 0]] * 2


def test_with_shrinkage_the_identity_stands_until_layers_are_decided(heads):
    plans = RouterPolicy(heads, shrinkage=1.0, penalty=50.0).initial_plans(2)
    assert plans.tolist() == [identity_plan(4).tolist()] * 2


def test_layers_with_a_constant_router_are_not_read(heads, batch):
    tensors = heads.state_dict()
    for name, tensor in tensors.items():
        if name.endswith("second_weight"):
            tensors[name] = tensor.clone()
            tensors[name][[0, 2, 3]] = 0.0
    constant = RouterHeads.from_state_dict(CONFIG, tensors)
    bias = torch.randn(4, 3, generator=torch.Generator().manual_seed(5))
    policy = RouterPolicy(constant, bias, shrinkage=0.5, penalty=0.2)
    assert policy.decision_layers == (1,)
    plans = policy.initial_plans(len(batch[0]))
    plans[:, 1:] = policy.decide(1, batch[0], seen(batch[1]))
    for layer_idx in range(4):
        h = constant.logits(layer_idx, pool(*batch, CONFIG))
        scores = bias[layer_idx] + 0.5 * h - 0.2 * torch.tensor([0.0, 1.0, 2.0])
        assert plans[:, layer_idx].tolist() == scores.argmax(dim=1).tolist()


def test_states_that_hold_nan_are_no_ground_for_a_decision(heads, batch):
    hidden, mask = batch
    with pytest.raises(ConfigError, match="entering layer 2 hold NaN, so no router can decide"):
        RouterPolicy(heads).decide(2, torch.full_like(hidden, torch.nan), seen(mask))


def test_a_deep_copy_decides_alike_and_shares_no_state(heads, batch):
    policy = RouterPolicy(heads, shrinkage=0.5, penalty=0.3)
    with torch.inference_mode():
        before = [policy.decide(layer_idx, batch[0], seen(batch[1])) for layer_idx in range(4)]
    twin = copy.deepcopy(policy)
    policy.bias += 100.0 * torch.tensor([1.0, 0.0, 0.0])
    for layer_idx in range(4):
        assert np.array_equal(twin.decide(layer_idx, batch[0], seen(batch[1])), before[layer_idx])


def test_half_precision_and_autocast_decide_as_float32_of_the_same_states(heads, batch):
    policy = RouterPolicy(heads, shrinkage=1.0)
    hidden, mask = batch[0].to(torch.bfloat16), batch[1]
    expected = policy.decide(0, hidden.float(), seen(mask))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(policy.decide(0, hidden, seen(mask)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(3, 3)}, r"the bias has shape \(3, 3\)"),
        ({"bias": torch.full((4, 3), torch.inf)}, "values that are not finite"),
        ({"shrinkage": 1.5}, "shrinkage is 1.5; expected a number from 0 to 1"),
        ({"shrinkage": float("nan")}, "shrinkage is nan; expected a number from 0 to 1"),
        ({"penalty": float("inf")}, "penalty is inf; expected a finite number"),
    ],
)
def test_a_router_policy_refuses_bad_numbers(heads, change, message):
    with pytest.raises(ConfigError, match=message):
        RouterPolicy(heads, **change)


@pytest.mark.gpu
def test_the_formula_holds_on_a_device_with_the_decision_on_the_host(heads, batch):
    if not torch.cuda.is_available():
        pytest.skip("no accelerator")
    policy = RouterPolicy(heads, penalty=0.2)
    hidden, mask = batch[0].cuda(), batch[1].cuda()
    assert np.array_equal(
        policy.decide(1, hidden, seen(mask)), policy.decide(1, batch[0], seen(batch[1]))
    )
