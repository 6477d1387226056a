"""Figures that the paper has not: controls, what went wrong, the cost on n decode slots, training;
drawn from `results` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from apr_jax.evaluate import cost, failures
from apr_jax.evaluate.scores import mean
from apr_jax.paper import charts
from apr_jax.paper.charts import EXTRA, OF_KIND, ON_BAR, canvas, colour, percent
from apr_jax.paper.figure_parts import (
    COMPARED,
    TOKENS,
    Drawn,
    cumulative,
    device,
    method_name,
    stage_name,
    tag,
)
from apr_jax.paper.results import Results, problems_of
from apr_jax.paper.suite import MODELS

_CURVES = {"sft": ("loss", "nats a token"), "rl": ("reward", "reward")}


@charts.styled
def budget(results: Results) -> Drawn | None:
    """A control: cumulative accuracy against total tokens, where small budgets are said to favour
    serial search.
    """
    shown = [one for model in COMPARED if (one := results.get(model))]
    if not shown:
        return None
    asked = results.sweep("apr")
    figure, axes = canvas(1, width=6.4)
    most = max(trace["total_tokens"] for one in (*shown, *asked) for trace in one.traces)
    cumulative(axes, shown, "total_tokens", most)
    for place, one in enumerate(asked):
        spent = sorted(trace["total_tokens"] for trace in one.traces if trace["correct"])
        share = 100 * np.arange(1, len(spent) + 1) / len(one.traces)
        label = None if place else f"{MODELS[one.evaluation.model]}, asked for n children"
        axes.plot(spent, share, color=colour("apr"), linestyle=":", linewidth=1.1, label=label)
        if spent:
            tag(axes, spent[-1], share[-1], str(one.evaluation.decoding.condition))
    limit = results.config.limits.window
    if limit < most:
        axes.axvline(
            limit, color=EXTRA, linewidth=1, linestyle="-.", label=f"one window: {limit:,}"
        )
    axes.legend(loc="lower right")
    percent(axes, "ours", f"budget: {TOKENS}", low=0, high=101)
    caption = (
        "A control: an answer counts only if its whole tree took no more than the budget. The"
        " paper finds serial search no worse at about 4,000 total tokens and below, one window of"
        f" its models. Greedy answers to {problems_of(shown)}"
    )
    if asked:
        caption += (
            "; dotted: APR asked for a number of children, which stands at the last right one of"
            f" {problems_of(asked)}"
        )
    return Drawn("control_token_budget", f"{caption}.", figure)


@charts.styled
def what_went_wrong(results: Results) -> Drawn | None:
    """Failures by kind, as shares of all problems."""
    shown = [one for one in results.plain().values() if one.traces]
    counts = {one.label: failures.count(one.traces) for one in shown}
    kinds = [kind for kind in failures.KINDS if any(kind in found for found in counts.values())]
    if not kinds:
        return None
    figure, axes = canvas(1, width=8.6, height=0.9 + 0.42 * len(shown))
    left = np.zeros(len(shown))
    for kind in kinds:
        width = np.array([100 * counts[one.label].get(kind, 0) / len(one.traces) for one in shown])
        axes.barh(
            [one.label for one in shown],
            width,
            left=left,
            label=kind,
            color=OF_KIND[kind],
            height=0.65,
        )
        for row, (start, size) in enumerate(zip(left, width, strict=True)):
            if size >= 0.04 * max(1.0, left.max() + width.max()):
                axes.text(
                    start + size / 2,
                    row,
                    f"{size:.1f}",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color=ON_BAR,
                )
        left += width
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="problems not solved (%), by what went wrong first")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02))
    return Drawn(
        "failures",
        "What went wrong, by kind: " + "; ".join(f"{k}: {failures.KINDS[k]}" for k in kinds) + ".",
        figure,
    )


@charts.styled
def slots(results: Results) -> Drawn | None:
    """The cost model: the same trees on any number of decode slots."""
    one = results.get("apr/rl")
    if one is None or one.slots is None:
        return None
    rows, timed = one.slots["rows"], set(one.slots["problems"])
    traces = [trace for trace in one.traces if trace["id"] in timed]
    counts = list(range(1, max(row["slots"] for row in rows) + 1))
    steps = np.array(cost.mean_steps(traces, counts))
    spent = np.array(
        cost.seconds_on(traces, counts, {row["slots"]: row["step_seconds"] for row in rows})
    )
    figure, (left, right) = canvas(2)
    bound = sum(t["total_tokens"] for t in traces) / sum(t["sequential_tokens"] for t in traces)
    left.axhline(
        bound,
        color=EXTRA,
        linestyle="-.",
        linewidth=1,
        label=f"total / sequential tokens: {bound:.2f}",
    )
    left.plot(counts, steps[0] / steps, color=colour("apr"), label="steps, from the traces")
    measured = [rows[0]["steps"] / row["steps"] for row in rows]
    left.plot(
        [row["slots"] for row in rows],
        measured,
        "s",
        color=colour("apr"),
        markerfacecolor="none",
        label="steps, as decoded",
    )
    left.set(title="fewer steps", xlabel="slots", ylabel="times fewer than on one decode slot")
    left.legend(loc="lower right")
    right.plot(
        counts, 1e3 * spent, color=colour("apr"), label="model: steps x measured seconds of a step"
    )
    right.plot(
        counts,
        1e3 * rows[0]["step_seconds"] * steps,
        color=EXTRA,
        linestyle="-.",
        label="if a step took the same on any number",
    )
    right.plot(
        [row["slots"] for row in rows],
        [1e3 * row["seconds"] for row in rows],
        "s",
        color=colour("apr"),
        markerfacecolor="none",
        label="measured",
    )
    if one.latency:
        own = mean(one.latency["seconds"][name] for name in timed)
        label = "measured, a step as wide as it needs"
        right.axhline(1e3 * own, color=colour("apr"), linestyle=":", linewidth=1.1, label=label)
    right.set(title=f"milliseconds of one problem{device(results)}", xlabel="slots", ylabel="ms")
    right.set_ylim(0, 1.4 * right.get_ylim()[1])
    right.legend(loc="upper right")
    caption = (
        f"Cost model: what the trees of {one.label} would take on n decode slots. A tree cannot"
        " gain more than its total over its sequential tokens (Amdahl); threads that wait for a"
        " decode slot cost the rest. The dash-dotted curve on the right is a device whose step"
        " costs the same whatever its decode slots. All steps of a tree have the same decode slots"
        " here; the engine itself takes few where few threads are ready, which is the dotted line."
        f" {len(traces)} problems, medians of {one.slots['repeats']} runs."
    )
    return Drawn("cost_on_lanes", caption, figure)


@charts.styled
def draw_training(runs: dict[str, dict[str, list[dict[str, Any]]]]) -> list[Drawn]:
    """Loss and reward against the step.

    Args:
      runs: stage -> method -> logged lines.
    """
    shown = [(stage, *_CURVES[stage]) for stage in runs]
    if not shown:
        return []
    figure, axes = canvas(len(shown), squeeze=False, height=2.8)
    for column, (stage, metric, label) in enumerate(shown):
        for method, lines in runs[stage].items():
            points = [
                (line["step"], line[metric]) for line in lines if line.get(metric) is not None
            ]
            axes[0, column].plot(
                *zip(*points, strict=True),
                color=colour(method),
                label=method_name(method),
                linewidth=1.2,
            )
        axes[0, column].set(title=stage_name(stage), xlabel="step", ylabel=label)
        axes[0, column].legend()
    return [
        Drawn(
            "training",
            "Supervised loss, and reward of a tree at the sampling temperature, while training.",
            figure,
        )
    ]


CONTROLS: tuple[Callable[[Results], Drawn | None], ...] = (budget, slots, what_went_wrong)
