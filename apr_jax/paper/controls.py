"""Figures that the paper does not have.

They show controls, what went wrong, the cost on n decode slots, and the curves of training.
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
from apr_jax.paper.kinds import KINDS
from apr_jax.paper.results import Results, problems_of
from apr_jax.paper.suite import MODELS

# Curves of training: stage, metric, and what stands beside the axis.
_CURVES = (
    ("sft", "loss", "nats a token"),
    ("rl", "reward", "reward"),
    ("rl", "children", "children of a tree"),
)


@charts.styled
def budget(results: Results) -> Drawn | None:
    """Draws a control: cumulative accuracy against total tokens.

    The paper says that small budgets favour serial search.
    """
    shown = [answered for model in COMPARED if (answered := results.get(model))]
    if not shown:
        return None
    requested = results.sweep("apr")
    figure, axes = canvas(1, width=6.4)
    most = max(
        trace["total_tokens"] for answered in (*shown, *requested) for trace in answered.traces
    )
    cumulative(axes, shown, "total_tokens", most)

    for index, answered in enumerate(requested):
        spent = sorted(trace["total_tokens"] for trace in answered.traces if trace["correct"])
        share = 100 * np.arange(1, len(spent) + 1) / len(answered.traces)
        # All curves of requested children have one entry in the legend.
        label = f"{MODELS[answered.evaluation.model]}, n requested children" if index == 0 else None
        axes.plot(spent, share, color=colour("apr"), linestyle=":", linewidth=1.1, label=label)
        if spent:
            tag(axes, spent[-1], share[-1], str(answered.evaluation.decoding.condition))

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
    if requested:
        caption += (
            "; dotted: APR with requested children, whose number stands at the last right answer"
            f" of {problems_of(requested)}"
        )
    return Drawn("control_token_budget", f"{caption}.", figure)


@charts.styled
def what_went_wrong(results: Results) -> Drawn | None:
    """Draws failures by kind, as shares of all problems: a stacked bar for each evaluation."""
    shown = [answered for answered in results.headline().values() if answered.traces]
    labels = [answered.label for answered in shown]
    counts = [failures.count(answered.traces) for answered in shown]
    kinds = [kind for kind in KINDS if any(kind in count for count in counts)]
    if not kinds:
        return None

    figure, axes = canvas(1, width=8.6, height=0.9 + 0.42 * len(shown))
    left = np.zeros(len(shown))
    for kind in kinds:
        shares = [
            100 * count.get(kind, 0) / len(answered.traces)
            for answered, count in zip(shown, counts, strict=True)
        ]
        width = np.array(shares)
        axes.barh(labels, width, left=left, label=kind, color=OF_KIND[kind], height=0.65)
        for row, (start, size) in enumerate(zip(left, width, strict=True)):
            # A number needs a part that is wide enough for it.
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
    meanings = "; ".join(f"{kind}: {KINDS[kind]}" for kind in kinds)
    return Drawn("failures", f"What went wrong, by kind: {meanings}.", figure)


@charts.styled
def slots(results: Results) -> Drawn | None:
    """Draws the cost model: the steps and seconds of the same trees on n decode slots."""
    answered = results.get("apr/rl")
    if answered is None or answered.slots is None:
        return None
    rows = answered.slots["rows"]
    timed = set(answered.slots["problems"])
    traces = [trace for trace in answered.traces if trace["id"] in timed]
    measured_counts = [row["slots"] for row in rows]
    counts = list(range(1, max(measured_counts) + 1))
    steps = np.array(cost.mean_steps(traces, counts))
    step_seconds = {row["slots"]: row["step_seconds"] for row in rows}
    seconds = np.array(cost.seconds_on(traces, counts, step_seconds))

    figure, (left, right) = canvas(2)
    model: dict[str, Any] = {"color": colour("apr")}
    measured: dict[str, Any] = {"color": colour("apr"), "markerfacecolor": "none"}
    limit: dict[str, Any] = {"color": EXTRA, "linestyle": "-."}

    # Left: how many times fewer steps than on one decode slot, and Amdahl's limit of that.
    most = sum(t["total_tokens"] for t in traces) / sum(t["sequential_tokens"] for t in traces)
    left.axhline(most, linewidth=1, label=f"total / sequential tokens: {most:.2f}", **limit)
    left.plot(counts, steps[0] / steps, label="steps, from the traces", **model)
    fewer = [rows[0]["steps"] / row["steps"] for row in rows]
    left.plot(measured_counts, fewer, "s", label="steps, as decoded", **measured)
    left.set(title="fewer steps", xlabel="slots", ylabel="times fewer than on one decode slot")
    left.legend(loc="lower right")

    # Right: milliseconds of one problem.
    right.plot(counts, 1e3 * seconds, label="model: steps x measured seconds of a step", **model)
    constant = 1e3 * rows[0]["step_seconds"] * steps
    right.plot(counts, constant, label="if a step took the same on any number", **limit)
    milliseconds = [1e3 * row["seconds"] for row in rows]
    right.plot(measured_counts, milliseconds, "s", label="measured", **measured)
    if answered.latency:
        own = mean(answered.latency["seconds"][name] for name in timed)
        label = "measured, a step as wide as it needs"
        right.axhline(1e3 * own, linestyle=":", linewidth=1.1, label=label, **model)
    right.set(title=f"milliseconds of one problem{device(results)}", xlabel="slots", ylabel="ms")
    right.set_ylim(0, 1.4 * right.get_ylim()[1])
    right.legend(loc="upper right")

    caption = (
        f"Cost model: what the trees of {answered.label} would take on n decode slots. The number"
        " of steps cannot fall by more than the ratio of total to sequential tokens (Amdahl);"
        " threads that wait for a decode slot cost the rest. The dash-dotted curve on the right is"
        " a device whose step costs the same on any number of decode slots. All steps of a tree"
        " have the same number of decode slots here. The engine itself takes few where few threads"
        " are ready; that is the dotted line."
        f" {len(traces)} problems, medians of {answered.slots['repeats']} runs."
    )
    return Drawn("cost_on_slots", caption, figure)


@charts.styled
def draw_training(runs: dict[str, dict[str, list[dict[str, Any]]]]) -> list[Drawn]:
    """Draws loss, reward and children against the training step.

    Args:
      runs: stage -> method -> the lines of its metrics.jsonl.

    Returns:
      one figure; none if there are no runs.
    """
    panels = []
    for stage, metric, label in _CURVES:
        curves = {}
        for method, lines in runs.get(stage, {}).items():
            points = [
                (line["step"], line[metric]) for line in lines if line.get(metric) is not None
            ]
            if points:
                curves[method] = points
        if curves:
            panels.append((stage_name(stage), label, curves))
    if not panels:
        return []

    figure, axes = canvas(len(panels), squeeze=False, height=2.8)
    for panel, (title, label, curves) in zip(axes[0], panels, strict=True):
        for method, points in curves.items():
            style: dict[str, Any] = {"color": colour(method), "label": method_name(method)}
            panel.plot(*zip(*points, strict=True), linewidth=1.2, **style)
        panel.set(title=title, xlabel="step", ylabel=label)
        panel.legend()
    return [
        Drawn(
            "training",
            "Supervised loss; reward and children of a tree at the sampling temperature of RL.",
            figure,
        )
    ]


CONTROLS: tuple[Callable[[Results], Drawn | None], ...] = (budget, slots, what_went_wrong)
