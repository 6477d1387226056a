"""Every figure of the paper, ours beside the published one, drawn from `Results` alone.

A figure is a function of the results that returns None if the run does not have its evaluations.
FIGURES lists the figures in the order of the report; a new figure needs only an entry there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from apr_jax.paper import charts, published_figures
from apr_jax.paper.charts import canvas, colour, percent, with_interval
from apr_jax.paper.figure_parts import (
    COMPARED,
    TOKENS,
    Drawn,
    cumulative,
    device,
    intervals_on_bars,
    method_name,
    paired_bars,
    stage_name,
    tag,
)
from apr_jax.paper.results import Answered, Results, problems_of
from apr_jax.paper.suite import MODELS, RANDOM_PARENT_BEAM, STAGES, STRONGER, parallel

_PAPER = "the paper, 228M"
_MARKS = {"apr": "s", "sos+": "o"}
_STAR: dict[str, Any] = {"marker": "*", "markersize": 9, "linestyle": ""}


@charts.styled
def total_tokens(results: Results) -> Drawn | None:
    """Draws Fig. 4a and 8: a column of panels for each temperature, ours above the paper's."""
    temperatures = [t for t in results.config.evaluate.temperatures if _has_tokens(results, t)]
    if not temperatures:
        return None
    figure, axes = canvas(
        len(temperatures),
        rows=2,
        width=max(5.2, 3.6 * len(temperatures)),
        height=6.0,
        squeeze=False,
        sharey="row",
    )
    for column, temperature in enumerate(temperatures):
        _our_tokens(axes[0, column], results, temperature)
        _published_tokens(axes[1, column], temperature)
    axes[0, -1].legend(loc="best")
    caption = (
        "Accuracy against total tokens (Fig. 4a; Fig. 8 at other temperatures). SoS+ takes n"
        " independent samples: pass@n counts any right one, cons@n the solution that most of them"
        " claim. Numbers at the points of APR are requested children. The paper prints the accuracy"
        " of all its points, but the tokens of three points at T = 1 only, so its panels have no"
        " axis of cost: on the left SoS+ by its n, on the right APR by its conditions, the smallest"
        " first. Points of the two halves do not cost the same. Stronger serial searches stand"
        " beside SoS+ where the run has them; the paper has none here."
    )
    return Drawn("fig4a_fig8_total_tokens", caption, figure)


def _our_tokens(axes: Any, results: Results, temperature: float) -> None:
    """Draws our panel of Fig. 4a or 8."""
    sweep = results.config.evaluate.sweep
    for method in ("sos+", *STRONGER):
        if serial := results.get(f"{method}/{sweep}", temperature=temperature):
            passed, agreed, tokens = zip(*serial.by_n, strict=True)
            style: dict[str, Any] = {"color": colour(method), "marker": "o"}
            name = MODELS[f"{method}/sft"]
            with_interval(axes, tokens, passed, label=f"{name} pass@n", linestyle=":", **style)
            with_interval(axes, tokens, agreed, label=f"{name} cons@n", **style)

    points = results.sweep("apr", temperature)
    if points:
        spent = [point.mean("total_tokens") for point in points]
        scores = [point.accuracy() for point in points]
        style = {"color": colour("apr"), "marker": _MARKS["apr"]}
        with_interval(axes, spent, scores, label="APR by child condition", **style)
        for x, score, point in zip(spent, scores, points, strict=True):
            tag(axes, x, 100 * score.mean, str(point.evaluation.decoding.condition))

    if plain := results.get(f"apr/{sweep}", temperature=temperature):
        spent = [plain.mean("total_tokens")]
        style = {"color": colour("apr"), **_STAR}
        with_interval(axes, spent, [plain.accuracy()], label="APR, nothing requested", **style)
    percent(axes, f"ours, {stage_name(sweep)}, T = {temperature:g}", TOKENS)


@charts.styled
def window(results: Results) -> Drawn | None:
    """Draws Fig. 4b, with curves of the demonstrations."""
    shown = [answered for model in COMPARED if (answered := results.get(model))]
    if not shown:
        return None
    figure, (left, right) = canvas(2, width_ratios=(2.2, 1), sharey=True)

    cumulative(left, shown, "max_thread_tokens", results.config.limits.window)
    for method in ("sos+", "apr"):
        if traces := results.oracle.get(method):
            spent = sorted(trace["max_thread_tokens"] for trace in traces if trace["correct"])
            share = 100 * np.arange(1, len(spent) + 1) / len(traces)
            name = f"{MODELS[f'{method}/sft']} demonstrations"
            left.plot(spent, share, color=colour(method), linestyle=":", linewidth=1.1, label=name)
    left.legend(loc="upper left")
    percent(left, "ours", "window: tokens of the longest thread", low=0, high=101)

    for model, accuracy in published_figures.AT_WINDOW.items():
        name = MODELS[model].replace(" after", "\nafter")
        bars = right.bar(name, accuracy, color=colour(model), width=0.6)
        right.bar_label(bars, fmt="%.1f", padding=2)
    right.set_title(f"{_PAPER}, window {published_figures.WINDOW:,}")
    caption = (
        "Accuracy against the window (Fig. 4b): an answer counts only if every thread of its tree"
        " fits. Greedy answers; bands are 95% intervals; dotted: the demonstrations that the models"
        " imitate, of the same problems."
    )
    return Drawn("fig4b_window", caption, figure)


@charts.styled
def before_and_after(results: Results) -> Drawn | None:
    """Draws Fig. 5, with SoS+ beside APR."""
    pairs: dict[str, list[Answered]] = {}
    for method in ("sos+", *STRONGER, "apr", RANDOM_PARENT_BEAM):
        pair = _both_stages(results, method)
        if pair:
            pairs[method] = pair
    if not pairs:
        return None

    figure, axes = canvas(4, rows=2, width=3.2 + 3.2 * len(pairs), height=5.0)
    measures: list[tuple[str, str, Callable[[Answered], float]]] = [
        ("accuracy", "accuracy (%)", lambda answered: 100 * answered.accuracy().mean),
        ("total_tokens", "total tokens", lambda answered: answered.mean("total_tokens")),
        ("thread_tokens", "tokens a sequence", lambda answered: answered.thread_tokens()),
        ("children", "child threads", lambda answered: answered.mean("children")),
    ]
    shown = [answered for pair in pairs.values() for answered in pair]
    for column, (key, title, value) in enumerate(measures):
        ours = {method: [value(answered) for answered in pair] for method, pair in pairs.items()}
        if key == "children":
            ours = {method: values for method, values in ours.items() if parallel(method)}
        published = {
            method: list(pair)
            for method, pair in published_figures.RL[key].items()
            if method in ("sos+", "apr")
        }
        paired_bars(axes[0, column], ours, title)
        paired_bars(axes[1, column], published, title)
        if key == "accuracy":
            intervals_on_bars(axes[0, column], shown)
    axes[0, 0].set_ylabel("ours")
    axes[1, 0].set_ylabel(_PAPER)
    caption = (
        "Before and after RL (Fig. 5): hollow bars are the supervised models, full ones those"
        f" after RL. Greedy answers to {problems_of(shown)}. A sequence is"
        " one thread; the paper prints no tokens a sequence and no children for SoS+. Random parent"
        " beam, where the run has it: APR whose demonstrations draw how many children a parent"
        " spawns. Stronger serial searches stand beside SoS+ where the run has them."
    )
    return Drawn("fig5_before_and_after_rl", caption, figure)


@charts.styled
def latency(results: Results) -> Drawn | None:
    """Draws Fig. 6: accuracy against sequential tokens, and against seconds of one problem."""
    sweep = results.config.evaluate.sweep
    plain = {method: results.get(f"{method}/{sweep}") for method in ("sos+", "apr")}
    curves = {method: results.sweep(method) for method in plain}
    if not (any(curves.values()) or any(plain.values())):
        return None
    stars = {
        f"{method_name(method)}, nothing requested": answered for method, answered in plain.items()
    }
    stars |= {MODELS[f"{method}/sft"]: results.get(f"{method}/{sweep}") for method in STRONGER}

    figure, axes = canvas(2, rows=2, height=5.8, sharey="row")
    costs: list[tuple[str, Callable[[Answered], float | None]]] = [
        ("sequential tokens", lambda answered: answered.mean("sequential_tokens")),
        ("seconds of one problem", lambda answered: answered.seconds()),
    ]
    for column, (title, cost_of) in enumerate(costs):
        top = axes[0, column]
        for method, swept in curves.items():
            _our_latency_curve(top, method, swept, cost_of)
        for label, star in stars.items():
            if star and (spent := cost_of(star)) is not None:
                style: dict[str, Any] = {"color": colour(star.evaluation.model), **_STAR}
                with_interval(top, [spent], [star.accuracy()], label=label, **style)
        if top.lines:
            percent(top, f"ours, {stage_name(sweep)}", title)
        else:
            charts.note(top, "not measured")

        bottom = axes[1, column]
        for method, curve in published_figures.LATENCY.items():
            low, high = curve.tokens if column == 0 else curve.seconds
            x = np.linspace(low, high, len(curve.accuracy))
            bottom.plot(x, curve.accuracy, color=colour(method), marker=_MARKS[method])
        percent(bottom, _PAPER, title)
    axes[0, 0].legend(loc="best")

    swept_problems = problems_of(point for curve in curves.values() for point in curve)
    caption = (
        "Accuracy against latency (Fig. 6), greedy: at each point stands the number of children"
        f" (APR) or window bins (SoS+) that the prompt requests ({swept_problems}); the prompts of"
        f" stars request nothing ({problems_of(plain.values())}). One star, where the run has it,"
        f" is SoS+ with beams 1 to 15. Seconds are of {results.config.evaluate.timed} of the"
        f" problems, one at a time on this machine{device(results)}; the paper's are on 8 A6000"
        " GPUs, one for the parent and seven for children. The paper prints the cost of the first"
        " and the last point only; the others stand at equal distances."
    )
    return Drawn("fig6_latency", caption, figure)


def _our_latency_curve(
    axes: Any,
    method: str,
    swept: list[Answered],
    cost_of: Callable[[Answered], float | None],
) -> None:
    """Draws a method's points of Fig. 6 by their condition, those whose cost is known."""
    points = [(cost, point) for point in swept if (cost := cost_of(point)) is not None]
    if not points:
        return
    costs = [cost for cost, _ in points]
    scores = [point.accuracy() for _, point in points]
    style: dict[str, Any] = {"color": colour(method), "marker": _MARKS[method]}
    with_interval(axes, costs, scores, label=f"{method_name(method)} by condition", **style)
    for (cost, point), score in zip(points, scores, strict=True):
        tag(axes, cost, 100 * score.mean, str(point.evaluation.decoding.condition))


@charts.styled
def enforced(results: Results) -> Drawn | None:
    """Draws Fig. 7, which shows how much of RL's gain comes from more children alone."""
    pairs: dict[str, list[Answered]] = {}  # Name -> (before RL, after RL).
    for method, counts in _enforced_counts(results).items():
        for count in counts:
            name = method_name(method)
            if count is not None:
                name += f",\n{count} children"
            pair = _both_stages(results, method, forced=count)
            if pair:
                pairs[name] = pair
    shown = [answered for pair in pairs.values() for answered in pair]
    forced = [answered for answered in shown if not answered.evaluation.plain]
    if not forced:
        return None

    figure, axes = canvas(2, rows=2, width=max(8.6, 2.4 * len(pairs)), height=5.2)
    colours = [colour(pair[0].evaluation.model) for pair in pairs.values()]
    accuracy = {name: [100 * a.accuracy().mean for a in pair] for name, pair in pairs.items()}
    tokens = {name: [a.mean("total_tokens") for a in pair] for name, pair in pairs.items()}
    paired_bars(axes[0, 0], accuracy, "accuracy (%)", colours)
    intervals_on_bars(axes[0, 0], shown)
    paired_bars(axes[0, 1], tokens, "total tokens", colours)

    enforced_apr = f"apr{published_figures.ENFORCED}"
    models = {"SoS+": "sos+", "APR": "apr", "APR,\n10 children": enforced_apr}
    colours = [colour(model) for model in models.values()]
    for column, (key, title) in enumerate(
        (("accuracy", "accuracy (%)"), ("total_tokens", "total tokens"))
    ):
        published = {name: list(published_figures.RL[key][model]) for name, model in models.items()}
        paired_bars(axes[1, column], published, title, colours)
    axes[0, 0].set_ylabel("ours")
    axes[1, 0].set_ylabel(_PAPER)

    free = [answered for answered in shown if answered.evaluation.plain]
    caption = (
        "Child count enforced (Fig. 7): roots that are forced to spawn a number of children, before"
        " (hollow) and after RL (full). If RL's gain vanishes here, it was in the decision to"
        f" search wider. Greedy answers of forced roots: {problems_of(forced)}; of the others:"
        f" {problems_of(free)}."
    )
    return Drawn("fig7_child_count_enforced", caption, figure)


def _enforced_counts(results: Results) -> dict[str, tuple[int | None, ...]]:
    """Returns each method's forced children, a bar each, in Fig. 7; None leaves the roots free."""
    counts = (None, *results.config.evaluate.forced)
    return {"sos+": (None,), "apr": counts, RANDOM_PARENT_BEAM: counts}


def _both_stages(results: Results, method: str, **decoding: Any) -> list[Answered]:
    """Returns a method's evaluations before and after RL; empty unless the run has both."""
    pair = [results.get(f"{method}/{stage}", **decoding) for stage in STAGES]
    found = [answered for answered in pair if answered]
    return found if len(found) == len(STAGES) else []


def _published_tokens(axes: Any, temperature: float) -> None:
    """Draws the paper's panel of Fig. 4a or 8, in two halves: SoS+ on the left, APR on the right.

    A common axis would say that points above each other cost the same.
    """
    if temperature not in published_figures.APR_BY_CONDITION:
        charts.note(axes, f"the paper has no T = {temperature:g}")
        axes.set_title(_PAPER)
        return
    passed = published_figures.PASS_AT_N[temperature]
    agreed = published_figures.CONS_AT_N[temperature]
    by_condition = published_figures.APR_BY_CONDITION[temperature]
    samples = range(1, len(passed) + 1)
    conditions = range(1, len(by_condition) + 1)
    start = len(passed) + 1.5  # Where the right half begins.

    curves: tuple[tuple[str, tuple[float, ...], str, float, dict[str, Any]], ...] = (
        ("pass", passed, "sos+", 0, {"linestyle": ":", "marker": "o"}),
        ("cons", agreed, "sos+", 0, {"marker": "o"}),
        ("apr", by_condition, "apr", start, {"marker": _MARKS["apr"]}),
    )
    for name, values, method, before, style in curves:
        axes.plot(before + np.arange(1, len(values) + 1), values, color=colour(method), **style)
        if temperature == 1:
            number, tokens = published_figures.TOKENS_AT[name]
            tag(axes, before + number, values[number - 1], tokens)
    axes.axvline((len(passed) + 1 + start) / 2, color=charts.INK, alpha=0.4, linewidth=0.8)

    places = [*samples, *(start + number for number in conditions)]
    axes.set_xticks(places, [*samples, *conditions], fontsize=7)
    axes.xaxis.remove_overlapping_locs = False  # A label of a half may stand below a tick.
    middles = (len(passed) + 1) / 2, start + (len(by_condition) + 1) / 2
    axes.set_xticks(middles, ["SoS+: n samples", "APR: its conditions in order"], minor=True)
    axes.tick_params(axis="x", which="minor", length=0, pad=16)
    percent(axes, f"{_PAPER}, T = {temperature:g}", "")


def _has_tokens(results: Results, temperature: float) -> bool:
    """Returns whether the run has an evaluation for the panel of a temperature in Fig. 4a or 8."""
    sweep = results.config.evaluate.sweep
    return bool(
        results.get(f"sos+/{sweep}", temperature=temperature)
        or results.get(f"apr/{sweep}", temperature=temperature)
        or results.sweep("apr", temperature)
    )


FIGURES: tuple[Callable[[Results], Drawn | None], ...] = (
    total_tokens,
    window,
    before_and_after,
    latency,
    enforced,
)
