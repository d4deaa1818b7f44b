"""Policies: static plans, and the formula that routers decide by."""

import copy

import numpy as np
import pytest
import torch

from dynadepth.errors import ConfigError, PlanError
from dynadepth.plans import identity_plan
from dynadepth.policies.base import StaticPolicy, actions_of
from dynadepth.policies.calibration import PenaltyMix
from dynadepth.policies.menu import Menu, MenuHead
from dynadepth.policies.menu_policy import MenuPolicy
from dynadepth.policies.prompt_batch import PromptBatch, prompt_mix
from dynadepth.policies.router_heads import RouterConfig, RouterHeads, pool
from dynadepth.policies.router_policy import RouterPolicy
from tests.tiny_menus import PLANS, random_menu, told
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


def states(rows=24, tokens=7, seed=0):
    """States and masks with padding anywhere but everywhere."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, tokens, 48, generator=generator)
    mask = torch.rand(rows, tokens, generator=generator) > 0.3
    mask[:, 2] = True
    return hidden, mask


def constant_menu(scores, plans=PLANS, layer=2):
    """A menu whose plans have these scores whatever the states."""
    scores = torch.tensor(scores)
    return Menu(plans, (MenuHead(layer, 0, torch.zeros(len(plans), 48), scores),))


class TestMenuPolicy:
    @pytest.mark.parametrize("windows", [0, 3])
    @pytest.mark.parametrize("inner", [0, 8])
    @pytest.mark.parametrize("penalty", [-3.0, 0.0, 1.5])
    def test_it_takes_the_plan_of_highest_score_less_the_price_of_its_depth(
        self, windows, inner, penalty
    ):
        menu = random_menu(windows=(windows,), inner=(inner,)).menu
        policy = MenuPolicy(menu, penalty)
        assert (policy.num_layers, policy.decision_layers) == (6, (2,))
        hidden, mask = states()
        decided = policy.decide(2, hidden, told(mask))
        scores = menu.heads[0].scores(menu.heads[0].read(hidden, mask)).double()
        best = (scores - penalty * torch.from_numpy(menu.depths)).argmax(dim=1)
        assert decided.dtype == np.uint8
        assert np.array_equal(decided, PLANS[best.numpy(), 2:])
        assert len(np.unique(decided, axis=0)) > 1, "the case must tell prompts apart"

    def test_what_all_plans_begin_with_stands_before_the_decision(self):
        plans = np.array([[0, 2, 1, 1], [0, 2, 1, 0]], dtype=np.uint8)
        menu = constant_menu([0.0, 0.0], plans)
        assert MenuPolicy(menu).initial_plans(2).tolist() == [[0, 2, 1, 1]] * 2
        assert MenuPolicy(random_menu().menu).initial_plans(1).tolist() == [[1] * 6]

    def test_ties_go_to_the_first_plan(self):
        hidden, mask = states(rows=3)
        policy = MenuPolicy(constant_menu([0.0, 1.0, 1.0, 0.5, -1.0, 1.0]))
        assert policy.decide(2, hidden, told(mask)).tolist() == [PLANS[1, 2:].tolist()] * 3
        # Plans 1 and 2 have the same depth, which a price does not tell apart either.
        policy = MenuPolicy(constant_menu([0.0, 1.0, 1.0, 0.0, 0.0, 0.0]), 0.7)
        assert policy.decide(2, hidden, told(mask)).tolist() == [PLANS[1, 2:].tolist()] * 3

    @pytest.mark.parametrize("steps", [1, 2])
    @pytest.mark.parametrize("windows", [0, 3])
    def test_the_plan_of_a_prompt_does_not_depend_on_its_batch(self, steps, windows):
        menu = random_menu(layers=(2, 4)[:steps], windows=(windows,), inner=(0, 8)).menu
        policy = MenuPolicy(menu, PenaltyMix(1.0, -1.0, 0.5))
        hidden, mask = states(rows=16)
        tokens = torch.randint(0, 1000, mask.shape, generator=torch.Generator().manual_seed(9))
        so_far = PLANS[np.arange(16) % 6]
        order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
        for layer in menu.decision_layers:
            together = policy.decide(layer, hidden, PromptBatch(mask, so_far, tokens))
            assert len(np.unique(together, axis=0)) > 1
            shuffled = policy.decide(
                layer, hidden[order], PromptBatch(mask[order], so_far[order], tokens[order])
            )
            assert np.array_equal(shuffled, together[order])
            for row in range(16):
                real = mask[row]
                alone = PromptBatch(
                    torch.ones(1, int(real.sum()), dtype=torch.bool),
                    so_far[row : row + 1],
                    tokens[row : row + 1, real],
                )
                decided = policy.decide(layer, hidden[row : row + 1, real], alone)
                assert np.array_equal(decided[0], together[row]), (layer, row)

    def test_prompts_whose_number_is_below_the_share_pay_the_penalty_of_the_deep(self):
        """Full depth is worth 1 more, so that it is bought for a price below 6 and not above."""
        menu = constant_menu([1.0, 0.0], np.array([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=np.uint8))
        hidden, mask = torch.zeros(4000, 1, 48), torch.ones(4000, 1, dtype=torch.bool)
        tokens = torch.arange(4000).unsqueeze(1) * 11
        prompts = PromptBatch(mask, np.ones((4000, 4), dtype=np.uint8), tokens)
        for share in (0.0, 0.3, 0.75, 1.0):
            policy = MenuPolicy(menu, PenaltyMix(shallow=8.0, deep=2.0, share=share))
            deep = policy.decide(2, hidden, prompts)[:, 1] == 1
            assert np.array_equal(deep, prompt_mix(tokens, mask).numpy() < share)
            assert deep.mean() == pytest.approx(share, abs=0.03)

    def test_where_penalties_are_mixed_tokens_are_needed(self):
        hidden, mask = states(rows=2)
        nameless = PromptBatch(mask, np.ones((2, 6), dtype=np.uint8))
        with pytest.raises(ConfigError, match="tells prompts apart by their tokens"):
            MenuPolicy(random_menu().menu, PenaltyMix(2.0, 1.0, 0.5)).decide(2, hidden, nameless)
        decided = MenuPolicy(random_menu().menu, PenaltyMix(1.0, 1.0, 0.5)).decide(
            2, hidden, nameless
        )
        assert np.array_equal(
            decided, MenuPolicy(random_menu().menu, 1.0).decide(2, hidden, nameless)
        )

    @pytest.mark.parametrize("penalty", [-2.0, 0.0, 2.0])
    def test_the_second_step_chooses_among_the_plans_that_are_open(self, penalty):
        menu = random_menu(layers=(2, 4)).menu
        policy = MenuPolicy(menu, penalty)
        hidden, mask = states(rows=60)
        first = policy.decide(2, hidden, told(mask))
        assert first.shape == (60, 2)
        so_far = policy.initial_plans(60)
        so_far[:, 2:4] = first
        later = torch.randn(60, 7, 48, generator=torch.Generator().manual_seed(3))
        second = policy.decide(4, later, told(mask, so_far))
        scores = menu.heads[1].scores(menu.heads[1].read(later, mask)).numpy()
        priced = scores - penalty * menu.depths
        for row in range(60):
            same = [plan for plan in range(6) if (PLANS[plan, :4] == so_far[row, :4]).all()]
            best = max(same, key=lambda plan: priced[row, plan])
            assert second[row].tolist() == PLANS[best, 4:].tolist()
        unrestricted = PLANS[priced.argmax(axis=1), 4:]
        assert not np.array_equal(second, unrestricted), "the case must restrict the choice"

    def test_where_no_plan_is_open_any_more_it_refuses(self):
        policy = MenuPolicy(random_menu(layers=(2, 4)).menu)
        hidden, mask = states(rows=3)
        so_far = PLANS[[0, 2, 4]].copy()
        so_far[2, 2] = 1  # as `max_depth` takes the repeat away
        text = (
            "no plan of the menu agrees with what row 2 of the batch has run before layer 4: `protect` or `max_depth` "
            "changed .*; train the menu again with these layers protected"
        )
        with pytest.raises(PlanError, match=text):
            policy.decide(4, hidden, told(mask, so_far))
        assert policy.decide(4, hidden[:2], told(mask[:2], so_far[:2])).shape == (2, 2)

    @pytest.mark.parametrize("layer", [0, 3, 5, 6, -1])
    def test_a_layer_at_which_it_does_not_decide_is_refused(self, layer):
        hidden, mask = states(rows=2)
        text = rf"asked to decide layer {layer}; it decides at layers \[2, 4\]"
        with pytest.raises(PlanError, match=text):
            MenuPolicy(random_menu(layers=(2, 4)).menu).decide(layer, hidden, told(mask))

    @pytest.mark.parametrize("windows", [0, 3])
    def test_states_that_hold_nan_are_no_ground_for_a_decision(self, windows):
        policy = MenuPolicy(random_menu(windows=(windows,)).menu)
        hidden, mask = states()
        expected = policy.decide(2, hidden, told(mask))
        padded = hidden.masked_fill(~mask.unsqueeze(2), torch.nan)
        assert np.array_equal(policy.decide(2, padded, told(mask)), expected)
        last = int(mask[5].nonzero().max())
        hidden[5, last, 7] = torch.nan
        with pytest.raises(ConfigError, match="entering layer 2 hold NaN, so no router can decide"):
            policy.decide(2, hidden, told(mask))

    def test_states_of_another_width_are_refused(self):
        hidden, mask = states()
        with pytest.raises(ConfigError, match="layer 2 has states of width 47; this menu reads wi"):
            MenuPolicy(random_menu().menu).decide(2, hidden[..., :47], told(mask))

    def test_half_precision_and_autocast_decide_as_float32_of_the_same_states(self):
        policy = MenuPolicy(random_menu(windows=(3,), inner=(8,)).menu, 0.5)
        hidden, mask = states(rows=64)
        half = hidden.to(torch.bfloat16)
        expected = policy.decide(2, half.float(), told(mask))
        assert np.array_equal(policy.decide(2, half, told(mask)), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert np.array_equal(policy.decide(2, half, told(mask)), expected)

    def test_a_deep_copy_decides_alike(self):
        policy = MenuPolicy(random_menu(layers=(2, 4)).menu, PenaltyMix(1.0, -1.0, 0.5))
        hidden, mask = states()
        twin = copy.deepcopy(policy)
        before = policy.decide(2, hidden, told(mask))
        policy.menu.heads[0].bias.add_(torch.arange(6) * 100.0)
        assert np.array_equal(twin.decide(2, hidden, told(mask)), before)

    @pytest.mark.parametrize(
        "penalty",
        [
            float("inf"),
            float("nan"),
            PenaltyMix(float("inf"), 0.0, 0.5),
            PenaltyMix(1.0, float("nan"), 1.0),
        ],
    )
    def test_a_penalty_must_be_finite(self, penalty):
        with pytest.raises(ConfigError, match="the penalty is .*; expected finite numbers"):
            MenuPolicy(random_menu().menu, penalty)

    @pytest.mark.gpu
    def test_it_follows_the_states_to_their_device_with_the_decision_on_the_host(self):
        if not torch.cuda.is_available():
            pytest.skip("no accelerator")
        policy = MenuPolicy(random_menu(layers=(2, 4)).menu, PenaltyMix(1.0, -1.0, 0.5))
        hidden, mask = states()
        there = told(mask)
        there = PromptBatch(mask.cuda(), there.plans, there.tokens.cuda())
        assert np.array_equal(
            policy.decide(2, hidden.cuda(), there), policy.decide(2, hidden, told(mask))
        )
