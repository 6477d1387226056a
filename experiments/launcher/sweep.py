"""Divides a sweep into work units: one for each combination of values, with a folder of its own."""

import dataclasses
import itertools
import re
from collections.abc import Sequence

from apr_jax.errors import UsageError

# Settings under these names change the data. Units that differ in none of them share one set of
# data.
_OF_DATA = ("task.", "data.", "limits.")


@dataclasses.dataclass(frozen=True)
class Unit:
    """One run of a sweep.

    Attributes:
      settings: the run's `--set` overrides.
      out: folder of the run.
      data: folder of its data; None for data within the run's folder.
    """

    settings: tuple[str, ...]
    out: str
    data: str | None = None


def work_units(out: str, settings: Sequence[str], sweeps: Sequence[str]) -> list[Unit]:
    """Forms the cartesian product of the sweeps, in which the first sweep changes slowest.

    Args:
      out: folder of all runs; without a sweep, of the only run.
      settings: FIELD=VALUE overrides of all units.
      sweeps: each is FIELD=VALUE,VALUE,...

    Raises:
      UsageError: a sweep has no values, has a value twice, or has a value that cannot be part of a
        folder's name; or two sweeps have the same field.
    """
    if not sweeps:
        return [Unit(tuple(settings), out)]
    axes = [_axis(sweep) for sweep in sweeps]
    fields = [field for field, _ in axes]
    for field in fields:
        if fields.count(field) > 1:
            raise UsageError(
                f"--sweep {field}: is given twice; put all its values into one, {field}=A,B"
            )

    changes_data = any(field.startswith(_OF_DATA) for field in fields)
    data = None if changes_data else f"{out}/data"
    units = []
    for values in itertools.product(*(values for _, values in axes)):
        chosen = list(zip(fields, values, strict=True))
        name = "__".join(f"{field}_{value}" for field, value in chosen)
        own = [f"{field}={value}" for field, value in chosen]
        units.append(Unit((*settings, *own), f"{out}/{name}", data))
    return units


def _axis(sweep: str) -> tuple[str, list[str]]:
    """Reads a sweep: its field and its values."""
    field, _, text = sweep.partition("=")
    values = [value.strip() for value in text.split(",")]
    if not field or not all(values):
        raise UsageError(
            f"--sweep {sweep!r}: write it as FIELD=VALUE,VALUE, for example"
            " train.sft.optimizer.lr=1e-4,3e-4"
        )
    for value in values:
        if not re.fullmatch(r"[\w.+-]+", value):
            raise UsageError(
                f"--sweep {sweep!r}: {value!r} can't be part of a folder's name (letters, digits, ."
                " + - _)"
            )
        if values.count(value) > 1:
            raise UsageError(f"--sweep {sweep!r}: has {value} twice")
    return field, values
