"""Tables in the terminal: evaluations, demonstrations, and the paper's comparisons."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from apr_jax.evaluate.cells import ON_TEST, SPENT, comparison_cells, write
from apr_jax.io.terminal import Terminal, natural_width, print_whole, visible

# Title of a column -> what it shows of a summary.
Columns = Mapping[str, Callable[[Mapping[str, Any]], str]]


def _share(summary: Mapping[str, Any], name: str) -> str:
    """Writes a share in percent, with its interval."""
    low, high = summary["ci95"]
    return f"{100 * summary[name]:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _optional_percent(summary: Mapping[str, Any], name: str) -> str:
    """Writes a share in percent; "" if the summary does not have it."""
    return f"{100 * summary[name]:.1f}" if name in summary else ""


# Columns of what `apr eval` writes (`scores.summarize`).
EVALUATED: Columns = {
    "accuracy %\n(95% interval)": lambda s: _share(s, "accuracy"),
    "total\ntokens": lambda s: write("total_tokens", s["total_tokens"]),
    "seq.\ntokens": lambda s: write("sequential_tokens", s["sequential_tokens"]),
    "chil-\ndren": lambda s: write("children", s["children"]),
    "longest\nthread": lambda s: write("max_thread_tokens", s["max_thread_tokens"]),
    "spawned\n%": lambda s: _optional_percent(s, "spawned"),
    "trunc.\n%": lambda s: _optional_percent(s, "truncated"),
    "pass@n\n%": lambda s: _optional_percent(s, "pass_at_n"),
    "cons@n\n%": lambda s: _optional_percent(s, "cons_at_n"),
}

# Columns of what a run shows at its end: what the trees solve, and what they cost.
SOLVED: Columns = {
    "right %\n(95% interval)": lambda s: _share(s, "accuracy"),
    "total\ntokens": lambda s: write("total_tokens", s["total_tokens"]),
    "longest\nchain": lambda s: write("sequential_tokens", s["sequential_tokens"]),
    "chil-\ndren": lambda s: write("children", s["children"]),
}

# Columns of what `apr data` writes (`data.statistics`).
DEMONSTRATED: Columns = {
    "solved %\n(95% interval)": lambda s: _share(s, "solver_success"),
    "total\ntokens": lambda s: f"{s['mean_total_tokens']:.1f}",
    "of a\nthread": lambda s: f"{s['mean_thread_tokens']:.1f}",
    "longest\nchain": lambda s: f"{s['mean_sequential_tokens']:.1f}",
    "longest\nthread": lambda s: f"{s['mean_longest_thread']:.1f}",
    "children": lambda s: f"{s['mean_children']:.2f}",
    "kept": lambda s: str(s["demonstrations"]),
}


# Reason why a demonstration was dropped -> the config fields that decide it.
_DROPPED_BY = {
    "window": "limits.window",
    "max_thread_tokens": "limits.max_thread_tokens",
    "threads": "limits.max_threads, children or max_depth",
    "wrong": "data.correct_only",
}
_LEFT_OUT_BY = {
    "excluded": "of excluded problems",
    "heldout": "of problems in the group of a validation or test problem",
}


def print_demonstrations(
    statistics: Mapping[str, Mapping[str, Any]], console: Console | None = None
) -> None:
    """Prints one line for each method, and what was dropped of its demonstrations.

    Args:
      statistics: method -> `data.statistics` of its demonstrations.
      console: where to print; by default standard output.
    """
    console = console or Terminal()
    print_table(statistics, DEMONSTRATED, console)
    for method, values in statistics.items():
        dropped = [
            f"{count} for {_DROPPED_BY[reason]}"
            for reason, count in values["dropped"].items()
            if count
        ]
        if dropped:
            lost = _solved_with(values["dropped_success"], values["dropped_children"])
            kept = _solved_with(values["kept_success"], values["mean_children"])
            line = f"{method}: dropped {', '.join(dropped)}; of these {lost}, of the kept {kept}"
            console.print(line, highlight=False, soft_wrap=True)
        left_out = [
            f"{count} {_LEFT_OUT_BY[reason]}"
            for reason, count in values.get("left_out", {}).items()
            if count
        ]
        if left_out:
            line = f"{method}: left out {' and '.join(left_out)}"
            console.print(line, highlight=False, soft_wrap=True)


def _solved_with(success: float, children: float) -> str:
    """Says how many demonstrations are solved, and with how many children."""
    return f"{100 * success:.1f}% are solved, with {children:.2f} children"


def print_table(
    summaries: Mapping[str, Mapping[str, Any]],
    columns: Columns = EVALUATED,
    console: Console | None = None,
) -> None:
    """Prints one line for each summary.

    Columns that are empty in all lines are left out. If a terminal has no room for all columns, the
    rest follows in further tables below, in which each line begins with its name again.

    Args:
      summaries: name of a line -> summary.
      columns: the columns.
      console: where to print; by default standard output.
    """
    console = console or Terminal()
    lines = {
        name: {column: write_cell(summary) for column, write_cell in columns.items()}
        for name, summary in summaries.items()
    }
    remaining = [column for column in columns if any(line[column] for line in lines.values())]
    while True:
        count = _fitting_columns(lines, remaining, console)
        print_whole(_table(lines, remaining[:count]), console)
        remaining = remaining[count:]
        if not remaining:
            return
        console.print()


def _fitting_columns(
    lines: Mapping[str, Mapping[str, str]], columns: Sequence[str], console: Console
) -> int:
    """Returns how many columns fit beside each other; one at least, and all unless a terminal."""
    count = len(columns)
    if console.is_terminal:
        while count > 1 and natural_width(console, _table(lines, columns[:count])) > console.width:
            count -= 1
    return count


def _table(lines: Mapping[str, Mapping[str, str]], columns: Sequence[str]) -> Table:
    """Makes a table of some columns.

    Args:
      lines: name of a line -> title of a column -> text of the cell.
      columns: titles of the columns to show.
    """
    table = _empty_table()
    for column in columns:
        table.add_column(column, justify="right")
    for name, line in lines.items():
        table.add_row(Text(visible(name)), *(line[column] for column in columns))
    return table


def _empty_table() -> Table:
    """Makes a table that has a column for names and no lines."""
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
    """Prints two lines for each comparison: the scores of its sides, their cost, and the gap.

    Args:
      comparisons: rows of `paper.comparisons` or `paper.methods`. Only those of the former have
        figures of the paper, for which there is a column then.
      console: where to print; by default standard output.
    """
    console = console or Terminal()
    table = _empty_table()
    has_paper = any(comparison["paper"] for comparison in comparisons)
    columns = ["here", "total\ntokens", "seq.\ntokens", "chil-\ndren", "gap (95%)"]
    for column in [*columns, "the paper"] if has_paper else columns:
        table.add_column(column, justify="right")
    for comparison in comparisons:
        cells = comparison_cells(comparison)
        spent = (
            "\n".join(write(key, comparison[side][key]) for side in ("one_spent", "other_spent"))
            for key in SPENT
        )
        table.add_row(
            cells["comparison"],
            f"{cells['one']}\n{cells['other']}",
            *spent,
            f"{cells['gap']}\n({cells['interval']})",
            *([f"{cells['paper']}\n{cells['verdict']}".strip()] if has_paper else []),
        )
    print_whole(table, console)

    flattered = sum(ON_TEST in comparison["chosen"] for comparison in comparisons)
    if flattered:
        console.print(
            f"{flattered} of these compare the best of several that was chosen on the same"
            " problems: the report says by how much that may flatter it",
            highlight=False,
        )
