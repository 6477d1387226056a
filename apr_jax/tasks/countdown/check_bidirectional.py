"""Finds the faults in a trace of a search from both ends that a model wrote.

The parser is written from the description of the form in `bidirectional`, and shares no code with
it.

Each number is compared with the true one. What is wrong counts once, and the trace is believed from
there on. A fault is decisive if a solution was lost by it: the thread would have found one, had it
written the piece right. What is left out is a fault only if a solution was lost by it, and if it is
within the bound of the search (`task.solver.max_intermediate`). A pair of numbers that no thread
searched is no fault: a tree without a fault that lost the solution in this way counts as `coverage`
(`evaluate.failures`).

A root's text behind a spawn holds the checks of what its children joined. Their answers do not
stand in its own text, so only the form of these checks is looked at.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from apr_jax.tasks.base import Diagnosis, Fault, Spawn, Thread
from apr_jax.tasks.countdown.problems import reachable
from apr_jax.tasks.countdown.puzzle import Puzzle

# As many digits as the verifier reads.
_NUMBER = r"[0-9]{1,40}"
_VALUE = rf"[+\-*/]{_NUMBER}"
_CHECK = rf"{_NUMBER}(?:,{_NUMBER})*!?"
_PAIR = re.compile(rf"({_NUMBER}),({_NUMBER})>({_NUMBER}),({_NUMBER})")
_MESSAGE = re.compile(rf"({_NUMBER}),({_NUMBER})>({_NUMBER}),({_NUMBER}):({_NUMBER})")
_NEEDS = re.compile(rf"({_NUMBER})>({_NUMBER}):((?:{_VALUE})*)")
_RESULTS = re.compile(rf">({_NUMBER}),({_NUMBER}):((?:{_VALUE})*)")
_STEP = re.compile(rf"([+\-*/])({_NUMBER})(?:\|((?:{_VALUE}(?:!(?:{_CHECK})?)?)*))?")
_TRIAL = re.compile(rf"([+\-*/])({_NUMBER})(!?)((?:{_CHECK})?)")
_LISTED = re.compile(rf"([+\-*/])({_NUMBER})")
# What may be half a number at the end of a text, with the signs before it.
_CUT_OFF = re.compile(r"[+\-*/,|!>:]*[0-9]*$")
_ONE_CHECK = re.compile(_CHECK)


class _Pair(NamedTuple):
    """The two numbers of a first step, and the two others."""

    a: int
    b: int
    c: int
    d: int

    @property
    def others(self) -> tuple[int | None, ...]:
        """What its sections combine with a first step's result; None: they ask for its needs."""
        return tuple(dict.fromkeys((self.c, self.d, None)))


def check_thread(puzzle: Puzzle, thread: Thread, most: int, cut: bool = False) -> Diagnosis:
    """Finds the faults of one thread, messages to its children included, but not their traces.

    Args:
      puzzle: numbers and target of the problem.
      thread: the thread as it was written; its prompt is empty if it is the root.
      most: the largest number that leaves two numbers; 0 if there is no bound.
      cut: whether the thread was stopped from outside. Then its last piece may be half a piece, and
        what it left undone is no fault.
    """
    reader = _Reader(puzzle, most)
    hopeful = puzzle.target in reachable(puzzle.numbers)
    if thread.prompt:
        message = _MESSAGE.fullmatch(thread.prompt)
        if message is None:
            # Nobody knows what such a thread was to do. The fault is its parent's.
            return Diagnosis((), found=False, hopeful=False)
        reader.begin_pair(_Pair(*map(int, message.groups()[:4])))
        hopeful = reader.pair is not None and any(reader.find_first_steps(reader.pair))

    spawned = False
    for index, part in enumerate(thread.body):
        is_cut = cut and index == len(thread.body) - 1
        if isinstance(part, Spawn):
            reader.read_messages([child.prompt for child in part.children])
            spawned = True
        elif spawned:
            reader.read_checks(part, is_cut)
        else:
            reader.read_text(part, is_cut)
    if not cut:
        reader.end_pair()
    return Diagnosis(tuple(reader.faults), reader.found, hopeful)


def _results(x: int, y: int, most: int) -> dict[str, int]:
    """Returns operation -> result of two numbers."""
    large, small = max(x, y), min(x, y)
    found = {"+": x + y, "-": large - small, "*": x * y}
    if small and large % small == 0:
        found["/"] = large // small
    return {op: result for op, result in found.items() if not most or result <= most}


def _needs(number: int, target: int, most: int) -> set[tuple[str, int]]:
    """Returns each operation and number with which a number makes the target."""
    found = {("-", number + target)}
    found.add(("+", target - number) if number <= target else ("-", number - target))
    if number:
        found.add(("/", number * target))
        if target % number == 0:
            found.add(("*", target // number))
        if number % target == 0:
            found.add(("/", number // target))
    return {(op, other) for op, other in found if not most or other <= most}


def _normal(pair: _Pair) -> _Pair:
    """Returns the pair with both couples of numbers sorted."""
    return _Pair(*sorted(pair[:2]), *sorted(pair[2:]))


def _all_pairs(numbers: tuple[int, ...]) -> set[_Pair]:
    """Returns every pair of a problem, its numbers sorted."""
    orders = itertools.permutations(numbers)
    return {_normal(_Pair(*order)) for order in orders}


class _Reader:
    """Reads one thread, and keeps where it is.

    Args:
      puzzle: numbers and target of the problem.
      most: the largest number that leaves two numbers; 0 if there is no bound.

    Attributes:
      faults: the faults that were found.
      found: whether the thread marked a right solution that its check did not reject.
      pair: the pair below which the thread searches; None before the first.
      searched: the pairs that it was at before.
      others: what the sections that it has begun below the pair combine with a first step's result.
      in_section: whether what it writes belongs to the last of these.
      tried: operations whose results were written in this section.
    """

    def __init__(self, puzzle: Puzzle, most: int):
        self.puzzle = puzzle
        self.most = most
        self.faults: list[Fault] = []
        self.found = False
        self.pair: _Pair | None = None
        self.searched: set[_Pair] = set()
        self.others: list[int | None] = []
        self.in_section = False
        self.tried: set[str] = set()

    def add_fault(self, kind: str, text: str, decisive: bool) -> None:
        """Notes a fault."""
        self.faults.append(Fault(kind, text, decisive))

    def find_first_steps(self, pair: _Pair) -> Iterator[str]:
        """Yields the operation of a first step for each of its solutions within the bound."""
        for other in pair.others:
            yield from self.find_in_section(pair, other)

    def find_in_section(self, pair: _Pair, other: int | None) -> Iterator[str]:
        """Yields the operation of a first step for each of its solutions in a section."""
        for op, first in _results(pair.a, pair.b, 0).items():
            for _ in self.find_hits(pair, first, other):
                yield op

    def find_hits(self, pair: _Pair, first: int, other: int | None) -> Iterator[tuple[str, int]]:
        """Yields the operation and the number of each trial of a section that is a hit.

        Args:
          pair: the pair.
          first: the result of the first step.
          other: the number that the section combines with it; None: it asks for its needs.
        """
        target = self.puzzle.target
        if other is None:
            made = set(_results(pair.c, pair.d, self.most).values())
            yield from ((op, need) for op, need in _needs(first, target, self.most) if need in made)
            return
        last = pair.d if other == pair.c else pair.c
        wanted = {number for _, number in _needs(last, target, self.most)}
        for op, number in _results(first, other, self.most).items():
            if number in wanted:
                yield op, number

    def read_messages(self, texts: list[str]) -> None:
        """Reads the messages of a spawn; each gives a child a pair of the problem's numbers."""
        wrong = []
        told = set()
        for text in texts:
            match = _MESSAGE.fullmatch(text)
            values = tuple(map(int, match.groups())) if match else ()
            is_right = bool(match) and values[4] == self.puzzle.target
            if is_right and sorted(values[:4]) == sorted(self.puzzle.numbers):
                told.add(_normal(_Pair(*values[:4])))
            else:
                wrong.append(text)
        untold = (pair for pair in _all_pairs(self.puzzle.numbers) if pair not in told)
        decisive = bool(wrong) and any(any(self.find_first_steps(pair)) for pair in untold)
        for text in wrong:
            self.add_fault("message", text, decisive)

    def read_checks(self, text: str, is_cut: bool) -> None:
        """Reads the checks of what children joined; the last may be half a check if it `is_cut`."""
        pieces = text.split(";")
        for number, piece in enumerate(pieces, start=1):
            is_half = is_cut and number == len(pieces)
            if not _ONE_CHECK.fullmatch(piece) and not is_half:
                self.add_fault("bookkeeping", piece, decisive=False)

    def read_text(self, text: str, is_cut: bool) -> None:
        """Reads the pieces of a text, which semicolons separate.

        Args:
          text: text of the thread.
          is_cut: whether the last piece may be half a piece.
        """
        pieces = [piece for piece in text.split(";") if piece]
        for number, piece in enumerate(pieces, start=1):
            is_half = is_cut and number == len(pieces)
            if is_half:
                piece = _CUT_OFF.sub("", piece)
            if match := _PAIR.fullmatch(piece):
                self.begin_pair(_Pair(*map(int, match.groups())))
            elif self.pair is None:
                self.add_fault("bookkeeping", piece, decisive=False)
            elif match := _NEEDS.fullmatch(piece):
                other, last = int(match[1]), int(match[2])
                self.read_needs(self.pair, other, last, match[3], is_half)
            elif match := _RESULTS.fullmatch(piece):
                self.read_results(self.pair, int(match[1]), int(match[2]), match[3], is_half)
            elif match := _STEP.fullmatch(piece):
                if self.in_section:
                    trials = match[3] or ""
                    self.read_step(self.pair, match[1], int(match[2]), trials, is_half)
                else:  # What is lost by it is noted as a section that was left out.
                    self.add_fault("bookkeeping", piece, decisive=False)
            elif not is_half:
                self.add_fault("bookkeeping", piece, decisive=any(self.find_first_steps(self.pair)))

    def begin_pair(self, pair: _Pair) -> None:
        """Begins the search below a pair."""
        self.end_pair()
        self.pair = pair
        self.others = []
        self.in_section = False
        if sorted(pair) != sorted(self.puzzle.numbers):
            lost = any(any(self.find_first_steps(one)) for one in _all_pairs(self.puzzle.numbers))
            self.add_fault("bookkeeping", ",".join(map(str, pair)), lost)

    def end_pair(self) -> None:
        """Ends the search below a pair: notes sections that were left out."""
        self.end_section()
        if self.pair is None or self.found:
            return
        pair = self.pair
        for other in pair.others:
            if other is None and _normal(_Pair(pair.c, pair.d, pair.a, pair.b)) in self.searched:
                continue  # These results were combined below the pair of the two others.
            if other not in self.others and any(self.find_in_section(pair, other)):
                text = f"{'' if other is None else other}>: not tried"
                self.add_fault("bookkeeping", text, decisive=True)
        self.searched.add(_normal(pair))

    def begin_section(self, other: int | None, is_known: bool, text: str) -> None:
        """Begins a section.

        Args:
          other: the number that it combines with the results of first steps; None: it asks for
            their needs.
          is_known: whether it is one of the pair's. What it is to do is unknown otherwise, and
            counts as left out.
          text: its head.
        """
        self.end_section()
        self.in_section = is_known
        self.tried = set()
        if is_known:
            self.others.append(other)
        else:
            self.add_fault("bookkeeping", text, decisive=False)

    def end_section(self) -> None:
        """Ends a section: notes first steps that were left out."""
        if self.pair is None or not self.in_section or self.found:
            return
        for op in sorted(set(self.find_in_section(self.pair, self.others[-1])) - self.tried):
            text = f"{self.pair.a}{op}{self.pair.b}: not tried"
            self.add_fault("bookkeeping", text, decisive=True)

    def read_needs(self, pair: _Pair, other: int, last: int, listed: str, is_half: bool) -> None:
        """Reads `2>93:-40-146`: what is made with 2 is looked up among the needs of 93."""
        is_known = (other, last) in ((pair.c, pair.d), (pair.d, pair.c))
        self.begin_section(other, is_known, f"{other}>{last}:{listed}")
        if not is_known:
            return
        firsts = _results(pair.a, pair.b, 0).values()
        made = {number for first in firsts for number in _results(first, other, self.most).values()}
        expected, all_needs = (_needs(last, self.puzzle.target, most) for most in (self.most, 0))
        self.compare_list(f"{last}:", listed, expected, all_needs, is_half, made.__contains__)

    def read_results(self, pair: _Pair, c: int, d: int, listed: str, is_half: bool) -> None:
        """Reads `>2,93:+95-91*186`: needs are looked up among the results of the two others."""
        is_known = sorted((c, d)) == sorted((pair.c, pair.d))
        self.begin_section(None, is_known, f">{c},{d}:{listed}")
        if not is_known:
            return
        target = self.puzzle.target
        firsts = _results(pair.a, pair.b, 0).values()
        wanted = {number for first in firsts for _, number in _needs(first, target, self.most)}
        expected, all_results = (set(_results(c, d, most).items()) for most in (self.most, 0))
        self.compare_list(f"{c},{d}:", listed, expected, all_results, is_half, wanted.__contains__)

    def compare_list(
        self,
        head: str,
        listed: str,
        expected: set[tuple[str, int]],
        allowed: set[tuple[str, int]],
        is_half: bool,
        matters: Callable[[int], bool],
    ) -> None:
        """Compares a list with the true one.

        Args:
          head: what stands before the list.
          listed: the list as it was written.
          expected: the operations and numbers that it should hold.
          allowed: those that it may hold, beyond the bound of the search.
          is_half: whether it may have been cut off.
          matters: whether a solution is lost with a number that is left out.
        """
        written = {(op, int(text)) for op, text in _LISTED.findall(listed)}
        lost = [] if is_half else [entry for entry in expected - written if matters(entry[1])]
        wrong = sorted(written - allowed)
        for op, number in wrong:
            self.add_fault("arithmetic", f"{head}{op}{number}", decisive=bool(lost))
        if lost and not wrong:
            op, number = min(lost)
            self.add_fault("arithmetic", f"{head}{op}{number} left out", decisive=True)

    def read_step(self, pair: _Pair, op: str, first: int, trials: str, is_half: bool) -> None:
        """Reads `-20|+22-18*40!`, a first step with its result, and what is tried with it."""
        other = self.others[-1]
        true_first = _results(pair.a, pair.b, 0).get(op)
        self.tried.add(op)
        if first != true_first:
            lost = true_first is not None and any(self.find_hits(pair, true_first, other))
            fault = Fault("arithmetic", f"{pair.a}{op}{pair.b}={first}", lost)
            if fault not in self.faults:  # Every section of the pair may repeat it.
                self.faults.append(fault)
        expected = set(self.find_hits(pair, first, other)) if first == true_first else set()
        written: set[tuple[str, int]] = set()
        for trial_op, text, mark, check in _TRIAL.findall(trials):
            trial = (trial_op, int(text))
            written.add(trial)
            # A check that was cut off rejects nothing.
            whole = "" if is_half else check
            self.read_trial(pair, first, trial, mark, whole, first == true_first)
        if self.found or is_half:
            return

        for trial_op, number in sorted(expected - written):
            shown = _shown(first, trial_op, other, number)
            self.add_fault("arithmetic", f"{shown} left out", decisive=True)

    def read_trial(
        self,
        pair: _Pair,
        first: int,
        trial: tuple[str, int],
        mark: str,
        check: str,
        is_reached: bool,
    ) -> None:
        """Reads `*40!`, a number that is looked up in the list of the section.

        Args:
          pair: the pair.
          first: the result of the first step, as it was written.
          trial: the operation and the number.
          mark: "!" if it is said to stand in the list.
          check: the check that follows the mark in a root.
          is_reached: whether the first step is right.
        """
        other = self.others[-1]
        op, number = trial
        shown = _shown(first, op, other, number)
        if other is None:
            is_true = trial in _needs(first, self.puzzle.target, 0)
        else:
            is_true = _results(first, other, 0).get(op) == number
        is_hit = trial in set(self.find_hits(pair, first, other))
        rejected = bool(check) and not check.endswith("!")
        if not is_true:
            # What the right number would have found is noted as left out.
            if not rejected:
                self.add_fault("arithmetic", f"{shown}{mark}", decisive=False)
        elif bool(mark) != is_hit:
            # A false mark ends the search, unless a check rejects it.
            if not rejected:
                lost = is_hit or any(self.find_first_steps(pair))
                self.add_fault("arithmetic", f"{shown}{mark or ': not marked'}", lost)
        elif is_hit and rejected:
            self.add_fault("check", f"{shown}!{check}", decisive=True)
        elif is_hit and is_reached:
            self.found = True


def _shown(first: int, op: str, other: int | None, number: int) -> str:
    """Writes a trial as a fault shows it: `20*2=40`, or a need as `20:*40`."""
    return f"{first}:{op}{number}" if other is None else f"{first}{op}{other}={number}"
