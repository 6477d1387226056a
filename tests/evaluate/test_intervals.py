"""Intervals against figures worked out by hand, and against the textbook."""

import numpy as np
import pytest

from apr_jax.data.statistics import wilson
from apr_jax.evaluate.intervals import mcnemar, mean_interval, optimism, paired_gap


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 0, 0.0, 1.0),
        (0, 10, 0.0, 0.27753),  # z^2 / (n + z^2)
        (10, 10, 0.72247, 1.0),
        (8, 10, 0.49016, 0.94331),  # Agresti and Coull's example values, to five digits by hand.
        (850, 1000, 0.82653, 0.87079),
    ],
)
def test_wilson(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=2e-5)


@pytest.mark.parametrize(
    ("one", "other", "p"),
    # Tails of fair coins.
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 0.0625),
        (0, 6, 0.03125),
        (8, 2, 0.109375),
        (3, 3, 1.0),
    ],
)
def test_mcnemar(one, other, p):
    assert mcnemar(one, other) == pytest.approx(p) == mcnemar(other, one)


def test_bootstrap_is_as_wide_as_the_normal_interval():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = mean_interval(list(values))
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert mean_interval([2.0, 2.0]) == (2.0, 2.0)


def test_a_gap_is_of_the_shared_problems():
    one = {"a": 1.0, "b": 1.0, "c": 0.0, "only here": 0.0}
    other = {"a": 0.0, "b": 1.0, "c": 0.0, "only there": 1.0}
    found = paired_gap(one, other)
    assert (found.gap, found.n, found.p) == (pytest.approx(1 / 3), 3, 1.0)
    assert found.low <= found.gap <= found.high
    with pytest.raises(ValueError, match="share no problem"):
        paired_gap({"a": 1.0}, {"b": 1.0})


def test_pairing_narrows_the_interval_of_two_that_err_alike():
    rng = np.random.default_rng(0)
    hard = rng.random(500) < 0.5
    one = {str(k): float(not bad) for k, bad in enumerate(hard)}
    other = one | {str(k): 0.0 for k in range(10)}
    found = paired_gap(one, other)
    assert found.high - found.low < 0.03 < 2 * 1.96 * (0.25 * 2 / 500) ** 0.5
    assert paired_gap({"a": 0.5, "b": 1.0}, {"a": 0.0, "b": 1.0}).p is None, (
        "shares of several samples are no coin flips"
    )


@pytest.mark.parametrize(
    ("candidates", "problems", "accuracy", "points"),
    [
        (1, 160, 0.8, 0.0),
        (2, 160, 0.8, 1.8),
        (12, 160, 0.8, 5.0),
        (12, 160, 0.85, 4.4),
        (12, 1000, 0.85, 1.8),
    ],
)
def test_the_best_of_equal_candidates_flatters_itself(candidates, problems, accuracy, points):
    """As simulated."""
    expected = optimism(candidates, problems, accuracy)
    assert 100 * expected == pytest.approx(points, abs=0.05)
    right = np.random.default_rng(0).binomial(problems, accuracy, (20_000, candidates))
    assert right.max(axis=1).mean() / problems - accuracy == pytest.approx(expected, abs=1e-3)
    assert optimism(candidates, problems, 0.0) == optimism(candidates, problems, 1.0) == 0.0
