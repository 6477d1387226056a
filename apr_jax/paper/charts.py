"""How figures look: one colour a method everywhere, one line a stage, at home on light and dark
pages.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

# A notebook names its backend in the environment, and matplotlib cannot be imported where that is
# not installed. Nothing here needs one: figures are drawn by canvases of their own.
_BACKEND = os.environ.pop("MPLBACKEND", None)
import matplotlib

if _BACKEND is not None:
    os.environ["MPLBACKEND"] = _BACKEND
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = _BACKEND  # For whoever else draws in this process.

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from apr_jax.io.storage import write_bytes
from apr_jax.paper.suite import DRAWN, WIDE

# Readable in print, by the colour-blind, and on either page: `_DARK` has the twin of each for the
# dark one.
APR, NESTED, SOS_PLUS, WIDE_BEAMS, SOS, EXTRA = (
    "#2563eb",
    "#7c3aed",
    "#d97706",
    "#be185d",
    "#6b7280",
    "#0d9488",
)
OF_KIND = {  # Of what went wrong (`failures.KINDS`).
    "arithmetic": "#b91c1c",
    "bookkeeping": "#c2410c",
    "message": "#a16207",
    "belief": "#4338ca",
    "join": "#0e7490",
    "comparison": NESTED,
    "coverage": "#475569",
    "search": "#475569",
    "truncated": "#9d174d",
    "malformed": "#57534e",
    "refused": "#4d7c0f",
}
ON_BAR = "#fffefd"  # Words on a bar of `OF_KIND`.
_DARK = {
    APR: "#60a5fa",
    NESTED: "#a78bfa",
    SOS_PLUS: "#fbbf24",
    WIDE_BEAMS: "#f9a8d4",
    SOS: "#9ca3af",
    EXTRA: "#2dd4bf",
    ON_BAR: "#0d131e",
    "#4338ca": "#818cf8",
    "#b91c1c": "#f87171",
    "#c2410c": "#fb923c",
    "#a16207": "#facc15",
    "#0e7490": "#22d3ee",
    "#475569": "#94a3b8",
    "#9d174d": "#f472b6",
    "#57534e": "#a8a29e",
    "#4d7c0f": "#a3e635",
}
INK = "#010203"  # Stands for the page's own ink.
_FAINT = "#040506"
LINES = {"sft": "--", "rl": "-"}
_STYLE: Any = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.alpha": 0.15,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "errorbar.capsize": 2.0,
    "svg.hashsalt": "apr_jax",
    "svg.fonttype": "none",
}

P = ParamSpec("P")
R = TypeVar("R")


def styled(function: Callable[P, R]) -> Callable[P, R]:
    """Everything that the function draws is in the house style.

    The settings of a matplotlibrc or of the caller have no effect on it, and the caller's are as
    before afterwards."""

    @functools.wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_STYLE)
            return function(*args, **kwargs)

    return inner


def canvas(
    columns: int, *, rows: int = 1, width: float = 8.6, height: float = 3.3, **settings: Any
) -> tuple[Figure, Any]:
    """A figure and its axes: one Axes, or an array of them."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **settings)


def colour(model: str) -> str:
    """Of a model or method: "apr/rl", "sos+"."""
    method = model.partition("/")[0]
    found = {
        "apr": APR,
        DRAWN: APR,
        "apr-nested": NESTED,
        "sos": SOS,
        WIDE.partition("/")[0]: WIDE_BEAMS,
    }
    return found.get(method.partition(" ")[0], SOS_PLUS)


def with_interval(
    axes: Axes, x: Sequence[float], scores: Sequence[Any], *, label: str, **style: Any
) -> None:
    """Scores in percent with their 95% intervals, joined by a line."""
    y = [100 * score.mean for score in scores]
    below = [max(0.0, 100 * (score.mean - score.low)) for score in scores]
    above = [max(0.0, 100 * (score.high - score.mean)) for score in scores]
    axes.errorbar(x, y, yerr=[below, above], label=label, elinewidth=0.9, **style)


def percent(
    axes: Axes, title: str, xlabel: str, *, low: float | None = None, high: float | None = None
) -> None:
    """An axis of problems solved."""
    axes.set(title=title, xlabel=xlabel)
    if (place := axes.get_subplotspec()) and place.is_first_col():
        axes.set_ylabel("problems solved (%)")
    axes.set_ylim(low, high, auto=low is None)


def note(axes: Axes, text: str) -> None:
    """Instead of curves: why there are none."""
    axes.text(
        0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", wrap=True, alpha=0.8
    )
    axes.set_xticks([])
    axes.set_yticks([])


@styled
def to_svg(figure: Figure, label: str) -> str:
    """The figure as an `<svg>` element that stands in a page, in the page's colours; the same
    figure gives the same text.

    Args:
      label: what a screen reader says.
    """
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    # Groups of several figures would share their names; those of marks and clips depend on the
    # process.
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    names = dict.fromkeys(re.findall(r' id="([^"]*)"', svg))
    prefix = f"f{zlib.crc32(label.encode()):08x}"
    new = {name: f"{prefix}-{number}" for number, name in enumerate(names)}
    svg = re.sub(
        r'(?<= id=")[^"]*|(?<=#)[^")]*(?=["\)])', lambda match: new.get(match[0], match[0]), svg
    )
    svg = svg.replace(INK, "currentColor").replace(_FAINT, "currentColor")
    svg = re.sub("|".join(_DARK), lambda match: f"light-dark({match[0]}, {_DARK[match[0]]})", svg)
    escaped = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escaped}"', 1)


@styled
def save(figure: Figure, stem: Path) -> None:
    """Writes STEM.png and STEM.svg."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    for ending, settings in (("png", {"dpi": 160}), ("svg", {"metadata": {"Date": None}})):
        drawn = io.BytesIO()
        figure.savefig(drawn, format=ending, **settings)
        write_bytes(stem.parent / f"{stem.name}.{ending}", drawn.getvalue())
