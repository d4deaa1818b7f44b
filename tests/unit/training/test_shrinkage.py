"""The choice of s: nothing from noise, something from a strong effect, and honest counting."""

import numpy as np
import pytest
import torch

from dynadepth.errors import ConfigError, PlanError
from dynadepth.plans import plan_depth
from dynadepth.policies.router_heads import RouterConfig
from dynadepth.training import shrinkage
from dynadepth.training.router_training import train_heads
from dynadepth.training.shrinkage import (
    SHRINKAGES,
    logit_scale,
    plans_of,
    select_shrinkage,
)
from dynadepth.training.train_config import TrainConfig

LAYERS, WIDTH, PROMPTS = 8, 12, 100
CONFIG = RouterConfig(num_layers=LAYERS, hidden_size=WIDTH, num_windows=2, bottleneck=16)
RECIPE = TrainConfig(epochs=10, learning_rate=1e-2, batch_size=20)


def make_front() -> np.ndarray:
    """Removes layers 0 to 5, one after the other."""
    front = np.ones((7, LAYERS), dtype=np.uint8)
    for step in range(1, 7):
        front[step:, step - 1] = 0
    return front


class World:
    """Prompts of two kinds, and what skipping costs them.

    Skipping layer l costs l / 10. Besides, a prompt of the first kind can do without the even layers among 0 to 5, one
    of the second kind without the odd ones, and skipping any other layer costs 1 more. With `readable=False` the
    features do not tell the kind, and to leave the front's order costs without a return.
    """

    def __init__(self, seed: int, *, readable: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.kind = torch.randint(0, 2, (PROMPTS,), generator=generator).numpy()
        self.features = torch.randn(PROMPTS, LAYERS, CONFIG.num_views, WIDTH, generator=generator)
        if readable:
            self.features[:, :, -1, 0] = 2.0 * torch.from_numpy(self.kind)[:, None] - 1.0
        self.actions = np.ones((PROMPTS, LAYERS), dtype=np.uint8)
        for prompt, kind in enumerate(self.kind):
            self.actions[prompt, kind:6:2] = 0
        self.calls = 0
        self.trained: list[tuple[np.ndarray, int]] = []
        self.pairs: list[tuple[int, bytes]] = []

    def evaluate(self, prompts, plans):
        self.calls += 1
        self.pairs += [(int(p), plan.tobytes()) for p, plan in zip(prompts, plans, strict=True)]
        cost = np.tile(1.0 + np.arange(LAYERS) / 10, (len(prompts), 1))
        for row, prompt in enumerate(prompts):
            cost[row, self.kind[prompt] : 6 : 2] -= 1.0
        return -(cost * (plans == 0)).sum(axis=1)

    def train(self, prompts, seed):
        """Return routers that learned from some prompts, and note which."""
        self.trained.append((prompts, seed))
        features, actions = self.features[prompts], self.actions[prompts]
        return train_heads(features, actions, CONFIG, RECIPE, seed=seed)

    def choose(self, *, features=None, front=None, **changes):
        return select_shrinkage(
            self.features if features is None else features,
            self.train,
            make_front() if front is None else front,
            self.evaluate,
            **{"seed": 0, **changes},
        )


@pytest.mark.parametrize("seed", range(3))
def test_an_effect_that_features_tell_is_used(seed):
    choice = World(seed, readable=True).choose()
    assert choice.shrinkage == 1.0
    last = choice.trials[-1]
    assert last.gain > 5 * last.standard_error > 0
    # With 1.5, 3 and 4.5 layers removed, a perfect router meets 0, 0 and 1.5 of the costs of 1; the front meets half.
    assert 0.4 < last.gain < 1.1
    assert [trial.shrinkage for trial in choice.trials] == list(SHRINKAGES)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_gained_from_noise(seed):
    choice = World(seed, readable=False).choose()
    assert choice.shrinkage == 0.0
    assert all(trial.gain <= trial.standard_error for trial in choice.trials)


def test_static_and_routed_plans_are_compared_at_the_same_depth():
    """A reward that is the depth itself, whatever the plan, leaves no gain."""
    world = World(0, readable=True)
    world.evaluate = lambda prompts, plans: plan_depth(plans)
    choice = world.choose()
    assert choice.shrinkage == 0.0
    for trial in choice.trials:
        assert abs(trial.gain) < 1e-12
        assert trial.depths == tuple(sorted(trial.depths))


def test_no_pair_is_evaluated_twice_and_all_in_one_call():
    world = World(0, readable=True)
    choice = world.choose()
    assert world.calls == 1
    assert len(set(world.pairs)) == len(world.pairs) == choice.evaluations
    # Three shrinkages at three depths, and at most the front's seven plans.
    assert choice.evaluations <= PROMPTS * (9 + 7)
    assert {prompt for prompt, _ in world.pairs} == set(range(PROMPTS))


def test_features_that_betray_the_label_gain_nothing_without_them():
    """Held-out prompts are judged on features that do not depend on their label."""
    world = World(0, readable=False)
    betraying = world.features.clone()
    betraying[:, :, -1, 0] = 2.0 * torch.from_numpy(world.kind)[:, None] - 1.0
    clean, world.features = world.features, betraying
    assert world.choose().shrinkage == 1.0
    assert world.choose(features=clean).shrinkage == 0.0


def test_every_prompt_is_judged_by_routers_that_did_not_learn_from_it(monkeypatch):
    world, judged = World(0, readable=True), []
    compare = shrinkage._compare_fold

    def watch(logits, held_logits, bias, prompts, front, pairs):
        judged.append(prompts)
        return compare(logits, held_logits, bias, prompts, front, pairs)

    monkeypatch.setattr(shrinkage, "_compare_fold", watch)
    world.choose()
    assert len(world.trained) == len(judged) == 5
    assert sorted(np.concatenate(judged).tolist()) == list(range(PROMPTS))
    for (trained, _), prompts in zip(world.trained, judged, strict=True):
        assert sorted([*trained.tolist(), *prompts.tolist()]) == list(range(PROMPTS))
    assert len({seed for _, seed in world.trained}) == 5


def test_protected_layers_run_once_in_every_plan():
    world = World(0, readable=True)
    world.choose(protect=(6, 7))
    plans = np.array([list(plan) for _, plan in world.pairs])
    assert (plans[:, 6:] == 1).all()


def test_a_group_is_in_one_fold(monkeypatch):
    world = World(0, readable=True)
    # The odd steps mix the groups over the rows.
    groups = [str(index * 7 % 20) for index in range(PROMPTS)]
    folds = []
    compare = shrinkage._compare_fold

    def watch(logits, held_logits, bias, prompts, front, pairs):
        folds.append([groups[prompt] for prompt in prompts])
        return compare(logits, held_logits, bias, prompts, front, pairs)

    monkeypatch.setattr(shrinkage, "_compare_fold", watch)
    world.choose(groups=groups)
    assert [len(fold) for fold in folds] == [20] * 5
    assert sum(len(set(fold)) for fold in folds) == len(set(groups)) == 20


def test_groups_that_cannot_be_folded_are_refused():
    world = World(0, readable=True)
    with pytest.raises(ConfigError, match="9 prompts cannot be cross-validated in 5 folds"):
        world.choose(groups=[str(index % 9) for index in range(PROMPTS)])
    with pytest.raises(ConfigError, match="groups has 3 entries for 100 prompts"):
        world.choose(groups=["a", "b", "c"])
    assert world.calls == 0


def test_the_choice_is_the_same_for_the_same_seed():
    assert World(1, readable=True).choose() == World(1, readable=True).choose()


def test_a_front_of_the_identity_alone_needs_no_evaluation():
    world = World(0, readable=True)
    choice = world.choose(front=make_front()[:1])
    assert (choice.shrinkage, choice.trials, world.calls, world.trained) == (0.0, (), 0, [])


def test_the_evidence_goes_to_json():
    content = World(0, readable=True).choose().to_dict()
    assert content["prompts"] == PROMPTS
    assert [trial["shrinkage"] for trial in content["trials"]] == list(SHRINKAGES)
    assert all(len(trial["gains"]) == len(trial["depths"]) == 3 for trial in content["trials"])


def test_bad_arguments_are_refused():
    world = World(0, readable=True)
    with pytest.raises(ConfigError, match="100 prompts cannot be cross-validated in 51 folds"):
        world.choose(folds=51)
    with pytest.raises(PlanError, match="starts with a plan that edits layers"):
        world.choose(front=make_front()[1:])
    assert world.trained == []
    world.evaluate = lambda prompts, plans: np.full(len(prompts), np.nan)
    with pytest.raises(ConfigError, match="some are not finite"):
        world.choose()


def test_the_scale_is_the_spread_of_the_lead_where_there_is_any():
    logits = torch.zeros(4, 2, 3)
    logits[:, 0, 1] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert logit_scale(logits) == pytest.approx(1.0)
    logits[:, 0, 0] = -logits[:, 0, 1]
    assert logit_scale(logits) == pytest.approx(2.0)
    assert logit_scale(torch.zeros(4, 2, 3)) == 1.0


def test_a_plan_without_layers_runs_the_last():
    plans = plans_of(torch.zeros(1, 3, 3), torch.zeros(3, 3), shrinkage=1.0, penalty=9.0)
    assert plans.tolist() == [[0, 0, 1]]


def test_the_mixture_is_made_of_the_plans_on_the_hull():
    front = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]], dtype=np.uint8)
    assert shrinkage._on_hull(front, [0.0, -5.0, -1.0, -4.0]).tolist() == front[[0, 2, 3]].tolist()
    assert (
        shrinkage._on_hull(front, [0.0, -1.0, -2.0, -3.0])[[0, -1]].tolist()
        == front[[0, -1]].tolist()
    )
    with pytest.raises(
        ConfigError, match=r"front_rewards has shape \(2,\); expected one finite number"
    ):
        shrinkage._on_hull(front, [0.0, 1.0])
