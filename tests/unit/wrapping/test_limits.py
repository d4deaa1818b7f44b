"""Limits against menus: what cannot be kept for some prompt is found when the model is wrapped."""

import numpy as np
import pytest
import torch

from dynadepth.errors import ConfigError, PlanError
from dynadepth.policies.menu_policy import MenuPolicy
from dynadepth.wrapping.constraints import Limits
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from tests.tiny import random_batch, tiny_model
from tests.tiny_menus import PLANS, random_menu


def menu_model(seed=0, **settings):
    model = tiny_model(num_layers=6)
    menu = random_menu(layers=(2, 4), windows=(0, 0), inner=(0, 0), hidden_size=32, seed=seed).menu
    return wrap_model(model, policy=MenuPolicy(menu), **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_depth": 1.0},  # plan 112010 repeats layer 2 and cannot
        {"protect": [2]},
        {"protect": [3]},
    ],
)
def test_limits_that_a_menu_of_two_steps_cannot_keep_are_refused_when_wrapping(settings):
    model = tiny_model(num_layers=6)
    before = dict(model.__dict__)
    menu = random_menu(layers=(2, 4), windows=(0, 0), inner=(0, 0), hidden_size=32).menu
    with pytest.raises(ConfigError, match="change what this menu chooses before layer 4"):
        wrap_model(model, policy=MenuPolicy(menu), **settings)
    assert model.__dict__ == before


@pytest.mark.parametrize("settings", [{"max_depth": 1.5}, {"protect": [5]}, {"protect": [0]}])
def test_limits_that_it_can_keep_are_kept_for_every_prompt(settings):
    for seed in range(5):
        model = menu_model(seed, **settings)
        ids, mask = random_batch([5, 9, 7, 8, 6], seed=seed)
        model(ids, attention_mask=mask)
        plans = model.dynadepth.last_plans
        assert (plans.sum(axis=1) <= 6 * settings.get("max_depth", 2)).all()
        assert (plans[:, settings.get("protect", [])] == 1).all()
        unwrap_model(model)


def test_what_is_accepted_never_leaves_a_prompt_without_a_plan():
    """Over all limits: a menu is refused exactly where some choice of heads has no way on."""
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        protect = np.flatnonzero(rng.random(6) < 0.25).tolist()
        limits = Limits(6, max_depth=rng.choice([None, 1.0, 1.17, 1.5]), protect=protect)
        stuck = any(leads_nowhere(limits, first) for first in range(len(PLANS)))
        if stuck:
            refused += 1
            with pytest.raises(ConfigError, match="no plan of it is left"):
                limits.check_menu(PLANS, (2, 4))
        else:
            limits.check_menu(PLANS, (2, 4))
    assert 0 < refused < 300


def leads_nowhere(limits, first):
    """Say whether a prompt that is given plan `first` at the first step has no plan at the second."""
    none = np.zeros(1, dtype=np.int64)
    start = limits.apply(PLANS[:1, :2].copy(), 0, none)
    visits = start.sum(axis=1, dtype=np.int64)
    chosen = limits.apply(PLANS[first : first + 1, 2:4].copy(), 2, visits)
    so_far = np.concatenate([start, chosen], axis=1)
    return not (PLANS[:, :4] == so_far).all(axis=1).any()


def test_a_menu_of_one_step_takes_any_limit():
    model = tiny_model(num_layers=6)
    menu = random_menu(layers=(2,), hidden_size=32).menu
    wrap_model(model, policy=MenuPolicy(menu), max_depth=1.0, protect=[2, 3])
    ids, mask = random_batch([5, 9, 7], seed=1)
    model(ids, attention_mask=mask)
    assert (model.dynadepth.last_plans.sum(axis=1) <= 6).all()


NUMPYS = [np.int64(1), np.uint8(1), np.int32(1)]


@pytest.mark.parametrize("layer", NUMPYS)
def test_layers_are_protected_by_numpys_numbers_too(layer):
    model = wrap_model(tiny_model(), plan="0-1,3", protect=[layer])
    assert "protect [1]" in repr(model.dynadepth)
    with pytest.raises(PlanError, match="protected"), model.dynadepth.plans("0,2-3"):
        pass


@pytest.mark.parametrize("depth", [np.float32(1.25), np.float64(1.25)])
def test_the_limit_of_depth_is_any_number(depth):
    model = wrap_model(tiny_model(), plan="0-3,3", max_depth=depth)
    assert "max_depth 1.25" in repr(model.dynadepth)
    for wrong in (True, np.bool_(1), "1.5", 0.5, torch.tensor(1.5)):
        with pytest.raises(ConfigError, match="max_depth is"):
            wrap_model(tiny_model(), plan="0-3", max_depth=wrong)
