"""The threshold of late exits moves by what audits find, and keeps its promise on traffic unlike any before."""

import copy

import pytest
import torch

from dynadepth.exits.audit import Audit, Audited
from dynadepth.exits.dial import Dial


def traffic(dial, scores, wrong_at, *, seed=0):
    """Play tokens whose early reading is wrong with a probability that falls with the score; return who was changed."""
    generator = torch.Generator().manual_seed(seed)
    changed = []
    for score in scores:
        leaves = float(score) >= dial.threshold
        wrong = leaves and float(torch.rand((), generator=generator)) < wrong_at(float(score))
        changed.append(wrong)
        dial.record(tokens=1, changed=int(wrong))
    return torch.tensor(changed, dtype=torch.float)


def scores_of(count, seed):
    return 3.0 * torch.randn(count, generator=torch.Generator().manual_seed(seed))


class TestADial:
    @pytest.mark.parametrize("start", [-5.0, 0.0, 6.0])
    def test_the_share_of_changed_tokens_is_the_promise_in_the_long_run(self, start):
        dial = Dial(start, fidelity=0.97)
        changed = traffic(dial, scores_of(20_000, 1), lambda score: 1 / (1 + 2.7**score))
        assert float(changed[2_000:].mean()) == pytest.approx(0.03, abs=0.004)

    def test_so_it_is_when_the_traffic_changes_half_way(self):
        dial = Dial(2.0, fidelity=0.97)
        first = traffic(dial, scores_of(10_000, 2), lambda score: 0.1 / (1 + 2.7**score))
        # The same scores mean much less now.
        second = traffic(dial, scores_of(10_000, 3), lambda score: 3 / (3 + 2.7**score), seed=5)
        assert float(first[1_000:].mean()) == pytest.approx(0.03, abs=0.006)
        assert float(second.mean()) == pytest.approx(0.03, abs=0.006)

    def test_a_worthless_router_ends_at_the_base_models_depth(self):
        dial = Dial(-3.0, fidelity=0.98)
        scores = scores_of(20_000, 4)
        changed = traffic(dial, scores, lambda score: 1.0)
        left = scores[-5_000:] >= dial.threshold
        assert float(changed[-5_000:].mean()) <= 0.025
        assert float(left.float().mean()) <= 0.03

    def test_frozen_it_stays(self):
        dial = Dial(1.0, fidelity=0.9, adapt=False)
        dial.record(tokens=10, changed=10)
        assert dial.threshold == 1.0

    def test_it_never_goes_where_nothing_was_measured(self):
        dial = Dial(1.0, fidelity=0.5, lowest=0.5)
        dial.record(tokens=1_000, changed=0)
        assert dial.threshold == 0.5

    def test_a_copy_goes_on_by_itself(self):
        dial = Dial(1.0, fidelity=0.9)
        other = copy.deepcopy(dial)
        other.record(tokens=1, changed=1)
        assert (dial.threshold, other.threshold) == (1.0, pytest.approx(1.18))


def told(audit, *, given, true, early, counts=None):
    early = torch.tensor(early)
    counts = torch.ones_like(early) if counts is None else torch.tensor(counts)
    audit.settled(true, given, early, counts)


def states(*choices):
    return torch.eye(5)[list(choices)]


class TestAnAudit:
    def test_it_compares_early_tokens_and_no_others(self):
        dial = Dial(0.0, fidelity=0.5, step=1.0)
        audit = Audit(dial=dial)
        told(audit, given=states(1, 2, 3), true=states(1, 3, 4), early=[True, True, False])
        told(audit, given=None, true=states(1, 1, 1), early=[False, False, False])
        audit.look(lambda found: found)
        assert audit.found == Audited(tokens=6, early=2, read=2, changed=1)
        assert audit.found.fidelity == pytest.approx(5 / 6)
        assert dial.threshold == pytest.approx(1 - 0.5 * 6)

    def test_what_a_row_pads_with_counts_nowhere(self):
        audit = Audit()
        told(audit, given=states(1, 2), true=states(3, 3), early=[True, True], counts=[True, False])
        audit.look(lambda found: found)
        assert audit.found == Audited(tokens=1, early=1, read=1, changed=1)

    @pytest.mark.parametrize("pieces", [[40], [7] * 6, [1] * 40])
    def test_a_share_is_read_evenly_however_they_come(self, pieces):
        dial = Dial(0.0, fidelity=1.0, step=1.0)
        audit = Audit(0.25, dial)
        for count in pieces:
            rows = [1] * count
            told(audit, given=states(*rows), true=states(*([2] * count)), early=[True] * count)
            audit.look(lambda found: found)
        found = audit.found
        assert (found.early, found.read) == (sum(pieces), sum(pieces) // 4)
        assert found.changed == found.read
        # Each of them stands for four.
        assert dial.threshold == pytest.approx(sum(pieces), abs=6)

    def test_it_looks_when_enough_waits_and_once_only(self):
        audit, calls = Audit(), []

        def read(found):
            calls.append(len(found))
            return found

        while not audit.is_due:
            told(audit, given=states(1), true=states(1), early=[True])
        audit.look(read)
        audit.look(read)
        assert calls == [2 * audit.found.tokens]
        assert not audit.is_due

    def test_nothing_found_is_no_fidelity(self):
        assert Audit().found.fidelity is None
        assert Audited(tokens=5, early=2).fidelity is None
        assert Audited(tokens=5).fidelity == 1.0

    def test_the_interval_holds_the_share_and_narrows(self):
        few, many = Audited(100, 50, 50, 5), Audited(10_000, 5_000, 5_000, 500)
        for each in (few, many):
            low, high = each.interval
            assert low < each.fidelity < high <= 1.0
        assert many.interval[1] - many.interval[0] < (few.interval[1] - few.interval[0]) / 5
        assert Audited(10).interval == (1.0, 1.0)

    def test_a_copy_has_the_counts_and_nothing_that_waits(self):
        audit = Audit()
        told(audit, given=states(1), true=states(2), early=[True])
        audit.look(lambda found: found)
        told(audit, given=states(1), true=states(2), early=[True])
        other = copy.deepcopy(audit)
        other.look(lambda found: found)
        assert other.found == Audited(1, 1, 1, 1)
