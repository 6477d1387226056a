"""Boards of six rows and six columns, which are filled cell by cell.

Each row, each column and each box of two rows and three columns holds every digit from 1 to 6 once.
Rows are called a to f from the top, columns 1 to 6 from the left, so that `b4=5` puts a 5 into the
second row. Cells are numbered from 0 to 35 in reading order.

A digit is *allowed* in an empty cell if no other cell of its row, column and box has it. A cell is
*forced* if one digit is allowed there, and a board is *dead* if a cell has none. The *tightest*
cell is the first of those in which the fewest digits are allowed.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

SIZE = 6
CELLS = SIZE * SIZE
DIGITS = range(1, SIZE + 1)
BOX_ROWS = 2
BOX_COLUMNS = 3
ROW_NAMES = "abcdef"
NAMES = tuple(f"{row}{column}" for row in ROW_NAMES for column in DIGITS)
CELL_OF = {name: cell for cell, name in enumerate(NAMES)}

Cells = tuple[int, ...]  # [36], the digit of each cell; 0 if it is empty.


def _box(cell: int) -> tuple[int, int]:
    """Returns the place of a cell's box among the boxes."""
    row, column = divmod(cell, SIZE)
    return row // BOX_ROWS, column // BOX_COLUMNS


def _are_peers(cell: int, other: int) -> bool:
    """Whether two cells share a row, a column or a box."""
    row, column = divmod(cell, SIZE)
    other_row, other_column = divmod(other, SIZE)
    shares = row == other_row or column == other_column or _box(cell) == _box(other)
    return shares and cell != other


PEERS = tuple(  # [36, 12]: the cells that share a row, a column or a box with each cell.
    tuple(other for other in range(CELLS) if _are_peers(cell, other)) for cell in range(CELLS)
)
# [64]. Sets of digits are bits: digit 1 is bit 0. This is every set as a list.
_MEMBERS = tuple(
    tuple(digit for digit in DIGITS if members >> (digit - 1) & 1) for members in range(1 << SIZE)
)
_ALL = (1 << SIZE) - 1


class Board:
    """A board that can be filled further.

    Args:
      cells: the digit of each cell, 0 for empty ones. A digit may stand twice in a row: such boards
        come from the text of models.

    Attributes:
      digits: the digit of each cell, 0 for empty ones.
    """

    def __init__(self, cells: Iterable[int]):
        self.digits = [0] * CELLS  # [36]
        # [36], sets of digits that no peer has; that of a filled cell means nothing.
        self._allowed = [_ALL] * CELLS
        for cell, digit in enumerate(cells):
            if digit:
                self.fill(cell, digit)

    def copy(self) -> Board:
        """Returns a board of its own that is equal."""
        board = Board.__new__(Board)
        board.digits = self.digits.copy()
        board._allowed = self._allowed.copy()
        return board

    def fill(self, cell: int, digit: int) -> None:
        """Puts a digit into an empty cell."""
        self.digits[cell] = digit
        others = _ALL ^ 1 << (digit - 1)
        allowed = self._allowed
        for peer in PEERS[cell]:
            allowed[peer] &= others

    def filled(self, cell: int, digit: int) -> Board:
        """Returns a copy in which an empty cell has a digit."""
        board = self.copy()
        board.fill(cell, digit)
        return board

    def candidates(self, cell: int) -> tuple[int, ...]:
        """Returns the digits that are allowed in an empty cell."""
        return _MEMBERS[self._allowed[cell]]

    def tightest(self) -> int | None:
        """Returns the tightest cell, or None if the board is full."""
        best = None
        fewest = SIZE + 1
        for cell, digit in enumerate(self.digits):
            if not digit:
                count = len(_MEMBERS[self._allowed[cell]])
                if count < fewest:
                    best = cell
                    fewest = count
        return best

    def is_full(self) -> bool:
        """Whether no cell is empty."""
        return 0 not in self.digits

    def propagate(self) -> list[tuple[int, int]]:
        """Fills forced cells, the first one first, until there is none or the board is dead.

        Returns:
          the cells with their digits, in the order in which they were filled.
        """
        steps: list[tuple[int, int]] = []
        while True:
            cell = self.tightest()
            if cell is None:
                return steps
            candidates = self.candidates(cell)
            if len(candidates) != 1:
                return steps
            self.fill(cell, candidates[0])
            steps.append((cell, candidates[0]))


def solutions(board: Board, rng: random.Random | None = None) -> Iterator[Cells]:
    """Yields the ways to fill a board.

    Args:
      board: the board, which is changed.
      rng: shuffles the order in which digits are tried; without it the smallest is the first.
    """
    board.propagate()
    cell = board.tightest()
    if cell is None:
        yield tuple(board.digits)
        return
    candidates = list(board.candidates(cell))
    if rng is not None:
        rng.shuffle(candidates)
    for digit in candidates:
        yield from solutions(board.filled(cell, digit), rng)


def is_proper(cells: Cells) -> bool:
    """Whether no row, column or box of a board has a digit twice."""
    return all(
        not digit or all(cells[peer] != digit for peer in PEERS[cell])
        for cell, digit in enumerate(cells)
    )


def levels(board: Board) -> int:
    """Counts the guesses within one another that a board needs.

    A guess is needed where no cell is forced; then every digit of the tightest cell is tried.

    Args:
      board: the board, which is changed.
    """
    board.propagate()
    cell = board.tightest()
    if cell is None or not board.candidates(cell):
        return 0
    return 1 + max(levels(board.filled(cell, digit)) for digit in board.candidates(cell))


def draw(rng: random.Random) -> Cells:
    """Draws a puzzle with one solution, which has another one without any one of its givens."""
    solution = next(solutions(Board([0] * CELLS), rng))
    givens = list(solution)
    for cell in rng.sample(range(CELLS), CELLS):
        givens[cell] = 0
        if _has_other_solution(givens, cell, solution[cell]):
            givens[cell] = solution[cell]
    return tuple(givens)


def _has_other_solution(givens: list[int], cell: int, digit: int) -> bool:
    """Whether a board can be filled with another digit in an empty cell."""
    board = Board(givens)
    return any(
        next(solutions(board.filled(cell, other)), None) is not None
        for other in board.candidates(cell)
        if other != digit
    )
