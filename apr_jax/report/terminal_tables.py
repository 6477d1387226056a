"""Tables in the terminal: a line a model, from the summaries that `apr eval` writes, or a line a
demonstrator.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from apr_jax.evaluate.cells import ON_TEST, SPENT, comparison_cells, write
from apr_jax.io.terminal import Terminal, natural_width, print_whole, visible

Columns = Mapping[str, Callable[[Mapping[str, Any]], str]]  # Name -> how a summary fills it.


def _share(s: Mapping[str, Any], name: str) -> str:
    """A share with its interval, in percent."""
    return "{:.1f} ({:.1f}-{:.1f})".format(*(100 * value for value in (s[name], *s["ci95"])))


EVALUATED: Columns = {
    "accuracy %\n(95% interval)": lambda s: _share(s, "accuracy"),
    "total\ntokens": lambda s: write("total_tokens", s["total_tokens"]),
    "seq.\ntokens": lambda s: write("sequential_tokens", s["sequential_tokens"]),
    "chil-\ndren": lambda s: write("children", s["children"]),
    "longest\nthread": lambda s: write("max_thread_tokens", s["max_thread_tokens"]),
    "spawned\n%": lambda s: f"{100 * s['spawned']:.1f}" if "spawned" in s else "",
    "trunc.\n%": lambda s: f"{100 * s['truncated']:.1f}" if "truncated" in s else "",
    "pass@n\n%": lambda s: f"{100 * s['pass_at_n']:.1f}" if "pass_at_n" in s else "",
    "cons@n\n%": lambda s: f"{100 * s['cons_at_n']:.1f}" if "cons_at_n" in s else "",
}

DEMONSTRATED: Columns = {  # By `data.statistics`.
    "solved %\n(95% interval)": lambda s: _share(s, "solver_success"),
    "total\ntokens": lambda s: f"{s['mean_total_tokens']:.1f}",
    "of a\nthread": lambda s: f"{s['mean_thread_tokens']:.1f}",
    "longest\nchain": lambda s: f"{s['mean_sequential_tokens']:.1f}",
    "longest\nthread": lambda s: f"{s['mean_longest_thread']:.1f}",
    "children": lambda s: f"{s['mean_children']:.2f}",
    "kept": lambda s: str(s["demonstrations"]),
}


def print_demonstrations(
    statistics: Mapping[str, Mapping[str, Any]], console: Console | None = None
) -> None:
    """Prints one line a method (name -> `data.statistics`), what was dropped for which field, and
    how it differs from what was kept."""
    console = console or Terminal()
    print_table(statistics, DEMONSTRATED, console)
    where = {
        "window": "limits.window",
        "max_thread_tokens": "limits.max_thread_tokens",
        "threads": "limits.max_threads, children or max_depth",
        "wrong": "data.correct_only",
    }
    for name, s in statistics.items():
        dropped = [f"{count} for {where[bound]}" for bound, count in s["dropped"].items() if count]
        if dropped:
            lost = _solved_with(s["dropped_success"], s["dropped_children"])
            kept = _solved_with(s["kept_success"], s["mean_children"])
            told = f"{name}: dropped {', '.join(dropped)}; of these {lost}, of the kept {kept}"
            console.print(told, highlight=False, soft_wrap=True)


def _solved_with(success: float, children: float) -> str:
    return f"{100 * success:.1f}% are solved, with {children:.2f} children"


def print_table(
    summaries: Mapping[str, Mapping[str, Any]],
    columns: Columns = EVALUATED,
    console: Console | None = None,
) -> None:
    """Prints one line a summary (name -> summary), leaving out columns that are empty in all of
    them.

    Where a terminal has no room for all columns the others follow below, each line again with its
    name."""
    console = console or Terminal()
    lines = {
        name: {column: fill(summary) for column, fill in columns.items()}
        for name, summary in summaries.items()
    }
    left = [column for column in columns if any(line[column] for line in lines.values())]
    while True:
        count = len(left)
        while (
            count > 1
            and console.is_terminal
            and natural_width(console, _table(lines, left[:count])) > console.width
        ):
            count -= 1
        print_whole(_table(lines, left[:count]), console)
        left = left[count:]
        if not left:
            return
        console.print()


def _table(lines: Mapping[str, Mapping[str, str]], shown: Sequence[str]) -> Table:
    """A table of these columns of lines (name -> column -> text)."""
    table = _empty_table()
    for column in shown:
        table.add_column(column, justify="right")
    for name, line in lines.items():
        table.add_row(Text(visible(name)), *(line[column] for column in shown))
    return table


def _empty_table() -> Table:
    """With a column for names."""
    table = Table(
        header_style="bold",
        box=box.HORIZONTALS,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("")
    return table


def print_comparisons(
    comparisons: Sequence[Mapping[str, Any]], console: Console | None = None
) -> None:
    """Prints two lines a comparison of the paper: what was found here, with tokens and children,
    and whether it reaches theirs.
    """
    table = _empty_table()
    for column in (
        "here",
        "total\ntokens",
        "seq.\ntokens",
        "chil-\ndren",
        "gap (95%)",
        "the paper",
    ):
        table.add_column(column, justify="right")
    for comparison in comparisons:
        cells = comparison_cells(comparison)
        measured = (
            "\n".join(write(key, comparison[side][key]) for side in ("one_spent", "other_spent"))
            for key in SPENT
        )
        table.add_row(
            cells["comparison"],
            f"{cells['one']}\n{cells['other']}",
            *measured,
            f"{cells['gap']}\n({cells['interval']})",
            f"{cells['paper']}\n{cells['verdict']}".strip(),
        )
    console = console or Terminal()
    print_whole(table, console)
    if flattered := sum(ON_TEST in comparison["chosen"] for comparison in comparisons):
        console.print(
            f"{flattered} of these compare the best of several that was chosen on the same"
            " problems: the report says by how much that may flatter it",
            highlight=False,
        )
