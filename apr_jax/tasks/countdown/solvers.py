"""Symbolic solvers that demonstrate how to search: SoS, SoS+, APR and nested APR (docs/data.md).

All of them are one hybrid of depth-first and breadth-first search:
1. A queue starts with the problem. A node is taken from it, its successors are ranked by a
   heuristic, and the best `beam` of them are kept.
2. A coin decides whether they are searched at once or join the queue. If they are searched at once,
   a serial method searches them depth-first, one after the other, and APR in a child thread each.
3. If a node has two numbers left, they are combined in every way, without ranking.

Depth-first SoS is the hybrid whose coin always says yes, and breadth-first SoS the one whose coin
always says no. APR's children search depth-first and do not spawn. In nested APR, children that are
not too deep flip the coin at each of their nodes too, and may have children of their own.
"""

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
PARALLEL = ("apr", "apr-nested")  # The methods that spawn.
# The largest target with a table of distances. Tables of all large targets would fill the memory.
_TABULATED = 2_000


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one demonstration searches.

    Attributes:
      heuristic: ranks the successors of a state.
      beam: number of successors that are kept.
      child_beam: number of successors that are kept within a child thread.
      spawn_probability: probability that the successors of a node are searched at once, not queued.
      max_children: number of threads that may be spawned in all; 0 for the serial methods.
      shuffle: whether the kept successors are shuffled, or stay in their canonical order.
      near: whether, instead of a beam, all successors near the target are kept, as depth-first SoS
        was published. A state is near if the mean ("sum") or the sum ("multiply") of its numbers'
        distances is at most the target.
      max_intermediate: a step that leaves two numbers is only kept if its result is at most this; 0
        keeps all.
      max_spawn: number of children that one spawn may make.
      max_depth: depth of the deepest thread; 1 lets only the root spawn.
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
    """Draws how a demonstration searches, as the authors of the method do.

    Args:
      method: one of METHODS.
      config: settings of the solvers.
      rng: source of the draws.
      conditioned: whether the prompt states a condition. Then the parent of APR draws from all
        beams, so that the model sees every number of children.
      max_spawn: number of children that one spawn of the rollout may make.
      max_depth: depth of the rollout's deepest thread. Nested APR goes as deep.

    Raises:
      ValueError: there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {', '.join(METHODS)}")
    if method in PARALLEL:
        narrowest = 1 if conditioned else config.parent_beam_low
        beam = rng.randint(narrowest, config.parent_beam)
        child_beam = rng.randint(min(beam, config.child_beam), config.child_beam)
        return Plan(
            heuristic="multiply",
            beam=beam,
            child_beam=child_beam,
            spawn_probability=config.spawn_probability,
            max_children=config.max_children,
            shuffle=config.shuffle,
            max_intermediate=config.max_intermediate,
            max_spawn=max_spawn,
            max_depth=min(max_depth, 1) if method == "apr" else max_depth,
        )

    beam = rng.randint(1, config.serial_beam)
    if method == "sos+":
        return Plan(
            heuristic="multiply",
            beam=beam,
            child_beam=beam,
            spawn_probability=config.spawn_probability,
            max_children=0,
            shuffle=config.shuffle,
            max_intermediate=config.max_intermediate,
        )

    heuristic: Heuristic = "sum" if rng.random() < 0.5 else "multiply"
    depth_first = rng.random() < 0.5
    return Plan(
        heuristic=heuristic,
        beam=beam,
        child_beam=beam,
        spawn_probability=1.0 if depth_first else 0.0,
        max_children=0,
        shuffle=config.shuffle,
        near=depth_first and config.depth_first == "near",
        max_intermediate=config.max_intermediate,
    )


@functools.lru_cache(maxsize=4096)
def distances(heuristic: Heuristic, target: int) -> tuple[int, ...]:
    """Returns the distance of each number from 0 to the target.

    It is the distance to the target ("sum"), or to the nearest factor above 1 of the target
    ("multiply").
    """
    if heuristic == "sum":
        return tuple(target - number for number in range(target + 1))
    factors = [factor for factor in range(2, target + 1) if target % factor == 0] or [target]
    return tuple(min(abs(number - factor) for factor in factors) for number in range(target + 1))


@functools.lru_cache(maxsize=4096)
def _factors(target: int) -> tuple[int, ...]:
    """Returns the factors of the target above 1 in order; for target 1, only itself."""
    small = [factor for factor in range(1, math.isqrt(target) + 1) if target % factor == 0]
    large = [target // factor for factor in small]
    factors = {*small, *large} - {1}
    return tuple(sorted(factors)) or (target,)


def _distance(heuristic: Heuristic, target: int, number: int) -> int:
    """Computes one value of `distances` without its table."""
    if heuristic == "sum":
        return target - number
    factors = _factors(target)
    above = bisect.bisect_left(factors, number)
    neighbours = factors[max(0, above - 1) : above + 1]
    return min(abs(number - factor) for factor in neighbours)


def score(heuristic: Heuristic, state: State, target: int) -> int:
    """Computes the sum of the distances of a state's numbers; smaller is better.

    The distance of a number above the target is that to the target, by both heuristics.
    """
    if target > _TABULATED:
        return sum(
            _distance(heuristic, target, number) if number <= target else number - target
            for number in state
        )
    table = distances(heuristic, target)
    return sum(table[number] if number <= target else number - target for number in state)


def successors(state: State) -> list[tuple[Step, State]]:
    """Lists every step from a state, and the state to which it leads, each pair once.

    They come in canonical order: pairs of numbers in the order of their indices, and for each pair
    + - * /. Differences and quotients have the larger number first. Quotients are exact, and no
    divisor is 0.
    """
    unique: dict[tuple[Step, State], None] = {}  # A set that keeps its order.
    for i, first in enumerate(state):
        for j in range(i + 1, len(state)):
            second = state[j]
            rest = state[:i] + state[i + 1 : j] + state[j + 1 :]
            large, small = (first, second) if first >= second else (second, first)
            total = first + second
            difference = large - small
            product = first * second
            unique[Step(first, "+", second, total), (total, *rest)] = None
            unique[Step(large, "-", small, difference), (difference, *rest)] = None
            unique[Step(first, "*", second, product), (product, *rest)] = None
            if small and large % small == 0:
                quotient = large // small
                unique[Step(large, "/", small, quotient), (quotient, *rest)] = None
    return list(unique)


@dataclasses.dataclass
class _Thread:
    """A thread that is searching.

    Attributes:
      events: what it did.
      depth: 0 for the root.
      free: number of threads that may still be spawned below it.
    """

    events: list[Event]
    depth: int
    free: int


class _Solver:
    """The search for one demonstration.

    Args:
      target: the target of the problem.
      plan: how to search.
      rng: source of all coin flips and shuffles.
    """

    def __init__(self, target: int, plan: Plan, rng: random.Random):
        self.target = target
        self.plan = plan
        self.rng = rng

    def expand(self, node: Node, beam: int) -> list[Node]:
        """Returns the successors of a node that the search keeps."""
        kept = successors(node.state)
        limit = self.plan.max_intermediate
        if limit and len(node.state) == 3:
            kept = [(step, state) for step, state in kept if step.result <= limit]

        if self.plan.near:
            kept = [(step, state) for step, state in kept if self.is_near(state)]
        elif beam < len(kept):
            # Of equally good ones the earlier is kept. The kept ones stay in their order.
            scores = [self.score(state) for _, state in kept]
            ranking = sorted(range(len(kept)), key=scores.__getitem__)
            kept = [kept[index] for index in sorted(ranking[:beam])]

        if self.plan.shuffle:
            self.rng.shuffle(kept)
        return [
            Node(state, (*node.path, step), (*node.place, number))
            for number, (step, state) in enumerate(kept)
        ]

    def score(self, state: State) -> int:
        """Computes the plan's heuristic for a state; smaller is better."""
        return score(self.plan.heuristic, state, self.target)

    def is_near(self, state: State) -> bool:
        """Tells whether a state is near the target, see `Plan.near`."""
        numbers = len(state) if self.plan.heuristic == "sum" else 1
        return self.score(state) <= self.target * numbers

    def promising(self) -> bool:
        """Flips the coin."""
        return self.rng.random() < self.plan.spawn_probability

    def test(self, node: Node, thread: _Thread) -> tuple[Step, ...] | None:
        """Combines the last two numbers in every way until one makes the target."""
        for step, _ in successors(node.state):
            thread.events.append(Test(node, step))
            if step.result == self.target:
                return (*node.path, step)
        return None

    def dive(self, node: Node, beam: int, thread: _Thread) -> tuple[Step, ...] | None:
        """Searches depth-first below a node that the thread has entered."""
        if len(node.state) == 2:
            return self.test(node, thread)
        kept = self.expand(node, beam)
        # The root of a serial method comes here too, and flips no coin.
        flips = 0 < thread.depth < self.plan.max_depth
        if flips and self.promising() and self.may_spawn(kept, thread):
            return self.fork(node, kept, thread)
        for successor in kept:
            solution = self.dive_into(successor, beam, thread)
            if solution is not None:
                return solution
        return None

    def dive_into(self, node: Node, beam: int, thread: _Thread) -> tuple[Step, ...] | None:
        """Writes a successor down, and searches it depth-first in the same thread."""
        thread.events += (Generate(node), Enter(node, queued=False))
        solution = self.dive(node, beam, thread)
        if solution is None:
            thread.events.append(Leave(node))
        return solution

    def may_spawn(self, kept: list[Node], thread: _Thread) -> bool:
        """Tells whether each successor can have a thread; a lone one would gain nothing by it."""
        most = min(thread.free, self.plan.max_spawn)
        return thread.depth < self.plan.max_depth and 2 <= len(kept) <= most

    def fork(self, node: Node, kept: list[Node], thread: _Thread) -> tuple[Step, ...] | None:
        """Searches each successor in a child thread, and takes the first solution in their order.

        The threads that are left are divided evenly among the children, if they may spawn too, and
        the thread itself, as a rollout divides its threads.
        """
        thread.free -= len(kept)
        children_may_spawn = thread.depth + 1 < self.plan.max_depth
        share = thread.free // (len(kept) + 1) if children_may_spawn else 0
        thread.free -= share * len(kept)
        searches = []
        for successor in kept:
            child = _Thread([], thread.depth + 1, share)
            solution = self.dive(successor, self.plan.child_beam, child)
            solutions = () if solution is None else (solution,)
            searches.append(Search(successor, child.events, solutions))
        thread.events.append(Fork(node, tuple(searches)))
        found = (search.solution for search in searches if search.solution is not None)
        return next(found, None)

    def hybrid(self, root: Node) -> Search:
        """Runs the search of a root thread."""
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
                return Search(root, thread.events, (solution,))
        return Search(root, thread.events, ())

    def visit(
        self, node: Node, queue: collections.deque[Node], thread: _Thread
    ) -> tuple[Step, ...] | None:
        """Expands a node of the queue: its successors get threads, are searched here, or queued."""
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

    The search follows from the arguments and the state of `rng`, from which it draws.
    """
    return _Solver(target, plan, rng).hybrid(Node(tuple(numbers), (), (0,)))
