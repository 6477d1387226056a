"""What a reader of a run sees first: one thread tree, the main models in a table, one figure."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np

from apr_jax.evaluate.intervals import paired_gap
from apr_jax.evaluate.scores import Trace
from apr_jax.paper import charts
from apr_jax.paper.charts import canvas, colour, percent
from apr_jax.paper.figure_parts import Drawn
from apr_jax.paper.results import Answered, Results, problems_of
from apr_jax.paper.suite import MAIN_MODELS, STAGES

FIGURE = "overview"  # Name of the figure's files.
_WHEN = {"sft": "before RL", "rl": "after RL"}


def opening(results: Results) -> dict[str, Any]:
    """Returns the table of the main models, and which problem's trees are shown.

    Returns:
      - `answers`: in words, which answers these are.
      - `rows`: label -> the summary of a main model that the run has.
      - `gains`: what RL changed, a sentence for each method that the run has before and after it.
      - `trees`: "after RL" and "before RL" -> name of the evaluation whose tree is shown.
      - `problem`: the id of its problem; `title`: the problem; `why`: why it is this one.
      A run without answers of the headline has no rows and no trees.
    """
    main = _main(results)
    pairs = {
        method: {
            _WHEN[stage]: answered
            for stage in reversed(STAGES)
            if (answered := main.get(f"{method}/{stage}"))
        }
        for method in ("apr", "sos+")
    }
    candidates = pairs["apr"] or pairs["sos+"]
    problem, why = _choose(*candidates.values()) if candidates else ("", "")
    trees = {when: answered for when, answered in candidates.items() if problem in answered.groups}
    titles = [answered.groups[problem][0]["problem"] for answered in trees.values()]
    return {
        "answers": _answers(results),
        "rows": {MAIN_MODELS[model]: answered.summary for model, answered in main.items()},
        "gains": [
            _gain(name, pair["after RL"], pair["before RL"])
            for name, pair in (("serial search", pairs["sos+"]), ("thread trees", pairs["apr"]))
            if len(pair) == len(STAGES)
        ],
        "trees": {when: answered.evaluation.name for when, answered in trees.items()},
        "problem": problem,
        "title": titles[0] if titles else "",
        "why": why,
    }


def _main(results: Results) -> dict[str, Answered]:
    """Returns the headline's evaluations of the main models that the run has, by model."""
    of_model = {answered.evaluation.model: answered for answered in results.headline().values()}
    return {model: of_model[model] for model in MAIN_MODELS if model in of_model}


def _answers(results: Results) -> str:
    """Says which answers the headline is of."""
    temperature = results.config.evaluate.headline
    how = f"sampled at temperature {temperature:g}" if temperature else "greedy"
    return f"one answer to each of {problems_of(results.headline().values())}, {how}"


def _gain(name: str, after: Answered, before: Answered) -> str:
    """Says what RL changed, with 95% intervals over the problems, each paired with itself."""
    right = paired_gap(after.accuracy().values, before.accuracy().values)
    points = [f"{100 * value:+.1f}" for value in (right.gap, right.low, right.high)]
    sentence = f"RL changes {name} by {points[0]} points ({points[1]} to {points[2]})"

    if not (after.mean("children") or before.mean("children")):
        return f"{sentence}."
    children = paired_gap(after.measure("children").values, before.measure("children").values)
    more = [f"{value:+.1f}" for value in (children.gap, children.low, children.high)]
    return f"{sentence} and {more[0]} children ({more[1]} to {more[2]})."


def _choose(after: Answered, before: Answered | None = None) -> tuple[str, str]:
    """Chooses the problem whose trees are shown; returns its id, and why it is this one."""
    first_samples = {name: group[0] for name, group in after.groups.items()}
    right = [name for name, trace in first_samples.items() if trace["correct"]]
    if before:
        for name in right:
            earlier = before.groups[name][0] if name in before.groups else None
            if earlier and _has_learned(earlier, first_samples[name]):
                return name, "the first that is solved after RL alone, by more children"
    for name in right:
        if first_samples[name]["children"]:
            return name, "the first that is solved with children"
    return next(iter(right or first_samples)), "the first"


def _has_learned(before: Trace, after: Trace) -> bool:
    """Whether a wrong tree with children became a right one with more children."""
    return not before["correct"] and after["children"] > before["children"] > 0


@charts.styled
def overview(results: Results) -> Drawn | None:
    """Draws accuracy against the longest chain, and how many children the trees have."""
    main = _main(results)
    if not main:
        return None
    figure, (left, right) = canvas(2, height=2.6)
    for method in ("sos+", "apr"):
        _accuracy_by_chain(left, main, method)
    longest = max(answered.mean("sequential_tokens") for answered in main.values())
    left.set_xlim(0, 1.1 * max(longest, 1.0))
    left.legend(loc="best")
    percent(
        left, "right answers against the longest chain", "tokens in the longest chain of a tree"
    )

    parallel = {stage: main[f"apr/{stage}"] for stage in STAGES if f"apr/{stage}" in main}
    _children(right, parallel)
    caption = (
        f"What is won and what it costs: {_answers(results)}. Left: each arrow leads from the"
        " supervised model (hollow) to the same model after RL (full); bars are 95% intervals."
        " Right: how many children the thread trees have, before (hollow) and after RL (full)."
    )
    return Drawn(FIGURE, caption, figure)


def _accuracy_by_chain(axes: Any, main: dict[str, Answered], method: str) -> None:
    """Draws a method's models before and after RL, with an arrow between them."""
    tone = colour(method)
    points = []
    for stage in STAGES:
        model = f"{method}/{stage}"
        if model not in main:
            continue
        score = main[model].accuracy()
        chain = main[model].mean("sequential_tokens")
        fill = tone if stage == "rl" else "none"
        charts.with_interval(
            axes,
            [chain],
            [score],
            label=MAIN_MODELS[model],
            color=tone,
            marker="s" if method == "apr" else "o",
            markerfacecolor=fill,
            linestyle="",
        )
        points.append((chain, 100 * score.mean))
    if len(points) == len(STAGES):
        arrow = {"arrowstyle": "->", "color": tone, "shrinkA": 5, "shrinkB": 5}
        axes.annotate("", xy=points[1], xytext=points[0], arrowprops=arrow)


def _children(axes: Any, parallel: dict[str, Answered]) -> None:
    """Draws which share of the trees has how many children, a row of bars for each stage."""
    if not parallel:
        charts.note(axes, "no thread trees")
        return
    tone = colour("apr")
    most = max(trace["children"] for answered in parallel.values() for trace in answered.traces)
    counts = np.arange(most + 1)
    width = 0.8 / len(parallel)
    for place, (stage, answered) in enumerate(parallel.items()):
        found = collections.Counter(trace["children"] for trace in answered.traces)
        shares = [100 * found[count] / len(answered.traces) for count in counts]
        left = counts + width * (place - (len(parallel) - 1) / 2)
        fill = tone if stage == "rl" else "none"
        label = f"{_WHEN[stage]}: {answered.mean('children'):.1f} on average"
        axes.bar(left, shares, width, color=fill, edgecolor=tone, linewidth=1.2, label=label)
    axes.set(title="children of a tree", xlabel="children", ylabel="share of the trees (%)")
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.25)
    axes.legend(loc="upper left")
