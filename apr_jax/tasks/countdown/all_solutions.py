"""Countdown with all solutions: `task.solutions="all"`.

An answer is a set of solutions, with `;` between them: `22+26=48,48-2=46;26-2=24,22+24=46`.

Two solutions are the same if they consist of the same equations, whatever the order of the
equations and of the two numbers of a sum or a product. So `1+2=3,3+4=7` and `2+1=3,4+3=7` are one
solution, and `2+4=6,1+6=7` is another one, because it goes by another number. Of equal numbers
nobody can say which was taken, so they tell no solutions apart. A quotient has the larger number
first, as in traces: `0/5=0`, which a single solution may hold, is no step here.

- `all_solutions` finds every solution by brute force, and `count_solutions` counts them by target.
- `search_all` demonstrates: it tries every step from every state, in one thread or with a child for
  each first step, and goes on behind a solution. A child joins the solutions that it found, and the
  root joins those of all children.
- `score_all` compares an answer with all solutions.
"""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from apr_jax.tasks.base import Score
from apr_jax.tasks.countdown.events import (
    Enter,
    Event,
    Fork,
    Generate,
    Node,
    Search,
    State,
    Step,
    Test,
)
from apr_jax.tasks.countdown.puzzle import Puzzle
from apr_jax.tasks.countdown.solvers import successors

SOLUTION = ";"  # Stands between two solutions of an answer.

# The equations of a solution as (a, op, b, result), sorted, the larger number of each first.
Solution = tuple[tuple[int, str, int, int], ...]

_EQUATION = re.compile(r"([0-9]{1,40})([+\-*/])([0-9]{1,40})=([0-9]{1,40})")
_MOST_VOTED = 64  # An answer of more parts votes as it stands.


def solution_of(steps: Iterable[tuple[int, str, int, int]]) -> Solution:
    """Returns the solution of which these are the steps, equal for steps that are the same one."""
    return tuple(sorted(_ordered(step) for step in steps))


def _ordered(step: tuple[int, str, int, int]) -> tuple[int, str, int, int]:
    """Returns a step whose larger number comes first if it is a sum or a product."""
    a, op, b, result = step
    if op in "+*" and a < b:
        return b, op, a, result
    return a, op, b, result


def all_solutions(numbers: Sequence[int], target: int) -> frozenset[Solution]:
    """Returns every solution of a problem of at most `MAX_NUMBERS_OF_ALL` numbers."""
    return _by_target(tuple(sorted(numbers))).get(target, frozenset())


def count_solutions(numbers: Sequence[int]) -> dict[int, int]:
    """Returns how many solutions each target has that the numbers can make."""
    by_target = _by_target(tuple(sorted(numbers)))
    return {target: len(solutions) for target, solutions in by_target.items()}


@functools.lru_cache(maxsize=64)
def _by_target(numbers: State) -> Mapping[int, frozenset[Solution]]:
    """Returns target -> every solution, for each target that the numbers can make."""
    solutions: dict[int, set[Solution]] = collections.defaultdict(set)
    for path in _paths(numbers, ()):
        solutions[path[-1].result].add(solution_of(path))
    return {target: frozenset(found) for target, found in solutions.items()}


def _paths(state: State, path: tuple[Step, ...]) -> Iterator[tuple[Step, ...]]:
    """Yields each sequence of steps that leads from a state to a single number, behind `path`."""
    if len(state) == 1:
        yield path
        return
    for step, following in successors(state):
        yield from _paths(following, (*path, step))


def search_all(puzzle: Puzzle, parallel: bool) -> Search:
    """Demonstrates how all solutions of a problem are found.

    Args:
      puzzle: numbers and target of the problem.
      parallel: whether each first step gets a child thread; of a problem of two numbers there are
        none, because its first step is the last.
    """
    root = Node(tuple(puzzle.numbers), (), (0,))
    if not parallel or len(root.state) == 2:
        return _search(root, puzzle.target)
    children = tuple(_search(node, puzzle.target) for node in _following(root))
    found = (solution for child in children for solution in child.solutions)
    return Search(root, [Fork(root, children)], _distinct(found))


def _search(node: Node, target: int) -> Search:
    """Demonstrates how one thread tries every step from a node on."""
    events: list[Event] = []
    found: list[tuple[Step, ...]] = []
    _try_all(node, target, events, found)
    return Search(node, events, _distinct(found))


def _try_all(node: Node, target: int, events: list[Event], found: list[tuple[Step, ...]]) -> None:
    """Tries every step from a node, depth-first; adds to `events` and to the paths `found`."""
    if len(node.state) == 2:
        for step, _ in successors(node.state):
            events.append(Test(node, step))
            if step.result == target:
                found.append((*node.path, step))
        return
    for following in _following(node):
        events += (Generate(following), Enter(following, queued=False))
        _try_all(following, target, events, found)


def _following(node: Node) -> list[Node]:
    """Returns every node that is one step from a node, in the canonical order."""
    return [
        Node(state, (*node.path, step), (*node.place, number))
        for number, (step, state) in enumerate(successors(node.state))
    ]


def _distinct(paths: Iterable[tuple[Step, ...]]) -> tuple[tuple[Step, ...], ...]:
    """Returns the paths without those that are the same solution as an earlier one."""
    first: dict[Solution, tuple[Step, ...]] = {}
    for path in paths:
        first.setdefault(solution_of(path), path)
    return tuple(first.values())


def score_all(puzzle: Puzzle, answer: str, wrong_because: Mapping[str, str]) -> Score:
    """Compares an answer with all solutions.

    The reward is the share of all solutions that the answer states. What it states besides, and is
    no solution, counts as one more that was to be found: otherwise the answer that states
    everything would be the best. The answer is correct if it states all solutions and nothing else.

    Args:
      puzzle: numbers and target of the problem.
      answer: the answer; not empty.
      wrong_because: part of the answer -> why it is no solution, or "" if it is one.
    """
    parts = answer.split(SOLUTION)
    expected = all_solutions(puzzle.numbers, puzzle.target)
    found = set()
    reasons = {}  # Part that is no solution -> why not.
    for part in parts:
        solution = read_solution(part)
        if not wrong_because[part] and solution in expected:
            found.add(solution)
        else:
            reasons[part] = wrong_because[part] or f"{part}: divides 0"

    wrong = sorted(reasons)
    correct = not wrong and len(found) == len(expected)
    reason = ""
    if wrong:
        reason = reasons[wrong[0]]
    elif not correct:
        reason = f"{len(found)} of {len(expected)} solutions"
    vote = None
    if len(parts) <= _MOST_VOTED:
        vote = SOLUTION.join([*map(_write, sorted(found)), *wrong])
    return Score(
        reward=len(found) / (len(expected) + len(wrong)),
        correct=correct,
        stated="; ".join(part.replace(",", ", ") for part in parts),
        reason=reason,
        vote=vote,
    )


def read_solution(text: str) -> Solution:
    """Returns the solution that a text of equations states; what is no equation is left out."""
    matches = map(_EQUATION.fullmatch, text.split(","))
    return solution_of(
        (int(match[1]), match[2], int(match[3]), int(match[4])) for match in matches if match
    )


def _write(solution: Solution) -> str:
    """Returns the equations of a solution, joined by commas."""
    return ",".join(f"{a}{op}{b}={result}" for a, op, b, result in solution)
