"""Introspection: what `model.dynadepth` tells of the last batch, of all batches, and of every visit."""

import copy
import gc
import threading

import numpy as np
import pytest
import torch

from dynadepth.caching.depth_cache import DepthCache
from dynadepth.caching.memory import KvBytes
from dynadepth.errors import ConfigError, PlanError
from dynadepth.execution.callbacks import VisitEvent
from dynadepth.plans import plan_text
from dynadepth.wrapping.bake import bake
from dynadepth.wrapping.stats import Totals
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from tests.tiny import MECHANISMS, random_batch, tiny_model
from tests.tiny_menus import random_menu

PLAN = np.array([1, 0, 2, 1], dtype=np.uint8)
ROWS = np.array([[1, 0, 2, 1], [1, 1, 1, 0], [0, 0, 1, 0]], dtype=np.uint8)


def batch(rows, *, width=7):
    return dict(zip(("input_ids", "attention_mask"), random_batch([width] * rows), strict=True))


def bytes_of(cache):
    """Bytes of a plain cache."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


# Plans as text


def test_a_plan_as_text_is_the_same_plan_wherever_it_is_given():
    model, inputs = tiny_model(), batch(1)
    baked = bake(model, "0,2,2-3")
    with torch.no_grad():
        expected = bake(model, PLAN)(**inputs).logits
        assert torch.equal(baked(**inputs).logits, expected)
        for text in ("1021", "0,2,2-3", "0,2-2,2,3"):
            wrap_model(model, plan=text)
            model(**inputs)
            assert model.dynadepth.last_plans.tolist() == [PLAN.tolist()]
            unwrap_model(model)


def test_a_block_takes_one_text_for_all_rows_or_one_for_each():
    model = wrap_model(tiny_model(), plan="1111")
    with model.dynadepth.plans("0,2,2-3"):
        model(**batch(3))
    assert model.dynadepth.last_plans.tolist() == [PLAN.tolist()] * 3
    with model.dynadepth.plans(["0,2,2-3", "1110", "2-2"]):
        model(**batch(3))
    assert model.dynadepth.last_plans.tolist() == ROWS.tolist()
    model(**batch(1))
    assert model.dynadepth.last_plans.tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ("0-4", "names layer 4, but the model has layers 0 to 3"),
        ("1-0", "goes backwards"),
        (["0-3", "0-3,"], "cannot be read at ''"),
        ("0,1,1,2,2,3", "6 visits .* max_depth allows 5"),
        ("1-3", r"layers \[0\] are protected"),
    ],
)
def test_a_wrong_text_is_refused_before_anything_runs(plans, message):
    model = wrap_model(tiny_model(), plan="1111", max_depth=1.25, protect=[0])
    with pytest.raises(PlanError, match=message), model.dynadepth.plans(plans):
        pytest.fail("the block was entered")


# The last batch


def test_nothing_is_told_before_the_first_batch():
    controller = wrap_model(tiny_model(), plan=PLAN).dynadepth
    assert controller.last_plans is None
    assert controller.last_depths is None
    assert controller.last_mean_depth is None
    assert controller.last_kv is None
    assert controller.totals == Totals()
    assert controller.totals.mean_depth is None
    assert repr(controller) == "<Controller: 4 layers, StaticPolicy 0,2,2-3; nothing planned yet>"


def test_depths_are_those_of_the_last_batch_row_by_row():
    model = wrap_model(tiny_model(), plan=PLAN)
    model(**batch(2))
    with model.dynadepth.plans(ROWS):
        model(**batch(3))
    assert model.dynadepth.last_depths.tolist() == [1.0, 0.75, 0.25]
    assert model.dynadepth.last_mean_depth == pytest.approx(2 / 3)


def test_what_is_told_of_the_last_batch_is_not_the_plan_in_force():
    model = wrap_model(tiny_model(), plan=PLAN)
    cache = model(**batch(1)).past_key_values
    model.dynadepth.last_plans[:] = 0
    assert cache.row_plans.plans.tolist() == [PLAN.tolist()]


def test_the_controller_shows_its_policy_limits_and_depths():
    model = wrap_model(tiny_model(), plan="0-3", max_depth=1.5, protect=[3, 0])
    with model.dynadepth.plans("0,3"):
        model(**batch(2))
    model(**batch(1))
    assert repr(model.dynadepth) == (
        "<Controller: 4 layers, StaticPolicy 0-3, max_depth 1.5, protect [0, 3]; "
        "last batch 1 row at depth 1.000; in all 3 rows at depth 0.667>"
    )
    model.dynadepth.reset_totals()
    assert repr(model.dynadepth).endswith("; last batch 1 row at depth 1.000>")


def test_a_policy_that_decides_as_the_prefill_goes_is_told_of_when_it_has_decided():
    policy = random_menu(layers=(1,), hidden_size=32, plans=np.array([[1, 1, 1, 1], [1, 0, 0, 1]]))
    model = wrap_model(tiny_model(), policy=policy.policy(0.8))
    model(**batch(4))
    texts = {plan_text(plan) for plan in model.dynadepth.last_plans}
    assert texts <= {"1111", "1001"}
    assert model.dynadepth.totals.prompts == 4
    assert "MenuPolicy" in repr(model.dynadepth)


# Key and value states


@pytest.mark.parametrize("family", MECHANISMS)
@pytest.mark.parametrize(
    "plans",
    [
        "1111",
        "0,2,2-3",
        "0-3,3",
        ["0,2,2-3", "1110", "2-2"],
        # On gemma3 all sliding layers are skipped, then all full ones.
        "1,3",
        "0,2",
        "0,0,1,1,2,2,3,3",
    ],
)
def test_plain_bytes_are_what_the_plain_model_holds(family, plans):
    rows = 3
    inputs = batch(rows, width=9)
    model = tiny_model(family)
    with torch.no_grad():
        plain = bytes_of(model(**inputs).past_key_values)
        wrap_model(model, plan="1111")
        with model.dynadepth.plans(plans):
            cache = model(**inputs).past_key_values
        kv = model.dynadepth.last_kv
    assert kv == KvBytes(held=cache.state_bytes, plain=plain)
    assert kv.saved == plain - cache.state_bytes
    if plans == "1111":
        assert kv.saved == 0
    if plans == "0,0,1,1,2,2,3,3":
        assert kv.saved == -plain


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_bytes_are_those_of_this_moment_while_the_cache_lives(family):
    model, inputs = tiny_model(family), batch(2)
    step = torch.full((2, 1), 5)
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        before = bytes_of(cache)
        model(step, past_key_values=cache)
        after = bytes_of(cache)
        wrap_model(model, plan="0-1,3")
        cache = model(**inputs).past_key_values
        assert model.dynadepth.last_kv.plain == before
        model(step, past_key_values=cache)
        assert model.dynadepth.last_kv.plain == after
    held = model.dynadepth.last_kv.held
    cache.batch_select_indices(torch.tensor([1]))
    assert model.dynadepth.last_kv == KvBytes(held // 2, after // 2)
    cache.reset()
    assert model.dynadepth.last_kv == KvBytes(0, 0)
    del cache
    gc.collect()
    assert model.dynadepth.last_kv is None


def test_bytes_of_a_generation_are_those_at_its_end_and_its_memory_is_free():
    model = wrap_model(tiny_model(), plan="0-1,3")
    gc.collect()
    before = sum(isinstance(each, DepthCache) for each in gc.get_objects())
    tokens = model.generate(**batch(2), max_new_tokens=4, do_sample=False)
    gc.collect()
    assert sum(isinstance(each, DepthCache) for each in gc.get_objects()) == before
    # The last token made is not read any more. 2 heads of 8 float64 numbers, keys and values.
    of_token = 2 * 2 * 8 * 8
    plain = 4 * 2 * (tokens.shape[1] - 1) * of_token
    assert model.dynadepth.last_kv == KvBytes(held=plain * 3 // 4, plain=plain)


def test_bytes_are_known_after_a_generation_that_was_broken_off():
    model = wrap_model(tiny_model(), plan="0-1,3")

    def stop(event):
        if event.num_tokens == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), model.dynadepth.watch(stop):
        model.generate(**batch(2), max_new_tokens=4)
    of_token = 2 * 2 * 8 * 8
    assert model.dynadepth.last_kv == KvBytes(3 * 2 * 7 * of_token, 4 * 2 * 7 * of_token)


def test_without_a_cache_there_are_no_bytes():
    model = wrap_model(tiny_model(), plan=PLAN)
    kept = model(**batch(1)).past_key_values
    assert model.dynadepth.last_kv is not None
    model(**batch(1), use_cache=False)
    assert model.dynadepth.last_kv is None
    model.generate(**batch(1), max_new_tokens=3, use_cache=False)
    assert model.dynadepth.last_kv is None
    assert kept.state_bytes > 0


# Totals


def test_totals_add_up_over_prefills_and_steps():
    model = wrap_model(tiny_model(), plan="1111")
    with model.dynadepth.plans(ROWS):
        model.generate(**batch(3), max_new_tokens=4, do_sample=False)
    visits = int(ROWS.sum())
    assert model.dynadepth.totals == Totals(
        prompts=3,
        planned_visits=visits,
        plain_planned_visits=12,
        prefill_forwards=1,
        decode_forwards=3,
        visits=4 * visits,
        plain_visits=4 * 12,
    )
    model(**batch(1))
    totals = model.dynadepth.totals
    assert (totals.prompts, totals.prefill_forwards, totals.decode_forwards) == (4, 2, 3)
    assert totals.mean_depth == pytest.approx((visits + 4) / 16)
    model.dynadepth.reset_totals()
    assert model.dynadepth.totals == Totals()
    assert model.dynadepth.last_plans.tolist() == [[1, 1, 1, 1]]


def test_beams_are_rows_and_their_visits_follow_them():
    model = wrap_model(tiny_model(), plan="1111")
    with model.dynadepth.plans(["0-2", "3-3"]):
        model.generate(**batch(2), max_new_tokens=3, num_beams=2, do_sample=False)
    totals = model.dynadepth.totals
    assert (totals.prompts, totals.planned_visits) == (4, 2 * 3 + 2 * 1)
    assert totals.prefill_forwards == 1
    assert totals.visits == (1 + totals.decode_forwards) * 8


def test_a_generation_without_a_cache_plans_its_prompts_once():
    model = wrap_model(tiny_model(), plan=PLAN)
    model.generate(**batch(2), max_new_tokens=4, use_cache=False)
    totals = model.dynadepth.totals
    assert (totals.prompts, totals.prefill_forwards, totals.decode_forwards) == (2, 1, 3)


def test_a_forward_that_raised_is_not_counted():
    model = wrap_model(tiny_model(), plan=PLAN)

    def fail(event):
        if event.layer_idx == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), model.dynadepth.watch(fail):
        model(**batch(2))
    totals = model.dynadepth.totals
    assert (totals.prefill_forwards, totals.visits, totals.plain_visits) == (0, 0, 0)


def test_threads_lose_no_count():
    model = wrap_model(tiny_model(), plan="1111")
    inputs = batch(3)
    errors = []

    def work():
        try:
            with torch.no_grad(), model.dynadepth.plans(ROWS):
                for _ in range(20):
                    model(**inputs)
                    _ = model.dynadepth.last_kv, repr(model.dynadepth)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    totals = model.dynadepth.totals
    assert (totals.prompts, totals.prefill_forwards, totals.visits) == (240, 80, 80 * ROWS.sum())


def test_a_deep_copy_goes_on_with_figures_of_its_own():
    model = wrap_model(tiny_model(), plan=PLAN)
    kept = model(**batch(2)).past_key_values
    twin = copy.deepcopy(model)
    assert twin.dynadepth.totals == model.dynadepth.totals
    assert twin.dynadepth.last_kv == model.dynadepth.last_kv
    twin(**batch(1))
    assert (model.dynadepth.totals.prompts, twin.dynadepth.totals.prompts) == (2, 3)
    assert len(model.dynadepth.last_plans) == 2
    assert kept.state_bytes == model.dynadepth.last_kv.held


# Watching


def test_a_callback_sees_every_visit_in_order():
    model, seen = wrap_model(tiny_model(), plan="1111"), []
    with model.dynadepth.plans(ROWS), model.dynadepth.watch(seen.append):
        model.generate(**batch(3), max_new_tokens=3, do_sample=False)
    visits = [(0, 0, (0, 1)), (1, 0, (1,)), (2, 0, (0, 1, 2)), (2, 1, (0,)), (3, 0, (0,))]
    assert seen == [VisitEvent(*visit, width) for width in (7, 1, 1) for visit in visits]


def test_before_and_after_frame_the_layers_own_forward():
    model, log = wrap_model(tiny_model(), plan="0,2,2"), []
    model.model.layers[2].self_attn.register_forward_hook(lambda *_: log.append("attention"))
    watch = model.dynadepth.watch(
        lambda event: log.append(("before", event.layer_idx, event.visit)),
        after=lambda event: log.append(("after", event.layer_idx, event.visit)),
    )
    with watch:
        model(**batch(1))
    assert log == [
        *[("before", 0, 0), ("after", 0, 0)],
        *[("before", 2, 0), "attention", ("after", 2, 0)],
        *[("before", 2, 1), "attention", ("after", 2, 1)],
    ]


def test_watching_changes_no_output():
    model = tiny_model()
    with torch.no_grad():
        wrap_model(model, plan="1111")
        with model.dynadepth.plans(ROWS):
            expected = model(**batch(3)).logits
            with model.dynadepth.watch(lambda _: None, after=lambda _: None):
                assert torch.equal(model(**batch(3)).logits, expected)


def test_blocks_inside_each_other_are_both_called_and_end_with_their_block():
    model, log = wrap_model(tiny_model(), plan="0-0"), []
    with model.dynadepth.watch(lambda _: log.append("outer")):
        with model.dynadepth.watch(after=lambda _: log.append("inner, after")):
            model(**batch(1))
        model(**batch(1))
    model(**batch(1))
    assert log == ["outer", "inner, after", "outer"]


def test_a_block_is_for_its_own_model_and_thread():
    model, other, log = wrap_model(tiny_model(), plan="0-0"), tiny_model(), []
    wrap_model(other, plan="0-0")
    with model.dynadepth.watch(log.append):
        other(**batch(1))
        thread = threading.Thread(target=lambda: model(**batch(1)))
        thread.start()
        thread.join()
    assert log == []
    assert model.dynadepth.totals.prompts == 1


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_what_a_callback_raises_comes_out_and_the_model_goes_on(when, error):
    model = wrap_model(tiny_model(), plan=PLAN)
    expected = model.generate(**batch(2), max_new_tokens=4, do_sample=False)

    def fail(event):
        if event.visit == 1:
            raise error

    with model.dynadepth.watch(**{when: fail}):
        for _ in range(2):
            with pytest.raises(error):
                model(**batch(2))
            with pytest.raises(error):
                model.generate(**batch(2), max_new_tokens=4)
    assert torch.equal(model.generate(**batch(2), max_new_tokens=4, do_sample=False), expected)


def test_no_event_is_made_when_nobody_watches(monkeypatch):
    def refuse(*_):
        raise AssertionError

    model = wrap_model(tiny_model(), plan=PLAN)
    monkeypatch.setattr("dynadepth.execution.plan_forward.VisitEvent", refuse)
    model(**batch(1))
    with pytest.raises(AssertionError), model.dynadepth.watch(print):
        model(**batch(1))


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ({}, "watch was given nothing to call; expected a function that takes one VisitEvent"),
        ({"before": 3}, "watch was given 3 to call"),
        ({"before": print, "after": "print"}, "watch was given 'print' to call"),
    ],
)
def test_only_what_can_be_called_can_watch(callbacks, message):
    model = wrap_model(tiny_model(), plan=PLAN)
    with pytest.raises(ConfigError, match=message), model.dynadepth.watch(**callbacks):
        pytest.fail("the block was entered")
