"""Several threads generate on one model at once, each with plans, caches and modes of its own."""

import contextlib
import copy
import sys
import threading

import pytest
from transformers.generation.streamers import BaseStreamer

from dynadepth.plans import identity_plan
from dynadepth.wrapping.wrap import wrap_model
from tests.parity.drivers import mixed_plans
from tests.parity.recompute import (
    assert_same,
    difference,
    generated,
    plans_alone,
    prompts_of,
    recomputing,
)
from tests.parity.test_generate import FEW, POLICIES
from tests.tiny import tiny_model

# Each runs in a thread of its own.
MODES = (
    {"do_sample": False},
    {"num_beams": 3},
    {"do_sample": False, "cache_implementation": "static"},
    {"do_sample": False, "use_cache": False},
)
ROUNDS = 3
NEW = 4


@pytest.fixture(autouse=True)
def _impatient():
    """Let threads take turns hundreds of times in a forward."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def at_once(works):
    """Run functions in threads that start together; raise what any of them raised."""
    barrier, errors = threading.Barrier(len(works)), []

    def run(work):
        try:
            barrier.wait(timeout=60)
            work()
        except BaseException as error:  # An assertion of a thread is one of the test.
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("kind", ["fixed", "menu", "routers"])
@pytest.mark.parametrize("family", FEW)
def test_threads_do_not_mix(family, kind):
    base = tiny_model(family, num_layers=6)
    policy = None if kind == "fixed" else POLICIES[kind]()
    model = wrap_model(
        copy.deepcopy(base),
        **({"plan": identity_plan(6)} if policy is None else {"policy": policy}),
    )
    works, all_plans = [], set()
    for who, settings in enumerate(MODES):
        ids, mask, prompts = prompts_of([7, 10, 4], seed=who)
        fixed = mixed_plans(6, 3, seed=who)
        plans = (
            dict(zip(prompts, fixed, strict=True))
            if policy is None
            else plans_alone(base, policy, prompts)
        )
        all_plans |= {plan.tobytes() for plan in plans.values()}
        reference = {**settings, "use_cache": False, "cache_implementation": None}
        expected = generated(recomputing(base, plans), ids, mask, **reference, max_new_tokens=NEW)

        def work(ids=ids, mask=mask, settings=settings, fixed=fixed, expected=expected):
            for _ in range(ROUNDS):
                block = model.dynadepth.plans(fixed) if policy is None else contextlib.nullcontext()
                with block:
                    found = generated(model, ids, mask, **settings, max_new_tokens=NEW)
                assert_same(found, expected, settings)

        works.append(work)
    assert len(all_plans) > 2
    at_once(works)


def test_one_thread_fails_and_the_others_go_on():
    base = tiny_model("llama")
    model = wrap_model(copy.deepcopy(base), plan=identity_plan(4))
    ids, mask, prompts = prompts_of([7, 10, 4])
    plans = mixed_plans(4, 3, seed=1)
    expected = generated(
        recomputing(base, dict(zip(prompts, plans, strict=True))),
        ids,
        mask,
        do_sample=False,
        use_cache=False,
        max_new_tokens=NEW,
    )

    class Failing(BaseStreamer):
        def __init__(self):
            self.heard = 0

        def put(self, value):
            self.heard += 1
            if self.heard == 3:
                raise ZeroDivisionError

        def end(self):
            raise AssertionError("it fails before")

    def good():
        for _ in range(3 * ROUNDS):
            with model.dynadepth.plans(plans):
                found = generated(model, ids, mask, do_sample=False, max_new_tokens=NEW)
            assert_same(found, expected)

    def bad():
        for _ in range(3 * ROUNDS):
            with pytest.raises(ZeroDivisionError), model.dynadepth.plans([2, 2, 2, 2]):
                generated(model, ids, mask, max_new_tokens=NEW, streamer=Failing())

    at_once([good, bad, good])


def test_a_block_holds_in_its_own_thread_only():
    """A thread that a streaming server starts inside the block runs the policy's plans, not the block's."""
    base = tiny_model("llama")
    model = wrap_model(copy.deepcopy(base), plan=[1, 0, 1, 2])
    ids, mask, _ = prompts_of([7, 10, 4])
    settings = {"do_sample": False, "max_new_tokens": NEW}
    own = generated(model, ids, mask, **settings)
    found = []
    with model.dynadepth.plans([2, 1, 2, 0]):
        inside = generated(model, ids, mask, **settings)
        at_once([lambda: found.append(generated(model, ids, mask, **settings))])
    assert_same(found[0], own)
    assert difference(inside, own) > 1e-2
