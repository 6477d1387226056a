"""What a Countdown problem holds: numbers and a target."""

from __future__ import annotations

import dataclasses

from apr_jax.tasks.base import Problem

Key = tuple[tuple[int, ...], int]  # The sorted numbers and the target.


@dataclasses.dataclass(frozen=True)
class Puzzle:
    """The contents of one problem: all `numbers` together are to make `target`."""

    numbers: tuple[int, ...]
    target: int

    @classmethod
    def of(cls, problem: Problem) -> Puzzle:
        """Reads numbers and target from a problem."""
        return cls(tuple(problem.data["numbers"]), problem.data["target"])

    def problem(self, name: str) -> Problem:
        """Returns the problem of this id that holds numbers and target."""
        return Problem(name, {"numbers": list(self.numbers), "target": self.target})

    @property
    def key(self) -> Key:
        """Sorted numbers and target, which are equal for problems that are the same."""
        return tuple(sorted(self.numbers)), self.target


def make_problem(name: str, numbers: tuple[int, ...], target: int) -> Problem:
    """Returns the problem of an id, numbers and a target."""
    return Puzzle(tuple(numbers), target).problem(name)


def problem_key(problem: Problem) -> Key:
    """Returns sorted numbers and target, which are equal for problems that are the same."""
    return Puzzle.of(problem).key
