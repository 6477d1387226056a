"""Intervals: every score has one, and a gap between two evaluations is that of the same problems.

Everything is of 95% and of the test problems as a sample; training again with another seed would
move scores further."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

_RESAMPLES = 10_000


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% interval of a mean: percentiles of the means of resampled values (bootstrap, Efron 1979);
    fixed seed.
    """
    if not len(values):
        return math.nan, math.nan
    array = np.asarray(values, float)
    rng = np.random.default_rng(0)
    # A few at a time: 10,000 samples of 1,000 problems at once would take 80 MB.
    means = [
        array[rng.integers(len(array), size=(500, len(array)))].mean(1)
        for _ in range(_RESAMPLES // 500)
    ]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Gap:
    """How much higher one evaluation scores than another, on the problems that both answered.

    Attributes:
      gap: difference of the mean scores, in their unit.
      low, high: 95% interval, by a bootstrap over problems (Efron 1979): both scores of a problem
        stay together.
      p: of McNemar's exact test (1947) that both are right equally often; None if a score is not 0
        or 1, as tokens are not.
      n: problems.
    """

    gap: float
    low: float
    high: float
    p: float | None
    n: int


def paired_gap(one: dict[str, float], other: dict[str, float]) -> Gap:
    """`one` less `other`; both are problem -> score: a share of right answers, or any other
    measure, such as tokens.

    Raises:
      ValueError: no problem is in both.
    """
    shared = [name for name in one if name in other]
    if not shared:
        raise ValueError("paired_gap: the evaluations share no problem")
    pairs = [(one[name], other[name]) for name in shared]
    differences = [a - b for a, b in pairs]
    low, high = mean_interval(differences)
    binary = all(score in (0, 1) for pair in pairs for score in pair)
    p = mcnemar(differences.count(1), differences.count(-1)) if binary else None
    return Gap(sum(differences) / len(shared), low, high, p, len(shared))


def mcnemar(only_one: int, only_other: int) -> float:
    """Exact two-sided p of McNemar's test: problems that only one of two got right split like fair
    coins.
    """
    n, few = only_one + only_other, min(only_one, only_other)
    tail = sum(math.comb(n, k) for k in range(few + 1))
    return min(1.0, 2 * tail / 2**n)


def optimism(candidates: int, problems: int, accuracy: float) -> float:
    """How far above its truth the best of equal candidates scores where it was chosen and scored on
    the same problems.

    The expected largest of independent binomial shares, less `accuracy`, exactly. Candidates that
    are right on the same problems exceed their truth by less, and so does one that is better than
    its rivals by far.

    Args:
      candidates: how many compete.
      problems: that chose and scored.
      accuracy: of each of them, in truth, in 0..1.
    """
    if not 0 < accuracy < 1:
        return 0.0
    logs = [
        math.lgamma(problems + 1)
        - math.lgamma(right + 1)
        - math.lgamma(problems - right + 1)
        + right * math.log(accuracy)
        + (problems - right) * math.log1p(-accuracy)
        for right in range(problems + 1)
    ]
    # [problems + 1]: probability of at most so many right answers.
    at_most = np.minimum(np.cumsum(np.exp(logs)), 1.0)
    largest = np.sum(1 - at_most[:-1] ** candidates)
    return float(largest) / problems - accuracy
