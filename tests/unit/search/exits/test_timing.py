"""Times in turns: what is compared with what, on which prompts."""

import numpy as np
import pytest
import torch

from dynadepth_search.exits.judging.timing import long_answers, time_in_turns
from dynadepth_search.scoring.own_text import Text

BATCHES = [(torch.zeros(1, 3), torch.ones(1, 3)), (torch.zeros(1, 5), torch.ones(1, 5))]


def quiet(*_: object) -> None:
    pass


def test_a_way_is_compared_by_the_time_of_a_token_and_in_turns() -> None:
    ran: list[str] = []

    def way(name: str, seconds: float, steps: int):
        def timed(batch):
            ran.append(name)
            return seconds * batch[0].shape[1], steps

        return timed

    found = time_in_turns(
        way("base", 1.0, 10),
        # As long a time, for half of the tokens.
        {"ours": way("ours", 1.0, 5), "other": way("other", 0.5, 10)},
        BATCHES,
        rounds=3,
        progress=quiet,
    )
    assert found["ours"].median == found["ours"].low == found["ours"].high == pytest.approx(2.0)
    assert found["other"].median == pytest.approx(0.5)
    assert found["other"].milliseconds == pytest.approx(1e3 * 0.5 * 4 / 10)
    assert found["ours"].batches == 2
    assert ran == ["base", "ours", "other"] * 7


def test_a_turn_is_the_sum_of_its_prompts() -> None:
    slow = iter([1.0, *[1.0, 2.0] * 2])
    found = time_in_turns(
        lambda _: (1.0, 1), {"ours": lambda _: (next(slow), 1)}, BATCHES, rounds=2, progress=quiet
    )
    assert found["ours"].median == pytest.approx(1.5)


def test_short_answers_are_not_timed() -> None:
    own = [Text(np.arange(3 + new), prompt=3) for new in (1, 3, 4, 8)]
    assert long_answers(own, new_tokens=8, most=9) == [2, 3]
    assert long_answers(own, new_tokens=8, most=1) == [2]
