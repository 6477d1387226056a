"""The paper's comparisons, made with the evaluations of this run.

Each is the gap between two evaluations of the same problems, with its interval. A comparison sets
APR (the first side) against serial search (the second) at equal cost: the same window, the same
total tokens, at most the same seconds, or at most the same sequential tokens. Except at the same
window, serial search may take whatever serves it best: the model of either stage, one answer or the
vote of several samples (cons@n). Where it cannot spend as much as APR did, the note says so. What
the threads of each side did stands beside its score. The paper's gap counts as reached if ours is
at least as large, to the tenth of a point that the paper prints.

Where a comparison takes the best of several evaluations, their answers to validation problems
choose it and its answers to test problems score it. A run without such answers chooses on the test
problems, and the row says by how much that may flatter the chosen evaluation.

Serial search is SoS+ with the published beams, as in the paper's comparisons. Where a stronger
serial search was evaluated (`suite.STRONGER`), each comparison has a second row in which it may
also compete, and a third one where there are two of them. The paper's figures stand beside the
first row alone.
"""

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
from apr_jax.paper.suite import (
    MODELS,
    RANDOM_PARENT_BEAM,
    STAGES,
    STRONGER,
    compared_temperatures,
)

_Row = dict[str, Any]

# SoS+ with the published beams, of both stages.
_PUBLISHED_BEAMS = tuple(f"sos+/{stage}" for stage in STAGES)


@dataclasses.dataclass(frozen=True)
class _Side:
    """One of the two sides of a comparison: an evaluation, and how its trees become answers.

    Attributes:
      answered: the evaluation.
      score: its score on test problems, by problem.
      votes: samples that make one answer by vote; None where every tree is an answer.
      seconds: problem -> time of one answer; empty if it was not measured.
      choice: the score of the same evaluation on validation problems; None if it has not answered
        them.
      rivals: how many evaluations competed, this one included, if the test problems chose it;
        else 0.
      flattered: by how much its score may be too high because the test problems chose it.
      chooser: how many validation problems chose it; 0 if none did.
    """

    answered: Answered
    score: Score
    votes: int | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    choice: Score | None = None
    rivals: int = 0
    flattered: float = 0.0
    chooser: int = 0

    @property
    def label(self) -> str:
        """The evaluation in words, for example `cons@3 of SoS+, T = 1`."""
        return f"cons@{self.votes} of {self.answered.label}" if self.votes else self.answered.label

    @property
    def name(self) -> str:
        """A short name for the title of the comparison, for example `SoS+ cons@3`."""
        model = MODELS[self.answered.evaluation.model]
        return f"{model} cons@{self.votes}" if self.votes else model

    def cost(self, measure: str, rival: _Side) -> float:
        """Returns the mean `measure` of one answer, over the problems that `rival` answered too.

        Where several samples vote, their tokens add up and the longest of their chains counts.
        """
        return self.answered.spent(_shared(self.score, rival.score), self.votes)[measure]


@dataclasses.dataclass(frozen=True)
class _Published:
    """What the paper found in a comparison.

    Attributes:
      words: its figures in words; empty if it has none.
      reached: says whether our first score and our gap reach the paper's; None where there is
        nothing to reach.
    """

    words: str = ""
    reached: Callable[[float, float], bool] | None = None


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """Two sides that are compared, before their gap is computed.

    Attributes:
      what: what is equal for both sides, or what is measured; the title begins with it.
      first, second: the two sides; the gap is the first less the second.
      published: what the paper found.
      note: what a reader should know about the two sides.
      unit: of the scores, "%" or "tokens".
      sides: names of both sides in the title; None takes their own names, "" leaves them out.
    """

    what: str
    first: _Side
    second: _Side
    published: _Published = dataclasses.field(default_factory=_Published)
    note: str = ""
    unit: str = "%"
    sides: str | None = None

    @property
    def title(self) -> str:
        sides = f"{self.first.name}, {self.second.name}" if self.sides is None else self.sides
        return f"{self.what}: {sides}" if sides else self.what


def comparisons(results: Results) -> list[_Row]:
    """Computes every comparison whose evaluations the run has.

    Returns:
      rows with `comparison` (the title), `one` and `other` (scores of the two sides), `one_spent`
      and `other_spent` (measures of an answer's tree, or of all trees that vote), `gap`, `low`,
      `high`, `p` (McNemar's test; None where it does not apply), `n` problems, `unit` ("%" or
      "tokens"), `paper` (the paper's figures, in words), `reached` (whether ours reach them; None
      where there is nothing to reach), `chosen` (which problems chose, where the best of several is
      compared; "" if nothing was chosen) and `note`.
    """
    possible: Iterable[_Comparison | None] = (
        *_compared(results, _window, "rl", among=("rl",)),
        *_compared(results, _window, "sft", among=("sft",)),
        *_compared(results, _tokens, "rl"),
        *_compared(results, _tokens, "sft"),
        *_compared(results, _tokens_at_best),
        *_compared(results, _latency),
        *_compared(results, _sequential, among=(results.config.evaluate.sweep,)),
        *_compared(results, _no_more_sequential),
        *_rl(results),
        *_compared(results, _budget, "rl"),
        *_compared(results, _budget, "sft"),
    )
    return [_row(comparison) for comparison in possible if comparison]


def _compared(
    results: Results,
    compare: Callable[..., _Comparison | None],
    *stage: str,
    among: Sequence[str] = STAGES,
) -> Iterable[_Comparison | None]:
    """Compares with SoS+ with published beams, and then with stronger serial searches too.

    Args:
      results: the evaluations.
      compare: takes the results, the serial models and `stage`.
      *stage: the stage of APR, where there is a row for each.
      among: the stages whose serial models compete.
    """
    yield compare(results, _PUBLISHED_BEAMS, *stage)

    serial = _PUBLISHED_BEAMS
    named: list[str] = []
    for folder, words in STRONGER.items():
        models = [f"{folder}/{one}" for one in among]
        if not any(_was_evaluated(results, model) for model in models):
            continue
        serial = (*serial, *models)
        named.append(f"SoS+ {words}")
        comparison = compare(results, serial, *stage)
        if comparison:
            # The paper compares with published beams, so its figures do not belong here.
            what = f"{comparison.what}, {' and '.join(named)} too"
            yield dataclasses.replace(comparison, what=what, published=_Published())


def _was_evaluated(results: Results, model: str) -> bool:
    """Returns whether a model answered at every temperature of the comparisons."""
    return all(
        results.get(model, temperature=temperature)
        for temperature in compared_temperatures(results.config.evaluate)
    )


def _window(results: Results, serial: Sequence[str], stage: str) -> _Comparison | None:
    """Compares greedy answers in the same window; only models of the same stage compete."""
    parallel = results.get(f"apr/{stage}")
    rivals = [results.get(model) for model in serial if model.endswith(f"/{stage}")]
    best_rival = _best([_greedy(rival) for rival in rivals if rival])
    if not (parallel and best_rival):
        return None

    published = _Published()
    if stage == "rl":
        published = _published(published_figures.COMPARISONS["window"], score=True)
    # The title names the stage once, so it is cut from the rival's name.
    rival_name = best_rival.name.removesuffix(f" {stage_name(stage)}")
    return _Comparison(
        f"same window, {stage_name(stage)}",
        _greedy(parallel),
        best_rival,
        published,
        sides=f"APR, {rival_name}",
    )


def _tokens(results: Results, serial: Sequence[str], stage: str) -> _Comparison | None:
    """Compares at the same total tokens and the highest temperature, as the paper does.

    The votes may be those of SoS+ of either stage.
    """
    temperatures = results.config.evaluate.temperatures
    if not temperatures:
        return None
    temperature = max(temperatures)

    parallel = _points(results, f"apr/{stage}", temperature)
    rivals = [point for model in serial for point in _points(results, model, temperature)]
    published = _Published()
    if stage == "sft":
        published = _published(published_figures.COMPARISONS["tokens"])
    return _same_tokens("same total tokens", parallel, rivals, published)


def _tokens_at_best(results: Results, serial: Sequence[str]) -> _Comparison | None:
    """Compares at the same total tokens, each side at its best temperature, which may be 0.

    The paper has no such comparison.
    """
    settings = results.config.evaluate
    if not settings.temperatures:
        return None
    parallel = _at_all_temperatures(results, [f"apr/{settings.sweep}"])
    rivals = _at_all_temperatures(results, serial)
    what = "same total tokens, each at its best temperature"
    return _same_tokens(what, parallel, rivals, _Published())


def _same_tokens(
    what: str, parallel: Sequence[Answered], serial: Sequence[Answered], published: _Published
) -> _Comparison | None:
    """Compares the best APR evaluation with the best that serial search does for as many tokens.

    Each serial evaluation may take as many votes as use up the tokens of an APR answer.
    """
    best_parallel = _best([_greedy(answered) for answered in parallel])
    if best_parallel is None:
        return None
    rivals = [_with_as_many_tokens(answered, best_parallel) for answered in serial]
    best_rival = _best(rivals, best_parallel)
    if best_rival is None:
        return None

    tokens = best_parallel.cost("total_tokens", best_rival)
    rival_tokens = best_rival.cost("total_tokens", best_parallel)
    note = f"{best_parallel.label}: {tokens:,.0f} tokens; {best_rival.label}: {rival_tokens:,.0f}"
    return _Comparison(what, best_parallel, best_rival, published, note)


def _with_as_many_tokens(serial: Answered, parallel: _Side) -> _Side:
    """Finds the vote of the fewest samples with as many total tokens as an answer of `parallel`.

    Where all samples together take fewer, it is the vote of all.
    """
    sides = _answers(serial)
    for side in sides:
        if side.cost("total_tokens", parallel) >= parallel.cost("total_tokens", side):
            return side
    return sides[-1]


def _latency(results: Results, serial: Sequence[str]) -> _Comparison | None:
    """Compares the best timed APR evaluation with the best SoS+ that takes no longer.

    SoS+ may give one timed answer, or the vote of n samples that decode side by side. It takes no
    longer if the paired interval of its seconds less those of APR reaches down to 0.
    """
    points = _points(results, f"apr/{results.config.evaluate.sweep}")
    parallel = _best([_with_clock(_greedy(point)) for point in points if point.latency])
    if parallel is None:
        return None
    affordable = [side for side in _timed(results, serial) if _is_as_fast(side, parallel)]
    rival = _best(affordable, parallel)
    if rival is None:
        return None
    return _Comparison(
        "same seconds of one problem",
        parallel,
        rival,
        _published(published_figures.COMPARISONS["latency"]),
        note=f"{parallel.label}: {_clock(parallel)}; {rival.label}: {_clock(rival)}",
    )


def _is_as_fast(rival: _Side, parallel: _Side) -> bool:
    """Returns whether the rival is not shown to be slower, on the problems that both answered."""
    return paired_gap(rival.seconds, parallel.seconds).low <= 0


def _timed(results: Results, serial: Sequence[str]) -> list[_Side]:
    """Lists everything that these models can answer with and that was timed.

    Greedy answers come first, then votes. Samples are timed at the highest temperature alone, and
    at others they count as taking as long.
    """
    highest = compared_temperatures(results.config.evaluate)[-1]
    greedy = []
    votes = []
    for answered in _at_all_temperatures(results, serial):
        if answered.latency:
            greedy.append(_with_clock(_greedy(answered)))
            continue
        at_highest = results.get(answered.evaluation.model, temperature=highest)
        if not answered.evaluation.decoding.temperature or not at_highest or not at_highest.votes:
            continue
        for side in _answers(answered):
            seconds = at_highest.votes["seconds"].get(str(side.votes or 1))
            if seconds:
                votes.append(dataclasses.replace(side, seconds=seconds))
    return greedy + votes


def _with_clock(side: _Side) -> _Side:
    """Returns a side of greedy answers with the seconds of each."""
    assert side.answered.latency
    return dataclasses.replace(side, seconds=side.answered.latency["seconds"])


def _sequential(results: Results, serial: Sequence[str]) -> _Comparison | None:
    """Compares the sequential tokens of the most accurate evaluation of each method.

    The paper's APR takes fewer sequential tokens and is more accurate.
    """
    stage = results.config.evaluate.sweep
    parallel = _best([_greedy(point) for point in _points(results, f"apr/{stage}")])
    of_the_stage = [model for model in serial if model.endswith(f"/{stage}")]
    rival = _best([_greedy(point) for model in of_the_stage for point in _points(results, model)])
    if not (parallel and rival):
        return None

    shared = _shared(parallel.score, rival.score)
    gain = mean(parallel.score.values[name] - rival.score.values[name] for name in shared)
    is_more_accurate = gain > 0
    chain, rival_chain = (
        dataclasses.replace(side, score=side.answered.measure("sequential_tokens"))
        for side in (parallel, rival)
    )
    return _Comparison(
        "sequential tokens of the best point",
        chain,
        rival_chain,
        _Published("under 2,500 against 3,000", lambda _, gap: gap < 0 and is_more_accurate),
        note=f"{parallel.label}; {rival.label}",
        unit="tokens",
        sides=f"APR, {MODELS[rival.answered.evaluation.model]}",
    )


def _no_more_sequential(results: Results, serial: Sequence[str]) -> _Comparison | None:
    """Compares the best serial answer or vote with the best APR whose chains are no longer.

    Votes are sampled side by side, so the longest chain of a problem's n samples counts. The paper
    has no such comparison.
    """
    rivals = [
        side for answered in _at_all_temperatures(results, serial) for side in _answers(answered)
    ]
    rival = _best(rivals)
    if rival is None:
        return None

    points = [_greedy(point) for point in _points(results, f"apr/{results.config.evaluate.sweep}")]
    measure = "sequential_tokens"
    no_longer = [
        point for point in points if point.cost(measure, rival) <= rival.cost(measure, point)
    ]
    parallel = _best(no_longer, rival)
    if parallel is None:
        return None
    return _Comparison(
        "no more sequential tokens than SoS+ on published beams at its best",
        parallel,
        rival,
        note=f"{parallel.label}; {rival.label}",
    )


def _rl(results: Results) -> Iterable[_Comparison | None]:
    """Compares each method after RL with itself before.

    The temperatures are 0 and the highest one, at which the paper's policy learns and gains most.
    """
    settings = results.config.evaluate
    for temperature in compared_temperatures(settings):
        for method in ("apr", RANDOM_PARENT_BEAM, "sos+", *STRONGER):
            yield _gain(results, method, temperature)
        for forced in settings.forced[-1:]:
            yield _gain(results, "apr", temperature, forced)
        for forced in settings.forced[:1]:
            yield _gain(results, RANDOM_PARENT_BEAM, temperature, forced)
        for requested in settings.children[-1:]:
            yield _gain_beyond_children(results, temperature, requested)


def _gain(
    results: Results, method: str, temperature: float, forced: int | None = None
) -> _Comparison | None:
    """Compares a method after RL with the same method before RL.

    Before and after, the roots are forced to spawn `forced` children; None leaves them free.
    """
    decoding = {"temperature": temperature, "forced": forced}
    before = results.get(f"{method}/sft", **decoding)
    after = results.get(f"{method}/rl", **decoding)
    if not (before and after):
        return None

    published = _Published()
    scores = _published_gain(method, temperature, enforced=forced is not None)
    if scores:
        published = _published(scores)
    if forced is not None:
        # The paper gains next to nothing with the child count enforced. That is its point, and
        # nothing that ours should reach.
        published = dataclasses.replace(published, reached=None)
    what = f"RL's gain, {before.label}"
    return _Comparison(what, _greedy(after), _greedy(before), published, sides="")


def _gain_beyond_children(
    results: Results, temperature: float, requested: int
) -> _Comparison | None:
    """Compares a random parent beam after RL with itself before, when many children are requested.

    The gap is what RL gains beyond wider search.
    """
    before = results.get(f"{RANDOM_PARENT_BEAM}/sft", temperature=temperature, condition=requested)
    after = results.get(f"{RANDOM_PARENT_BEAM}/rl", temperature=temperature)
    if not (before and after):
        return None
    what = f"RL's gain, {after.label} against {before.label}"
    return _Comparison(what, _greedy(after), _greedy(before), sides="")


def _published_gain(
    method: str, temperature: float, *, enforced: bool
) -> tuple[float, float] | None:
    """Returns (after RL, before RL), the accuracies in Table 3; None where it prints none."""
    # The parents of the paper's APR draw their beam, so its figures stand beside both of ours.
    method = method.replace(RANDOM_PARENT_BEAM, "apr")
    suffix = published_figures.ENFORCED if enforced else ""
    if f"{method}/rl{suffix}" not in published_figures.TABLE_3:
        return None
    after = published_figures.TABLE_3[f"{method}/rl{suffix}"]
    before = published_figures.TABLE_3[f"{method}/sft{suffix}"]
    if temperature not in after or temperature not in before:
        return None
    return after[temperature], before[temperature]


def _budget(results: Results, serial: Sequence[str], stage: str) -> _Comparison | None:
    """Compares the best of each side if an answer may take one window of total tokens at most.

    An answer that takes more counts as wrong. The paper sees no gain of APR there.
    """
    window = results.config.limits.window

    def within_window(models: Sequence[str]) -> list[_Side]:
        return [
            _within(window, side)
            for answered in _at_all_temperatures(results, models)
            for side in _answers(answered)
        ]

    parallel = _best(within_window([f"apr/{stage}"]))
    if parallel is None:
        return None
    rival = _best(within_window(serial), parallel)
    if rival is None:
        return None
    return _Comparison(
        f"at most {window:,} total tokens",
        parallel,
        rival,
        _Published("about equal at 4,000 and below" if stage == "sft" else ""),
        note=f"{parallel.label}; {rival.label}; an answer that took more counts as wrong",
    )


def _within(limit: int, side: _Side) -> _Side:
    """Returns a side where answers that took more than `limit` total tokens count as wrong."""
    score = _cut(limit, side.answered, side.score, side.votes)
    choice = side.choice
    if choice and side.answered.validated:
        choice = _cut(limit, side.answered.validated, choice, side.votes)
    return dataclasses.replace(side, score=score, choice=choice)


def _cut(limit: int, answered: Answered, score: Score, votes: int | None) -> Score:
    """Returns a score with 0 for each problem whose answer took more than `limit` total tokens."""
    values = {}
    for name, value in score.values.items():
        tokens = answered.spent([name], votes)["total_tokens"]
        values[name] = value if tokens <= limit else 0.0
    return share(values)


def _clock(side: _Side) -> str:
    """Puts the seconds of a timed side into words, with their 95% interval over problems."""
    score = average(side.seconds)
    return f"{score.mean:.2f} s ({score.low:.2f} to {score.high:.2f})"


def _points(results: Results, model: str, temperature: float = 0.0) -> list[Answered]:
    """Lists a model's evaluations at a temperature: with each requested condition, and with none.

    Only the swept stage has conditions. The greedy ones are the points of Fig. 6.
    """
    method, _, stage = model.partition("/")
    swept = results.sweep(method, temperature) if stage == results.config.evaluate.sweep else []
    plain = results.get(model, temperature=temperature)
    return [*swept, plain] if plain else swept


def _at_all_temperatures(results: Results, models: Sequence[str]) -> list[Answered]:
    """Lists the evaluations (`_points`) of these models at all temperatures, greedy ones first."""
    return [
        point
        for temperature in (0.0, *results.config.evaluate.temperatures)
        for model in models
        for point in _points(results, model, temperature)
    ]


def _answers(answered: Answered) -> list[_Side]:
    """Lists everything that an evaluation can answer with.

    That is its one tree a problem, or the votes of its first n samples for n from 1 to all.
    """
    if answered.summary["samples"] == 1:
        return [_greedy(answered)]
    sides = []
    for n, (_, agreed, _) in enumerate(answered.by_n, start=1):
        choice = answered.validated.by_n[n - 1][1] if answered.validated else None
        sides.append(_Side(answered, agreed, votes=n, choice=choice))
    return sides


def _best(sides: Sequence[_Side], *against: _Side) -> _Side | None:
    """Returns the most accurate of several sides, the first of equals; None if there are none.

    Validation problems choose if all sides have answered them. Otherwise the test problems choose
    that all sides, and those `against` which they are compared, have answered.
    """
    if len(sides) < 2:
        return sides[0] if sides else None

    choices = [side.choice for side in sides if side.choice]
    if len(choices) == len(sides):
        shared = _shared(*choices)
        means = [mean(choice.values[name] for name in shared) for choice in choices]
        best = sides[means.index(max(means))]
        return dataclasses.replace(best, chooser=len(shared))

    shared = _shared(*(side.score for side in (*sides, *against)))
    means = [mean(side.score.values[name] for name in shared) for side in sides]
    best = sides[means.index(max(means))]
    flattered = optimism(len(sides), len(shared), max(means))
    return dataclasses.replace(best, rivals=len(sides), flattered=flattered)


def _greedy(answered: Answered) -> _Side:
    """Returns an evaluation whose every tree is an answer, scored by its share of right answers."""
    choice = answered.validated.accuracy() if answered.validated else None
    return _Side(answered, answered.accuracy(), choice=choice)


def _published(scores: tuple[float, float], score: bool = False) -> _Published:
    """Returns two scores of the paper, in percent, with the rule by which ours reach them.

    Our gap is to reach theirs, and with `score` our first score is to reach theirs as well.
    """
    first, second = scores
    least = first if score else -math.inf

    def is_reached(ours: float, gap: float) -> bool:
        # All in percent, to the tenth of a point that the paper prints.
        return round(100 * ours, 1) >= least and round(100 * gap, 1) >= round(first - second, 1)

    return _Published(f"{first:.1f} against {second:.1f} ({first - second:+.1f})", is_reached)


def _shared(*scores: Score) -> list[str]:
    """Returns the problems that all scores have, in the order of the first score."""
    return [name for name in scores[0].values if all(name in score.values for score in scores)]


def _row(comparison: _Comparison) -> _Row:
    """Computes the gap of a comparison, as a row of `comparisons`."""
    first = comparison.first
    second = comparison.second
    published = comparison.published
    gap = paired_gap(first.score.values, second.score.values)
    shared = _shared(first.score, second.score)
    means = [mean(side.score.values[name] for name in shared) for side in (first, second)]
    return {
        "comparison": comparison.title,
        "one": means[0],
        "other": means[1],
        "one_spent": first.answered.spent(shared, first.votes),
        "other_spent": second.answered.spent(shared, second.votes),
        "gap": gap.gap,
        "low": gap.low,
        "high": gap.high,
        "p": gap.p if comparison.unit == "%" else None,
        "n": gap.n,
        "unit": comparison.unit,
        "paper": published.words,
        "reached": published.reached(means[0], gap.gap) if published.reached else None,
        "chosen": _chosen(first, second),
        "note": comparison.note,
    }


def _chosen(first: _Side, second: _Side) -> str:
    """Says which problems chose the two sides, and what that means; "" if nothing was chosen."""
    by_test = [side for side in (first, second) if side.rivals]
    if by_test:
        parts = [
            f"{side.name} of {side.rivals}, up to {100 * side.flattered:.1f} points too high"
            for side in by_test
        ]
        return f"{ON_TEST} ({'; '.join(parts)} if all were equal)"

    count = max(first.chooser, second.chooser)
    return f"chosen by {count:,} validation problems" if count else ""
