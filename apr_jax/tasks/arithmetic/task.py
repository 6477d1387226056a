"""Arithmetic: work out an expression with nested brackets, modulo a small number.

The tree of an expression is known from the start, so a tree of threads can follow it: a thread for
each operation whose operands are worked out by its children. Nothing is searched for.

    prompt     (3+4)*(2-5)=
    serial     3+4=7,2-5=7,7*7=9                                          joins 9
    parallel   spawns 3+4 and 2-5, is given 7 and 7, writes 7*7=9         joins 9

What stands on the longest chain: a message is written by the parent, token by token, and a child
must be told its whole expression. So a thread that spawns writes its expression out once more, and
in nested threads every level writes out the half that the level above has just written. As single
characters an operation takes some 4 tokens of a message (a digit, an operator, two brackets) and 6
of the work itself (`3+4=7,`): nested threads would write more one after the other than a single
one. Therefore brackets that stand next to an operator are one piece of the tokenizer with it
(`phrases`), which leaves some 2 tokens of a message for each operation.
"""

import dataclasses
import functools
import itertools
import json
import random
from collections.abc import Mapping
from typing import ClassVar

from apr_jax.errors import UsageError
from apr_jax.tasks.arithmetic import expression as expressions
from apr_jax.tasks.arithmetic.diagnosis import FAULT_KINDS, diagnose
from apr_jax.tasks.arithmetic.expression import MAX_HEIGHT, OPERATORS, Operation
from apr_jax.tasks.base import Diagnosis, Method, Problem, Score, Spawn, Task, Thread
from apr_jax.tasks.problem_files import cut

_EXAMPLE = '{"id": "x-0", "expression": "(3+4)*(2-5)"}'


@dataclasses.dataclass(frozen=True)
class ArithmeticConfig:
    """Which expressions there are.

    Attributes:
      height: levels of operators of each expression that is drawn.
      fullness: the probability that an operand which could as well be a digit is an operation. At 0
        an expression has one operation on each level; at 1 it has all operations that `height`
        levels can have.
      modulus: every result is the remainder of a division by it. Digits are below it.
    """

    height: int = 3
    fullness: float = 0.5
    modulus: int = 10

    def __post_init__(self):
        if not 2 <= self.height <= MAX_HEIGHT:
            raise ValueError(
                f"task.height={self.height} must be from 2 to {MAX_HEIGHT}: with fewer levels there"
                " is nothing that a child could do"
            )
        if not 0 <= self.fullness <= 1:
            raise ValueError(f"task.fullness={self.fullness} must be from 0 to 1")
        if not 2 <= self.modulus <= 10:
            raise ValueError(
                f"task.modulus={self.modulus} must be from 2 to 10, so that every result is a digit"
            )


class Arithmetic(Task):
    """What is the value? Problems hold an `expression`."""

    Config = ArithmeticConfig
    config: ArithmeticConfig
    alphabet = "0123456789+-*()=,"
    example = _EXAMPLE
    fault_kinds: ClassVar[Mapping[str, str]] = FAULT_KINDS
    children_solve_parts = True

    @property
    def phrases(self) -> tuple[str, ...]:
        """Brackets that stand next to each other, with the operator between them."""
        closing = [")" * count for count in range(self.config.height)]
        opening = ["(" * count for count in range(self.config.height)]
        between = [
            left + operator + right
            for left, operator, right in itertools.product(closing, OPERATORS, opening)
        ]
        return tuple(phrase for phrase in closing + opening + between if len(phrase) > 1)

    @property
    def methods(self) -> Mapping[str, Method]:
        return {
            "serial": Method(parallel=False),
            "parallel": Method(parallel=True, depth=1),
            "nested": Method(parallel=True, depth=self.config.height - 1),
        }

    def draw(self, seed: int) -> Problem:
        config = self.config
        rng = random.Random(f"arithmetic {seed}")
        operation = expressions.draw(rng, config.height, config.fullness, config.modulus)
        return Problem(f"arithmetic-{seed}", {"expression": expressions.write(operation)})

    def key(self, problem: Problem) -> str:
        key: str = problem.data["expression"]
        return key

    def prompt(self, problem: Problem, condition: int | None = None) -> str:
        return f"{problem.data['expression']}="

    def demonstrate(self, problem: Problem, method: str, seed: int) -> Thread:
        """Works out the expression; the seed changes nothing.

        Raises:
          ValueError: `method` is not one of `methods`.
        """
        self.check_method(method)
        levels = {"serial": 0, "parallel": 1, "nested": MAX_HEIGHT}[method]
        return self._work_out(self._read(problem), self.prompt(problem), levels)

    def _work_out(self, operation: Operation, prompt: str, levels: int) -> Thread:
        """Demonstrates how a thread works out an operation.

        Args:
          operation: what the thread works out.
          prompt: what it is given.
          levels: levels of threads below it that may be used; at 0 it works alone.
        """
        modulus = self.config.modulus
        answer = str(expressions.value(operation, modulus))
        if levels == 0:
            steps = (
                expressions.write_step(step, modulus) for step in expressions.operations(operation)
            )
            return Thread(prompt, (",".join(steps),), answer)

        children = tuple(
            self._work_out(operand, expressions.write(operand), levels - 1)
            for operand in operation.operands
            if isinstance(operand, Operation)
        )
        last_step = expressions.write_step(operation, modulus)
        body = (Spawn(children), last_step) if children else (last_step,)
        return Thread(prompt, body, answer)

    def score(self, problem: Problem, answer: str) -> Score:
        """Compares an answer, which must be one digit, with the value of the expression."""
        if not answer:
            return Score(0.0, correct=False, stated=None, reason="states no digit")
        right = str(expressions.value(self._read(problem), self.config.modulus))
        if answer == right:
            return Score(1.0, correct=True, stated=answer)
        # isdigit alone would let other scripts' digits through.
        is_digit = len(answer) == 1 and answer.isascii() and answer.isdigit()
        reason = f"the value is {right}" if is_digit else "is not a single digit"
        return Score(0.0, correct=False, stated=cut(answer), reason=reason)

    def diagnose(self, problem: Problem, thread: Thread, cut: bool) -> Diagnosis:
        return diagnose(self._read(problem), thread, cut, self.config.modulus)

    def _read(self, problem: Problem) -> Operation:
        """Reads the expression of a problem."""
        return _read(problem.data["expression"], self.config.modulus)

    def check(self, problem: Problem) -> Problem:
        if "expression" not in problem.data:
            raise ValueError(f'has no field "expression"; expected {_EXAMPLE}')
        text = problem.data["expression"]
        if not isinstance(text, str):
            raise ValueError(
                f'"expression" {cut(json.dumps(text))} must be a text like "(3+4)*(2-5)"'
            )
        try:
            _read(text, self.config.modulus)
        except ValueError as error:
            raise ValueError(f'"expression" {expressions.quote(text)} {error}') from None
        return Problem(problem.id, {"expression": text})

    def parse(self, text: str) -> Problem:
        """Reads `(3+4) x (2-5)`, with or without spaces and a last `=`; x and * mean the same.

        Raises:
          UsageError: the text is no such expression; the message says why.
        """
        compact = "".join(text.split()).removesuffix("=").replace("x", "*")
        try:
            return self.check(Problem(cut(compact), {"expression": compact}))
        except ValueError as error:
            raise UsageError(f"problem: {error}; write it like '(3+4)*(2-5)'") from None


@functools.lru_cache(maxsize=1024)
def _read(text: str, modulus: int) -> Operation:
    """Reads an expression, which is asked for several times in a row."""
    return expressions.read(text, modulus)
