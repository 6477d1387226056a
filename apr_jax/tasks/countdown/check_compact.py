"""What is wrong in a compact trace: a parser of its own, which shares nothing with
`render_compact`, where the form is defined.

The life of a check: the thread's start (the problem, or what its message stands for) is the first
state it has *reached*. Each piece of the trace must follow from a reached state, and reaches states
itself; a wrong piece is a `Fault`, and the trace is believed from there on, so that one slip counts
once. A fault is decisive if the target can be made from the state that it lost."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable

from apr_jax.tasks.base import Diagnosis, Fault, Spawn, Thread
from apr_jax.tasks.countdown.problems import reachable
from apr_jax.tasks.countdown.puzzle import Puzzle

State = tuple[int, ...]  # Sorted here: the order of a state says nothing.

# As many digits as the verifier reads: the product of the most and largest numbers that a task
# allows has 36.
_NUMBER = r"[0-9]{1,40}"
_NUMBERS = rf"{_NUMBER}(?:,{_NUMBER})*"
_TESTS = rf"(?:[+\-*/](?:{_NUMBER})?!?)*"
_START = re.compile(rf"=({_NUMBER})({_TESTS})")
_ONLY_TESTS = re.compile(_TESTS)
_QUEUED = re.compile(rf">({_NUMBERS})({_TESTS})")
_GROUP = re.compile(rf"({_NUMBER}),({_NUMBER})(?::({_NUMBERS}))?((?:\|[+\-*/]{_NUMBER}{_TESTS})+)")
_SUCCESSOR = re.compile(rf"\|([+\-*/])({_NUMBER})({_TESTS})")
_TEST = re.compile(rf"([+\-*/])({_NUMBER})?(!?)")
_CUT_OFF = re.compile(r"[|+\-*/,:>=]*[0-9]*$")  # What may be half a number, with what leads to it.
_MESSAGE = re.compile(
    rf"(?:([^;:]*);)?({_NUMBER})([+\-*/])({_NUMBER})((?:,{_NUMBER})*):({_NUMBER})"
)
_EQUATION = re.compile(rf"({_NUMBER})([+\-*/])({_NUMBER})=({_NUMBER})")


def check_thread(puzzle: Puzzle, thread: Thread, cut: bool = False) -> Diagnosis:
    """Reads one thread; what its children did is not looked at, what it told them is.

    Args:
      thread: as it was written; `prompt` is empty for the root.
      cut: it was stopped from outside: its last piece may be half a piece, and what it left undone
        is no fault.
    """
    start = _of(puzzle.numbers)
    reader = _Reader(puzzle, cut)
    if thread.prompt:
        told = read_message(thread.prompt)
        if told is None:  # Nobody knows what such a thread was to do; the fault is its parent's.
            return Diagnosis((), found=False, hopeful=False)
        start = told.state
        reader.first = told
    reader.reached[start] = True
    reader.current = start
    for part in thread.body:
        if isinstance(part, Spawn):
            for child in part.children:
                reader.message(child.prompt)
        else:
            reader.text(part, last=part is thread.body[-1])
    if not (cut or thread.answer):
        reader.leftovers()
    return Diagnosis(tuple(reader.faults), reader.found, _can(start, puzzle.target))


@dataclasses.dataclass(frozen=True)
class Told:
    """What a message says.

    Attributes:
      path: the equations of the steps before, as (a, op, b, result).
      step: a, op, b of the last one.
      rest: the other numbers; target: the number to make.
    """

    path: tuple[tuple[int, str, int, int], ...]
    step: tuple[int, str, int]
    rest: State
    target: int

    @property
    def result(self) -> int | None:
        """Of the last step; None where there is none."""
        return _result(*self.step)

    @property
    def state(self) -> State:
        """Where the child starts; a step without a result leaves the rest alone."""
        return _of(self.rest if self.result is None else (self.result, *self.rest))


def read_message(message: str) -> Told | None:
    """The parts of a message; None if it is not in the form of one."""
    match = _MESSAGE.fullmatch(message)
    if match is None:
        return None
    equations = [_EQUATION.fullmatch(text) for text in match[1].split(",")] if match[1] else []
    if None in equations:
        return None
    path = tuple((int(one[1]), one[2], int(one[3]), int(one[4])) for one in equations if one)
    rest = tuple(map(int, match[5].split(",")[1:]))
    return Told(path, (int(match[2]), match[3], int(match[4])), rest, int(match[6]))


class _Reader:
    """One thread in the reading.

    Attributes:
      reached: state -> whether a right way leads to it (False after a fault).
      expanded: states whose successors were listed, or that were taken from the queue.
      current: the state that was last moved to: a spawn's messages follow from it.
      first: the message, until its result was worked out.
    """

    def __init__(self, puzzle: Puzzle, cut: bool):
        self.puzzle, self.cut = puzzle, cut
        self.faults: list[Fault] = []
        self.found = False
        self.reached: dict[State, bool] = {}
        self.expanded: set[State] = set()
        self.current: State = ()
        self.first: Told | None = None

    def fault(self, kind: str, text: str, lost: State) -> None:
        self.faults.append(Fault(kind, text, _can(lost, self.puzzle.target)))

    def text(self, text: str, last: bool) -> None:
        """Pieces between semicolons."""
        pieces = [piece for piece in text.split(";") if piece]
        for place, piece in enumerate(pieces):
            half = self.cut and last and place == len(pieces) - 1
            piece = _CUT_OFF.sub("", piece) if half else piece
            if match := _START.fullmatch(piece):
                self.start(piece, int(match[1]), match[2])
            elif match := _QUEUED.fullmatch(piece):
                self.queued(piece, _of(map(int, match[1].split(","))), match[2])
            elif match := _GROUP.fullmatch(piece):
                rest = map(int, match[3].split(",")) if match[3] else ()
                self.group(piece, int(match[1]), int(match[2]), tuple(rest), match[4])
            elif len(self.puzzle.numbers) == 2 and _ONLY_TESTS.fullmatch(piece):
                # Of a problem of two numbers the root has nothing else to write.
                self.tests(piece, self.current)
            elif not half:
                self.fault("bookkeeping", piece, self.current)

    def start(self, piece: str, result: int, tests: str) -> None:
        """`=48`: a child works out the result that its message left open."""
        told, self.first = self.first, None
        if told is None:
            return self.fault("bookkeeping", piece, self.current)
        if result != told.result:
            self.fault("arithmetic", piece, self.current)
            self.reached[_of((result, *told.rest))] = False
        self.current = _of((result, *told.rest))
        return self.tests(tests, self.current)

    def queued(self, piece: str, state: State, tests: str) -> None:
        """`>48,2`: a state that was written before."""
        if state not in self.reached:
            self.fault("bookkeeping", piece, _nearest(state, self.reached))
            self.reached[state] = False
        self.current = state
        self.expanded.add(state)
        self.tests(tests, state)

    def group(self, piece: str, a: int, b: int, rest: State, successors: str) -> None:
        """`22,26:2|+48|-4`: two numbers of a reached state, and what can be made of them."""
        state = _of((a, b, *rest))
        if state not in self.reached:
            self.fault("bookkeeping", piece, _nearest(state, self.reached))
            self.reached[state] = False
        self.expanded.add(state)
        for op, text, tests in _SUCCESSOR.findall(successors):
            result, true = int(text), _result(max(a, b), op, min(a, b))
            made = _of((result, *rest))
            if true != result:
                lost = () if true is None else _of((true, *rest))
                self.fault("arithmetic", f"{max(a, b)}{op}{min(a, b)}={text}", lost)
            self.reached.setdefault(made, self.reached[state] and true == result)
            if not rest and true == result == self.puzzle.target:
                self.found = self.found or self.reached[state]
            self.tests(tests, made)

    def tests(self, tests: str, state: State) -> None:
        """`+50-46!`: the last two numbers combined; a result too long to be the target is left
        out.
        """
        for op, text, hit in _TEST.findall(tests):
            if len(state) != 2:
                self.fault("bookkeeping", f"{op}{text}{hit}", state)
                continue
            result, true = int(text) if text else None, _result(state[1], op, state[0])
            is_target = result == self.puzzle.target
            if true is None or (text and true != result) or (hit and not is_target):
                lost = state if hit or true == self.puzzle.target else ()
                self.fault("arithmetic", f"{state[1]}{op}{state[0]}={text}{hit}", lost)
            elif is_target:
                self.found = self.found or self.reached.get(state, False)
                self.expanded.add(state)

    def message(self, message: str) -> None:
        """What a child is told: a way from the problem to a successor of the current state."""
        told = read_message(message)
        if told is None or told.target != self.puzzle.target:
            return self.fault("message", message, self.current)
        state: State | None = _of(self.puzzle.numbers)
        for a, op, b, result in told.path:
            state = _after(state, a, op, b) if _result(a, op, b) == result else None
        after = _after(state, *told.step)
        if after != told.state:
            return self.fault("message", message, after or self.current)
        if state not in self.reached:
            return self.fault("bookkeeping", message, self.current)
        return self.expanded.add(state)

    def leftovers(self) -> None:
        """The thread claims that there is no solution: what did it write down and not follow, or
        not see?
        """
        start = next(iter(self.reached))
        for state, right in self.reached.items():
            if state == start and len(state) > 2:  # A search that was never begun is no slip.
                continue
            if (
                right
                and state not in self.expanded
                and _can(state, self.puzzle.target)
                and not self.found
            ):
                kind = "arithmetic" if len(state) == 2 else "bookkeeping"
                self.fault(kind, f"{','.join(map(str, state))}: not followed", state)


def _of(numbers: Iterable[int]) -> State:
    return tuple(sorted(numbers))


def _can(state: State, target: int) -> bool:
    """Whether the target can be made from a state (of more numbers than any problem has: no)."""
    return 0 < len(state) <= _MOST and max(state) < _LARGEST and target in reachable(state)


_MOST, _LARGEST = 6, 10**9  # What a model makes up may be long and large; problems are not.


def _result(a: int, op: str, b: int) -> int | None:
    """Of an exact step that is not negative; None where there is none."""
    if op == "/":
        return a // b if b and a % b == 0 else None
    result = {"+": a + b, "-": a - b, "*": a * b}[op]
    return result if result >= 0 else None


def _after(state: State | None, a: int, op: str, b: int) -> State | None:
    """The state after a step; None if it cannot be taken."""
    left = list(state or ())
    for number in (a, b):
        if number not in left:
            return None
        left.remove(number)
    result = _result(a, op, b)
    return None if result is None else _of((result, *left))


def _nearest(state: State, reached: Iterable[State]) -> State:
    """The reached state that shares most numbers with one that was never reached: what was meant,
    most likely.
    """

    def shared(other: State) -> int:
        return sum((collections.Counter(state) & collections.Counter(other)).values())

    return max(reversed(list(reached)), key=lambda other: (len(other) == len(state), shared(other)))
