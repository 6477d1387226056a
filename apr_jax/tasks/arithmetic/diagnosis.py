"""What is wrong in the text of one thread that works out an expression.

The life of a diagnosis: what the thread has to work out is the problem, or its message. Its
operations are put in a list, each behind those of its operands; an operand that a child is told is
taken off the list with all that is in it. Then every piece of text must be the first operation that
is left, with the results of earlier pieces as operands. A wrong result is believed from there on,
so that one slip counts once. What a child answered is believed, too: whether that was right is the
diagnosis of the child.
"""

from __future__ import annotations

import re

from apr_jax.tasks.arithmetic.expression import (
    Expression,
    Operation,
    apply,
    operations,
    read,
    value,
    write,
)
from apr_jax.tasks.base import Diagnosis, Fault, Spawn, Thread

FAULT_KINDS = {
    "arithmetic": "an operation has a wrong result",
    "order": "an operation is not the next one of the thread's expression, or is left out",
    "message": "a child was told something that is no operand of the thread's expression",
    "answer": "a thread joined another digit than its last operation gave",
}
_STEP = re.compile(r"([0-9])([+\-*])([0-9])=([0-9])")


def diagnose(problem: Operation, thread: Thread, cut: bool, modulus: int) -> Diagnosis:
    """Reads one thread; it never raises, whatever the text is.

    A fault is decisive if the thread works on a part of the problem: all parts are needed.

    Args:
      problem: the expression of the tree's problem.
      thread: the thread; the prompt of a root is empty, and what the children did is not looked at.
      cut: whether the thread was stopped before its end: what it left undone is no fault then.
      modulus: results are remainders of a division by it.
    """
    is_root = not thread.prompt
    expression = problem
    if not is_root:
        try:
            expression = read(thread.prompt, modulus)
        except ValueError:
            # Nobody knows what such a thread was to do. The fault is its parent's.
            return Diagnosis((), found=False, hopeful=False)

    hopeful = is_root or expression in operations(problem)
    reader = _Reader(expression, modulus, hopeful)
    for index, part in enumerate(thread.body):
        if isinstance(part, Spawn):
            for child in part.children:
                reader.message(child.prompt)
        else:
            reader.text(part, is_cut=cut and index == len(thread.body) - 1)
    if not cut:
        reader.answer(thread.answer)
    found = is_root and reader.result == value(problem, modulus)
    return Diagnosis(tuple(reader.faults), found, hopeful)


class _Reader:
    """One thread in the reading.

    Attributes:
      faults: the wrong pieces so far.
      result: the result that the thread's last operation has by its text; None before.
    """

    def __init__(self, expression: Operation, modulus: int, decisive: bool):
        self._expression = expression
        self._modulus = modulus
        self._decisive = decisive
        # Operations that are left. Equal ones may stand in two places, so their place in this list
        # is what tells them apart, and identity what finds their operands.
        self._left = list(operations(expression))
        self._results: dict[int, int | None] = {}  # id of an operation -> its result by the text.
        self.faults: list[Fault] = []
        self.result: int | None = None

    def message(self, message: str) -> None:
        """Reads a message, which must be one of the two operands and was not given before."""
        for operand in self._expression.operands:
            is_new = isinstance(operand, Operation) and id(operand) not in self._results
            if is_new and write(operand) == message:
                inside = {id(operation) for operation in operations(operand)}
                self._left = [step for step in self._left if id(step) not in inside]
                self._results[id(operand)] = None  # The child knows it.
                return
        self._fault("message", message)

    def text(self, text: str, is_cut: bool) -> None:
        """Reads pieces between commas; the last one may be half a piece if the text `is_cut`."""
        pieces = text.split(",")
        for index, piece in enumerate(pieces):
            match = _STEP.fullmatch(piece)
            if match:
                left, operator, right, result = match.groups()
                self._step(piece, operator, (int(left), int(right)), int(result))
            elif piece and not (is_cut and index == len(pieces) - 1):
                self._fault("order", piece)

    def _step(self, piece: str, operator: str, operands: tuple[int, int], result: int) -> None:
        """Reads one operation with its result."""
        fitting = [step for step in self._left[:1] if self._fits(step, operator, operands)]
        if not fitting:
            self._fault("order", piece)
            # The piece is believed to be what it looks like: another operation that is left and
            # whose operands are known, or else the next one, with a slip.
            fitting = [step for step in self._left if self._is(step, operator, operands)]
            fitting = fitting or self._left[:1]
        elif apply(operator, *operands, self._modulus) != result:
            self._fault("arithmetic", piece)

        for step in fitting[:1]:
            self._left = [other for other in self._left if other is not step]
            self._results[id(step)] = result
            if step is self._expression:
                self.result = result

    def _known(self, operand: Expression) -> int | None:
        """Returns the value of an operand by the thread's own text; None if it has none."""
        return operand if isinstance(operand, int) else self._results.get(id(operand))

    def _fits(self, step: Operation, operator: str, operands: tuple[int, int]) -> bool:
        """Whether a piece can be this operation; what a child has answered may be any digit."""
        known = [self._known(operand) for operand in step.operands]
        return step.operator == operator and all(
            wanted in (None, operand) for wanted, operand in zip(known, operands, strict=True)
        )

    def _is(self, step: Operation, operator: str, operands: tuple[int, int]) -> bool:
        """Whether a piece is this operation, and the operands of it are known."""
        known = tuple(self._known(operand) for operand in step.operands)
        return step.operator == operator and known == operands

    def answer(self, answer: str) -> None:
        """Reads the answer that the thread joined at its end."""
        if not self._left:
            if answer != str(self.result):
                self._fault("answer", answer)
        elif answer != str(value(self._expression, self._modulus)):
            # To join the right digit without all of the work does no harm.
            self._fault("order", f"{write(self._left[0])}: left out")

    def _fault(self, kind: str, text: str) -> None:
        self.faults.append(Fault(kind, text, self._decisive))
