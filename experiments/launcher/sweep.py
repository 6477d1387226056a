"""A sweep as work units: every combination of the values, each with a folder of its own."""

import dataclasses
import itertools
import re
from collections.abc import Sequence

from apr_jax.errors import UsageError

# Settings under these names decide the data: units that differ in none of them share one set.
_OF_DATA = ("task.", "solver.", "data.", "limits.")


@dataclasses.dataclass(frozen=True)
class Unit:
    """One run.

    Attributes:
      settings: its `--set` overrides.
      out: folder of the run.
      data: folder of its data; None is the run's own.
    """

    settings: tuple[str, ...]
    out: str
    data: str | None = None


def work_units(out: str, settings: Sequence[str], sweeps: Sequence[str]) -> list[Unit]:
    """The cartesian product of the sweeps, the first one slowest.

    Args:
      out: folder of all; without a sweep, of the one run.
      settings: FIELD=VALUE of all units.
      sweeps: each FIELD=VALUE,VALUE,...

    Raises:
      UsageError: a sweep has no values, a value twice, or one that no folder can be named by, or
        two sweep the same field.
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
    shared = None if any(field.startswith(_OF_DATA) for field in fields) else f"{out}/data"
    units = []
    for values in itertools.product(*(values for _, values in axes)):
        chosen = list(zip(fields, values, strict=True))
        name = "__".join(f"{field}_{value}" for field, value in chosen)
        units.append(
            Unit(
                (*settings, *(f"{field}={value}" for field, value in chosen)),
                f"{out}/{name}",
                shared,
            )
        )
    return units


def _axis(sweep: str) -> tuple[str, list[str]]:
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
