"""The forest's Python face: settings, arrays in and out, and errors that say what to do."""

import json
import threading

import numpy as np
import pytest

import dynadepth._core
from dynadepth.errors import ConfigError, SearchError
from dynadepth.tree_search.forest import EditPrior, Forest, SearchConfig


def make(num_layers=3, num_trees=2, *, seed=0, prior=None, tree_keys=None, **settings):
    config = SearchConfig(**{"probe_trees": 0, "max_evaluations": 6, **settings})
    return Forest(num_layers, num_trees, config=config, seed=seed, prior=prior, tree_keys=tree_keys)


def told(forest, *, reward=0.0):
    batch = forest.ask(100)
    forest.tell(batch.ticket, np.full(len(batch), reward))
    return batch


def test_a_batch_has_the_promised_arrays():
    batch = make().ask(10)
    assert (batch.tree.dtype, batch.plans.dtype, batch.ticket.dtype) == (
        np.uint32,
        np.uint8,
        np.uint64,
    )
    assert batch.plans.shape == (2, 3)
    assert len(batch) == 2


def test_results_have_the_promised_arrays():
    forest = make()
    told(forest, reward=0.5)
    told(forest, reward=0.25)
    evaluated = forest.evaluated(1)
    assert evaluated.plans.dtype == np.uint8
    assert evaluated.rewards.tolist() == [0.5] + [0.25] * 4
    assert evaluated.visits.dtype == np.uint32
    assert (evaluated.depths == evaluated.visits / 3).all()
    assert len(evaluated) == 5
    best = forest.best(1)
    assert best.value == best.reward - best.depth
    assert best.visits == best.plan.sum()


def test_an_empty_batch_keeps_its_shape():
    forest = make()
    forest.ask(10)
    batch = forest.ask(10)
    assert batch.plans.shape == (0, 3)
    assert len(batch) == 0
    forest.tell(batch.ticket, [])
    forest.tell([], [])


def test_a_forest_ends_and_then_asks_nothing():
    forest = make()
    assert not forest.tree_finished(0)
    while not forest.finished:
        assert len(told(forest)) > 0
    assert forest.tree_finished(0)
    assert len(forest.ask(10)) == 0
    assert len(forest.evaluated(0)) == 6


def test_float32_rewards_are_taken_as_they_are():
    forest = make()
    batch = forest.ask(1)
    forest.tell(batch.ticket, np.array([0.1], dtype=np.float32))
    assert forest.best(0).reward == float(np.float32(0.1))


@pytest.mark.parametrize(
    ("ticket", "rewards", "message"),
    [
        ([0, 1], [0.0, 0.0], "ticket 1 was never handed out by this forest"),
        (
            [0, 2**32],
            [0.0, float("nan")],
            "the reward of ticket 4294967296 is NaN; expected a finite",
        ),
        ([0], [float("inf")], "the reward of ticket 0 is inf"),
        ([0, 0], [1.0, 1.0], "ticket 0 is told more than once"),
        ([0], [1.0, 2.0], "2 rewards were told for 1 tickets; give one reward for each"),
        ([-1], [1.0], "tickets are an array of int64 with shape"),
        ([0.0], [1.0], "tickets are an array of float64"),
        ([[0]], [1.0], "expected those of `ask`, shape"),
        ([0], ["high"], "rewards are an array of <U4"),
    ],
)
def test_a_wrong_tell_says_why_and_changes_nothing(ticket, rewards, message):
    forest, untouched = make(), make()
    open_tickets = forest.ask(10).ticket
    assert open_tickets.tolist() == untouched.ask(10).ticket.tolist()
    with pytest.raises(SearchError, match=message):
        forest.tell(ticket, rewards)
    assert [len(forest.evaluated(tree)) for tree in range(2)] == [0, 0]
    assert len(forest.ask(10)) == 0
    for one in (forest, untouched):
        one.tell(open_tickets, [0.25, 0.5])
        while not one.finished:
            batch = one.ask(100)
            one.tell(batch.ticket, batch.plans @ np.array([0.5, 0.25, 1.0]))
    for tree in range(2):
        one, other = forest.evaluated(tree), untouched.evaluated(tree)
        np.testing.assert_array_equal(one.plans, other.plans)
        np.testing.assert_array_equal(one.rewards, other.rewards)


def test_a_ticket_is_told_once():
    forest = make()
    batch = told(forest)
    with pytest.raises(SearchError, match="told more than once; each ticket takes one reward"):
        forest.tell(batch.ticket, [0.0, 0.0])


@pytest.mark.parametrize("max_plans", [0, -3])
def test_a_batch_of_nothing_is_refused(max_plans):
    with pytest.raises(SearchError, match=f"max_plans is {max_plans}; ask for at least one plan"):
        make().ask(max_plans)


@pytest.mark.parametrize("tree", [-1, 2])
def test_an_unknown_tree_is_named(tree):
    forest = make()
    for method in (forest.best, forest.pareto, forest.evaluated, forest.tree_finished):
        with pytest.raises(SearchError, match=f"tree {tree} does not exist; expected"):
            method(tree)


def test_results_before_their_time_are_refused():
    forest = make()
    with pytest.raises(SearchError, match="tree 0 has no evaluated plan yet; tell the reward"):
        forest.best(0)
    assert forest.pareto(0) == []
    with pytest.raises(SearchError, match="there is no prior: tell the rewards of the whole probe"):
        forest.prior()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_evaluations": 0}, r"SearchConfig.max_evaluations is 0; expected 1 to"),
        ({"max_evaluations": 2.5}, r"max_evaluations is 2.5 \(float\); expected a whole number"),
        ({"depth_penalty": -1.0}, "SearchConfig.depth_penalty is -1.0"),
        ({"depth_penalty": float("nan")}, "expected a finite number"),
        ({"max_depth": 0.8}, "SearchConfig.max_depth is 0.8; expected 1 to 2"),
        ({"selection": "ucb"}, "expected one of 'posterior', 'puct', 'drllm'"),
        ({"protect": (-1,)}, "expected layer indices from 0"),
        ({"random_child": 2.0}, "SearchConfig.random_child is 2.0; expected 0 to 1"),
        ({"round_size": 0}, "SearchConfig.round_size is 0"),
    ],
)
def test_a_wrong_setting_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        SearchConfig(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers=0; expected 1 to 4096"),
        ({"num_trees": 0}, "num_trees=0; expected 1 to"),
        ({"seed": -1}, r"seed=-1; expected 0 to 2\*\*64 - 1"),
        ({"protect": (3,)}, "the setting protect is 3; expected layers below 3"),
        ({"tree_keys": [1]}, r"tree_keys are an array of int64 with shape \(1,\)"),
        ({"tree_keys": [1, -1]}, "expected whole numbers from 0"),
        ({"prior": EditPrior(np.zeros(4), np.zeros(4), 1)}, "the prior has 4 edits; expected 6"),
        (
            {"prior": EditPrior(np.full(6, np.nan), np.zeros(6), 1)},
            "the prior gives NaN for the edit 'skip layer 0', which the search can reach; probe again",
        ),
    ],
)
def test_a_forest_that_cannot_be_made_says_why(change, message):
    with pytest.raises(ConfigError, match=message):
        make(**change)


def test_settings_survive_json():
    config = SearchConfig(protect=(1, 2), selection="drllm", max_depth=1.5)
    assert SearchConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match="did you mean 'depth_penalty'"):
        SearchConfig.from_dict({"depth_penalti": 1.0})


def test_a_forest_says_what_it_was_made_from():
    forest = make(protect=(1,), exploration=0.75)
    assert forest.config == SearchConfig(
        probe_trees=0, max_evaluations=6, protect=(1,), exploration=0.75
    )
    assert (forest.num_layers, forest.num_trees) == (3, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected an object with mean, variance and count"),
        ({"mean": [0.0], "variance": [0.0]}, "expected an object with mean, variance and count"),
        ({"mean": ["x"], "variance": [0.0], "count": 1}, "something other than numbers"),
        ({"mean": [0.0], "variance": [0.0, 1.0], "count": 1}, "expected two lists of one length"),
        ({"mean": [0.0], "variance": [0.0], "count": "1"}, "and a whole number"),
    ],
)
def test_a_wrong_prior_says_why(content, message):
    with pytest.raises(ConfigError, match=message):
        EditPrior.from_dict(content)


def test_the_probe_becomes_the_prior_of_other_forests():
    probe = Forest(3, 2, config=SearchConfig(max_evaluations=1, probe_trees=2), seed=0)
    batch = probe.ask(100)
    assert len(batch) == 2 * (1 + 6)
    probe.tell(batch.ticket, -1.0 * (batch.plans[:, 0] == 0))
    assert probe.finished
    prior = probe.prior()
    assert prior.mean.tolist() == [-1, 0, 0, 0, 0, 0]
    assert prior.variance.tolist() == [0] * 6
    assert prior.count == 2
    forest = make(prior=EditPrior.from_dict(json.loads(json.dumps(prior.to_dict()))))
    told(forest)
    asked, without = forest.ask(100).plans, make()
    told(without)
    # The skip that the probe found harmful is left out; nothing else tells it from the others.
    assert (asked[:, 0] != 0).all()
    assert (without.ask(100).plans[:, 0] == 0).any()
    assert forest.prior().mean.tolist() == prior.mean.tolist()


def test_a_protected_layer_is_neither_probed_nor_searched():
    forest = Forest(3, 1, config=SearchConfig(probe_trees=1, protect=(0,)), seed=0)
    while not forest.finished:
        told(forest)
    assert (forest.evaluated(0).plans[:, 0] == 1).all()
    assert np.isnan(forest.prior().mean[[0, 3]]).all()
    assert forest.prior().to_dict()["mean"][0] is None


def test_other_threads_run_while_rust_works():
    """A tell that starts a long round in every tree takes half a second; a thread that held the GIL would let no
    other one run.
    """
    forest = make(30, 4000, max_evaluations=41, round_size=40)
    batch = forest.ask(4000)
    running = threading.Event()
    done = threading.Event()

    def tell():
        running.set()
        forest.tell(batch.ticket, np.zeros(4000))
        done.set()

    thread = threading.Thread(target=tell)
    thread.start()
    running.wait()
    ticks = 0
    while not done.wait(0.001):
        ticks += 1
    thread.join()
    assert ticks > 5
    assert len(forest.ask(200_000)) == 4000 * 40


def test_a_tree_may_be_a_numpy_number():
    forest = make()
    batch = told(forest)
    assert forest.best(batch.tree[1]).visits == 3


def test_the_core_says_its_version():
    assert dynadepth._core.__version__.count(".") == 2
