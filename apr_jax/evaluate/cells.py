"""How scores are written, the same in the report and in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from apr_jax.evaluate.scores import MEASURES
from apr_jax.io.terminal import Terminal

# A comparison's `chosen` begins with these words if a side was chosen, among several, by its score
# on the very problems that are compared.
ON_TEST = "chosen on these same problems"

SPENT = ("total_tokens", "sequential_tokens", "children")  # Measures that stand beside every score.

_VERDICTS = {True: "reached", False: "not reached", None: ""}


def write(measure: str, value: float) -> str:
    """Writes a measure of trees with its own number of decimals."""
    return MEASURES[measure][1].format(value)


def spent(measures: Mapping[str, float]) -> str:
    """Writes the measures beside a score: `1,741 tokens, 422 in sequence, 18.70 children`."""
    total, chain, children = (write(key, measures[key]) for key in SPENT)
    return f"{total} tokens, {chain} in sequence, {children} children"


def outcome(summary: Mapping[str, float]) -> str:
    """Writes what came of an evaluation: `84.9% right, 1,678 tokens, ...`, see `spent`."""
    return f"{summary['accuracy']:.1%} right, {spent(summary)}"


def print_warnings(lines: Iterable[str]) -> None:
    """Prints warnings on standard error, each in bold red."""
    console = Terminal(stderr=True, highlight=False, soft_wrap=True)
    for line in lines:
        console.print(f"warning: {line}", style="bold red", markup=False)


def comparison_cells(row: Mapping[str, Any]) -> dict[str, str]:
    """Writes a row of `comparisons`.

    Returns:
      the fields of the row as text, and `interval` and `verdict`; a field without a value is "".
    """
    scale, form = (100, "{:.1f}") if row["unit"] == "%" else (1, "{:,.0f}")
    signed = form.replace(":", ":+")
    low, high = (signed.format(scale * row[key]) for key in ("low", "high"))
    return {
        **{key: row[key] for key in ("comparison", "chosen", "note", "paper")},
        **{key: form.format(scale * row[key]) for key in ("one", "other")},
        "gap": signed.format(scale * row["gap"]),
        "interval": f"{low} to {high}",
        "p": "" if row["p"] is None else _probability(row["p"]),
        "n": str(row["n"]),
        "verdict": _VERDICTS[row["reached"]],
    }


def _probability(p: float) -> str:
    """Writes a p-value with two digits, or as an upper bound if it is tiny."""
    return f"{p:.2g}" if p >= 1e-3 else "< 0.001"
