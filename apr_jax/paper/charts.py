"""The look of figures, which read well on light and dark pages.

A method has the same colour everywhere, a stage the same kind of line.
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

# A notebook names matplotlib's backend in the environment. Where that backend is not installed,
# matplotlib cannot be imported. Figures here are drawn on canvases of their own and need no
# backend, so the variable is hidden during the import.
_BACKEND = os.environ.pop("MPLBACKEND", None)
import matplotlib

if _BACKEND is not None:
    os.environ["MPLBACKEND"] = _BACKEND
    with contextlib.suppress(ValueError):
        # Other code that draws in this process gets the backend that it expects.
        matplotlib.rcParams["backend"] = _BACKEND

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from apr_jax.io.storage import write_bytes
from apr_jax.paper.suite import BEAMS_1_TO_15, BOTH_ENDS, RANDOM_PARENT_BEAM

# Colours that are readable in print and for the colour-blind. `_DARK` has the twin of each for a
# dark page.
APR = "#2563eb"
NESTED = "#7c3aed"
SOS_PLUS = "#d97706"
SOS_PLUS_15 = "#be185d"  # SoS+ with beams 1 to 15.
SOS_PLUS_BOTH = "#4d7c0f"  # SoS+ from both ends.
SOS = "#6b7280"
EXTRA = "#0d9488"

# Colours of the kinds of failures (`kinds.KINDS`).
OF_KIND = {
    "arithmetic": "#b91c1c",
    "bookkeeping": "#c2410c",
    "message": "#a16207",
    "belief": "#4338ca",
    "join": "#0e7490",
    "claim": NESTED,
    "check": "#0f766e",
    "answer": SOS_PLUS_15,
    "coverage": "#475569",
    "search": "#475569",
    "truncated": "#9d174d",
    "malformed": "#57534e",
    "refused": SOS_PLUS_BOTH,
}
ON_BAR = "#fffefd"  # Colour of words on a bar of `OF_KIND`.

_DARK = {
    APR: "#60a5fa",
    NESTED: "#a78bfa",
    SOS_PLUS: "#fbbf24",
    SOS_PLUS_15: "#f9a8d4",
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
    SOS_PLUS_BOTH: "#a3e635",
    "#0f766e": "#5eead4",
}

# Placeholders for the page's own text colour, in full and in faint. `to_svg` replaces them.
INK = "#010203"
_FAINT = "#040506"

LINES = {"sft": "--", "rl": "-"}  # Kind of line of each stage.

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
    """Decorates a function so that everything that it draws has the style of this project.

    Settings of a matplotlibrc or of the caller have no effect, and the caller's settings are
    restored afterwards.
    """

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
    """Makes a figure and its axes: one Axes, or an array of them."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **settings)


def colour(model: str) -> str:
    """Returns the colour of a model or method.

    Args:
      model: for example "apr/rl", "sos+", or "apr enforced".
    """
    method = model.partition("/")[0].partition(" ")[0]
    colours = {
        "apr": APR,
        RANDOM_PARENT_BEAM: APR,
        "apr-nested": NESTED,
        "sos": SOS,
        BEAMS_1_TO_15: SOS_PLUS_15,
        BOTH_ENDS: SOS_PLUS_BOTH,
    }
    return colours.get(method, SOS_PLUS)


def with_interval(
    axes: Axes, x: Sequence[float], scores: Sequence[Any], *, label: str, **style: Any
) -> None:
    """Draws scores in percent with their 95% intervals, joined by a line."""
    y = [100 * score.mean for score in scores]
    below = [max(0.0, 100 * (score.mean - score.low)) for score in scores]
    above = [max(0.0, 100 * (score.high - score.mean)) for score in scores]
    axes.errorbar(x, y, yerr=[below, above], label=label, elinewidth=0.9, **style)


def percent(
    axes: Axes, title: str, xlabel: str, *, low: float | None = None, high: float | None = None
) -> None:
    """Titles a panel whose y axis is the percentage of problems solved."""
    axes.set(title=title, xlabel=xlabel)
    position = axes.get_subplotspec()
    if position and position.is_first_col():
        axes.set_ylabel("problems solved (%)")
    axes.set_ylim(low, high, auto=low is None)


def note(axes: Axes, text: str) -> None:
    """Writes into a panel why it has no curves."""
    axes.text(
        0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", wrap=True, alpha=0.8
    )
    axes.set_xticks([])
    axes.set_yticks([])


@styled
def to_svg(figure: Figure, label: str) -> str:
    """Writes the figure as an `<svg>` element of a page, in the page's colours.

    The same figure always gives the same text.

    Args:
      figure: the figure.
      label: what a screen reader says.
    """
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = _with_own_ids(svg, prefix=f"f{zlib.crc32(label.encode()):08x}")

    # The page's text colour, and for every other colour its twin on a dark page.
    svg = svg.replace(INK, "currentColor").replace(_FAINT, "currentColor")
    svg = re.sub("|".join(_DARK), lambda match: f"light-dark({match[0]}, {_DARK[match[0]]})", svg)

    escaped = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escaped}"', 1)


def _with_own_ids(svg: str, prefix: str) -> str:
    """Renames the ids of an SVG so that they are unique in a page, and the same in each process.

    Groups of several figures would have the same ids, so groups lose theirs. The ids of marks and
    clips depend on the process, so they are numbered.
    """
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    names = dict.fromkeys(re.findall(r' id="([^"]*)"', svg))
    new = {name: f"{prefix}-{number}" for number, name in enumerate(names)}
    definition_or_use = r'(?<= id=")[^"]*|(?<=#)[^")]*(?=["\)])'
    return re.sub(definition_or_use, lambda match: new.get(match[0], match[0]), svg)


@styled
def save(figure: Figure, stem: Path) -> None:
    """Writes STEM.png and STEM.svg."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    for ending, settings in (("png", {"dpi": 160}), ("svg", {"metadata": {"Date": None}})):
        contents = io.BytesIO()
        figure.savefig(contents, format=ending, **settings)
        write_bytes(stem.parent / f"{stem.name}.{ending}", contents.getvalue())
