"""A bound of a mean loss: above the mean, rarely below the truth, and narrower with more prompts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynadepth.errors import ConfigError
from dynadepth.evaluation.risk_bounds import mean_loss_bound


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_it_lies_between_the_mean_and_one(losses):
    assert np.mean(losses) - 1e-9 <= mean_loss_bound(losses) <= 1.0


@pytest.mark.parametrize("mean", [0.02, 0.1, 0.5])
def test_the_truth_is_rarely_above_it(mean):
    generator = np.random.default_rng(7)
    above = [
        mean_loss_bound(generator.binomial(1, mean, 150).astype(float)) < mean for _ in range(600)
    ]
    # 5 % are allowed; three standard errors of 600 trials are 2.7 points.
    assert np.mean(above) <= 0.05 + 0.027


def test_more_prompts_and_a_lower_confidence_narrow_it():
    generator = np.random.default_rng(3)
    losses = generator.beta(0.5, 20, 2_000)
    bounds = [mean_loss_bound(losses[:count]) for count in (50, 200, 2_000)]
    assert bounds == sorted(bounds, reverse=True)
    assert mean_loss_bound(losses, confidence=0.5) < bounds[-1]


@pytest.mark.parametrize("losses", [[], [1.5], [-0.1], [[0.1]], [float("nan")]])
def test_what_is_no_loss_is_refused(losses):
    with pytest.raises(ConfigError, match="from 0 to 1"):
        mean_loss_bound(losses)
