"""What is wrong in the text of one thread that fills a board.

The life of a diagnosis: the thread starts with the board of its problem, or of its message. Each
piece of its text must follow from the board as it is then. What does not is a fault, and is
believed from there on, so that one slip counts once. What children answered is not looked at here:
a right solution that a child found, and its parent did not join, is a failure of its own
(`evaluate.failures`).
"""

from __future__ import annotations

import re

from apr_jax.tasks.base import Diagnosis, Fault, Spawn, Thread
from apr_jax.tasks.sudoku.board import CELL_OF, Board, Cells
from apr_jax.tasks.sudoku.trace import (
    BACK,
    DEAD,
    GRID,
    PASS,
    Fill,
    before_last_guess,
    cells_of,
    read_board,
    read_fills,
    write_board,
    write_mark,
    write_state,
)

FAULT_KINDS = {
    "overwritten": "a cell that has a digit was marked or filled again",
    "conflict": "a digit was called allowed where its row, column or box has it already",
    "excluded": "a mark leaves out a digit that its cell can have",
    "contradiction": "`!` stands behind a cell that can have a digit",
    "unmarked": "a cell was filled without a mark or a guess",
    "guess": "a guess leaves out a digit that its cell can have, or names another one",
    "back": "a thread did not go back to the board before its last guess with digits left",
    "message": "a child was told another board than its parent's with one digit more",
    "left out": "no child was told one of the digits that the cell can have",
    "answer": "a thread joined another board than it had, or gave up with digits left to try",
    "unreadable": "something that is no piece of a trace",
}
_FILL = re.compile(r"(?:\?([1-6]*))?([a-f][1-6])=([1-6])")
_MARK = re.compile(r"([a-f][1-6]):([1-6]+|!)")
_PIECE = re.compile(rf"{_FILL.pattern}|{_MARK.pattern}|[/>]")


def diagnose(givens: Cells, solution: Cells, thread: Thread, cut: bool) -> Diagnosis:
    """Reads one thread; it never raises, whatever the text is.

    A fault is decisive if the thread leaves the way to the solution by it.

    Args:
      givens: the board of the tree's problem.
      solution: the solution of the problem.
      thread: the thread; the prompt of a root is empty.
      cut: whether the thread was stopped before its end: what it left undone is no fault then.
    """
    start = givens
    if thread.prompt:
        told = read_board(thread.prompt)
        if told is None:
            # Nobody knows what such a thread was to do. The fault is its parent's.
            return Diagnosis((), found=False, hopeful=False)
        start = told

    reader = _Reader(read_fills(write_board(start)) or [], solution)
    hopeful = all(digit in (0, right) for digit, right in zip(start, solution, strict=True))
    for index, part in enumerate(thread.body):
        if isinstance(part, Spawn):
            reader.read_spawn([child.prompt for child in part.children])
        else:
            reader.read_text(part, is_cut=cut and index == len(thread.body) - 1)
    if not cut:
        reader.read_answer(thread.answer)
    return Diagnosis(tuple(reader.faults), reader.found, hopeful)


class _Reader:
    """One thread in the reading.

    Args:
      fills: the cells that its prompt names.
      solution: the solution of the problem.

    Attributes:
      faults: the wrong pieces so far.
      found: whether the board was once full and right.
    """

    def __init__(self, fills: list[Fill], solution: Cells):
        self.faults: list[Fault] = []
        self.found = False
        self._solution = solution
        self._fills = fills  # Those that count, in the order in which they were filled.
        self._marked: dict[int, set[int]] = {}  # Cell -> digits of its last mark.
        self._gave_up = False  # The last piece was a mark with `!`.
        self._spawned = False

    def read_text(self, text: str, is_cut: bool) -> None:
        """Reads a text piece by piece; the last piece may be half a piece if it `is_cut`."""
        place = 0
        while place < len(text):
            if match := _MARK.match(text, place):
                place = match.end()
                if not (is_cut and place == len(text)):  # More digits might have followed.
                    self._read_mark(CELL_OF[match[1]], match[2])
            elif match := _FILL.match(text, place):
                self._read_fill(_fill_of(match))
                place = match.end()
            elif text[place] == BACK:
                place = self._read_back(text, place + 1, is_cut)
            elif text[place] == PASS:
                place += 1
            else:
                place = self._skip_unreadable(text, place, is_cut)
        # A board can only be full at the end of a text: full boards have no next piece.
        if self._is_right(self._fills) and 0 not in cells_of(self._fills):
            self.found = True

    def _skip_unreadable(self, text: str, place: int, is_cut: bool) -> int:
        """Goes on to the next piece; returns where that begins."""
        following = _PIECE.search(text, place)
        end = following.start() if following else len(text)
        if not (is_cut and following is None):
            self._add_fault("unreadable", text[place:end], False)
        return end

    def _read_mark(self, cell: int, marked: str) -> None:
        """Reads which digits are called allowed in a cell; one alone is filled in."""
        digits = set() if marked == DEAD else set(map(int, marked))
        cells = cells_of(self._fills)
        allowed = set(Board(cells).candidates(cell))
        text = write_mark(cell, sorted(digits))
        is_loss = self._is_right(self._fills) and self._solution[cell] not in digits
        if self._gave_up:
            # The thread goes on with a board that it has called dead.
            self._gave_up = False
            self._add_fault("back", text, self._can_go_back())
        elif cells[cell]:
            self._add_fault("overwritten", text, is_loss)
        elif digits - allowed:
            self._add_fault("conflict", text, is_loss)
        elif not digits and allowed:
            self._add_fault("contradiction", text, is_loss)
        elif allowed - digits:
            self._add_fault("excluded", text, is_loss)

        self._marked[cell] = digits
        if not digits:
            self._gave_up = True
        elif len(digits) == 1:
            self._fills = [*self._fills, Fill(cell, min(digits))]

    def _read_fill(self, fill: Fill) -> None:
        """Reads a filled cell, which has to be a guess."""
        cells = cells_of(self._fills)
        candidates = set(Board(cells).candidates(fill.cell))
        was_right = self._is_right(self._fills)
        is_loss = was_right and fill.digit != self._solution[fill.cell]
        if self._gave_up:
            self._gave_up = False
            self._add_fault("back", str(fill), self._can_go_back())
        elif cells[fill.cell]:
            self._add_fault("overwritten", str(fill), is_loss)
        elif fill.others is None:
            self._add_fault("unmarked", str(fill), is_loss)
        else:
            tried = {fill.digit, *fill.others}
            # A wrong mark is a fault of its own, and what follows from it is none.
            if tried not in (candidates, self._marked.get(fill.cell)):
                is_loss = was_right and self._solution[fill.cell] not in tried
                self._add_fault("guess", str(fill), is_loss)
        self._fills = [*self._fills, fill]

    def _read_back(self, text: str, start: int, is_cut: bool) -> int:
        """Reads a way back, whose text begins at `start`; returns where it ends."""
        gave_up = self._gave_up
        self._gave_up = False
        self._marked = {}
        expected = before_last_guess(self._fills)
        if not gave_up or expected is None:
            self._add_fault("back", BACK, self._is_right(self._fills))
        if expected is None:
            return start

        wanted = write_state(expected)
        if is_cut and wanted.startswith(text[start:]):
            return len(text)
        if text.startswith(wanted, start):
            self._fills = expected
            return start + len(wanted)

        # The thread went back to another board, and to the guesses that stand behind it.
        board = _matched(GRID, text, start)
        fills = read_fills(board[0]) or []
        end = board.end()
        while match := _FILL.match(text, end):
            fills.append(_fill_of(match))
            end = match.end()
        is_loss = self._is_right(expected) and not self._is_right(fills)
        self._add_fault("back", text[start - 1 : end], is_loss)
        self._fills = fills
        return end

    def read_spawn(self, messages: list[str]) -> None:
        """Reads messages, which must try every digit of one cell."""
        self._spawned = True
        cells = cells_of(self._fills)
        board = Board(cells)
        tried: dict[int, set[int]] = {}  # Cell -> digits that a child was told; one cell is right.
        wrong = []
        for message in messages:
            told = read_board(message) or ()
            new = [cell for cell, digit in enumerate(told) if digit != cells[cell]]
            fits = (
                len(new) == 1
                and not cells[new[0]]
                and told[new[0]] in board.candidates(new[0])
                and new[0] in (tried or new)
                and told[new[0]] not in tried.get(new[0], ())
            )
            if fits:
                tried.setdefault(new[0], set()).add(told[new[0]])
            else:
                wrong.append(message)

        is_right = self._is_right(self._fills)
        is_loss = is_right and not any(self._solution[cell] in tried[cell] for cell in tried)
        for message in wrong:
            self._add_fault("message", message, is_loss)
        if not wrong:
            for cell, digits in tried.items():
                for digit in set(board.candidates(cell)) - digits:
                    lost = is_right and digit == self._solution[cell]
                    self._add_fault("left out", str(Fill(cell, digit)), lost)

    def read_answer(self, answer: str) -> None:
        """Reads the answer that the thread joined at its end."""
        cells = cells_of(self._fills)
        joined = read_board(answer)
        if joined == self._solution:
            return  # To join the right board without all of the work does no harm.
        if answer and self._spawned and joined is not None:
            # It may be what a child has joined: then it has every digit of this thread's board.
            agrees = all(own in (0, other) for own, other in zip(cells, joined, strict=True))
            is_fault = 0 in joined or not agrees
        elif answer:
            is_fault = joined != cells or 0 in cells
        else:
            gave_up = self._gave_up and before_last_guess(self._fills) is None
            is_fault = not self._spawned and not gave_up
        if is_fault:
            self._add_fault("answer", answer, self._is_right(self._fills) or self._can_go_back())

    def _is_right(self, fills: list[Fill]) -> bool:
        """Whether no cell has another digit than the solution."""
        return all(fill.digit == self._solution[fill.cell] for fill in fills)

    def _can_go_back(self) -> bool:
        """Whether the way to the solution is still open behind a way back."""
        fills: list[Fill] | None = self._fills
        while fills is not None:
            fills = before_last_guess(fills)
            if fills is not None and self._is_right(fills):
                return True
        return False

    def _add_fault(self, kind: str, text: str, decisive: bool) -> None:
        self.faults.append(Fault(kind, text, decisive))


def _matched(pattern: re.Pattern[str], text: str, start: int) -> re.Match[str]:
    """Returns the match of a pattern that matches everywhere."""
    match = pattern.match(text, start)
    assert match is not None
    return match


def _fill_of(match: re.Match[str]) -> Fill:
    """Returns the cell that a piece fills."""
    others, cell, digit = match.groups()
    tried_later = None if others is None else tuple(map(int, others))
    return Fill(CELL_OF[cell], int(digit), tried_later)
