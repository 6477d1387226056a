"""The table of results in the terminal: a line a model, from the summaries that `apr eval` writes."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

# Column -> how a summary fills it.
_COLUMNS = {
    "accuracy %\n(95% interval)": lambda s: "{:.1f} ({:.1f}-{:.1f})".format(
        *(100 * v for v in (s["accuracy"], *s["ci95"]))
    ),
    "total\ntokens": lambda s: f"{s['total_tokens']:.1f}",
    "sequential\ntokens": lambda s: f"{s['sequential_tokens']:.1f}",
    "children": lambda s: f"{s['children']:.2f}",
    "longest\nthread": lambda s: f"{s['max_thread_tokens']:.1f}",
    "pass@n\n%": lambda s: f"{100 * s['pass_at_n']:.1f}" if "pass_at_n" in s else "",
    "cons@n\n%": lambda s: f"{100 * s['cons_at_n']:.1f}" if "cons_at_n" in s else "",
}


def print_table(summaries: Mapping[str, Mapping[str, Any]], console: Console | None = None) -> None:
    """Prints one line a model (name -> summary), leaving out columns that are empty in all of them."""
    lines = {name: {column: fill(summary) for column, fill in _COLUMNS.items()} for name, summary in summaries.items()}
    table = Table(header_style="bold", box=box.HORIZONTALS, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    shown = [column for column in _COLUMNS if any(line[column] for line in lines.values())]
    for column in shown:
        table.add_column(column, justify="right", no_wrap=True)
    for name, line in lines.items():
        table.add_row(name, *(line[column] for column in shown))
    (console or Console()).print(table)
