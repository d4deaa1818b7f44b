"""What is timed, on which prompts, beside which runs of the base model."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dynadepth_search.evaluation import costs
from dynadepth_search.evaluation.costs import time_runs
from dynadepth_search.evaluation.metrics import PolicyRun
from dynadepth_search.scoring import runtime_checks
from dynadepth_search.scoring.runtime_checks import time_prefill


class Machine:
    """A model, its clock and its scorer, in one: each prompt costs its length, and the machine slows down."""

    device = torch.device("cpu")

    def __init__(self, slowdown=1.0):
        self.now, self.speed, self.slowdown, self.pace = 0.0, 1.0, slowdown, 1.0
        self.ran = []

    def encode_prompts(self, examples):
        return examples[0], None

    def __call__(self, *, input_ids, **_):
        self.ran.append((self.pace, input_ids))
        self.now += self.pace * input_ids * self.speed
        self.speed *= self.slowdown

    def perf_counter(self):
        return self.now


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()

    @contextmanager
    def wrapped(model, *, pace):
        model.pace = pace
        yield
        model.pace = 1.0

    monkeypatch.setattr(runtime_checks, "wrapped", wrapped)
    monkeypatch.setattr(runtime_checks, "time", machine)
    return machine


def test_ratios_are_to_the_base_model_on_the_same_prompts(machine):
    policies = {"half": ({"pace": 0.5}, [3.0, 5.0]), "twice": ({"pace": 2.0}, [100.0])}
    found, base = time_prefill(machine, machine, policies, rounds=3)
    assert [found[name].median for name in policies] == [0.5, 2.0]
    assert [found[name].milliseconds for name in policies] == [2000.0, 200_000.0]
    assert [found[name].prompts for name in policies] == [2, 1]
    assert base == pytest.approx(52_000.0)


def test_each_run_is_beside_one_of_the_base_model(machine):
    time_prefill(machine, machine, {"one": ({"pace": 0.5}, [3.0])}, rounds=2)
    # Each measurement is one prompt that does not count, and the prompt; neither is always the second.
    assert [pace for pace, _ in machine.ran] == [1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 1.0, 1.0]


@pytest.mark.usefixtures("machine")
def test_what_is_set_up_at_the_first_prompt_does_not_count(monkeypatch):
    class SetUp(Machine):
        def __call__(self, **given):
            super().__call__(**given)
            self.now += 1000.0 * (self.pace != self.paced)
            self.paced = self.pace

        paced = None

    slow = SetUp()
    monkeypatch.setattr(runtime_checks, "time", slow)
    found, _ = time_prefill(slow, slow, {"half": ({"pace": 0.5}, [3.0, 5.0])}, rounds=2)
    assert found["half"].median == 0.5


def test_a_machine_that_slows_down_slows_both(machine):
    machine.slowdown = 1.01
    policies = {f"policy {number}": ({"pace": 0.5}, [1.0]) for number in range(30)}
    found, _ = time_prefill(machine, machine, policies, rounds=2)
    # A run is two prompts away from the one beside it, however many policies there are.
    drift = 1.01**2
    for each in found.values():
        assert (each.low, each.high) == pytest.approx((0.5 / drift, 0.5 * drift))


def test_a_policy_is_timed_on_shallow_and_deep_plans(monkeypatch):
    asked = {}

    def noted(_model, _scorer, policies, *, rounds):
        asked.update(policies, rounds=rounds)
        ratio = runtime_checks.TimeRatio(1.0, 1.0, 1.0, rounds, 4, 1.0)
        return dict.fromkeys(policies, ratio), 1.0

    monkeypatch.setattr(costs, "time_prefill", noted)
    # Every fourth prompt is deep, the others shallow; prompt 0 is deep.
    plans = np.array([[1] * 4 if row % 4 == 0 else [1, 0, 0, 1] for row in range(16)], np.uint8)
    run = PolicyRun(name="menu", kind="routed", depth=plans.mean(axis=1), metrics={}, plans=plans)
    times, _ = time_runs(
        None,
        SimpleNamespace(shortcuts=None),
        list(range(16)),
        [SimpleNamespace(run=run)],
        {"menu": {}},
        prompts=4,
        rounds=2,
        progress=lambda *_: None,
    )
    _, prompts = asked["menu"]
    assert [prompt % 4 == 0 for prompt in prompts] == [False, False, False, True]
    assert times["menu"]["median"] == 1.0
