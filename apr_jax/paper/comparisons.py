"""The paper's comparisons, put to this run: each a gap between two evaluations of the same
problems, with its interval.

A comparison compares one evaluation with another at equal cost: the same window, the same total
tokens, at most the same seconds, at most the same sequential tokens. But for the window serial
search may take what serves it best: either stage, one answer or the vote of several samples
(cons@n). Where it cannot spend as much as the parallel one took, the note says so. Beside each
score stands what the threads did. The paper's gap is reached if ours is at least as large, to the
tenth of a point that the paper prints.

Where a comparison takes the best of several, their answers to validation problems choose it, and
its answers to test problems score it. A run that has no such answers chooses on test problems, and
the note says by how much that may flatter the chosen one.

Serial search is SoS+ on published beams, as in the paper. Where SoS+ on wide beams was evaluated
too, each comparison has a second row in which it may also compete; the paper's figures, which it
does not, stand beside the first alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from apr_jax.evaluate.cells import ON_TEST
from apr_jax.evaluate.intervals import optimism, paired_gap
from apr_jax.evaluate.scores import mean
from apr_jax.paper import published_figures
from apr_jax.paper.figure_parts import stage_name
from apr_jax.paper.results import Answered, Results, Score, average, share
from apr_jax.paper.suite import DRAWN, MODELS, STAGES, WIDE, compared_temperatures

_Row = dict[str, Any]
_ON_PUBLISHED = tuple(f"sos+/{stage}" for stage in STAGES)


@dataclasses.dataclass(frozen=True)
class _Side:
    """One of the two that a comparison compares.

    Attributes:
      answered: whose trees; score: of them, by problem.
      votes: samples that make one answer; None where every tree is an answer.
      seconds: of one answer, where they are known.
      choice: the score of the same on validation problems; None if they were not asked.
      rivals: how many competed, this one too, if it was chosen by its score on test problems; else
        0.
      flattered: by how much its score may be too high for that.
      chooser: how many validation problems chose it; 0 if none did.
    """

    answered: Answered
    score: Score
    votes: int | None = None
    seconds: float = math.nan
    choice: Score | None = None
    rivals: int = 0
    flattered: float = 0.0
    chooser: int = 0

    @property
    def label(self) -> str:
        """The evaluation in words; `cons@3 of SoS+, T = 1`."""
        return f"cons@{self.votes} of {self.answered.label}" if self.votes else self.answered.label

    @property
    def name(self) -> str:
        """In short, for the comparison: `SoS+ cons@3`."""
        model = MODELS[self.answered.evaluation.model]
        return f"{model} cons@{self.votes}" if self.votes else model

    def cost(self, measure: str, other: _Side) -> float:
        """Of one answer, over the problems that `other` has too: tokens of all that vote add up,
        their longest chain counts.
        """
        return self.answered.spent(_shared(self.score, other.score), self.votes)[measure]


@dataclasses.dataclass(frozen=True)
class _Published:
    """What the paper found.

    Attributes:
      words: its figures.
      reached: whether ours, the first score and the gap, reach them; None where there is nothing to
        reach.
    """

    words: str = ""
    reached: Callable[[float, float], bool] | None = None


def comparisons(results: Results) -> list[_Row]:
    """Every comparison whose evaluations are there.

    Returns:
      rows with `comparison`, `one` and `other` (scores), `one_spent` and `other_spent` (measures of
      an answer's tree, or of all that vote), `gap`, `low`, `high`, `p` (McNemar; None without), `n`
      problems, `unit` ("%" or "tokens"), `paper` (their figures, in words), `reached` (whether ours
      reach them; None where there is nothing to reach), `chosen` (which problems chose where the
      best of several is compared, in words; "" if nothing was chosen) and `note`.
    """
    found: Iterable[_Row | None] = (
        _window(results, _ON_PUBLISHED, "rl"),
        *_compared(results, _window, "sft"),
        *_compared(results, _tokens, "rl"),
        *_compared(results, _tokens, "sft"),
        *_compared(results, _tokens_at_best),
        *_compared(results, _latency),
        _sequential(results),
        *_compared(results, _no_more_sequential),
        *_rl(results),
        *_compared(results, _budget, "rl"),
        *_compared(results, _budget, "sft"),
    )
    return [row for row in found if row]


def _compared(
    results: Results, comparison: Callable[..., _Row | None], *stage: str
) -> Iterable[_Row | None]:
    """The row against SoS+ on published beams; if that on wide beams was evaluated, also the one in
    which both compete.
    """
    yield comparison(results, _ON_PUBLISHED, *stage)
    evaluated = all(
        results.get(WIDE, temperature=each)
        for each in compared_temperatures(results.config.evaluate)
    )
    if evaluated and (row := comparison(results, (*_ON_PUBLISHED, WIDE), *stage)):
        what, _, sides = row["comparison"].partition(": ")
        yield row | {
            "comparison": f"{what}, {MODELS[WIDE]} too: {sides}",
            "paper": "",
            "reached": None,
        }


def _window(results: Results, serial: Sequence[str], stage: str) -> _Row | None:
    """Greedy answers of one stage: no RL was done on wide beams."""
    one = results.get(f"apr/{stage}")
    rivals = [results.get(model) for model in serial if model.endswith(f"/{stage}")]
    other = _best([_right(each) for each in rivals if each])
    if not (one and other):
        return None
    published = (
        _published(published_figures.COMPARISONS["window"], score=True)
        if stage == "rl"
        else _Published()
    )
    rival = other.name.removesuffix(f" {stage_name(stage)}")
    return _row(f"same window, {stage_name(stage)}: APR, {rival}", _right(one), other, published)


def _tokens(results: Results, serial: Sequence[str], stage: str) -> _Row | None:
    """All at the highest temperature, as in the paper; the votes are of SoS+ of either stage."""
    temperatures = results.config.evaluate.temperatures
    if not temperatures:
        return None
    temperature = max(temperatures)
    parallel = _points(results, f"apr/{stage}", temperature)
    rivals = [one for model in serial for one in _points(results, model, temperature)]
    published = (
        _published(published_figures.COMPARISONS["tokens"]) if stage == "sft" else _Published()
    )
    return _same_tokens("same total tokens", parallel, rivals, published)


def _tokens_at_best(results: Results, serial: Sequence[str]) -> _Row | None:
    """Each at the temperature that serves it best, greedy answers among them; the paper has no such
    row.
    """
    settings = results.config.evaluate
    if not settings.temperatures:
        return None
    parallel = _every(results, [f"apr/{settings.sweep}"])
    comparison = "same total tokens, each at its best temperature"
    return _same_tokens(comparison, parallel, _every(results, serial), _Published())


def _same_tokens(
    comparison: str, parallel: Sequence[Answered], serial: Sequence[Answered], published: _Published
) -> _Row | None:
    """The best APR point against the best of what its tokens pay for: of each serial evaluation so
    many votes as take them.
    """
    one = _best([_right(each) for each in parallel])
    if one is None:
        return None
    other = _best([_as_many_tokens(each, one) for each in serial], one)
    if other is None:
        return None
    tokens = one.cost("total_tokens", other), other.cost("total_tokens", one)
    note = f"{one.label}: {tokens[0]:,.0f} tokens; {other.label}: {tokens[1]:,.0f}"
    return _row(f"{comparison}: {one.name}, {other.name}", one, other, published, note)


def _as_many_tokens(serial: Answered, one: _Side) -> _Side:
    """The vote of the fewest samples that take as many total tokens as `one`, or of all there
    are.
    """
    sides = _answers(serial)
    enough = (
        side for side in sides if side.cost("total_tokens", one) >= one.cost("total_tokens", side)
    )
    return next(enough, sides[-1])


def _latency(results: Results, serial: Sequence[str]) -> _Row | None:
    """The best timed APR point against the best SoS+ that takes no longer: a timed answer, or the
    vote of n samples.

    Samples were not timed: n take n times the seconds of their stage's plain answer, one after
    another on the machine. Drawn in a batch each would take less, but nobody timed that."""
    points = _points(results, f"apr/{results.config.evaluate.sweep}")
    one = _best([_right(each) for each in points if each.latency])
    if one is None:
        return None
    limit = seconds(one.answered)
    other = _best([side for side in _with_seconds(results, serial) if side.seconds <= limit], one)
    if other is None:
        return None
    note = f"{one.label}: {_clock(one.answered)}; {other.label}: "
    if other.answered.latency:
        note += _clock(other.answered)
    else:
        note += (
            f"{other.seconds:.2f} s ({other.votes or 1} x the plain answer's, one after another; "
        )
        note += "a batch would take less, but was not timed)"
    comparison = f"same seconds of one problem: {one.name}, {other.name}"
    return _row(comparison, one, other, _published(published_figures.COMPARISONS["latency"]), note)


def _with_seconds(results: Results, serial: Sequence[str]) -> list[_Side]:
    """All that these models answer with the seconds that it takes: what was timed first, then
    samples and their votes.
    """
    timed, votes = [], []
    for each in _every(results, serial):
        plain = results.get(each.evaluation.model)
        if each.latency:
            timed.append(dataclasses.replace(_right(each), seconds=seconds(each)))
        elif each.evaluation.decoding.temperature and plain and plain.latency:
            took = seconds(plain)
            votes += [
                dataclasses.replace(side, seconds=(side.votes or 1) * took)
                for side in _answers(each)
            ]
    return timed + votes


def _sequential(results: Results) -> _Row | None:
    """Sequential tokens of the most accurate point of each; the paper's APR takes fewer and is more
    accurate.
    """
    stage = results.config.evaluate.sweep
    one, other = (
        _best([_right(each) for each in _points(results, f"{method}/{stage}")])
        for method in ("apr", "sos+")
    )
    if not (one and other):
        return None
    shared = _shared(one.score, other.score)
    more_right = mean(one.score.values[name] - other.score.values[name] for name in shared) > 0
    published = _Published("under 2,500 against 3,000", lambda _, gap: gap < 0 and more_right)
    chains = [
        dataclasses.replace(each, score=each.answered.measure("sequential_tokens"))
        for each in (one, other)
    ]
    comparison = "sequential tokens of the best point: APR, SoS+"
    return _row(
        comparison, chains[0], chains[1], published, f"{one.label}; {other.label}", unit="tokens"
    )


def _no_more_sequential(results: Results, serial: Sequence[str]) -> _Row | None:
    """The most accurate serial answer or vote against the best APR point whose chains are no
    longer; no comparison of the paper.

    Votes are drawn side by side: the longest chain of a problem's n samples counts.
    """
    other = _best([side for each in _every(results, serial) for side in _answers(each)])
    if other is None:
        return None
    points = [_right(each) for each in _points(results, f"apr/{results.config.evaluate.sweep}")]
    measure = "sequential_tokens"
    one = _best(
        [each for each in points if each.cost(measure, other) <= other.cost(measure, each)], other
    )
    if one is None:
        return None
    comparison = (
        f"no more sequential tokens than SoS+ on published beams at its best: {one.name},"
        f" {other.name}"
    )
    return _row(comparison, one, other, _Published(), f"{one.label}; {other.label}")


def _rl(results: Results) -> Iterable[_Row | None]:
    """RL's gain, greedy and at the highest temperature, at which the paper's policy learns and
    where it gains most.
    """
    settings = results.config.evaluate
    for temperature in compared_temperatures(settings):
        for method in ("apr", DRAWN, "sos+"):
            yield _gain(results, method, temperature)
        for method, counts in (("apr", settings.forced[-1:]), (DRAWN, settings.forced[:1])):
            yield from (_gain(results, method, temperature, count) for count in counts)


def _gain(
    results: Results, method: str, temperature: float, forced: int | None = None
) -> _Row | None:
    """Before and after; the paper's APR draws its beams.

    With the child count held the paper gains next to nothing, which is its point: there nothing is
    to be reached."""
    models = [f"{method}/{stage}" for stage in reversed(STAGES)]
    after, before = (results.get(model, temperature=temperature, forced=forced) for model in models)
    if not (after and before):
        return None
    held = " enforced" * (forced is not None)
    rows = [published_figures.TABLE_3[model.replace(DRAWN, "apr") + held] for model in models]
    scores = [row[temperature] for row in rows if temperature in row]
    published = _published((scores[0], scores[1])) if scores else _Published()
    if forced is not None:
        published = _Published(published.words)
    return _row(f"RL's gain, {before.label}", _right(after), _right(before), published)


def _budget(results: Results, serial: Sequence[str], stage: str) -> _Row | None:
    """The best of each if an answer of more than one window of total tokens counts as wrong; the
    paper sees no gain there.
    """
    window = results.config.limits.window
    parallel, rivals = (
        [_within(window, side) for each in _every(results, models) for side in _answers(each)]
        for models in ([f"apr/{stage}"], serial)
    )
    one = _best(parallel)
    other = _best(rivals, one) if one else None
    if not (one and other):
        return None
    published = _Published("about equal at 4,000 and below" if stage == "sft" else "")
    note = f"{one.label}; {other.label}; an answer that took more counts as wrong"
    return _row(
        f"at most {window:,} total tokens: {one.name}, {other.name}", one, other, published, note
    )


def _within(limit: int, side: _Side) -> _Side:
    """With the answers that took more total tokens counted as wrong, by problem."""
    score = _cut(limit, side.answered, side.score, side.votes)
    validated = side.answered.validated
    if side.choice is None or validated is None:
        return dataclasses.replace(side, score=score)
    return dataclasses.replace(
        side, score=score, choice=_cut(limit, validated, side.choice, side.votes)
    )


def _cut(limit: int, answered: Answered, score: Score, votes: int | None) -> Score:
    took = {name: answered.spent([name], votes)["total_tokens"] for name in score.values}
    return share({name: value * (took[name] <= limit) for name, value in score.values.items()})


def seconds(one: Answered) -> float:
    """Mean over the timed problems of their median seconds."""
    assert one.latency
    return mean(one.latency["seconds"].values())


def _clock(one: Answered) -> str:
    """The same with its interval, of these problems as a sample."""
    assert one.latency
    took = average(one.latency["seconds"])
    return f"{took.mean:.2f} s ({took.low:.2f} to {took.high:.2f})"


def _points(results: Results, model: str, temperature: float = 0.0) -> list[Answered]:
    """A model at a temperature: plain, and with each condition if it is a swept one (greedy: the
    points of Fig. 6).
    """
    method, _, stage = model.partition("/")
    swept = results.sweep(method, temperature) if stage == results.config.evaluate.sweep else []
    return [one for one in (*swept, results.get(model, temperature=temperature)) if one]


def _every(results: Results, models: Sequence[str]) -> list[Answered]:
    """The points of these models at all temperatures, the greedy ones first."""
    temperatures = (0.0, *results.config.evaluate.temperatures)
    return [
        one for each in temperatures for model in models for one in _points(results, model, each)
    ]


def _answers(one: Answered) -> list[_Side]:
    """What an evaluation can answer with: its one tree a problem, or the votes of its first n
    samples, n from 1 to all.
    """
    if one.summary["samples"] == 1:
        return [_right(one)]
    sides = []
    for n, (_, agreed, _) in enumerate(one.by_n, start=1):
        choice = one.validated.by_n[n - 1][1] if one.validated else None
        sides.append(_Side(one, agreed, votes=n, choice=choice))
    return sides


def _best(sides: Sequence[_Side], *against: _Side) -> _Side | None:
    """The most accurate of several, the first of equals: by validation problems, if all of them
    answered these.

    Else by the test problems that all of them and those `against` have.
    """
    if len(sides) < 2:
        return sides[0] if sides else None

    choices = [side.choice for side in sides if side.choice]
    if len(choices) == len(sides):
        shared = _shared(*choices)
        means = [mean(choice.values[name] for name in shared) for choice in choices]
        return dataclasses.replace(sides[means.index(max(means))], chooser=len(shared))

    shared = _shared(*(side.score for side in (*sides, *against)))
    means = [mean(side.score.values[name] for name in shared) for side in sides]
    flattered = optimism(len(sides), len(shared), max(means))
    return dataclasses.replace(
        sides[means.index(max(means))], rivals=len(sides), flattered=flattered
    )


def _right(one: Answered) -> _Side:
    """By the share of right answers."""
    return _Side(one, one.accuracy(), choice=one.validated.accuracy() if one.validated else None)


def _published(scores: tuple[float, float], score: bool = False) -> _Published:
    """Two of the paper's scores: their gap is to be reached by ours, and, if `score`, the first by
    APR's.
    """
    one, other = scores
    least = one if score else -math.inf
    return _Published(
        f"{one:.1f} against {other:.1f} ({one - other:+.1f})",
        lambda ours, gap: (
            round(100 * ours, 1) >= least and round(100 * gap, 1) >= round(one - other, 1)
        ),
    )


def _shared(*scores: Score) -> list[str]:
    """The problems that all of them have."""
    return [name for name in scores[0].values if all(name in score.values for score in scores)]


def _row(
    comparison: str,
    one: _Side,
    other: _Side,
    published: _Published,
    note: str = "",
    unit: str = "%",
) -> dict[str, Any]:
    gap = paired_gap(one.score.values, other.score.values)
    shared = _shared(one.score, other.score)
    means = [mean(side.score.values[name] for name in shared) for side in (one, other)]
    return {
        "comparison": comparison,
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
        "chosen": _chosen(one, other),
        "note": note,
    }


def _chosen(one: _Side, other: _Side) -> str:
    """Which problems chose the two sides of a comparison among others, and what that means; "" if
    nothing was chosen.
    """
    by_test = [side for side in (one, other) if side.rivals]
    if by_test:
        said = [
            f"{side.name} of {side.rivals}, up to {100 * side.flattered:.1f} points too high"
            for side in by_test
        ]
        return f"{ON_TEST} ({'; '.join(said)} if all were equal)"
    count = max(one.chooser, other.chooser)
    return f"chosen by {count:,} validation problems" if count else ""
