"""How scores are written, in the report and in the terminal alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from apr_jax.evaluate.scores import MEASURES
from apr_jax.io.terminal import Terminal

ON_TEST = (  # How a comparison's `chosen` begins where the problems that score chose, too.
    "chosen on these same problems"
)
SPENT = ("total_tokens", "sequential_tokens", "children")  # What stands beside every score.


def write(measure: str, value: float) -> str:
    """A measure of trees in its own form."""
    return MEASURES[measure][1].format(value)


def spent(measures: Mapping[str, float]) -> str:
    """What stands beside a score in words: `1,741 tokens, 422 in sequence, 18.70 children`."""
    total, chain, children = (write(key, measures[key]) for key in SPENT)
    return f"{total} tokens, {chain} in sequence, {children} children"


def print_warnings(lines: Iterable[str]) -> None:
    """Says loudly what is wrong with an evaluation, on standard error."""
    console = Terminal(stderr=True, highlight=False, soft_wrap=True)
    for line in lines:
        console.print(f"warning: {line}", style="bold red", markup=False)


def comparison_cells(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of `comparisons`, written: its fields as text, and `interval` and `verdict`, each empty
    if there is none.
    """
    scale, form = (100, "{:.1f}") if row["unit"] == "%" else (1, "{:,.0f}")
    sign = form.replace(":", ":+")
    low, high = (sign.format(scale * row[key]) for key in ("low", "high"))
    return {
        **{key: row[key] for key in ("comparison", "chosen", "note", "paper")},
        **{key: form.format(scale * row[key]) for key in ("one", "other")},
        "gap": sign.format(scale * row["gap"]),
        "interval": f"{low} to {high}",
        "p": "" if row["p"] is None else _probability(row["p"]),
        "n": str(row["n"]),
        "verdict": {True: "reached", False: "not reached", None: ""}[row["reached"]],
    }


def _probability(p: float) -> str:
    return f"{p:.2g}" if p >= 1e-3 else "< 0.001"
