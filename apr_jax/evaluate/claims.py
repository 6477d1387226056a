"""The paper's claims, put to this run: each a gap between two evaluations of the same problems, with its interval.

A claim compares one evaluation with another at equal cost: the same window, at most the same total tokens, at most the same
seconds. Where the serial model cannot spend as much as the parallel one took, the note says so. Beside each score stands what
the threads did. The paper's gap is reached if ours is at least as large, to the tenth of a point that the paper prints.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

from apr_jax.evaluate import paper
from apr_jax.evaluate.parts import stage_name
from apr_jax.evaluate.results import Answered, Results, Score
from apr_jax.evaluate.statistics import paired_gap
from apr_jax.evaluate.suite import STAGES


@dataclasses.dataclass(frozen=True)
class _Side:
    """One of the two that a claim compares.

    Attributes:
      answered: whose trees; score: of them, by problem.
      votes: samples that make one answer; None where every tree is an answer.
    """

    answered: Answered
    score: Score
    votes: int | None = None


@dataclasses.dataclass(frozen=True)
class _Published:
    """What the paper found.

    Attributes:
      words: its figures.
      reached: whether ours, the first score and the gap, reach them; None where there is nothing to reach.
    """

    words: str = ""
    reached: Callable[[float, float], bool] | None = None


def claims(results: Results) -> list[dict[str, Any]]:
    """Every claim whose evaluations are there.

    Returns:
      rows with `claim`, `one` and `other` (scores), `one_spent` and `other_spent` (measures of an answer's tree, or of all
      that vote), `gap`, `low`, `high`, `p` (McNemar; None without), `n` problems, `unit` ("%" or "tokens"), `paper` (their
      figures, in words), `reached` (whether ours reach them; None where there is nothing to reach) and `note`.
    """
    found: Iterable[dict[str, Any] | None] = (
        *(_window(results, stage) for stage in reversed(STAGES)),
        *(_tokens(results, stage) for stage in reversed(STAGES)),
        _latency(results),
        _sequential(results),
        _no_more_sequential(results),
        *(_rl(results, method) for method in ("apr", "sos+", "enforced")),
        *(_budget(results, stage) for stage in reversed(STAGES)),
    )
    return [row for row in found if row]


def _window(results: Results, stage: str) -> dict[str, Any] | None:
    one, other = results.get(f"apr/{stage}"), results.get(f"sos+/{stage}")
    if not (one and other):
        return None
    published = _published("window") if stage == "rl" else _Published()
    return _row(f"same window, {stage_name(stage)}: APR, SoS+", _right(one), _right(other), published)


def _tokens(results: Results, stage: str) -> dict[str, Any] | None:
    """The best APR point at the highest temperature against SoS+'s votes over as many samples as its tokens pay for."""
    temperature = max(results.config.evaluate.temperatures, default=0.0)
    points = [results.get(f"apr/{stage}", temperature=temperature), *_swept(results, "apr", stage, temperature)]
    serial = results.get(f"sos+/{stage}", temperature=temperature)
    parallel = [one for one in points if one]
    if not (serial and parallel and temperature):
        return None
    best = max(parallel, key=lambda one: one.accuracy().mean)
    tokens = best.mean("total_tokens")
    enough = (n for n, (*_, spent) in enumerate(serial.by_n, start=1) if spent >= tokens)
    n = next(enough, len(serial.by_n))
    _, agreed, spent = serial.by_n[n - 1]
    note = f"{best.label}: {tokens:,.0f} tokens; {n} samples of SoS+: {spent:,.0f}"
    published = _published("tokens") if stage == "sft" else _Published()
    claim = f"same total tokens, {stage_name(stage)}: APR, SoS+ cons@{n}"
    return _row(claim, _right(best), _Side(serial, agreed, votes=n), published, note)


def _latency(results: Results) -> dict[str, Any] | None:
    """The best APR point against the best of SoS+ that takes no longer."""
    pair = _at_equal(results, lambda one: seconds(one) if one.latency else None)
    if pair is None:
        return None
    one, other = pair
    note = f"{one.label}: {seconds(one):.2f} s; {other.label}: {seconds(other):.2f} s"
    return _row("same seconds of one problem: APR, SoS+", _right(one), _right(other), _published("latency"), note)


def _sequential(results: Results) -> dict[str, Any] | None:
    """Sequential tokens of the most accurate point of each; the paper's APR takes fewer and is more accurate."""
    one, other = (_best(_points(results, method)) for method in ("apr", "sos+"))
    if not (one and other):
        return None
    right, wrong = _shared_means(one.accuracy(), other.accuracy())
    published = _Published("under 2,500 against 3,000", lambda _, gap: gap < 0 and right > wrong)
    chains = [_Side(each, each.measure("sequential_tokens")) for each in (one, other)]
    claim = "sequential tokens of the best point: APR, SoS+"
    return _row(claim, chains[0], chains[1], published, f"{one.label}; {other.label}", unit="tokens")


def _no_more_sequential(results: Results) -> dict[str, Any] | None:
    """The most accurate SoS+ of all, before and after RL, against the best APR point whose chains are no longer."""
    plain = [one for stage in STAGES if (one := results.get(f"sos+/{stage}"))]
    serial = _best([*results.sweep("sos+"), *plain])
    if serial is None:
        return None
    chain = serial.measure("sequential_tokens")

    def is_no_longer(one: Answered) -> bool:
        own, other = _shared_means(one.measure("sequential_tokens"), chain)
        return own <= other

    one = _best([one for one in _points(results, "apr") if is_no_longer(one)])
    if one is None:
        return None
    claim = "no more sequential tokens than SoS+ at its best: APR, SoS+"
    published = _Published("fewer tokens and higher accuracy", lambda _, gap: gap > 0)
    return _row(claim, _right(one), _right(serial), published, f"{one.label}; {serial.label}")


def _rl(results: Results, method: str) -> dict[str, Any] | None:
    forced = results.config.evaluate.forced
    if method == "enforced":
        if not forced:
            return None
        before, after = (results.get(f"apr/{stage}", forced=forced[-1]) for stage in STAGES)
        what = f"RL's gain, APR held to {forced[-1]} children"
    else:
        before, after = (results.get(f"{method}/{stage}") for stage in STAGES)
        what = f"RL's gain, {'APR' if method == 'apr' else 'SoS+'}"
    if not (before and after):
        return None
    published = _published(f"rl {method}")
    if method == "enforced":  # The paper gains nothing here, which is its point.
        published = _Published(published.words)
    return _row(what, _right(after), _right(before), published)


def _budget(results: Results, stage: str) -> dict[str, Any] | None:
    """The paper sees no gain of parallel search below one window of total tokens."""
    one, other = results.get(f"apr/{stage}"), results.get(f"sos+/{stage}")
    if not (one and other):
        return None
    window = results.config.limits.window
    return _row(
        f"at most {window:,} total tokens, {stage_name(stage)}: APR, SoS+",
        _Side(one, one.within("total_tokens", window)),
        _Side(other, other.within("total_tokens", window)),
        _Published("about equal at 4,000 and below" if stage == "sft" else ""),
        "a tree that took more counts as wrong",
    )


def seconds(one: Answered) -> float:
    """Mean over the timed problems of their median seconds."""
    assert one.latency
    values = list(one.latency["seconds"].values())
    return sum(values) / len(values)


def _points(results: Results, method: str) -> list[Answered]:
    """The greedy points of Fig. 6: the swept model, with and without conditions."""
    plain = results.get(f"{method}/{results.config.evaluate.sweep}")
    return [one for one in (*results.sweep(method), plain) if one]


def _swept(results: Results, method: str, stage: str, temperature: float) -> list[Answered]:
    return results.sweep(method, temperature) if stage == results.config.evaluate.sweep else []


def _best(points: list[Answered]) -> Answered | None:
    return max(points, key=lambda one: one.accuracy().mean, default=None)


def _at_equal(results: Results, cost: Callable[[Answered], float | None]) -> tuple[Answered, Answered] | None:
    """The best APR point, and the best of SoS+ that costs no more."""
    one = _best([point for point in _points(results, "apr") if cost(point) is not None])
    if one is None:
        return None
    most = cost(one) or 0.0
    other = _best([point for point in _points(results, "sos+") if (spent := cost(point)) is not None and spent <= most])
    return (one, other) if other else None


def _right(one: Answered) -> _Side:
    """By the share of right answers."""
    return _Side(one, one.accuracy())


def _published(key: str) -> _Published:
    """To be reached by our gap; in the same window by APR's score too."""
    one, other = paper.CLAIMS[key]
    least = one if key == "window" else -math.inf
    return _Published(
        f"{one:.1f} against {other:.1f} ({one - other:+.1f})",
        lambda score, gap: round(100 * score, 1) >= least and round(100 * gap, 1) >= round(one - other, 1),
    )


def _shared(*scores: Score) -> list[str]:
    """The problems that all of them have."""
    return [name for name in scores[0].values if all(name in score.values for score in scores)]


def _shared_means(*scores: Score) -> list[float]:
    """The mean of each score over those."""
    shared = _shared(*scores)
    return [sum(score.values[name] for name in shared) / len(shared) for score in scores]


def _row(
    claim: str, one: _Side, other: _Side, published: _Published, note: str = "", unit: str = "%"
) -> dict[str, Any]:
    gap = paired_gap(one.score.values, other.score.values)
    means = _shared_means(one.score, other.score)
    shared = _shared(one.score, other.score)
    return {
        "claim": claim,
        "one": means[0],
        "other": means[1],
        "one_spent": one.answered.spent(shared, one.votes),
        "other_spent": other.answered.spent(shared, other.votes),
        "gap": gap.gap,
        "low": gap.low,
        "high": gap.high,
        "p": gap.p if unit == "%" else None,
        "n": gap.n,
        "unit": unit,
        "paper": published.words,
        "reached": published.reached and published.reached(means[0], gap.gap),
        "note": note,
    }
