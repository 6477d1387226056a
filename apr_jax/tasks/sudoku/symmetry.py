"""Puzzles that are the same but for names: of the digits, and of rows and columns.

A puzzle stays one if its digits change names, if two rows of the same boxes change places, or all
rows of some boxes with all rows of others; and the same for columns. These are
3! * 2!^3 * 2! * 3!^2 = 3,456 ways to arrange rows and columns, and 6! ways to name the digits.
"""

from __future__ import annotations

import itertools

from apr_jax.tasks.sudoku.board import BOX_COLUMNS, BOX_ROWS, SIZE, Cells


def _orders(in_a_box: int) -> tuple[tuple[int, ...], ...]:
    """Lists the orders of rows, or columns, of which so many go through the same boxes."""
    starts = range(0, SIZE, in_a_box)
    orders = []
    for blocks in itertools.permutations(starts):
        inside = [itertools.permutations(range(start, start + in_a_box)) for start in blocks]
        orders += [tuple(itertools.chain(*parts)) for parts in itertools.product(*inside)]
    return tuple(orders)


_ROW_ORDERS = _orders(BOX_ROWS)
_COLUMN_ORDERS = _orders(BOX_COLUMNS)


def canonical(cells: Cells) -> Cells:
    """Returns the least of all boards that are the same puzzle.

    Boards are compared by the places of their empty cells first, because few arrangements of rows
    and columns have the least places, and digits are named only there.
    """
    rows = [cells[start : start + SIZE] for start in range(0, len(cells), SIZE)]
    arranged = {columns: _filled(rows, columns) for columns in _COLUMN_ORDERS}
    least = min(map(_least, arranged.values()))
    return min(
        _renamed([rows[row][column] for row in order for column in columns])
        for columns, filled in arranged.items()
        if _least(filled) == least
        for order in _ROW_ORDERS
        if [filled[row] for row in order] == least
    )


def _filled(rows: list[Cells], columns: tuple[int, ...]) -> list[int]:
    """Returns for each row which of its cells are filled, as the bits of a number.

    Args:
      rows: the digits of each row.
      columns: the order in which columns are looked at.
    """
    return [sum((row[column] > 0) << bit for bit, column in enumerate(columns)) for row in rows]


def _least(filled: list[int]) -> list[int]:
    """Returns the least sequence that the numbers of rows can be arranged in."""
    boxes = [sorted(filled[start : start + BOX_ROWS]) for start in range(0, SIZE, BOX_ROWS)]
    return list(itertools.chain(*sorted(boxes)))


def _renamed(digits: list[int]) -> Cells:
    """Names the digits of a board in the order in which they first occur."""
    names = {0: 0}
    return tuple(names.setdefault(digit, len(names)) for digit in digits)
