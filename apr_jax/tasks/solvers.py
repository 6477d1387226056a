"""Symbolic solvers that demonstrate how to search: SoS, SoS+ and APR (PAPER.md, "Demonstrations").

All of them are one hybrid search. A queue starts with the problem; a node is taken from it, its successors are ranked
by a heuristic and the best `beam` are kept. If a coin judges the node promising, each kept successor is searched
depth-first right there (serial methods) or by a child thread (APR); otherwise they join the queue. Depth-first SoS is
the hybrid whose coin always says yes, breadth-first SoS the one whose coin always says no. States of two numbers are
tried out, unranked.
"""

import collections
import dataclasses
import functools
import random
from typing import Literal

from apr_jax.tasks.config import SolverConfig
from apr_jax.tasks.events import Enter, Event, Fork, Generate, Leave, Node, Search, State, Step, Test

Heuristic = Literal["sum", "multiply"]
METHODS = ("sos", "sos+", "apr")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one demonstration searches.

    Attributes:
      heuristic: what ranks the successors of a state.
      beam: successors that are kept.
      child_beam: the same within a child thread.
      promising: probability that a node's successors are searched at once instead of queued.
      max_children: threads that may be spawned in all; 0 for the serial methods.
      shuffle: shuffle the kept successors, or leave them in their canonical order.
      near: keep every successor whose distances are on average (sum) or in all (multiply) at most the target, whatever
        the beam: how depth-first SoS was published.
      largest: a step that leaves two numbers is only kept if its result is at most this; 0 keeps all.
    """

    heuristic: Heuristic
    beam: int
    child_beam: int
    promising: float
    max_children: int
    shuffle: bool
    near: bool = False
    largest: int = 0


def draw_plan(method: str, config: SolverConfig, rng: random.Random, conditioned: bool = False) -> Plan:
    """Draws heuristic, search order and beams as the method's authors do; SoS+ and APR always rank by "multiply".

    A conditioned parent of APR draws from all beams: it is to learn what every number of children looks like.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {', '.join(METHODS)}")
    if method == "apr":
        beam = rng.randint(1 if conditioned else config.parent_beam_low, config.parent_beam)
        child_beam = rng.randint(min(beam, config.child_beam), config.child_beam)
        return Plan(
            "multiply",
            beam,
            child_beam,
            config.promising,
            config.max_children,
            config.shuffle,
            largest=config.largest,
        )
    beam = rng.randint(1, config.serial_beam)
    if method == "sos+":
        return Plan("multiply", beam, beam, config.promising, 0, config.shuffle, largest=config.largest)
    heuristic: Heuristic = "sum" if rng.random() < 0.5 else "multiply"
    depth_first = rng.random() < 0.5
    near = depth_first and config.depth_first == "near"
    return Plan(heuristic, beam, beam, float(depth_first), 0, config.shuffle, near, config.largest)


@functools.lru_cache(maxsize=4096)
def distances(heuristic: Heuristic, target: int) -> tuple[int, ...]:
    """How far each number 0..target is from being useful: from the target, or from its nearest factor above 1."""
    if heuristic == "sum":
        return tuple(target - number for number in range(target + 1))
    factors = [factor for factor in range(2, target + 1) if target % factor == 0] or [target]
    return tuple(min(abs(number - factor) for factor in factors) for number in range(target + 1))


def score(heuristic: Heuristic, state: State, target: int) -> int:
    """Sum of the distances of a state's numbers; smaller is better. Above the target both heuristics agree."""
    table = distances(heuristic, target)
    return sum(table[number] if number <= target else number - target for number in state)


def successors(state: State) -> list[tuple[Step, State]]:
    """Every step from a state and the state it leads to (result first), in canonical order and each once.

    Pairs go in index order, then + - * /; differences and quotients are larger first, quotients exact, divisors not 0.
    """
    found: dict[tuple[Step, State], None] = {}
    for i, first in enumerate(state):
        for j in range(i + 1, len(state)):
            second = state[j]
            rest = state[:i] + state[i + 1 : j] + state[j + 1 :]
            large, small = (first, second) if first >= second else (second, first)
            total, gap, product = first + second, large - small, first * second
            found[Step(first, "+", second, total), (total, *rest)] = None
            found[Step(large, "-", small, gap), (gap, *rest)] = None
            found[Step(first, "*", second, product), (product, *rest)] = None
            if small and large % small == 0:
                ratio = large // small
                found[Step(large, "/", small, ratio), (ratio, *rest)] = None
    return list(found)


class _Solver:
    """One demonstration in the making: the plan, the source of its coin flips, and the threads still to be had."""

    def __init__(self, target: int, plan: Plan, rng: random.Random):
        self.target = target
        self.plan = plan
        self.rng = rng
        self.free = plan.max_children

    def expand(self, node: Node, beam: int) -> list[Node]:
        """The best `beam` successors; ties go to the earlier one in canonical order."""
        found = successors(node.state)
        if self.plan.largest and len(node.state) == 3:
            found = [(step, state) for step, state in found if step.result <= self.plan.largest]
        if self.plan.near:
            most = self.target * (len(node.state) - 1 if self.plan.heuristic == "sum" else 1)
            found = [(step, state) for step, state in found if score(self.plan.heuristic, state, self.target) <= most]
        elif beam < len(found):
            ranks = [score(self.plan.heuristic, state, self.target) for _, state in found]
            best = sorted(sorted(range(len(found)), key=ranks.__getitem__)[:beam])
            found = [found[place] for place in best]
        if self.plan.shuffle:
            self.rng.shuffle(found)
        return [Node(state, (*node.path, step), (*node.place, k)) for k, (step, state) in enumerate(found)]

    def test(self, node: Node, events: list[Event]) -> tuple[Step, ...] | None:
        """Combines the last two numbers in every way until one hits the target."""
        for step, _ in successors(node.state):
            events.append(Test(node, step))
            if step.result == self.target:
                return (*node.path, step)
        return None

    def dive(self, node: Node, beam: int, events: list[Event]) -> tuple[Step, ...] | None:
        """Depth-first below `node`, which the thread has entered."""
        if len(node.state) == 2:
            return self.test(node, events)
        for successor in self.expand(node, beam):
            solution = self.dive_into(successor, beam, events)
            if solution is not None:
                return solution
        return None

    def dive_into(self, node: Node, beam: int, events: list[Event]) -> tuple[Step, ...] | None:
        """Writes a successor down and searches it in place."""
        events += (Generate(node), Enter(node, queued=False))
        solution = self.dive(node, beam, events)
        if solution is None:
            events.append(Leave(node))
        return solution

    def fork(self, node: Node, kept: list[Node], events: list[Event]) -> tuple[Step, ...] | None:
        """One child thread a successor; the first solution in their order is taken."""
        self.free -= len(kept)
        searches = []
        for successor in kept:
            trace: list[Event] = []
            solution = self.dive(successor, self.plan.child_beam, trace)
            searches.append(Search(successor, trace, solution))
        events.append(Fork(node, tuple(searches)))
        return next((search.solution for search in searches if search.solution is not None), None)

    def hybrid(self, root: Node) -> Search:
        """The search of a root thread."""
        events: list[Event] = []
        queue = collections.deque([root])
        while queue:
            node = queue.popleft()
            if node is not root:
                events.append(Enter(node, queued=True))
            if len(node.state) == 2:
                solution = self.test(node, events)
            else:
                solution = self.visit(node, queue, events)
            if solution is not None:
                return Search(root, events, solution)
        return Search(root, events, None)

    def visit(self, node: Node, queue: collections.deque[Node], events: list[Event]) -> tuple[Step, ...] | None:
        """Expands a node of the queue: forks, searches in place, or queues its successors."""
        kept = self.expand(node, self.plan.beam)
        promising = self.rng.random() < self.plan.promising
        # A lone successor gains nothing from a thread of its own.
        if promising and 2 <= len(kept) <= self.free:
            return self.fork(node, kept, events)
        if promising and self.plan.max_children == 0:
            for successor in kept:
                solution = self.dive_into(successor, self.plan.beam, events)
                if solution is not None:
                    return solution
            return None
        events += map(Generate, kept)
        queue += kept
        return None


def search(numbers: State, target: int, plan: Plan, rng: random.Random) -> Search:
    """Runs a plan on a problem. Deterministic in its arguments and the state of `rng`, which it consumes."""
    return _Solver(target, plan, rng).hybrid(Node(tuple(numbers), (), (0,)))
