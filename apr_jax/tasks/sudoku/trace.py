"""Demonstrations: how a thread fills a board, as text.

    a1=3a2=.a3=2...   a board: all cells in reading order, a dot for each empty one
    b4:25             a pencil mark: 2 and 5 are allowed in b4
    b4:2              only 2 is allowed in b4, so it is filled
    b4:!              no digit is allowed in b4: the board is dead
    /                 the next pass through the empty cells begins
    ?35b4=2           a guess: of 2, 3 and 5, which are allowed in b4, the 2 is tried first
    >a1=3...?5b4=3    back: the board before the last guess with digits left, and the next digit

A thread goes through the empty cells in reading order and marks each of them, again and again,
until a pass fills none. So it looks at one cell at a time, which a small model can learn.

A thread without children goes on with its own guess. After `!` it writes the board out again, as it
was before its first open guess, and then that guess, and in their order the cells that were filled
behind it: a small model cannot overlook a part of what it has written. So what stands before the
last `>` counts no more.

A thread that spawns makes no guess itself. Each of its children is told the board of the thread,
and behind it the tightest cell with one of its digits.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable

from apr_jax.tasks.base import Spawn, Thread
from apr_jax.tasks.sudoku.board import CELL_OF, CELLS, DIGITS, NAMES, SIZE, Board, Cells

DEAD = "!"
EMPTY = "."
PASS = "/"
GUESS = "?"
BACK = ">"
ALPHABET = f"abcdef123456=:{EMPTY}{DEAD}{PASS}{GUESS}{BACK}"
_SETS = [
    "".join(map(str, digits))
    for count in range(1, SIZE + 1)
    for digits in itertools.combinations(DIGITS, count)
]
# A cell with its digit is one token, so that a board is a set of tokens. A mark is two: which cell
# is next, and what is allowed there.
PHRASES = (
    *(f"{name}={digit}" for name in NAMES for digit in (*DIGITS, EMPTY)),
    *NAMES,
    *(f":{allowed}" for allowed in (*_SETS, DEAD)),
)
GRID = re.compile(r"(?:[a-f][1-6]=[1-6.])*")  # Cells with their digits, as many as follow.
_FILL_LENGTH = len("a1=1")
# A board, and behind it at most each cell once more.
_LONGEST_GRID = 2 * CELLS * _FILL_LENGTH


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


def write_board(cells: Cells) -> str:
    """Returns the text of a board: a prompt, or the answer if it is full."""
    return "".join(f"{name}={digit or EMPTY}" for name, digit in zip(NAMES, cells, strict=True))


def write_state(fills: list[Fill]) -> str:
    """Returns the text of a board that is being searched.

    Args:
      fills: the filled cells in their order. Those before the first guess become the board.
    """
    first_guess = len(fills)
    for index, fill in enumerate(fills):
        if fill.others is not None:
            first_guess = index
            break
    searched = "".join(map(str, fills[first_guess:]))
    return write_board(cells_of(fills[:first_guess])) + searched


def write_mark(cell: int, allowed: Iterable[int]) -> str:
    """Returns the text that says which digits are allowed in a cell."""
    return f"{NAMES[cell]}:{''.join(map(str, allowed)) or DEAD}"


def read_fills(text: str) -> list[Fill] | None:
    """Reads a board and what stands behind it, no guesses; returns None if it is something else.

    Returns:
      the filled cells as they stand there.
    """
    if len(text) > _LONGEST_GRID or not GRID.fullmatch(text):
        return None
    return [
        Fill(CELL_OF[text[start : start + 2]], int(text[start + 3]))
        for start in range(0, len(text), _FILL_LENGTH)
        if text[start + 3] != EMPTY
    ]


def read_board(text: str) -> Cells | None:
    """Reads a board, whose cells may stand in any order.

    Returns:
      the board, or None if the text is none or fills a cell twice.
    """
    fills = read_fills(text)
    if fills is None or len({fill.cell for fill in fills}) < len(fills):
        return None
    return cells_of(fills)


def cells_of(fills: Iterable[Fill]) -> Cells:
    """Returns the board that is filled so far; a cell that was filled twice has its last digit."""
    cells = [0] * CELLS
    for fill in fills:
        cells[fill.cell] = fill.digit
    return tuple(cells)


def before_last_guess(fills: list[Fill]) -> list[Fill] | None:
    """Takes back the last guess that has digits left, and tries the next one.

    Args:
      fills: the cells that count, in the order in which they were filled.

    Returns:
      the cells that count behind the next `>`; None if no guess has digits left.
    """
    for index in reversed(range(len(fills))):
        guess = fills[index]
        if guess.others:
            return [*fills[:index], Fill(guess.cell, guess.others[0], guess.others[1:])]
    return None


def work(cells: Cells, levels: int) -> Thread:
    """Demonstrates how a thread fills a board.

    Args:
      cells: the board.
      levels: levels of threads below it that may be used; at 0 it works alone.
    """
    return _work(write_board(cells), cells, levels)


def _work(prompt: str, cells: Cells, levels: int) -> Thread:
    """Demonstrates how a thread fills a board that its prompt describes."""
    if levels == 0:
        return _work_alone(prompt, cells)

    board = Board(cells)
    text, _ = _mark(board)
    cell = board.tightest()
    if cell is None:
        return Thread(prompt, (text,), write_board(tuple(board.digits)))
    candidates = board.candidates(cell)
    if not candidates:
        return Thread(prompt, (text,), "")

    told = write_board(tuple(board.digits))
    children = tuple(
        _work(told + str(Fill(cell, digit)), tuple(board.filled(cell, digit).digits), levels - 1)
        for digit in candidates
    )
    answers = [child.answer for child in children if child.answer]
    return Thread(prompt, (text, Spawn(children)), answers[0] if answers else "")


def _work_alone(prompt: str, cells: Cells) -> Thread:
    """Demonstrates how a thread fills a board without children, by guesses that it takes back."""
    fills = [Fill(cell, digit) for cell, digit in enumerate(cells) if digit]
    text = ""
    while True:
        board = Board(cells_of(fills))
        marks, forced = _mark(board)
        fills += forced
        text += marks
        cell = board.tightest()
        if cell is None:
            return Thread(prompt, (text,), write_board(tuple(board.digits)))

        candidates = board.candidates(cell)
        if candidates:
            guess = Fill(cell, candidates[0], candidates[1:])
            fills.append(guess)
            text += str(guess)
            continue
        earlier = before_last_guess(fills)
        if earlier is None:
            return Thread(prompt, (text,), "")
        fills = earlier
        text += BACK + write_state(fills)


def _mark(board: Board) -> tuple[str, list[Fill]]:
    """Marks the empty cells, pass by pass, until one fills none or the board is full or dead.

    Args:
      board: the board, whose forced cells are filled.

    Returns:
      the text, and the cells that were filled, in their order.
    """
    text = ""
    fills: list[Fill] = []
    while True:
        filled_earlier = len(fills)
        for cell in [cell for cell, digit in enumerate(board.digits) if not digit]:
            candidates = board.candidates(cell)
            text += write_mark(cell, candidates)
            if not candidates:
                return text, fills
            if len(candidates) == 1:
                board.fill(cell, candidates[0])
                fills.append(Fill(cell, candidates[0]))
        if board.is_full() or len(fills) == filled_earlier:
            return text, fills
        text += PASS
