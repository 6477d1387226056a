"""Symbolic solvers that demonstrate how to search: SoS, SoS+, APR and nested APR (docs/data.md).

All of them are one hybrid search. A queue starts with the problem; a node is taken from it, its
successors are ranked by a heuristic and the best `beam` are kept. If a coin judges the node
promising, each kept successor is searched depth-first right there (serial methods) or by a child
thread (APR); otherwise they join the queue. Depth-first SoS is the hybrid whose coin always says
yes, breadth-first SoS the one whose coin always says no. States of two numbers are tried out,
unranked. APR's children search depth-first and do not spawn; in nested APR a child that is not yet
too deep flips the coin at every node too, and a promising one gets children of its own."""

import bisect
import collections
import dataclasses
import functools
import math
import random
from typing import Literal

from apr_jax.tasks.countdown.config import SolverConfig
from apr_jax.tasks.countdown.events import (
    Enter,
    Event,
    Fork,
    Generate,
    Leave,
    Node,
    Search,
    State,
    Step,
    Test,
)

Heuristic = Literal["sum", "multiply"]
METHODS = ("sos", "sos+", "apr", "apr-nested")
# Targets up to it have a table of distances; larger ones would take more memory than there is.
_TABULATED = 2_000
PARALLEL = ("apr", "apr-nested")  # The methods that spawn.


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one demonstration searches.

    Attributes:
      heuristic: what ranks the successors of a state.
      beam: successors that are kept.
      child_beam: the same within a child thread.
      spawn_probability: probability that a node's successors are searched at once instead of
        queued.
      max_children: threads that may be spawned in all; 0 for the serial methods.
      shuffle: shuffle the kept successors, or leave them in their canonical order.
      near: keep every successor whose distances are on average (sum) or in all (multiply) at most
        the target, whatever the beam: how depth-first SoS was published.
      max_intermediate: a step that leaves two numbers is only kept if its result is at most this; 0
        keeps all.
      max_spawn: children that one spawn may make.
      max_depth: deepest thread; 1 lets only the root spawn.
    """

    heuristic: Heuristic
    beam: int
    child_beam: int
    spawn_probability: float
    max_children: int
    shuffle: bool
    near: bool = False
    max_intermediate: int = 0
    max_spawn: int = 1_000
    max_depth: int = 1


def draw_plan(
    method: str,
    config: SolverConfig,
    rng: random.Random,
    conditioned: bool,
    max_spawn: int,
    max_depth: int,
) -> Plan:
    """Draws heuristic, search order and beams as the method's authors do; SoS+ and APR always rank
    by "multiply".

    A conditioned parent of APR draws from all beams: it is to learn what every number of children
    looks like. `max_spawn` and `max_depth` are those of the rollout; nested APR goes as deep as
    they let it."""
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {', '.join(METHODS)}")
    if method in PARALLEL:
        beam = rng.randint(1 if conditioned else config.parent_beam_low, config.parent_beam)
        child_beam = rng.randint(min(beam, config.child_beam), config.child_beam)
        deepest = min(max_depth, 1) if method == "apr" else max_depth
        return Plan(
            "multiply",
            beam,
            child_beam,
            config.spawn_probability,
            config.max_children,
            config.shuffle,
            max_intermediate=config.max_intermediate,
            max_spawn=max_spawn,
            max_depth=deepest,
        )
    beam = rng.randint(1, config.serial_beam)
    if method == "sos+":
        return Plan(
            "multiply",
            beam,
            beam,
            config.spawn_probability,
            0,
            config.shuffle,
            max_intermediate=config.max_intermediate,
        )
    heuristic: Heuristic = "sum" if rng.random() < 0.5 else "multiply"
    depth_first = rng.random() < 0.5
    near = depth_first and config.depth_first == "near"
    return Plan(
        heuristic, beam, beam, float(depth_first), 0, config.shuffle, near, config.max_intermediate
    )


@functools.lru_cache(maxsize=4096)
def distances(heuristic: Heuristic, target: int) -> tuple[int, ...]:
    """How far each number 0..target is from being useful: from the target, or from its nearest
    factor above 1.
    """
    if heuristic == "sum":
        return tuple(target - number for number in range(target + 1))
    factors = [factor for factor in range(2, target + 1) if target % factor == 0] or [target]
    return tuple(min(abs(number - factor) for factor in factors) for number in range(target + 1))


@functools.lru_cache(maxsize=4096)
def _factors(target: int) -> tuple[int, ...]:
    """Factors of the target above 1, in order; of 1, itself."""
    small = [factor for factor in range(1, math.isqrt(target) + 1) if target % factor == 0]
    return tuple(sorted({*small, *(target // factor for factor in small)} - {1})) or (target,)


def _distance(heuristic: Heuristic, target: int, number: int) -> int:
    """One value of `distances`, without its table."""
    if heuristic == "sum":
        return target - number
    factors = _factors(target)
    above = bisect.bisect_left(factors, number)
    return min(abs(number - factor) for factor in factors[max(0, above - 1) : above + 1])


def score(heuristic: Heuristic, state: State, target: int) -> int:
    """Sum of the distances of a state's numbers; smaller is better.

    Above the target both heuristics agree.
    """
    if target > _TABULATED:
        return sum(
            _distance(heuristic, target, number) if number <= target else number - target
            for number in state
        )
    table = distances(heuristic, target)
    return sum(table[number] if number <= target else number - target for number in state)


def successors(state: State) -> list[tuple[Step, State]]:
    """Every step from a state and the state it leads to (result first), in canonical order and each
    once.

    Pairs go in index order, then + - * /; differences and quotients are larger first, quotients
    exact, divisors not 0."""
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


@dataclasses.dataclass
class _Thread:
    """A thread at work: what it did, how deep it is, and how many threads it and those below it may
    still have.
    """

    events: list[Event]
    depth: int
    free: int


class _Solver:
    """One demonstration in the making: the plan and the source of its coin flips."""

    def __init__(self, target: int, plan: Plan, rng: random.Random):
        self.target = target
        self.plan = plan
        self.rng = rng

    def expand(self, node: Node, beam: int) -> list[Node]:
        """The best `beam` successors; ties go to the earlier one in canonical order."""
        found = successors(node.state)
        if self.plan.max_intermediate and len(node.state) == 3:
            found = [
                (step, state) for step, state in found if step.result <= self.plan.max_intermediate
            ]
        if self.plan.near:
            most = self.target * (len(node.state) - 1 if self.plan.heuristic == "sum" else 1)
            found = [
                (step, state)
                for step, state in found
                if score(self.plan.heuristic, state, self.target) <= most
            ]
        elif beam < len(found):
            ranks = [score(self.plan.heuristic, state, self.target) for _, state in found]
            best = sorted(sorted(range(len(found)), key=ranks.__getitem__)[:beam])
            found = [found[place] for place in best]
        if self.plan.shuffle:
            self.rng.shuffle(found)
        return [
            Node(state, (*node.path, step), (*node.place, k))
            for k, (step, state) in enumerate(found)
        ]

    def promising(self) -> bool:
        """The coin flip."""
        return self.rng.random() < self.plan.spawn_probability

    def test(self, node: Node, thread: _Thread) -> tuple[Step, ...] | None:
        """Combines the last two numbers in every way until one hits the target."""
        for step, _ in successors(node.state):
            thread.events.append(Test(node, step))
            if step.result == self.target:
                return (*node.path, step)
        return None

    def dive(self, node: Node, beam: int, thread: _Thread) -> tuple[Step, ...] | None:
        """Depth-first below `node`, which the thread has entered."""
        if len(node.state) == 2:
            return self.test(node, thread)
        kept = self.expand(node, beam)
        # A serial root dives too, and flips no coin.
        if (
            0 < thread.depth < self.plan.max_depth
            and self.promising()
            and self.may_spawn(kept, thread)
        ):
            return self.fork(node, kept, thread)
        for successor in kept:
            solution = self.dive_into(successor, beam, thread)
            if solution is not None:
                return solution
        return None

    def dive_into(self, node: Node, beam: int, thread: _Thread) -> tuple[Step, ...] | None:
        """Writes a successor down and searches it in place."""
        thread.events += (Generate(node), Enter(node, queued=False))
        solution = self.dive(node, beam, thread)
        if solution is None:
            thread.events.append(Leave(node))
        return solution

    def may_spawn(self, kept: list[Node], thread: _Thread) -> bool:
        """Whether each successor can have a thread; a lone one gains nothing from its own."""
        return thread.depth < self.plan.max_depth and 2 <= len(kept) <= min(
            thread.free, self.plan.max_spawn
        )

    def fork(self, node: Node, kept: list[Node], thread: _Thread) -> tuple[Step, ...] | None:
        """One child thread a successor; the first solution in their order is taken.

        What threads are left is divided evenly among the children and the thread itself, as a
        rollout divides its threads."""
        thread.free -= len(kept)
        each = thread.free // (len(kept) + 1) if thread.depth + 1 < self.plan.max_depth else 0
        thread.free -= each * len(kept)
        searches = []
        for successor in kept:
            child = _Thread([], thread.depth + 1, each)
            solution = self.dive(successor, self.plan.child_beam, child)
            searches.append(Search(successor, child.events, solution))
        thread.events.append(Fork(node, tuple(searches)))
        return next((search.solution for search in searches if search.solution is not None), None)

    def hybrid(self, root: Node) -> Search:
        """The search of a root thread."""
        thread = _Thread([], 0, self.plan.max_children)
        queue = collections.deque([root])
        while queue:
            node = queue.popleft()
            if node is not root:
                thread.events.append(Enter(node, queued=True))
            if len(node.state) == 2:
                solution = self.test(node, thread)
            else:
                solution = self.visit(node, queue, thread)
            if solution is not None:
                return Search(root, thread.events, solution)
        return Search(root, thread.events, None)

    def visit(
        self, node: Node, queue: collections.deque[Node], thread: _Thread
    ) -> tuple[Step, ...] | None:
        """Expands a node of the queue: forks, searches in place, or queues its successors."""
        kept = self.expand(node, self.plan.beam)
        promising = self.promising()
        if promising and self.may_spawn(kept, thread):
            return self.fork(node, kept, thread)
        if promising and self.plan.max_children == 0:
            for successor in kept:
                solution = self.dive_into(successor, self.plan.beam, thread)
                if solution is not None:
                    return solution
            return None
        thread.events += map(Generate, kept)
        queue += kept
        return None


def search(numbers: State, target: int, plan: Plan, rng: random.Random) -> Search:
    """Runs a plan on a problem.

    Deterministic in its arguments and the state of `rng`, which it consumes.
    """
    return _Solver(target, plan, rng).hybrid(Node(tuple(numbers), (), (0,)))
