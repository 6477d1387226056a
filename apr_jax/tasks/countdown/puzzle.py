"""What a Countdown problem holds: numbers and a target, as `Problem.data` has them."""

from __future__ import annotations

import dataclasses

from apr_jax.tasks.base import Problem

Key = tuple[tuple[int, ...], int]


@dataclasses.dataclass(frozen=True)
class Puzzle:
    """The contents of one Countdown problem: all `numbers` are to make `target`."""

    numbers: tuple[int, ...]
    target: int

    @classmethod
    def of(cls, problem: Problem) -> Puzzle:
        """Reads them from a problem."""
        return cls(tuple(problem.data["numbers"]), problem.data["target"])

    def problem(self, name: str) -> Problem:
        """The problem of this id that holds them."""
        return Problem(name, {"numbers": list(self.numbers), "target": self.target})

    @property
    def key(self) -> Key:
        """What makes two problems the same: the sorted numbers and the target."""
        return tuple(sorted(self.numbers)), self.target


def make_problem(name: str, numbers: tuple[int, ...], target: int) -> Problem:
    """The Countdown problem of an id, numbers and a target."""
    return Puzzle(tuple(numbers), target).problem(name)


def problem_key(problem: Problem) -> Key:
    """What makes two problems the same: the sorted numbers and the target."""
    return Puzzle.of(problem).key
