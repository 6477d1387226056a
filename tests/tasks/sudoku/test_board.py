"""Boards, puzzles and their symmetries, held against the rules of the game and against counting."""

import itertools
import random

import pytest
from helpers import boards

from apr_jax.tasks.sudoku.board import (
    CELLS,
    NAMES,
    PEERS,
    Board,
    draw,
    is_proper,
    levels,
    solutions,
)
from apr_jax.tasks.sudoku.symmetry import canonical


def as_dict(cells):
    return {name: digit for name, digit in zip(NAMES, cells, strict=True) if digit}


def puzzle(seed):
    return draw(random.Random(seed))


def test_cells_share_rows_columns_and_boxes():
    for cell, name in enumerate(NAMES):
        assert {NAMES[peer] for peer in PEERS[cell]} == boards.peers(name)


def test_candidates_and_propagation_follow_the_rules():
    for seed in range(40):
        cells = puzzle(seed)
        board = Board(cells)
        naive = as_dict(cells)
        order = []
        while not boards.is_dead(naive) and (step := boards.forced(naive)):
            order.append(step)
            naive[step[0]] = step[1]
        assert [(NAMES[cell], digit) for cell, digit in board.propagate()] == order
        assert as_dict(board.digits) == naive
        cell = board.tightest()
        is_dead = cell is not None and not board.candidates(cell)
        assert is_dead == boards.is_dead(naive)
        assert board.is_full() == (not boards.empty(naive))
        for cell, name in enumerate(NAMES):
            if name not in naive:
                assert list(board.candidates(cell)) == boards.candidates(naive, name)


def test_puzzle_has_one_solution_and_needs_every_given():
    for seed in range(12):
        cells = puzzle(seed)
        board = as_dict(cells)
        assert boards.count_solutions(board) == 1
        assert boards.is_solution(as_dict(next(solutions(Board(cells)))))
        for cell in board:
            fewer = {name: digit for name, digit in board.items() if name != cell}
            assert boards.count_solutions(fewer, most=2) == 2


def test_solutions_are_counted_as_by_trying_all():
    rng = random.Random(0)
    counts = set()
    for seed in range(60):
        cells = list(next(solutions(Board([0] * CELLS), random.Random(seed))))
        for cell in rng.sample(range(CELLS), rng.randrange(8, 27)):
            cells[cell] = 0
        if seed % 3 == 0:  # As the text of a model may be: perhaps no solution.
            cells[rng.randrange(CELLS)] = rng.randrange(1, 7)
        found = [cells] if 0 not in cells else list(itertools.islice(solutions(Board(cells)), 50))
        proper = [one for one in found if is_proper(tuple(one))]
        assert len(set(map(tuple, proper))) == len(proper)
        if is_proper(tuple(cells)):
            assert len(found) == boards.count_solutions(as_dict(cells), most=50)
            assert all(boards.is_solution(as_dict(one)) for one in found)
        counts.add(min(len(found), 3))
    assert counts == {0, 1, 2, 3}


def naive_levels(board):
    """Guesses within one another, where every candidate of the tightest cell is tried."""
    board = dict(board)
    while not boards.is_dead(board) and (step := boards.forced(board)):
        board[step[0]] = step[1]
    if not boards.empty(board) or boards.is_dead(board):
        return 0
    cell = boards.tightest(board)
    digits = boards.candidates(board, cell)
    return 1 + max(naive_levels({**board, cell: digit}) for digit in digits)


def test_levels_are_guesses_within_one_another():
    found = set()
    for seed in range(40):
        cells = puzzle(seed)
        found.add(levels(Board(cells)))
        assert levels(Board(cells)) == naive_levels(as_dict(cells))
    assert {0, 1, 2} <= found


def rearranged(cells, rng):
    """The same puzzle with other names of digits, rows and columns."""
    names = [0, *rng.sample(range(1, 7), 6)]
    bands = [rng.sample([start, start + 1], 2) for start in rng.sample([0, 2, 4], 3)]
    stacks = [rng.sample(range(start, start + 3), 3) for start in rng.sample([0, 3], 2)]
    rows = list(itertools.chain(*bands))
    columns = list(itertools.chain(*stacks))
    return tuple(names[cells[6 * row + column]] for row in rows for column in columns)


def test_same_puzzle_has_the_same_canonical_form():
    rng = random.Random(0)
    forms = set()
    for seed in range(15):
        cells = puzzle(seed)
        form = canonical(cells)
        forms.add(form)
        for _ in range(10):
            assert canonical(rearranged(cells, rng)) == form
        # The form is a puzzle as hard as this one.
        assert form.count(0) == cells.count(0) and canonical(form) == form
        assert boards.count_solutions(as_dict(form)) == 1
    assert len(forms) == 15
    board = next(solutions(Board([0] * CELLS)))
    swapped = [*board[12:], *board[:12]]
    assert canonical(tuple(swapped)) == canonical(board), "a full board has many least arrangements"


@pytest.mark.thorough
def test_four_by_four_needs_no_guess():
    """Every puzzle of four rows with one solution is filled by forced cells alone.

    Enough are puzzles that need each of their givens: more givens only force more. Digits may be
    named by the first row, so 12 of the 288 full boards stand for all.
    """
    small = boards.units(size=4, box_rows=2, box_columns=2)
    names = sorted(frozenset().union(*small))
    full = list(all_full(small, {}, names))
    assert len(full) == 288

    # For each cell and digit the full boards that have it, as bits.
    having = [
        {d: sum(1 << i for i, one in enumerate(full) if one[name] == d) for d in range(1, 5)}
        for name in names
    ]
    least_puzzles = 0
    for one in full:
        if [one[name] for name in names[:4]] != [1, 2, 3, 4]:
            continue
        fits = [(1 << 288) - 1]
        for givens in range(1, 1 << 16):
            lowest = (givens & -givens).bit_length() - 1
            fits.append(fits[givens & (givens - 1)] & having[lowest][one[names[lowest]]])
        for givens in range(1 << 16):
            if fits[givens].bit_count() != 1:
                continue
            cells = [cell for cell in range(16) if givens >> cell & 1]
            if any(fits[givens ^ 1 << cell].bit_count() == 1 for cell in cells):
                continue
            board = {names[cell]: one[names[cell]] for cell in cells}
            while step := boards.forced(board, small):
                board[step[0]] = step[1]
            assert board == one
            least_puzzles += 1
    assert least_puzzles > 1_072, "those of four givens alone"


def all_full(unit_list, board, names):
    if len(board) == len(names):
        yield dict(board)
        return
    cell = names[len(board)]
    for digit in boards.candidates(board, cell, unit_list):
        yield from all_full(unit_list, {**board, cell: digit}, names)
