"""The events of a search, as a solver records them; renderers turn them into text.

A `Search` is what one thread did: the node from which it started, its events in time order, and the
path that it found. A `Fork` holds the searches of the children that one spawn makes. Events are
named tuples, which are cheap, because a demonstration has hundreds.
"""

from __future__ import annotations

from typing import NamedTuple

State = tuple[int, ...]  # The numbers that are left; the latest result comes first.


class Step(NamedTuple):
    """One exact operation, `a op b = result`. For `-` and `/` the larger number is `a`."""

    a: int
    op: str
    b: int
    result: int

    @property
    def expression(self) -> str:
        """The step without its result, such as `22+26`."""
        return f"{self.a}{self.op}{self.b}"

    @property
    def equation(self) -> str:
        """The step with its result, such as `22+26=48`."""
        return f"{self.a}{self.op}{self.b}={self.result}"


class Node(NamedTuple):
    """A state, and how it was reached.

    Attributes:
      state: the numbers that are left.
      path: the steps from the problem to the state.
      place: the number of the node among the kept successors at each level; the problem is (0,).
    """

    state: State
    path: tuple[Step, ...]
    place: tuple[int, ...]


class Generate(NamedTuple):
    """A successor that the search keeps is written down."""

    node: Node


class Enter(NamedTuple):
    """The search moves to a node, from its parent or, if `queued`, by taking it from the queue."""

    node: Node
    queued: bool


class Leave(NamedTuple):
    """The search goes back to the parent of a node below which there is no solution."""

    node: Node


class Test(NamedTuple):
    """The two numbers that are left at `node` are combined."""

    node: Node
    step: Step


class Fork(NamedTuple):
    """Every successor of `node` that the search keeps gets a child thread."""

    node: Node
    children: tuple[Search, ...]


Event = Generate | Enter | Leave | Test | Fork


class Search(NamedTuple):
    """What one thread did.

    Attributes:
      root: the node from which it started.
      events: its events in time order.
      solutions: what the thread found, each the steps from the problem to the target. A search for
        one solution ends with the first.
    """

    root: Node
    events: list[Event]
    solutions: tuple[tuple[Step, ...], ...]

    @property
    def solution(self) -> tuple[Step, ...] | None:
        """The first solution; None if the thread found none."""
        return self.solutions[0] if self.solutions else None


def children(search: Search) -> int:
    """Counts the threads that a search spawned, at any depth."""
    forks = [event for event in search.events if isinstance(event, Fork)]
    return sum(1 + children(child) for fork in forks for child in fork.children)
