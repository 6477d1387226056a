"""Measures several ways to do the same work by turns, and compares their medians."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from apr_jax.io.json_files import write_json
from apr_jax.io.terminal import print_whole


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to do the work.

    Attributes:
      name: its name in the table.
      run: does the work once and returns how much was done, in units. It must not return before the
        work is finished.
      unit: the unit of what `run` returns, for example "tokens".
    """

    name: str
    run: Callable[[], float]
    unit: str


@dataclasses.dataclass(frozen=True)
class Result:
    """The measured rates of all contestants.

    Attributes:
      part: name of the part that was measured.
      unit: unit of the rates.
      names: names of the contestants, ours first.
      rates: for each contestant its rate in each repeat.
      medians: for each contestant the median of its rates.
      ratios: our rate over that of each of the others: the median of the ratios of neighbouring
        repeats.
    """

    part: str
    unit: str
    names: tuple[str, ...]
    rates: tuple[list[float], ...]
    medians: tuple[float, ...]
    ratios: tuple[float, ...]


def measure(part: str, contestants: Sequence[Contestant], repeats: int) -> Result:
    """Measures contestants by turns, so that a busy machine slows all of them alike.

    Each contestant first runs once without being measured, so that it is compiled.
    """
    for contestant in contestants:
        contestant.run()

    rates: tuple[list[float], ...] = tuple([] for _ in contestants)
    for _ in range(repeats):
        for contestant, its_rates in zip(contestants, rates, strict=True):
            start = time.perf_counter()
            units = contestant.run()
            its_rates.append(units / (time.perf_counter() - start))

    ours, *others = rates
    ratios = [
        statistics.median(mine / its for mine, its in zip(ours, theirs, strict=True))
        for theirs in others
    ]
    return Result(
        part,
        unit=f"{contestants[0].unit}/s",
        names=tuple(contestant.name for contestant in contestants),
        rates=rates,
        medians=tuple(map(statistics.median, rates)),
        ratios=tuple(ratios),
    )


def measured(part: str, contestants: Sequence[Contestant], repeats: int) -> Result:
    """Measures contestants (`measure`) and prints the table."""
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
    """Formats a rate with about three digits."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def write(results: Sequence[Result], path: Path) -> None:
    """Writes the results as JSON."""
    values = [dataclasses.asdict(result) for result in results]
    write_json(path, values)
