"""Expressions: `(3+4)*(2-5)`, where every pair of brackets holds one operation.

An expression is a digit or an `Operation` on two expressions. As a text, an operation stands in
brackets wherever it is the operand of another one, so that no rule of precedence is needed.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

from apr_jax.tasks.problem_files import cut

OPERATORS = "+-*"
MAX_HEIGHT = 8
# An expression of MAX_HEIGHT levels has at most n = 2^MAX_HEIGHT - 1 operations: n operators, n + 1
# digits, and two brackets for each operation but the whole.
MAX_LENGTH = 4 * (2**MAX_HEIGHT - 1) - 1
_DIGITS = "0123456789"


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operator between two operands."""

    operator: str
    left: Expression
    right: Expression

    @property
    def operands(self) -> tuple[Expression, Expression]:
        """The left and the right operand."""
        return self.left, self.right


Expression = int | Operation


def draw(rng: random.Random, height: int, fullness: float, modulus: int) -> Operation:
    """Draws an operation of exactly `height` levels.

    One of its operands, either one with even odds, has exactly `height - 1` levels. The other one
    is drawn by `_draw_free`.

    Args:
      rng: the source of all that is random.
      height: levels of operators, at least 1.
      fullness: the probability that a free operand is an operation, where levels are left.
      modulus: digits are below it.
    """
    operator = rng.choice(OPERATORS)
    if height == 1:
        return Operation(operator, rng.randrange(modulus), rng.randrange(modulus))
    deep = draw(rng, height - 1, fullness, modulus)
    free = _draw_free(rng, height - 1, fullness, modulus)
    if rng.random() < 0.5:
        return Operation(operator, deep, free)
    return Operation(operator, free, deep)


def _draw_free(rng: random.Random, levels: int, fullness: float, modulus: int) -> Expression:
    """Draws an expression of at most `levels` levels."""
    if levels == 0 or rng.random() >= fullness:
        return rng.randrange(modulus)
    return Operation(
        rng.choice(OPERATORS),
        _draw_free(rng, levels - 1, fullness, modulus),
        _draw_free(rng, levels - 1, fullness, modulus),
    )


def write(expression: Expression) -> str:
    """Returns the text of an expression, without brackets around the whole."""
    if isinstance(expression, int):
        return str(expression)
    left, right = (_write_operand(operand) for operand in expression.operands)
    return f"{left}{expression.operator}{right}"


def _write_operand(operand: Expression) -> str:
    """Returns the text of an operand, in brackets if it is an operation."""
    text = write(operand)
    return f"({text})" if isinstance(operand, Operation) else text


def read(text: str, modulus: int) -> Operation:
    """Reads an operation: the inverse of `write`.

    Args:
      text: any text; the time is linear in its length, and what is too long is not looked at.
      modulus: digits must be below it.

    Raises:
      ValueError: the text is no such operation; the message says where and why, in one line.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"has {len(text)} characters, must have at most {MAX_LENGTH}")
    reader = _Reader(text, modulus)
    operation = reader.operation(height=MAX_HEIGHT)
    reader.end()
    return operation


class _Reader:
    """Reads a text from left to right; `place` is the next character."""

    def __init__(self, text: str, modulus: int):
        self._text = text
        self._modulus = modulus
        self._place = 0

    def operation(self, height: int) -> Operation:
        """Reads an operand, an operator and an operand, of at most `height` levels."""
        left = self._operand(height - 1)
        operator = self._take(OPERATORS, "an operator, + - or *")
        right = self._operand(height - 1)
        return Operation(operator, left, right)

    def end(self) -> None:
        """Makes sure that nothing is left."""
        if self._place < len(self._text):
            raise self._error("its end there; an operation in an operation stands in brackets")

    def _operand(self, height: int) -> Expression:
        """Reads a digit, or an operation in brackets."""
        digits = _DIGITS[: self._modulus]
        expected = f"a digit from 0 to {digits[-1]} or ("
        character = self._take(digits + "(", expected)
        if character != "(":
            return int(character)
        if height == 0:
            raise ValueError(f"has more than {MAX_HEIGHT} levels of operators")
        operation = self.operation(height)
        self._take(")", ")")
        return operation

    def _take(self, wanted: str, expected: str) -> str:
        """Takes the next character, which must be one of those that are `wanted`."""
        character = self._text[self._place : self._place + 1]
        if not character or character not in wanted:
            raise self._error(expected)
        self._place += 1
        return character

    def _error(self, expected: str) -> ValueError:
        """Returns the error for the next character."""
        found = self._text[self._place : self._place + 1]
        shown = repr(found) if found else "the end"
        return ValueError(f"has {shown} at character {self._place + 1}, must have {expected}")


def apply(operator: str, left: int, right: int, modulus: int) -> int:
    """Works out one operation on two digits."""
    results = {"+": left + right, "-": left - right, "*": left * right}
    return results[operator] % modulus


def value(expression: Expression, modulus: int) -> int:
    """Works out an expression."""
    if isinstance(expression, int):
        return expression
    left, right = (value(operand, modulus) for operand in expression.operands)
    return apply(expression.operator, left, right, modulus)


def operations(expression: Expression) -> Iterator[Operation]:
    """Yields the operations of an expression, each behind those of its operands (post-order)."""
    if isinstance(expression, Operation):
        for operand in expression.operands:
            yield from operations(operand)
        yield expression


def write_step(operation: Operation, modulus: int) -> str:
    """Returns the line of work of one operation, like `7*7=9`, whose operands are known."""
    left, right = (value(operand, modulus) for operand in operation.operands)
    result = apply(operation.operator, left, right, modulus)
    return f"{left}{operation.operator}{right}={result}"


def quote(text: str) -> str:
    """Returns a text as messages quote it: on one line and not too long."""
    return repr(cut(text))
