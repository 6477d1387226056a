"""Interleaved repeats, medians, and the ratios of contestants."""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from apr_jax.io.storage import write_text
from apr_jax.io.terminal import print_whole


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to do the work.

    Attributes:
      name: says what it is, for the table.
      run: does it once and returns how much was done, in units; it must not return before the work
        is finished.
      unit: of what `run` returns, e.g. "tokens".
    """

    name: str
    run: Callable[[], float]
    unit: str


@dataclasses.dataclass(frozen=True)
class Result:
    """Attributes:
    names: of the contestants, ours first.
    rates: units a second of each repeat, for each of them.
    medians: of the rates.
    ratios: ours to each of the others: the median of the ratios of neighbouring repeats.
    """

    part: str
    unit: str
    names: tuple[str, ...]
    rates: tuple[list[float], ...]
    medians: tuple[float, ...]
    ratios: tuple[float, ...]


def measure(part: str, contestants: Sequence[Contestant], repeats: int) -> Result:
    """Runs each once unmeasured (compilation), then by turns, so that a busy machine slows all."""
    for contestant in contestants:
        contestant.run()
    rates: tuple[list[float], ...] = tuple([] for _ in contestants)
    for _ in range(repeats):
        for contestant, found in zip(contestants, rates, strict=True):
            start = time.perf_counter()
            done = contestant.run()
            found.append(done / (time.perf_counter() - start))
    ours, *others = rates
    ratios = (
        statistics.median(mine / its for mine, its in zip(ours, other, strict=True))
        for other in others
    )
    names = tuple(contestant.name for contestant in contestants)
    unit = f"{contestants[0].unit}/s"
    return Result(part, unit, names, rates, tuple(map(statistics.median, rates)), tuple(ratios))


def measured(part: str, contestants: Sequence[Contestant], repeats: int) -> Result:
    """`measure`, its table printed."""
    result = measure(part, contestants, repeats)
    show(result)
    return result


def show(result: Result) -> None:
    """Prints the table of one part."""
    table = Table(title=f"{result.part}, median of {len(result.rates[0])}", title_justify="left")
    table.add_column("")
    for column in (result.unit, "slowest", "fastest", "ours to it"):
        table.add_column(column, justify="right")
    ratios = ("", *(f"{ratio:.2f}" for ratio in result.ratios))
    for name, rates, median, ratio in zip(
        result.names, result.rates, result.medians, ratios, strict=True
    ):
        table.add_row(name, *map(_digits, (median, min(rates), max(rates))), ratio)
    print_whole(table)


def _digits(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def write(results: Sequence[Result], path: Path) -> None:
    """The figures as JSON."""
    write_text(
        path, json.dumps([dataclasses.asdict(result) for result in results], indent=2) + "\n"
    )
