"""Finds the faults in a compact trace that a model wrote.

The parser is written from the description of the form in `render_compact`, and shares no code with
it.

The life of a check:
1. The first state that the thread has *reached* is its start: the problem, or the state for which
   its message stands.
2. Each piece of the trace must follow from a state that was reached, and reaches states itself.
3. A piece that does not is a `Fault`. The trace is believed from there on, so that a slip counts
   once.
4. A fault is decisive if the target can be made from the state that was lost by it.

Where all solutions are asked for, the steps that lead to solutions are checked, too: each must have
been tried, each hit marked, and the thread must join what it found. That is looked at if every
piece of the trace is right. The root reads the solutions of its children from their answers, which
do not stand in its own text, so of a thread that spawns no answer is checked.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator

from apr_jax.tasks.base import Diagnosis, Fault, Spawn, Thread
from apr_jax.tasks.countdown.all_solutions import (
    SOLUTION,
    all_solutions,
    read_solution,
    solution_of,
)
from apr_jax.tasks.countdown.problems import reachable
from apr_jax.tasks.countdown.puzzle import Puzzle

_Step = tuple[int, str, int]  # (a, op, b); the larger number is `a` where steps are compared.
_Equation = tuple[int, str, int, int]  # A step and its result.
State = tuple[int, ...]  # The numbers that are left. They are sorted here; order means nothing.

# What a model makes up may be long and large; the states of problems are not.
_MOST_NUMBERS = 6
_LARGEST_NUMBER = 10**9

# As many digits as the verifier reads. The largest product of the numbers of a problem has 36.
_NUMBER = r"[0-9]{1,40}"
_NUMBERS = rf"{_NUMBER}(?:,{_NUMBER})*"
_TESTS = rf"(?:[+\-*/](?:{_NUMBER})?!?)*"
_START = re.compile(rf"=({_NUMBER})({_TESTS})")
_ONLY_TESTS = re.compile(_TESTS)
_QUEUED = re.compile(rf">({_NUMBERS})({_TESTS})")
_GROUP = re.compile(rf"({_NUMBER}),({_NUMBER})(?::({_NUMBERS}))?((?:\|[+\-*/]{_NUMBER}{_TESTS})+)")
_SUCCESSOR = re.compile(rf"\|([+\-*/])({_NUMBER})({_TESTS})")
_TEST = re.compile(rf"([+\-*/])({_NUMBER})?(!?)")
# What may be half a number at the end of a text, with the signs before it.
_CUT_OFF = re.compile(r"[|+\-*/,:>=]*[0-9]*$")
_MESSAGE = re.compile(
    rf"(?:([^;:]*);)?({_NUMBER})([+\-*/])({_NUMBER})((?:,{_NUMBER})*):({_NUMBER})"
)
_EQUATION = re.compile(rf"({_NUMBER})([+\-*/])({_NUMBER})=({_NUMBER})")


def check_thread(
    puzzle: Puzzle, thread: Thread, cut: bool = False, wants_all: bool = False
) -> Diagnosis:
    """Finds the faults of one thread, messages to its children included, but not their traces.

    Args:
      puzzle: numbers and target of the problem.
      thread: the thread as it was written; its prompt is empty if it is the root.
      cut: whether the thread was stopped from outside. Then its last piece may be half a piece, and
        what it left undone is no fault.
      wants_all: whether all solutions are asked for.
    """
    start = _state(puzzle.numbers)
    reader = _Reader(puzzle, cut, wants_all)
    if thread.prompt:
        message = read_message(thread.prompt)
        if message is None:
            # Nobody knows what such a thread was to do. The fault is its parent's.
            return Diagnosis((), found=False, hopeful=False)
        start = message.state
        reader.unsolved = message
    reader.reached[start] = True
    reader.current = start

    for index, part in enumerate(thread.body):
        if isinstance(part, Spawn):
            for child in part.children:
                reader.message(child.prompt)
        else:
            reader.text(part, last=index == len(thread.body) - 1)
    if wants_all and not cut and not reader.faults:
        reader.untried_steps()
        if not reader.told and not reader.faults:
            reader.answer(thread)
    elif not wants_all and not cut and not thread.answer:
        reader.leftovers()
    return Diagnosis(tuple(reader.faults), reader.found, _is_solvable(start, puzzle.target))


@dataclasses.dataclass(frozen=True)
class Message:
    """What a message to a child says.

    Attributes:
      path: the steps before the last one, each as (a, op, b, result).
      step: the last step, as (a, op, b).
      rest: the other numbers.
      target: the number to make.
    """

    path: tuple[tuple[int, str, int, int], ...]
    step: tuple[int, str, int]
    rest: State
    target: int

    @property
    def result(self) -> int | None:
        """The result of the last step; None if it has none."""
        return _result(*self.step)

    @property
    def state(self) -> State:
        """The state from which the child starts."""
        if self.result is None:
            return _state(self.rest)
        return _state((self.result, *self.rest))


def read_message(text: str) -> Message | None:
    """Reads a message; returns None if the text does not have the form of one."""
    match = _MESSAGE.fullmatch(text)
    if match is None:
        return None

    path = []
    if match[1]:
        for equation in match[1].split(","):
            parts = _EQUATION.fullmatch(equation)
            if parts is None:
                return None
            path.append((int(parts[1]), parts[2], int(parts[3]), int(parts[4])))

    step = (int(match[2]), match[3], int(match[4]))
    rest = tuple(map(int, match[5].split(",")[1:]))
    return Message(tuple(path), step, rest, int(match[6]))


class _Reader:
    """Reads one thread, and keeps what it has reached.

    Args:
      puzzle: numbers and target of the problem.
      cut: whether the thread was stopped from outside.
      wants_all: whether all solutions are asked for.

    Attributes:
      faults: the faults that were found.
      found: whether the thread reached the target by right steps; where all solutions are asked
        for, whether it reached it by all of them.
      reached: state -> whether right steps lead to it; False after a fault.
      expanded: states whose successors were listed, or that were taken from the queue.
      current: the state to which the thread moved last. The messages of a spawn follow from it.
      unsolved: the thread's own message, until the result of its step was worked out.
      tried: steps that were tried, each with the state from which it was; of the last steps only
        those that were marked as hits. Only where all solutions are asked for.
      told: whether the thread told a child something.
    """

    def __init__(self, puzzle: Puzzle, cut: bool, wants_all: bool):
        self.puzzle = puzzle
        self.cut = cut
        self.wants_all = wants_all
        self.tried: set[tuple[State, _Step]] = set()
        self.told = False
        self.faults: list[Fault] = []
        self.found = False
        self.reached: dict[State, bool] = {}
        self.expanded: set[State] = set()
        self.current: State = ()
        self.unsolved: Message | None = None

    def fault(self, kind: str, text: str, lost: State) -> None:
        """Notes a fault, by which the thread lost a state."""
        self.faults.append(Fault(kind, text, _is_solvable(lost, self.puzzle.target)))

    def text(self, text: str, last: bool) -> None:
        """Reads the pieces of a text, which semicolons separate.

        Args:
          text: text of the thread between two spawns.
          last: whether it is the last one of the thread.
        """
        pieces = [piece for piece in text.split(";") if piece]
        for number, piece in enumerate(pieces, start=1):
            half = self.cut and last and number == len(pieces)
            if half:
                piece = _CUT_OFF.sub("", piece)
            if match := _START.fullmatch(piece):
                self.start(piece, int(match[1]), match[2])
            elif match := _QUEUED.fullmatch(piece):
                self.queued(piece, _state(map(int, match[1].split(","))), match[2])
            elif match := _GROUP.fullmatch(piece):
                rest = map(int, match[3].split(",")) if match[3] else ()
                self.group(piece, int(match[1]), int(match[2]), tuple(rest), match[4])
            elif len(self.puzzle.numbers) == 2 and _ONLY_TESTS.fullmatch(piece):
                # For a problem of two numbers the root has nothing else to write.
                self.tests(piece, self.current)
            elif not half:
                self.fault("bookkeeping", piece, self.current)

    def start(self, piece: str, result: int, tests: str) -> None:
        """Reads `=48`: a child works out the result that its message left open."""
        message = self.unsolved
        self.unsolved = None
        if message is None:
            self.fault("bookkeeping", piece, self.current)
            return
        state = _state((result, *message.rest))
        if result != message.result:
            self.fault("arithmetic", piece, self.current)
            self.reached[state] = False
        self.current = state
        self.tests(tests, state)

    def queued(self, piece: str, state: State, tests: str) -> None:
        """Reads `>48,2`: a state that was written before is taken from the queue."""
        if state not in self.reached:
            self.fault("bookkeeping", piece, _nearest(state, self.reached))
            self.reached[state] = False
        self.current = state
        self.expanded.add(state)
        self.tests(tests, state)

    def group(self, piece: str, a: int, b: int, rest: State, successors: str) -> None:
        """Reads `22,26:2|+48|-4`: two numbers of a reached state, and what operations make."""
        state = _state((a, b, *rest))
        if state not in self.reached:
            self.fault("bookkeeping", piece, _nearest(state, self.reached))
            self.reached[state] = False
        self.expanded.add(state)
        large = max(a, b)
        small = min(a, b)
        for op, text, tests in _SUCCESSOR.findall(successors):
            result = int(text)
            true_result = _result(large, op, small)
            is_right = result == true_result
            if not is_right:
                lost = () if true_result is None else _state((true_result, *rest))
                self.fault("arithmetic", f"{large}{op}{small}={text}", lost)

            if is_right:
                self.tried.add((state, (large, op, small)))
            successor = _state((result, *rest))
            self.reached.setdefault(successor, self.reached[state] and is_right)
            is_last = not rest
            if is_last and is_right and result == self.puzzle.target:
                self.found = self.found or self.reached[state]
            self.tests(tests, successor)

    def tests(self, tests: str, state: State) -> None:
        """Reads `+50-46!`: the last two numbers of a state are combined.

        A result that is too long to be the target is left out, and a hit is marked.
        """
        target = self.puzzle.target
        for op, text, mark in _TEST.findall(tests):
            if len(state) != 2:
                self.fault("bookkeeping", f"{op}{text}{mark}", state)
                continue
            small, large = state
            result = int(text) if text else None
            true_result = _result(large, op, small)
            is_target = result == target

            is_wrong = true_result is None or (result is not None and result != true_result)
            is_false_hit = bool(mark) and not is_target
            if is_wrong or is_false_hit:
                lost = state if mark or true_result == target else ()
                self.fault("arithmetic", f"{large}{op}{small}={text}{mark}", lost)
            elif is_target and self.wants_all:
                if mark:
                    self.tried.add((state, (large, op, small)))
                else:
                    self.fault("arithmetic", f"{large}{op}{small}={text}: not marked", state)
            elif is_target:
                self.found = self.found or self.reached.get(state, False)
                self.expanded.add(state)

    def message(self, text: str) -> None:
        """Reads a message to a child: steps from the problem to a successor of a reached state."""
        self.told = True
        message = read_message(text)
        if message is None or message.target != self.puzzle.target:
            self.fault("message", text, self.current)
            return

        state: State | None = _state(self.puzzle.numbers)
        for a, op, b, result in message.path:
            state = _after(state, a, op, b) if _result(a, op, b) == result else None
        successor = _after(state, *message.step)
        if successor != message.state:
            self.fault("message", text, successor or self.current)
        elif state not in self.reached:
            self.fault("bookkeeping", text, self.current)
        else:
            a, op, b = message.step
            self.tried.add((state, (max(a, b), op, min(a, b))))
            self.expanded.add(state)

    def leftovers(self) -> None:
        """Notes the solvable states that a thread left out which claims that there is no solution.

        If it has found a solution, it left nothing out.
        """
        if self.found:
            return
        start = next(iter(self.reached))
        for state, is_right in self.reached.items():
            # A search that was never begun is no slip.
            is_unbegun = state == start and len(state) > 2
            if is_unbegun or not is_right or state in self.expanded:
                continue
            if _is_solvable(state, self.puzzle.target):
                kind = "arithmetic" if len(state) == 2 else "bookkeeping"
                self.fault(kind, f"{','.join(map(str, state))}: not followed", state)

    def untried_steps(self) -> None:
        """Notes the steps to solutions that a thread has not tried from the states it reached.

        A last step counts as tried if it was marked as a hit.
        """
        for state, is_right in list(self.reached.items()):
            if not is_right or not _is_solvable(state, self.puzzle.target):
                continue
            for step, successor in _steps(state):
                leads_on = _is_solvable(successor, self.puzzle.target)
                if leads_on and (state, step) not in self.tried:
                    kind = "arithmetic" if len(state) == 2 else "bookkeeping"
                    a, op, b = step
                    shown = ",".join(map(str, state))
                    self.fault(kind, f"{shown}: {a}{op}{b} not tried", state)

    def answer(self, thread: Thread) -> None:
        """Compares what a thread without children joined with the solutions in its text."""
        path: tuple[_Equation, ...] = ()
        message = read_message(thread.prompt)
        if message is not None and message.result is not None:
            path = (*message.path, (*message.step, message.result))
        start = next(iter(self.reached))
        found = {solution_of(solution) for solution in self._tried_paths(start, path)}
        self.found = found == all_solutions(self.puzzle.numbers, self.puzzle.target)

        parts = thread.answer.split(SOLUTION) if thread.answer else []
        if {read_solution(part) for part in parts} != found:
            self.fault("answer", thread.answer, start)

    def _tried_paths(
        self, state: State, path: tuple[_Equation, ...]
    ) -> Iterator[tuple[_Equation, ...]]:
        """Yields the ways to the target that were tried from a state on, behind `path`."""
        for (a, op, b), successor in _steps(state):
            if (state, (a, op, b)) not in self.tried:
                continue
            result = _result(a, op, b)
            assert result is not None
            longer = (*path, (a, op, b, result))
            if len(successor) > 1:
                yield from self._tried_paths(successor, longer)
            elif result == self.puzzle.target:
                yield longer


def _steps(state: State) -> Iterator[tuple[_Step, State]]:
    """Yields each step from a state, its larger number first, and the state to which it leads."""
    if not 1 < len(state) <= _MOST_NUMBERS:
        return
    for small, large in set(itertools.combinations(state, 2)):
        for op in "+-*/":
            successor = _after(state, large, op, small)
            if successor is not None:
                yield (large, op, small), successor


def _state(numbers: Iterable[int]) -> State:
    """Returns the state of some numbers."""
    return tuple(sorted(numbers))


def _is_solvable(state: State, target: int) -> bool:
    """Tells whether a state can make the target; False if it is too large for any problem."""
    if not 0 < len(state) <= _MOST_NUMBERS or max(state) >= _LARGEST_NUMBER:
        return False
    return target in reachable(state)


def _result(a: int, op: str, b: int) -> int | None:
    """Computes `a op b`; None if the result is not exact or negative."""
    if op == "/":
        return a // b if b and a % b == 0 else None
    result = {"+": a + b, "-": a - b, "*": a * b}[op]
    return result if result >= 0 else None


def _after(state: State | None, a: int, op: str, b: int) -> State | None:
    """Returns the state after a step; None if the step cannot be taken."""
    left = list(state or ())
    for number in (a, b):
        if number not in left:
            return None
        left.remove(number)
    result = _result(a, op, b)
    return None if result is None else _state((result, *left))


def _nearest(state: State, reached: Iterable[State]) -> State:
    """Returns the reached state that was most likely meant by a state that was never reached.

    It is one of as many numbers, if there is any, that shares the most numbers; of several the one
    that was reached last.
    """
    numbers = collections.Counter(state)

    def likeness(candidate: State) -> tuple[bool, int]:
        shared = numbers & collections.Counter(candidate)
        return len(candidate) == len(state), shared.total()

    return max(reversed(list(reached)), key=likeness)
