"""Every figure of the paper, ours beside the published one; drawn from `results` alone.

A figure is a function of the results that returns None if its evaluations are not there. FIGURES
lists them in the order of the report; a new one needs no more than its line there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from apr_jax.paper import charts, published_figures
from apr_jax.paper.charts import canvas, colour, percent, with_interval
from apr_jax.paper.comparisons import seconds
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
from apr_jax.paper.suite import DRAWN, MODELS, STAGES, WIDE

_PAPER = "the paper, 228M"
_MARKS = {"apr": "s", "sos+": "o"}
_STAR: dict[str, Any] = {"marker": "*", "markersize": 9, "linestyle": ""}


@charts.styled
def total_tokens(results: Results) -> Drawn | None:
    """Fig. 4a and 8: a row of panels, one a temperature."""
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
    sweep = results.config.evaluate.sweep
    for column, temperature in enumerate(temperatures):
        top, bottom = axes[0, column], axes[1, column]
        for model, name in ((f"sos+/{sweep}", "SoS+"), (WIDE, MODELS[WIDE])):
            if serial := results.get(model, temperature=temperature):
                rows = serial.by_n
                tokens = [spent for *_, spent in rows]
                style: dict[str, Any] = {"color": colour(model), "marker": "o"}
                passed, agreed = [row[0] for row in rows], [row[1] for row in rows]
                with_interval(top, tokens, passed, label=f"{name} pass@n", linestyle=":", **style)
                with_interval(top, tokens, agreed, label=f"{name} cons@n", **style)
        points = results.sweep("apr", temperature)
        if points:
            spent = [one.mean("total_tokens") for one in points]
            style = {"color": colour("apr"), "marker": _MARKS["apr"]}
            with_interval(
                top,
                spent,
                [one.accuracy() for one in points],
                label="APR by child condition",
                **style,
            )
            for x, one in zip(spent, points, strict=True):
                tag(top, x, 100 * one.accuracy().mean, str(one.evaluation.decoding.condition))
        if free := results.get(f"apr/{sweep}", temperature=temperature):
            style = {"color": colour("apr"), **_STAR}
            with_interval(
                top,
                [free.mean("total_tokens")],
                [free.accuracy()],
                label="APR, asked for nothing",
                **style,
            )
        percent(top, f"ours, {stage_name(sweep)}, T = {temperature:g}", TOKENS)
        _published_tokens(bottom, temperature)
    axes[0, -1].legend(loc="best")
    caption = (
        "Accuracy against total tokens (Fig. 4a; Fig. 8 at other temperatures). SoS+ draws n"
        " independent samples: pass@n counts any right one, cons@n the solution that most of them"
        " claim. APR is asked for a number of child threads, which stands at its points. The paper"
        " prints the accuracy of its points but, at three of T = 1, not their tokens, so its panels"
        " have no axis of cost: on the left SoS+ by its n, on the right APR by its conditions, the"
        " least first. Points of the two halves do not cost the same. SoS+ on wide beams, where the"
        " run has it, answers once but at the highest temperature; the paper has none here."
    )
    return Drawn("fig4a_fig8_total_tokens", caption, figure)


@charts.styled
def window(results: Results) -> Drawn | None:
    """Fig. 4b, with the demonstrations' own curve."""
    shown = [one for model in COMPARED if (one := results.get(model))]
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
        bars = right.bar(
            MODELS[model].replace(" after", "\nafter"), accuracy, color=colour(model), width=0.6
        )
        right.bar_label(bars, fmt="%.1f", padding=2)
    right.set_title(f"{_PAPER}, window {published_figures.WINDOW:,}")
    caption = (
        "Accuracy against the window (Fig. 4b): an answer counts only if every thread of its tree"
        " fits. Greedy answers; bands are 95% intervals; dotted: the demonstrations that the models"
        " imitate, on the same problems."
    )
    return Drawn("fig4b_window", caption, figure)


@charts.styled
def before_and_after(results: Results) -> Drawn | None:
    """Fig. 5, with SoS+ beside APR."""
    methods = [
        m for m in ("sos+", "apr", DRAWN) if results.get(f"{m}/sft") and results.get(f"{m}/rl")
    ]
    if not methods:
        return None
    figure, axes = canvas(4, rows=2, width=3.2 + 3.2 * len(methods), height=5.0)
    measures: list[tuple[str, str, Callable[[Answered], float]]] = [
        ("accuracy", "accuracy (%)", lambda one: 100 * one.accuracy().mean),
        ("total_tokens", "total tokens", lambda one: one.mean("total_tokens")),
        ("thread_tokens", "tokens a sequence", lambda one: one.thread_tokens()),
        ("children", "child threads", lambda one: one.mean("children")),
    ]
    for column, (key, title, value) in enumerate(measures):
        ours = {
            method: [value(one) for stage in STAGES if (one := results.get(f"{method}/{stage}"))]
            for method in methods
        }
        if key == "children":
            ours.pop("sos+", None)
        published = {
            method: list(pair)
            for method, pair in published_figures.RL[key].items()
            if method in ("sos+", "apr")
        }
        paired_bars(axes[0, column], ours, f"{title}")
        paired_bars(axes[1, column], published, title)
        if key == "accuracy":
            intervals_on_bars(
                axes[0, column], [results.get(f"{m}/{s}") for m in methods for s in STAGES]
            )
    axes[0, 0].set_ylabel("ours")
    axes[1, 0].set_ylabel(_PAPER)
    caption = (
        "Before and after RL (Fig. 5): hollow bars are the supervised models, full ones those"
        " after RL. Greedy answers to"
        f" {problems_of(results.get(f'{m}/{s}') for m in methods for s in STAGES)}. A sequence is"
        " one thread; the paper prints no tokens a sequence and no children for SoS+. Drawn beams,"
        " where the run has them: APR whose demonstrations draw how many children a parent spawns."
    )
    return Drawn("fig5_before_and_after_rl", caption, figure)


@charts.styled
def latency(results: Results) -> Drawn | None:
    """Fig. 6: sequential tokens and measured seconds of one problem."""
    sweep = results.config.evaluate.sweep
    plain = {method: results.get(f"{method}/{sweep}") for method in ("sos+", "apr")}
    stars = {f"{method_name(method)}, asked for nothing": one for method, one in plain.items()}
    stars[MODELS[WIDE]] = results.get(WIDE)
    curves = {method: results.sweep(method) for method in plain}
    if not (any(curves.values()) or any(plain.values())):
        return None
    figure, axes = canvas(2, rows=2, height=5.8, sharey="row")
    costs: list[tuple[str, Callable[[Answered], float | None]]] = [
        ("sequential tokens", lambda one: one.mean("sequential_tokens")),
        ("seconds of one problem", lambda one: seconds(one) if one.latency else None),
    ]
    for column, (title, cost_of) in enumerate(costs):
        for method, swept in curves.items():
            placed = [(x, one) for one in swept if (x := cost_of(one)) is not None]
            style: dict[str, Any] = {"color": colour(method), "marker": _MARKS[method]}
            if placed:
                xs, ys = [spent for spent, _ in placed], [one.accuracy() for _, one in placed]
                with_interval(
                    axes[0, column], xs, ys, label=f"{method_name(method)} by condition", **style
                )
            for x, one in placed:
                d = one.evaluation.decoding
                asked = d.bins if d.condition is None else d.condition
                tag(axes[0, column], x, 100 * one.accuracy().mean, str(asked))
        for label, star in stars.items():
            if star and (spent := cost_of(star)) is not None:
                style = {"color": colour(star.evaluation.model), **_STAR}
                with_interval(axes[0, column], [spent], [star.accuracy()], label=label, **style)
        if axes[0, column].lines:
            percent(axes[0, column], f"ours, {stage_name(sweep)}", title)
        else:
            charts.note(axes[0, column], "not measured")
        for method, curve in published_figures.LATENCY.items():
            low, high = curve.tokens if column == 0 else curve.seconds
            axes[1, column].plot(
                np.linspace(low, high, len(curve.accuracy)),
                curve.accuracy,
                color=colour(method),
                marker=_MARKS[method],
            )
        percent(axes[1, column], _PAPER, title)
    axes[0, 0].legend(loc="best")
    caption = (
        "Accuracy against latency (Fig. 6), greedy: at each point stands the number of children"
        " (APR) or window bins (SoS+) that the prompt asks for"
        f" ({problems_of(one for curve in curves.values() for one in curve)}); stars are asked for"
        f" nothing ({problems_of(plain.values())}), one of them, where the run has it, SoS+ on wide"
        f" beams. Seconds are of {results.config.evaluate.timed} of the problems, one at a time on"
        f" this machine{device(results)}; the paper's are on 8 A6000 GPUs, one for the parent and"
        " seven for children. Of the paper's points only the first and last places are printed;"
        " the others stand evenly."
    )
    return Drawn("fig6_latency", caption, figure)


@charts.styled
def enforced(results: Results) -> Drawn | None:
    """Fig. 7: how much of RL's gain is only more children."""
    forced = results.config.evaluate.forced
    shown = [
        ("sos+", None),
        *((method, count) for method in ("apr", DRAWN) for count in (None, *forced)),
    ]
    rows: dict[str, list[Answered]] = {}
    for method, count in shown:
        pair = [one for stage in STAGES if (one := results.get(f"{method}/{stage}", forced=count))]
        if len(pair) == len(STAGES):
            rows[method_name(method) + ("" if count is None else f",\n{count} children")] = pair
    drawn = [one for pair in rows.values() for one in pair]
    held = [one for one in drawn if not one.evaluation.plain]
    if not held:
        return None
    figure, axes = canvas(2, rows=2, width=max(8.6, 2.4 * len(rows)), height=5.2)
    colours = [colour(pair[0].evaluation.model) for pair in rows.values()]
    paired_bars(
        axes[0, 0],
        {name: [100 * one.accuracy().mean for one in pair] for name, pair in rows.items()},
        "accuracy (%)",
        colours,
    )
    intervals_on_bars(axes[0, 0], drawn)
    paired_bars(
        axes[0, 1],
        {name: [one.mean("total_tokens") for one in pair] for name, pair in rows.items()},
        "total tokens",
        colours,
    )
    theirs = {"SoS+": "sos+", "APR": "apr", "APR,\n10 children": "apr enforced"}
    for column, key in enumerate(("accuracy", "total_tokens")):
        paired_bars(
            axes[1, column],
            {name: list(published_figures.RL[key][model]) for name, model in theirs.items()},
            "accuracy (%)" if column == 0 else "total tokens",
            [colour(model) for model in theirs.values()],
        )
    axes[0, 0].set_ylabel("ours")
    axes[1, 0].set_ylabel(_PAPER)
    caption = (
        "Child count enforced (Fig. 7): roots held to a number of children, before (hollow) and"
        " after RL (full). If RL's gain vanishes here, it was in the decision to search wider."
        f" Greedy answers of roots that are held: {problems_of(held)}; of the others:"
        f" {problems_of(one for one in drawn if one.evaluation.plain)}."
    )
    return Drawn("fig7_child_count_enforced", caption, figure)


def _published_tokens(axes: Any, temperature: float) -> None:
    """The paper's panel of Fig. 4a or 8: two halves, since one axis for both would say that they
    cost the same.
    """
    if temperature not in published_figures.APR_BY_CONDITION:
        charts.note(axes, f"the paper has no T = {temperature:g}")
        axes.set_title(_PAPER)
        return
    samples, conditions = (
        len(published_figures.PASS_AT_N[temperature]),
        len(published_figures.APR_BY_CONDITION[temperature]),
    )
    start = samples + 1.5  # Before the first condition: no point of APR stands above one of SoS+.
    curves: tuple[tuple[str, tuple[float, ...], str, float, dict[str, Any]], ...] = (
        (
            "pass",
            published_figures.PASS_AT_N[temperature],
            "sos+",
            0,
            {"linestyle": ":", "marker": "o"},
        ),
        ("cons", published_figures.CONS_AT_N[temperature], "sos+", 0, {"marker": "o"}),
        (
            "apr",
            published_figures.APR_BY_CONDITION[temperature],
            "apr",
            start,
            {"marker": _MARKS["apr"]},
        ),
    )
    for name, values, method, before, style in curves:
        axes.plot(before + np.arange(1, len(values) + 1), values, color=colour(method), **style)
        if temperature == 1:
            place, tokens = published_figures.TOKENS_AT[name]
            tag(axes, before + place, values[place - 1], tokens)
    axes.axvline((samples + 1 + start) / 2, color=charts.INK, alpha=0.4, linewidth=0.8)
    halves = [*range(1, samples + 1)], [*range(1, conditions + 1)]
    axes.set_xticks(
        [*halves[0], *(start + place for place in halves[1])], [*halves[0], *halves[1]], fontsize=7
    )
    axes.xaxis.remove_overlapping_locs = False  # A label may stand below a tick.
    middles = (samples + 1) / 2, start + (conditions + 1) / 2
    axes.set_xticks(middles, ["SoS+: n samples", "APR: its conditions in order"], minor=True)
    axes.tick_params(axis="x", which="minor", length=0, pad=16)
    percent(axes, f"{_PAPER}, T = {temperature:g}", "")


def _has_tokens(results: Results, temperature: float) -> bool:
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
