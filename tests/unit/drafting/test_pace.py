"""The pace lets drafts be made as long as they are measured to pay, and tries again what was too slow."""

import copy

import pytest

from dynadepth.drafting.pace import Drafts, Pace

PLAIN = 0.01


def play(
    pace: Pace, cycles: int, seconds: dict[Drafts, float], *, lookup: bool = True
) -> list[Drafts]:
    """Let cycles take so long; a cycle with drafts gives two tokens."""
    chosen = []
    for _ in range(cycles):
        kind = pace.choose(lookup=lookup)
        count = int(kind is not Drafts.NONE)
        pace.cycle(
            kind,
            drafts=count,
            kept=count,
            tokens=1 + count,
            seconds={Drafts.NONE: PLAIN, **seconds}[kind],
        )
        chosen.append(kind)
    return chosen


def test_slow_drafts_stop_and_are_tried_again_ever_more_seldom() -> None:
    pace = Pace()
    slow = {Drafts.EXITS: 3 * PLAIN}
    chosen = play(pace, 150, slow, lookup=False)
    assert pace.totals.paused == 1
    assert chosen.count(Drafts.EXITS) == 24
    assert pace.choose(lookup=False) is Drafts.NONE
    chosen = play(pace, 20_000, slow, lookup=False)
    # Pauses of 128, 256, ... and 4,096 tokens.
    assert 6 <= pace.totals.paused <= 12
    assert chosen.count(Drafts.EXITS) < 0.02 * len(chosen)


def test_drafts_that_fail_for_a_sentence_are_not_given_up() -> None:
    pace = Pace()
    for _ in range(6):
        play(pace, 14, {Drafts.EXITS: 2.6 * PLAIN}, lookup=False)
        play(pace, 40, {Drafts.EXITS: 1.0 * PLAIN}, lookup=False)
    assert pace.totals.paused == 0
    assert pace.totals.speedup > 1.2


def test_fast_drafts_go_on() -> None:
    pace = Pace()
    play(pace, 400, {Drafts.EXITS: 1.2 * PLAIN}, lookup=False)
    assert pace.totals.paused == 0
    assert pace.totals.drafts > 350
    assert pace.totals.speedup == pytest.approx(2 / 1.2, rel=0.01)


def test_the_faster_of_two_kinds_is_taken_and_the_other_is_timed_now_and_then() -> None:
    for fast, slow in ((Drafts.EXITS, Drafts.LOOKUP), (Drafts.LOOKUP, Drafts.EXITS)):
        pace = Pace()
        chosen = play(pace, 400, {fast: 1.2 * PLAIN, slow: 1.6 * PLAIN})
        assert chosen.count(fast) > 330
        assert 10 < chosen.count(slow) < 40
        # Without anything to look up, exits draft whether they are the faster or not.
        assert set(play(pace, 40, {fast: 1.2 * PLAIN, slow: 1.6 * PLAIN}, lookup=False)) == {
            Drafts.EXITS,
            Drafts.NONE,
        }
        # When the machine changes, so does the choice.
        chosen = play(pace, 1600, {fast: 1.6 * PLAIN, slow: 1.2 * PLAIN})
        assert chosen[-200:].count(slow) > 160


def test_one_slow_kind_does_not_stop_the_other() -> None:
    pace = Pace()
    chosen = play(pace, 300, {Drafts.LOOKUP: 4 * PLAIN, Drafts.EXITS: 1.2 * PLAIN})
    assert chosen.count(Drafts.LOOKUP) < 40
    assert chosen.count(Drafts.EXITS) > 250
    assert pace.totals.looked_up == chosen.count(Drafts.LOOKUP)
    assert pace.totals.looked_up_kept == pace.totals.looked_up < pace.totals.kept


def test_without_times_every_cycle_drafts() -> None:
    pace = Pace(measured=False)
    slow = {Drafts.EXITS: 9.0, Drafts.LOOKUP: 9.0}
    assert set(play(pace, 50, slow)) == {Drafts.LOOKUP}
    assert set(play(pace, 50, slow, lookup=False)) == {Drafts.EXITS}
    assert pace.totals.paused == 0


def test_a_copy_goes_on_by_itself() -> None:
    pace = Pace()
    play(pace, 100, {Drafts.EXITS: 1.2 * PLAIN}, lookup=False)
    copied = copy.deepcopy(pace)
    assert copied.totals == pace.totals
    before = pace.totals
    play(copied, 50, {Drafts.EXITS: 1.2 * PLAIN}, lookup=False)
    assert pace.totals == before != copied.totals
    copied.reset()
    assert copied.totals.cycles == 0
