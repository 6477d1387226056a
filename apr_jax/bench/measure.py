"""Interleaved repeats, medians, and the ratio of two contestants."""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to do the work.

    Attributes:
      name: says what it is, for the table.
      run: does it once and returns how much was done, in units; it must not return before the work is finished.
      unit: of what `run` returns, e.g. "tokens".
    """

    name: str
    run: Callable[[], float]
    unit: str


@dataclasses.dataclass(frozen=True)
class Result:
    """Attributes:
    names: the two contestants, ours first.
    rates: units a second of each repeat, for each of them.
    medians: of the rates.
    ratio: median of the ratios of neighbouring repeats, ours to the other.
    """

    part: str
    unit: str
    names: tuple[str, str]
    rates: tuple[list[float], list[float]]
    medians: tuple[float, float]
    ratio: float


def measure(part: str, ours: Contestant, other: Contestant, repeats: int) -> Result:
    """Runs both once unmeasured (compilation), then by turns."""
    for contestant in (ours, other):
        contestant.run()
    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for contestant, found in zip((ours, other), rates, strict=True):
            start = time.perf_counter()
            done = contestant.run()
            found.append(done / (time.perf_counter() - start))
    ratio = statistics.median(mine / its for mine, its in zip(*rates, strict=True))
    medians = (statistics.median(rates[0]), statistics.median(rates[1]))
    return Result(part, f"{ours.unit}/s", (ours.name, other.name), rates, medians, ratio)


def show(result: Result, path: Path | None = None) -> None:
    """Prints the table, and writes the figures as JSON if a path is given."""
    if path:
        path.write_text(json.dumps(dataclasses.asdict(result), indent=2) + "\n", encoding="utf-8")
    table = Table(title=f"{result.part}, median of {len(result.rates[0])}", title_justify="left")
    table.add_column("")
    for column in (result.unit, "slowest", "fastest"):
        table.add_column(column, justify="right")
    for name, rates, median in zip(result.names, result.rates, result.medians, strict=True):
        table.add_row(name, f"{median:,.0f}", f"{min(rates):,.0f}", f"{max(rates):,.0f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"ratio {result.ratio:.2f}: {result.names[0]} to {result.names[1]}")
