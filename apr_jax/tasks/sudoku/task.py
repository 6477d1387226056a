"""Mini-sudoku of six rows and six columns: fill what is forced, then guess.

The life of a problem:
1. `board.draw` draws a puzzle with one solution. Puzzles that need too few guesses within one
   another are drawn again, because in most of them every cell is forced sooner or later.
2. The root thread is given the board, `a1=.a2=3...`.
3. `trace.work` demonstrates how a thread fills the board: alone, by guesses that it takes back, or
   with a child for each digit of the tightest cell.
4. A thread joins the full board, or nothing if the board that it was told has no solution. `score`
   compares the root's answer with the only solution.
"""

import dataclasses
import functools
import itertools
import json
import random
import re
from collections.abc import Mapping
from typing import ClassVar

from apr_jax.errors import UsageError
from apr_jax.tasks.base import Diagnosis, Method, Problem, Score, Task, Thread
from apr_jax.tasks.problem_files import cut
from apr_jax.tasks.sudoku import trace
from apr_jax.tasks.sudoku.board import (
    CELLS,
    NAMES,
    SIZE,
    Board,
    Cells,
    draw,
    is_proper,
    levels,
    solutions,
)
from apr_jax.tasks.sudoku.diagnosis import FAULT_KINDS, diagnose
from apr_jax.tasks.sudoku.symmetry import canonical

# Of 2,000 drawn puzzles 4.5% need this many guesses within one another, and 3.7% need more.
_MOST_LEAST_LEVELS = 3
_MOST_LEVELS = 8
_GIVENS = re.compile(f"[1-6.]{{{CELLS}}}")
_EXAMPLE = '{"id": "x-0", "givens": "..3..2....3.2...53.5...1...6..4....."}'


@dataclasses.dataclass(frozen=True)
class SudokuConfig:
    """Which puzzles there are.

    Attributes:
      least_levels: a puzzle that is drawn needs at least so many guesses within one another; at 0
        every puzzle is taken, and in two thirds of them no guess is needed.
      most_levels: a puzzle that is drawn needs at most so many.
    """

    least_levels: int = 1
    most_levels: int = 3

    def __post_init__(self):
        if not 0 <= self.least_levels <= _MOST_LEAST_LEVELS:
            raise ValueError(
                f"task.least_levels={self.least_levels} must be from 0 to {_MOST_LEAST_LEVELS}:"
                " puzzles that need more guesses are too rare to be drawn"
            )
        if not self.least_levels <= self.most_levels <= _MOST_LEVELS:
            raise ValueError(
                f"task.most_levels={self.most_levels} must be from"
                f" task.least_levels={self.least_levels} to {_MOST_LEVELS}"
            )


class Sudoku(Task):
    """Fill the board. Problems hold the `givens`, cell by cell, with a dot for each empty one."""

    Config = SudokuConfig
    config: SudokuConfig
    alphabet = trace.ALPHABET
    phrases = trace.PHRASES
    example = _EXAMPLE
    fault_kinds: ClassVar[Mapping[str, str]] = FAULT_KINDS

    @property
    def methods(self) -> Mapping[str, Method]:
        return {
            "serial": Method(parallel=False),
            "parallel": Method(parallel=True, depth=1),
            "nested": Method(parallel=True, depth=max(1, self.config.most_levels)),
        }

    def draw(self, seed: int) -> Problem:
        rng = random.Random(f"sudoku {seed}")
        while True:
            givens = draw(rng)
            if self.config.least_levels <= levels(Board(givens)) <= self.config.most_levels:
                return Problem(f"sudoku-{seed}", {"givens": _write_givens(givens)})

    def key(self, problem: Problem) -> str:
        """Returns the same for puzzles that differ in names of digits, rows and columns only."""
        return _key(problem.data["givens"])

    def prompt(self, problem: Problem, condition: int | None = None) -> str:
        return trace.write_board(_cells(problem))

    def demonstrate(self, problem: Problem, method: str, seed: int) -> Thread:
        """Fills the board; the seed changes nothing.

        A puzzle from a file may need more guesses within one another than `most_levels`. Then the
        deepest children of the nested method go on alone.

        Raises:
          ValueError: `method` is not one of `methods`.
        """
        self.check_method(method)
        return trace.work(_cells(problem), self.methods[method].depth)

    def score(self, problem: Problem, answer: str) -> Score:
        """Compares an answer with the solution; its cells may stand in any order."""
        if not answer:
            return Score(0.0, correct=False, stated=None, reason="states no board")
        cells = trace.read_board(answer)
        if cells is None or 0 in cells:
            reason = f"does not name each of the {CELLS} cells once"
            return Score(0.0, correct=False, stated=cut(answer), reason=reason)

        reason = _what_is_wrong(_cells(problem), cells)
        vote = trace.write_board(cells)
        return Score(float(not reason), not reason, _write_rows(cells), reason, vote)

    def diagnose(self, problem: Problem, thread: Thread, cut: bool) -> Diagnosis:
        givens = problem.data["givens"]
        return diagnose(_read_givens(givens), _solution(givens), thread, cut)

    def check(self, problem: Problem) -> Problem:
        if "givens" not in problem.data:
            raise ValueError(f'has no field "givens"; expected {_EXAMPLE}')
        text = problem.data["givens"]
        if not isinstance(text, str) or not _GIVENS.fullmatch(text):
            raise ValueError(
                f'"givens" {cut(json.dumps(text))} must be {CELLS} characters, each a digit from 1'
                f" to {SIZE} or a dot"
            )
        wrong = _why_no_puzzle(_read_givens(text))
        if wrong:
            raise ValueError(f'"givens" {text!r} {wrong}')
        return Problem(problem.id, {"givens": text})

    def parse(self, text: str) -> Problem:
        """Reads rows such as `.2..../..6..5/...`, with / or spaces between them, or nothing.

        Raises:
          UsageError: the text is no puzzle; the message says why.
        """
        givens = "".join(text.replace("/", " ").split())
        try:
            return self.check(Problem(cut(givens), {"givens": givens}))
        except ValueError as error:
            raise UsageError(
                f"problem: {error}; write it row by row, like '.2..../..6..5/...'"
            ) from None

    def show(self, problem: Problem) -> str:
        """Returns a problem in the form that `parse` reads."""
        return _write_rows(_cells(problem))


def _cells(problem: Problem) -> Cells:
    """Returns the cells of a problem."""
    return _read_givens(problem.data["givens"])


def _read_givens(text: str) -> Cells:
    """Reads the cells of a board: the inverse of `_write_givens`."""
    return tuple(0 if character == "." else int(character) for character in text)


def _write_givens(cells: Cells) -> str:
    """Returns the digits of a board in reading order, with a dot for each empty cell."""
    return "".join(str(digit) if digit else "." for digit in cells)


def _write_rows(cells: Cells) -> str:
    """Returns a board row by row, as people read it."""
    text = _write_givens(cells)
    return "/".join(text[start : start + SIZE] for start in range(0, CELLS, SIZE))


@functools.lru_cache(maxsize=4096)
def _key(givens: str) -> str:
    """Returns the key of a puzzle, which is asked for several times in a row."""
    return _write_givens(canonical(_read_givens(givens)))


@functools.lru_cache(maxsize=1024)
def _solution(givens: str) -> Cells:
    """Returns the solution of a puzzle, which is asked for by each thread of a tree."""
    return next(solutions(Board(_read_givens(givens))))


def _why_no_puzzle(cells: Cells) -> str:
    """Says why a board has not exactly one solution; "" if it has."""
    if not is_proper(cells):
        return "has a digit twice in a row, column or box"
    found = len(list(itertools.islice(solutions(Board(cells)), 2)))
    return {0: "has no solution", 1: "", 2: "has more than one solution"}[found]


def _what_is_wrong(givens: Cells, cells: Cells) -> str:
    """Says what is wrong with a full board; "" if it is the solution."""
    for cell, (given, digit) in enumerate(zip(givens, cells, strict=True)):
        if given not in (0, digit):
            return f"{NAMES[cell]} is given as {given}"
    return "" if is_proper(cells) else "has a digit twice in a row, column or box"
