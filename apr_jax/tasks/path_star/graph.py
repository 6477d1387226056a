"""Path-star graphs: a start node with several arms, given as edges in any order.

A node is a lower-case letter, an edge two of them: `ab` leads from a to b. A path is the text of
its nodes. What a thread has to do is a `Search`, as a text `bc,de,sb,sd,e:s`: the edges, the goal,
and the path so far, which the thread goes on with. The problem itself is a search whose path so far
is the start alone.
"""

from __future__ import annotations

import dataclasses
import random
import re
import string

NODES = string.ascii_lowercase
# The longest text has an edge for each node but one, and all nodes in its path.
MAX_LENGTH = 3 * (len(NODES) - 1) + len(NODES) + len(":g")
_SEARCH = re.compile(r"((?:[a-z]{2},)+)([a-z]):([a-z]+)")


@dataclasses.dataclass(frozen=True)
class Search:
    """Looks for the goal from the end of a path.

    Attributes:
      edges: pairs of letters, in the order in which they are shown.
      path: the nodes on the way so far.
      goal: the node in which the right arm ends.
    """

    edges: tuple[str, ...]
    path: str
    goal: str

    def __str__(self) -> str:
        edges = "".join(f"{edge}," for edge in self.edges)
        return f"{edges}{self.goal}:{self.path}"

    @property
    def branches(self) -> tuple[Search, ...]:
        """One search for each edge out of the end of the path, which has one more node in its path.

        All edges stay, also those that are of no use from there on: a model copies a whole list
        much sooner than a part of it.
        """
        return tuple(
            dataclasses.replace(self, path=self.path + edge[1])
            for edge in self.edges
            if edge[0] == self.path[-1]
        )

    def follow(self) -> str:
        """Returns the path up to the end of its arm, or to the first node that has two edges."""
        path = self.path
        while True:
            successors = [edge[1] for edge in self.edges if edge[0] == path[-1]]
            if len(successors) != 1 or successors[0] in path:
                return path
            path += successors[0]


def draw(rng: random.Random, arms: int, length: int) -> Search:
    """Draws a graph of `arms` arms with `length` edges each, and the arm that has the goal.

    Its nodes are the first letters, in any order.
    """
    nodes = arms * length + 1
    start, *others = rng.sample(NODES[:nodes], nodes)
    paths = [
        start + "".join(others[place : place + length]) for place in range(0, len(others), length)
    ]
    edges = [edge for path in paths for edge in edges_of(path)]
    rng.shuffle(edges)
    goal = rng.choice(paths)[-1]
    return Search(tuple(edges), start, goal)


def edges_of(path: str) -> list[str]:
    """Returns the edges on which a path goes."""
    return [path[place : place + 2] for place in range(len(path) - 1)]


def read(text: str) -> Search:
    """Reads a search: the inverse of `str`.

    Raises:
      ValueError: the text is no search; the message says why, in one line.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"has {len(text)} characters, must have at most {MAX_LENGTH}")
    match = _SEARCH.fullmatch(text)
    if not match:
        raise ValueError(
            "must be edges of two letters from a to z, each with a comma behind it, then goal:start"
        )
    edges, goal, path = match.groups()
    return Search(tuple(edges.removesuffix(",").split(",")), path, goal)


def read_star(text: str) -> Search:
    """Reads a problem: a search whose edges are a path-star graph.

    Raises:
      ValueError: the text is no such problem; the message says why, in one line.
    """
    search = read(text)
    start = search.path
    if len(start) > 1:
        raise ValueError(f"starts from {start!r}, must start from one node")
    sources = [edge[0] for edge in search.edges if edge[0] != start]
    targets = [edge[1] for edge in search.edges]
    if start in targets:
        raise ValueError(f"has an edge into the start {start!r}")
    for nodes, where in ((sources, "out of"), (targets, "into")):
        repeated = sorted(node for node in set(nodes) if nodes.count(node) > 1)
        if repeated:
            raise ValueError(
                f"has two edges {where} {repeated[0]!r}; arms part at the start and never meet"
            )
    paths = arms(search)
    unreachable = sorted({*sources, *targets} - set("".join(paths)))
    if unreachable:
        raise ValueError(f"has no way from the start {start!r} to {unreachable[0]!r}")
    ends = sorted(path[-1] for path in paths)
    if search.goal not in ends:
        raise ValueError(f"has the goal {search.goal!r}; arms end in {', '.join(ends)}")
    return search


def arms(star: Search) -> tuple[str, ...]:
    """Returns the paths from the start to the end of each arm, in the order of their first edge."""
    return tuple(branch.follow() for branch in star.branches)


def right_path(star: Search) -> str:
    """Returns the path from the start to the goal."""
    return next(path for path in arms(star) if path[-1] == star.goal)


def wrong_step(search: Search, path: str) -> str:
    """Says what is wrong in a path from the end of `search.path` on; "" if every edge is there."""
    edges = set(search.edges)
    for edge in edges_of(path[len(search.path) - 1 :]):
        if edge not in edges:
            return edge
    return ""
