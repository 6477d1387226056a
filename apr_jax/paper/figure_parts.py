"""Pieces that several figures share: curves over evaluations, bars before and after RL, names."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from apr_jax.evaluate.scores import accuracy_within
from apr_jax.paper import charts
from apr_jax.paper.charts import LINES, colour
from apr_jax.paper.results import Answered, Results
from apr_jax.paper.suite import (
    BEAMS_1_TO_15,
    BOTH_ENDS,
    RANDOM_PARENT_BEAM,
    STRONGER_MODELS,
)

TOKENS = "total tokens of all threads"  # Label of an axis.
COMPARED = ("sos+/sft", "sos+/rl", *STRONGER_MODELS, "apr/sft", "apr/rl")
_NAMES = {
    "apr": "APR",
    RANDOM_PARENT_BEAM: "APR,\nrandom parent beam",
    "apr-nested": "nested APR",
    "sos+": "SoS+",
    BEAMS_1_TO_15: "SoS+,\nbeams 1 to 15",
    BOTH_ENDS: "SoS+,\nfrom both ends",
    "sos": "SoS",
}


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A figure with its caption.

    Attributes:
      name: name of its files.
      caption: what the figure shows, and where the paper shows it.
      figure: the figure.
    """

    name: str
    caption: str
    figure: Figure


def cumulative(axes: Any, shown: Sequence[Answered], measure: str, largest: int) -> None:
    """Draws cumulative accuracy against a measure of the trees, with bands of 95%.

    Args:
      axes: where it is drawn.
      shown: the evaluations, a curve each.
      measure: a tree counts as right only if its measure is at most the value on the x axis.
      largest: the end of the x axis.
    """
    limits = np.unique(np.linspace(0, largest, 120).astype(int))
    for answered in shown:
        stage = answered.evaluation.model.partition("/")[2]
        rows = accuracy_within(answered.traces, measure, limits)
        _, means, lows, highs = 100 * np.array(rows).T
        style: dict[str, Any] = {"color": colour(answered.evaluation.model)}
        axes.plot(limits, means, linestyle=LINES[stage], label=answered.label, **style)
        axes.fill_between(limits, lows, highs, alpha=0.14, linewidth=0, **style)
    axes.set_xlim(0, largest)


def paired_bars(
    axes: Any, pairs: dict[str, list[float]], title: str, colours: Sequence[str] | None = None
) -> None:
    """Draws two bars for each name: a hollow one before RL, a full one after RL.

    Args:
      axes: where they are drawn.
      pairs: name -> values before and after RL; a single value is drawn full.
      title: stands above the bars.
      colours: a colour for each name; None takes the colours of the methods.
    """
    for index, (name, values) in enumerate(pairs.items()):
        tone = colours[index] if colours else colour(name)
        for side, value in enumerate(values):
            is_full = side == 1 or len(values) == 1
            x = _bar_position(index, side)
            fill = tone if is_full else "none"
            bars = axes.bar(x, value, 0.36, color=fill, edgecolor=tone, linewidth=1.4)
            form = "{:,.1f}" if value < 100 else "{:,.0f}"
            axes.bar_label(bars, fmt=form, padding=5, fontsize=7.5)
    axes.set_xticks(range(len(pairs)), [method_name(name) for name in pairs])
    axes.set_title(title)
    axes.grid(axis="x", visible=False)
    axes.margins(x=0.12, y=0.18)


def intervals_on_bars(axes: Any, shown: Sequence[Answered | None]) -> None:
    """Draws intervals of 95% on the bars of `paired_bars`.

    Args:
      axes: those of the bars.
      shown: the evaluation of each bar, in the order of the bars; None draws no interval.
    """
    for index, answered in enumerate(shown):
        if answered:
            score = answered.accuracy()
            below = max(0, 100 * (score.mean - score.low))
            above = max(0, 100 * (score.high - score.mean))
            x = _bar_position(index // 2, index % 2)
            lengths = [[below], [above]]
            axes.errorbar(x, 100 * score.mean, lengths, color=charts.INK, elinewidth=1.0)


def _bar_position(index: int, side: int) -> float:
    """Returns the place of a bar on the x axis: `side` is 0 before RL and 1 after."""
    return index + 0.4 * (side - 0.5)


def tag(axes: Any, x: float, y: float, text: str) -> None:
    """Writes a word beside a point."""
    axes.annotate(text, (x, y), xytext=(4, -9), textcoords="offset points", fontsize=7)


def method_name(name: str) -> str:
    """Writes a method as the paper does; a name that is no method stays as it is."""
    return _NAMES.get(name, name)


def stage_name(stage: str) -> str:
    """Writes a stage, "sft" or "rl", in words."""
    return {"sft": "supervised", "rl": "after RL"}[stage]


def device(results: Results) -> str:
    """Names the devices on which seconds were measured, in brackets; "" if none were measured."""
    latencies = [answered.latency for answered in results.answered.values()]
    devices = {latency["device"] for latency in latencies if latency}
    return f" ({', '.join(sorted(devices))})" if devices else ""
