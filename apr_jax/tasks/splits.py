"""The split of random problems: training, validation and test share no group."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Hashable, Iterable

from apr_jax.errors import UsageError
from apr_jax.tasks.base import Map, Problem, Split

_PATIENCE = 20  # Draws a wanted problem before sampling gives up on a task that has too few.

Draw = Callable[[int], Problem]
Key = Callable[[Problem], Hashable]


def split_by_draws(
    draw: Draw,
    key: Key,
    group: Key,
    train: int,
    heldout: int,
    seed: int,
    exclude: Collection[Hashable],
    map_draws: Map,
) -> Split:
    """Draws what is held out first.

    Test problems stay as drawn; of the others, each that is of a group which is held out is
    replaced by one that is drawn last.

    Args:
      draw: a random problem, a function of its seed; a worker process must be able to unpickle it.
      key, group: see `Task`.
      train, heldout, seed, exclude, map_draws: see `Task.split`.

    Raises:
      UsageError: there are too few problems.
    """
    wanted = train + 2 * heldout
    sequence = _Sequence(draw, key, group, wanted, seed, exclude, map_draws)
    found = sequence.take(wanted, frozenset())
    parts = {
        "validation": found[:heldout],
        "test": found[heldout : 2 * heldout],
        "train": found[2 * heldout :],
    }

    held: set[Hashable] = set()
    for name in ("test", "validation", "train"):
        part = parts[name]
        # In its place: a demonstration is random by its place, and those of all other problems stay
        # what they are.
        shared = [place for place, problem in enumerate(part) if group(problem) in held]
        for place, problem in zip(shared, sequence.take(len(shared), held), strict=True):
            part[place] = problem
        held.update(map(group, part))
    return name_by_place(parts)


def name_by_place(parts: dict[str, list[Problem]]) -> Split:
    """The split whose problems are called `train-0`, `train-1`, ..., `test-0`, ..."""
    named = {
        name: [Problem(f"{name}-{place}", problem.data) for place, problem in enumerate(part)]
        for name, part in parts.items()
    }
    return Split(**named)


class _Sequence:
    """An endless random sequence of different problems, of which `wanted` are going to be taken."""

    def __init__(
        self,
        draw: Draw,
        key: Key,
        group: Key,
        wanted: int,
        seed: int,
        exclude: Collection[Hashable],
        map_draws: Map,
    ):
        self._draw = draw
        self._key = key
        self._group = group
        self._wanted = wanted
        self._map = map_draws
        self._rng = random.Random(f"draws {seed}")
        self._seen = set(exclude)
        self._tried = 0
        self._found = 0

    def take(self, count: int, held: Collection[Hashable]) -> list[Problem]:
        """The next ones whose groups are not held."""
        found: list[Problem] = []
        while len(found) < count:
            if self._tried > _PATIENCE * self._wanted + 10_000:
                raise UsageError(
                    f"task: found only {self._found} of {self._wanted} different problems; ask for"
                    " fewer or widen the task"
                )
            seeds = [self._rng.getrandbits(62) for _ in range(count - len(found))]
            self._tried += len(seeds)
            drawn: Iterable[Problem] = self._map(self._draw, seeds)
            for problem in drawn:
                key = self._key(problem)
                if key not in self._seen and self._group(problem) not in held:
                    self._seen.add(key)
                    found.append(problem)
                    self._found += 1
        return found
