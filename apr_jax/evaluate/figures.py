"""Figures from trace lines: PNG for papers, SVG for the report."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from apr_jax.evaluate.metrics import accuracy_within

# One colour a method, one line style a stage: readable in print and by the colour-blind.
_COLOURS = {"apr": "#2563eb", "apr-nested": "#7c3aed", "sos+": "#d97706", "sos": "#6b7280"}
_STYLES = {"sft": "--", "rl": "-"}
LABELS = {
    "max_thread_tokens": "window: tokens of the longest thread",
    "total_tokens": "total tokens of all threads",
    "sequential_tokens": "sequential tokens (longest chain)",
}


def accuracy_against(measure: str, evaluations: Mapping[str, Sequence[dict[str, Any]]]) -> Figure:
    """Cumulative accuracy against a measure, with 95% bands.

    Args:
      measure: a key of LABELS.
      evaluations: traces of each evaluation, named "<method>-<stage>".
    """
    largest = max((trace[measure] for traces in evaluations.values() for trace in traces), default=1)
    limits = np.unique(np.linspace(0, largest, 120).astype(int))
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, traces in evaluations.items():
        method, _, stage = name.rpartition("-")
        rows = np.asarray(accuracy_within(traces, measure, limits))
        colour = _COLOURS.get(method, "#111827")
        axes.plot(rows[:, 0], 100 * rows[:, 1], _STYLES.get(stage, "-"), color=colour, label=_name(name))
        axes.fill_between(rows[:, 0], 100 * rows[:, 2], 100 * rows[:, 3], color=colour, alpha=0.12, linewidth=0)
    axes.set(xlabel=LABELS[measure], ylabel="problems solved (%)", xlim=(0, largest), ylim=(0, 100))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    return figure


def training_curves(runs: Mapping[str, Sequence[dict[str, Any]]], metric: str, label: str) -> Figure:
    """A logged metric against the step, one line a run."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, lines in runs.items():
        points = [(line["step"], line[metric]) for line in lines if metric in line]
        if points:
            method, _, _ = name.rpartition("-")
            axes.plot(*zip(*points, strict=True), color=_COLOURS.get(method, "#111827"), label=method)
    axes.set(xlabel="step", ylabel=label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def to_svg(figure: Figure) -> str:
    """The figure as an `<svg>` element that stands in a page; the same figure gives the same text."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def save(figure: Figure, stem: Path) -> None:
    """Writes STEM.png and STEM.svg."""
    figure.savefig(stem.with_suffix(".png"), dpi=160)
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


def _name(evaluation: str) -> str:
    method, _, stage = evaluation.rpartition("-")
    names = {"apr": "APR", "apr-nested": "nested APR", "sos+": "SoS+", "sos": "SoS"}
    stages = {"sft": "supervised", "rl": "after RL"}
    return f"{names.get(method, method)}, {stages.get(stage, stage)}"
