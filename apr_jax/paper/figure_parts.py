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
from apr_jax.paper.suite import DRAWN, WIDE

TOKENS = "total tokens of all threads"
COMPARED = ("sos+/sft", "sos+/rl", WIDE, "apr/sft", "apr/rl")
_NAMES = {
    "apr": "APR",
    DRAWN: "APR,\ndrawn beams",
    "apr-nested": "nested APR",
    "sos+": "SoS+",
    "sos": "SoS",
}


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A figure and what stands below it.

    Attributes:
      name: of its files.
      caption: what is seen, and where the paper has it.
    """

    name: str
    caption: str
    figure: Figure


def cumulative(axes: Any, shown: Sequence[Answered], measure: str, largest: int) -> None:
    """Cumulative accuracy against a measure, with 95% bands."""
    limits = np.unique(np.linspace(0, largest, 120).astype(int))
    for one in shown:
        stage = one.evaluation.model.partition("/")[2]
        _, means, lows, highs = 100 * np.array(accuracy_within(one.traces, measure, limits)).T
        style: dict[str, Any] = {"color": colour(one.evaluation.model)}
        axes.plot(limits, means, linestyle=LINES[stage], label=one.label, **style)
        axes.fill_between(limits, lows, highs, alpha=0.14, linewidth=0, **style)
    axes.set_xlim(0, largest)


def paired_bars(
    axes: Any, pairs: dict[str, list[float]], title: str, colours: Sequence[str] | None = None
) -> None:
    """Two bars a name: hollow before RL, full after."""
    for place, (name, values) in enumerate(pairs.items()):
        tone = colours[place] if colours else colour(name)
        for side, value in enumerate(values):
            full = side == 1 or len(values) == 1
            drawn = axes.bar(
                place + 0.4 * (side - 0.5),
                value,
                0.36,
                color=tone if full else "none",
                edgecolor=tone,
                linewidth=1.4,
            )
            axes.bar_label(
                drawn, fmt="{:,.1f}" if value < 100 else "{:,.0f}", padding=5, fontsize=7.5
            )
    axes.set_xticks(range(len(pairs)), [method_name(name) for name in pairs])
    axes.set_title(title)
    axes.grid(axis="x", visible=False)
    axes.margins(x=0.12, y=0.18)


def intervals_on_bars(axes: Any, shown: Sequence[Answered | None]) -> None:
    """95% intervals on the bars of `paired_bars`, in their order."""
    for index, one in enumerate(shown):
        if one:
            score = one.accuracy()
            x = index // 2 + 0.4 * (index % 2 - 0.5)
            below, above = 100 * (score.mean - score.low), 100 * (score.high - score.mean)
            axes.errorbar(
                x,
                100 * score.mean,
                [[max(0, below)], [max(0, above)]],
                color=charts.INK,
                elinewidth=1.0,
            )


def tag(axes: Any, x: float, y: float, text: str) -> None:
    """A word beside a point."""
    axes.annotate(text, (x, y), xytext=(4, -9), textcoords="offset points", fontsize=7)


def method_name(name: str) -> str:
    """As the paper writes it; other names as they are."""
    return _NAMES.get(name, name)


def stage_name(stage: str) -> str:
    """In words."""
    return {"sft": "supervised", "rl": "after RL"}[stage]


def device(results: Results) -> str:
    """On what the seconds were measured, in brackets; empty if none were."""
    found = {one.latency["device"] for one in results.answered.values() if one.latency}
    return f" ({', '.join(sorted(found))})" if found else ""
