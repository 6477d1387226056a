"""Sudoku by its rules alone, without the library: a board is a dict of cell name -> digit."""

import functools
import re

FILL = re.compile(r"([a-f][1-6])=([1-6.])")


def units(size=6, box_rows=2, box_columns=3):
    """The rows, columns and boxes, each the cell names that it has."""
    where = {
        f"{'abcdef'[row]}{column + 1}": (row, column)
        for row in range(size)
        for column in range(size)
    }
    kinds = (
        lambda row, column: ("row", row),
        lambda row, column: ("column", column),
        lambda row, column: ("box", row // box_rows, column // box_columns),
    )
    found = {}
    for name, place in where.items():
        for kind in kinds:
            found.setdefault(kind(*place), set()).add(name)
    return tuple(frozenset(unit) for unit in found.values())


UNITS = units()


@functools.cache
def peers(cell, unit_list=UNITS):
    """The other cells of a row, column or box of the cell."""
    return frozenset().union(*(unit for unit in unit_list if cell in unit)) - {cell}


def candidates(board, cell, unit_list=UNITS):
    """The digits that no other cell of a row, column or box of the cell has."""
    size = len(unit_list[0])
    seen = {board.get(peer) for peer in peers(cell, unit_list)}
    return sorted(set(range(1, size + 1)) - seen)


def empty(board, unit_list=UNITS):
    return sorted(frozenset().union(*unit_list) - board.keys())


def forced(board, unit_list=UNITS):
    """The first cell of which the digit is forced, with the digit; None if there is none."""
    for cell in empty(board, unit_list):
        if len(candidates(board, cell, unit_list)) == 1:
            return cell, candidates(board, cell, unit_list)[0]
    return None


def is_dead(board):
    return any(not candidates(board, cell) for cell in empty(board))


def tightest(board):
    """The first of the empty cells with the fewest candidates."""
    return min(empty(board), key=lambda cell: len(candidates(board, cell)))


def is_solution(board):
    full = {1, 2, 3, 4, 5, 6}
    return all({board.get(cell) for cell in unit} == full for unit in UNITS)


def count_solutions(board, most=10):
    """Tries every digit in every cell, up to `most` solutions."""
    if not empty(board):
        return int(is_solution(board))
    cell = tightest(board)
    count = 0
    for digit in candidates(board, cell):
        count += count_solutions({**board, cell: digit}, most - count)
        if count >= most:
            break
    return count


def read(text):
    """The board of a text that fills each cell at most once."""
    assert re.fullmatch(f"(?:{FILL.pattern})*", text), text
    fills = [(cell, digit) for cell, digit in FILL.findall(text) if digit != "."]
    board = {cell: int(digit) for cell, digit in fills}
    assert len(board) == len(fills), text
    return board


def write(board):
    """The text of a board: every cell in reading order."""
    return "".join(f"{cell}={board.get(cell, '.')}" for cell in sorted(frozenset().union(*UNITS)))


def read_givens(givens):
    names = [f"{row}{column}" for row in "abcdef" for column in range(1, 7)]
    return {name: int(char) for name, char in zip(names, givens, strict=True) if char != "."}
