"""Intervals of scores, and gaps between two evaluations of the same problems.

All intervals are 95% intervals. They treat the test problems as a sample: other problems would give
another score. They say nothing about training again with another seed, which would move scores
further.

scipy computes the figures. It is imported where it is used, because loading `scipy.stats` takes
about a second, which most commands need not wait for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

_RESAMPLES = 10_000


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Computes the 95% interval of a mean by a percentile bootstrap (Efron 1979).

    The resampling has a fixed seed, so the same values always give the same interval.

    Returns:
      (low, high); NaN if there are no values.
    """
    if len(values) == 0:
        return math.nan, math.nan
    if len(values) == 1:
        return float(values[0]), float(values[0])

    from scipy.stats import bootstrap

    interval = bootstrap(
        (np.asarray(values, float),),
        np.mean,
        n_resamples=_RESAMPLES,
        batch=500,  # All resamples of 1,000 problems at once would take 80 MB.
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)


@dataclasses.dataclass(frozen=True)
class Gap:
    """How much higher one evaluation scores than another, on the problems that both answered.

    Attributes:
      gap: difference of the mean scores, in their unit.
      low, high: its 95% interval, by a bootstrap over problems that keeps both scores of a problem
        together.
      p: p-value of McNemar's exact test that both are right equally often; None unless all scores
        are 0 or 1.
      n: number of problems.
    """

    gap: float
    low: float
    high: float
    p: float | None
    n: int


def paired_gap(first: dict[str, float], second: dict[str, float]) -> Gap:
    """Computes the gap `first` less `second`, over the problems of both.

    Args:
      first: problem -> score, such as a share of right answers or a number of tokens.
      second: the same of the other evaluation.

    Raises:
      ValueError: the two have no problem in common.
    """
    shared = [problem for problem in first if problem in second]
    if not shared:
        raise ValueError("paired_gap: the evaluations share no problem")
    pairs = [(first[problem], second[problem]) for problem in shared]
    differences = [score - rival for score, rival in pairs]
    low, high = mean_interval(differences)

    p = None
    if all(score in (0, 1) for pair in pairs for score in pair):
        p = mcnemar(differences.count(1), differences.count(-1))
    return Gap(sum(differences) / len(shared), low, high, p, len(shared))


def mcnemar(only_first: int, only_second: int) -> float:
    """Computes the two-sided p-value of McNemar's exact test (1947).

    If two evaluations are right equally often, each problem that only one of them got right is
    equally likely to be the one's or the other's, like the toss of a fair coin.

    Args:
      only_first: number of problems that only the first evaluation got right.
      only_second: number of problems that only the second got right.
    """
    tosses = only_first + only_second
    if tosses == 0:
        return 1.0

    from scipy.stats import binomtest

    return float(binomtest(only_first, tosses).pvalue)


def optimism(candidates: int, problems: int, accuracy: float) -> float:
    """Computes how much too high the best of equal candidates scores on the problems that chose it.

    This is the exact expected value of the largest of independent binomial shares, less `accuracy`.
    The true excess is smaller if the candidates are right on the same problems, or if one of them
    is far better than its rivals.

    Args:
      candidates: number of candidates.
      problems: number of problems, which both choose the best and give its score.
      accuracy: the true accuracy of each candidate, in 0..1.
    """
    if not 0 < accuracy < 1:
        return 0.0

    from scipy.stats import binom

    # [problems]: probability that a candidate has at most 0, 1, ... problems - 1 right answers.
    at_most = binom.cdf(np.arange(problems), problems, accuracy)
    # The expected value is the sum of the probabilities of exceeding 0, 1, ...
    largest = np.sum(1 - at_most**candidates)
    return float(largest) / problems - accuracy
