"""Demonstrations: how a thread fills a board, as text.

    b4=5          a cell that is forced is filled
    !             the board is dead
    ?35b4=2       a guess: of 2, 3 and 5, which are allowed in b4, the 2 is tried first
    >a1=3...?5b4=3    back: the board before the last guess that has digits left, and the next digit

A thread without children goes on with its own guess. After `!` it writes the board out again, as it
was before the guess, because a small model cannot overlook a part of what it has written. So what
stands before the last `>` counts no more, and the guesses that are still open are all behind it.

A thread that spawns makes no guess itself. Each of its children is told the board as the thread
has it, in the order in which it was filled, with one of the digits put into the tightest cell.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from apr_jax.tasks.base import Spawn, Thread
from apr_jax.tasks.sudoku.board import CELL_OF, CELLS, NAMES, Board, Cells

DEAD = "!"
GUESS = "?"
BACK = ">"
ALPHABET = f"abcdef123456={GUESS}{DEAD}{BACK}"
# A cell and its digit are one token, so that a board is a set of tokens.
PHRASES = tuple(f"{name}={digit}" for name in NAMES for digit in range(1, 7))
_GRID = re.compile("(?:[a-f][1-6]=[1-6])*")
_FILL_LENGTH = len("a1=1")


@dataclasses.dataclass(frozen=True)
class Fill:
    """A cell that is filled.

    Attributes:
      cell: the cell.
      digit: its digit.
      others: the digits that are tried later, if this is a guess; None if it is none.
    """

    cell: int
    digit: int
    others: tuple[int, ...] | None = None

    def __str__(self) -> str:
        """Returns the text of the piece."""
        text = f"{NAMES[self.cell]}={self.digit}"
        if self.others is None:
            return text
        return GUESS + "".join(map(str, self.others)) + text


def write(fills: Iterable[Fill]) -> str:
    """Returns the text of cells that are filled."""
    return "".join(map(str, fills))


def write_board(cells: Cells) -> str:
    """Returns the filled cells of a board in reading order: a prompt, or the answer if all are."""
    return write(Fill(cell, digit) for cell, digit in enumerate(cells) if digit)


def read_fills(text: str) -> list[Fill] | None:
    """Reads cells with their digits, no guesses; returns None if the text is something else."""
    # No text is longer that names each cell once.
    if len(text) > CELLS * _FILL_LENGTH or not _GRID.fullmatch(text):
        return None
    return [
        Fill(CELL_OF[text[start : start + 2]], int(text[start + 3]))
        for start in range(0, len(text), _FILL_LENGTH)
    ]


def read_board(text: str) -> Cells | None:
    """Reads a board, whose filled cells may stand in any order.

    Returns:
      the board, or None if the text is none or names a cell twice.
    """
    fills = read_fills(text)
    if fills is None:
        return None
    cells = [0] * CELLS
    for fill in fills:
        if cells[fill.cell]:
            return None
        cells[fill.cell] = fill.digit
    return tuple(cells)


def before_last_guess(fills: list[Fill]) -> list[Fill] | None:
    """Takes back the last guess that has digits left, and tries the next one.

    Args:
      fills: what stands behind the last `>`, or all of it, the prompt included.

    Returns:
      what is written behind the next `>`; None if no guess has digits left.
    """
    for index in reversed(range(len(fills))):
        guess = fills[index]
        if guess.others:
            return [*fills[:index], Fill(guess.cell, guess.others[0], guess.others[1:])]
    return None


def work(cells: Cells, levels: int) -> Thread:
    """Demonstrates how a thread fills a board whose prompt is in reading order."""
    return _work([Fill(cell, digit) for cell, digit in enumerate(cells) if digit], levels)


def _work(given: list[Fill], levels: int) -> Thread:
    """Demonstrates how a thread fills a board.

    Args:
      given: the filled cells, as the prompt of the thread lists them.
      levels: levels of threads below it that may be used; at 0 it works alone.
    """
    prompt = write(given)
    if levels == 0:
        return _work_alone(given)

    board = _board(given)
    steps = [Fill(cell, digit) for cell, digit in board.propagate()]
    text = write(steps)
    cell = board.tightest()
    if cell is None:
        return Thread(prompt, (text,) if text else (), write_board(tuple(board.digits)))
    candidates = board.candidates(cell)
    if not candidates:
        return Thread(prompt, (text + DEAD,), "")

    known = given + steps
    children = tuple(_work([*known, Fill(cell, digit)], levels - 1) for digit in candidates)
    answers = [child.answer for child in children if child.answer]
    spawn = Spawn(children)
    return Thread(prompt, (text, spawn) if text else (spawn,), answers[0] if answers else "")


def _work_alone(given: list[Fill]) -> Thread:
    """Demonstrates how a thread fills a board without children, by guesses that it takes back."""
    fills = list(given)
    text = ""
    while True:
        board = _board(fills)
        steps = [Fill(cell, digit) for cell, digit in board.propagate()]
        fills += steps
        text += write(steps)
        cell = board.tightest()
        if cell is None:
            return Thread(write(given), (text,) if text else (), write_board(tuple(board.digits)))

        candidates = board.candidates(cell)
        if candidates:
            guess = Fill(cell, candidates[0], candidates[1:])
            fills.append(guess)
            text += str(guess)
            continue
        text += DEAD
        earlier = before_last_guess(fills)
        if earlier is None:
            return Thread(write(given), (text,), "")
        fills = earlier
        text += BACK + write(fills)


def _board(fills: Iterable[Fill]) -> Board:
    """Returns a board that is filled so far."""
    board = Board([0] * CELLS)
    for fill in fills:
        board.fill(fill.cell, fill.digit)
    return board
