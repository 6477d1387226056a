"""What a solver did, step by step, before any text: renderers turn these events into traces.

A `Search` is one thread: the node it started from, its events in time order, and the path it found.
Only `Fork` nests: its searches are the children that one spawn makes. Events are named tuples
because a demonstration has hundreds."""

from __future__ import annotations

from typing import NamedTuple

State = tuple[int, ...]  # The numbers still on the table; the latest result comes first.


class Step(NamedTuple):
    """One exact operation; for `-` and `/` the larger number is `a`."""

    a: int
    op: str
    b: int
    result: int

    @property
    def expression(self) -> str:
        return f"{self.a}{self.op}{self.b}"

    @property
    def equation(self) -> str:
        return f"{self.a}{self.op}{self.b}={self.result}"


class Node(NamedTuple):
    """A state and how it was reached.

    Attributes:
      state: the numbers left.
      path: the steps from the problem to here.
      place: which one among the kept successors at each level; the problem itself is (0,).
    """

    state: State
    path: tuple[Step, ...]
    place: tuple[int, ...]


class Generate(NamedTuple):
    """A kept successor is written down."""

    node: Node


class Enter(NamedTuple):
    """The search moves to a node: down from its parent, or (`queued`) by taking it from the
    queue.
    """

    node: Node
    queued: bool


class Leave(NamedTuple):
    """A node was searched in place and held no solution; the search is back at its parent."""

    node: Node


class Test(NamedTuple):
    """The last two numbers of `node` are combined."""

    node: Node
    step: Step


class Fork(NamedTuple):
    """Every kept successor of `node` gets a child thread."""

    node: Node
    children: tuple[Search, ...]


Event = Generate | Enter | Leave | Test | Fork


class Search(NamedTuple):
    """What one thread did; `solution` is the whole path from the problem, None if it found none."""

    root: Node
    events: list[Event]
    solution: tuple[Step, ...] | None


def children(search: Search) -> int:
    """Threads that the search spawned, at any depth."""
    forks = [event for event in search.events if isinstance(event, Fork)]
    return sum(1 + children(child) for fork in forks for child in fork.children)
