"""Splits random problems into training, validation and test, which share no group."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Hashable, Iterable

from apr_jax.errors import UsageError
from apr_jax.tasks.base import Map, Problem, Split

# A task may have fewer problems than are wanted. After this many draws for each wanted problem the
# search for more is given up.
_DRAWS_PER_PROBLEM = 20

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
    apart_from: Collection[Hashable],
) -> Split:
    """Draws problems and divides them: first validation, then test, then training problems.

    Test problems stay as they were drawn. A validation problem whose group occurs in test is
    replaced by another problem, and so is a training problem whose group occurs in one of the two.

    Args:
      draw: returns the random problem of a seed; worker processes must be able to unpickle it.
      key: see `Task.key`.
      group: see `Task.group`.
      train: number of training problems.
      heldout: number of problems for validation, and as many for test.
      seed: decides which problems are drawn.
      exclude: keys that no problem of the split may have.
      map_draws: see `Task.split`.
      apart_from: groups that no problem of the split may be of.

    Raises:
      UsageError: the task has fewer problems than are needed.
    """
    wanted = train + 2 * heldout
    sequence = _Sequence(draw, key, group, wanted, seed, exclude, map_draws)
    drawn = sequence.take(wanted, apart_from)
    parts = {
        "validation": drawn[:heldout],
        "test": drawn[heldout : 2 * heldout],
        "train": drawn[2 * heldout :],
    }

    groups = set(apart_from)  # And those of the parts that are finished.
    for name in ("test", "validation", "train"):
        part = parts[name]
        shared = [index for index, problem in enumerate(part) if group(problem) in groups]
        # The new problem takes the index of the old one. A demonstration is random by the index of
        # its problem, so the demonstrations of all other problems stay as they are.
        for index, problem in zip(shared, sequence.take(len(shared), groups), strict=True):
            part[index] = problem
        groups.update(map(group, part))
    return name_by_place(parts)


def name_by_place(parts: dict[str, list[Problem]]) -> Split:
    """Makes a split whose problems have the ids `train-0`, `train-1`, ..., `test-0`, ..."""
    named = {
        name: [Problem(f"{name}-{index}", problem.data) for index, problem in enumerate(part)]
        for name, part in parts.items()
    }
    return Split(**named)


class _Sequence:
    """A random sequence of different problems, of which `wanted` are going to be taken.

    The other arguments are those of `split_by_draws`.
    """

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
        """Takes the next problems whose groups are not among those `held` out.

        Raises:
          UsageError: too many problems were drawn that occurred before.
        """
        found: list[Problem] = []
        while len(found) < count:
            if self._tried > _DRAWS_PER_PROBLEM * self._wanted + 10_000:
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
