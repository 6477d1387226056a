"""Countdown: combine all given numbers with + - * / to hit a target.

The life of a sample:
  1. `problems` draws a problem: numbers and a target that can be hit.
  2. `Countdown.prompt` writes it down for the root thread, now and then with a condition on the
     effort.
  3. `Countdown.demonstrate` runs a symbolic solver on it and renders its events as a tree of
     threads.
  4. A model's answer, equations joined by commas, goes to `Countdown.score`, which recomputes every
     step.
"""

import dataclasses
import functools
import json
import random
import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, ClassVar

from apr_jax.errors import UsageError
from apr_jax.tasks.base import (
    Condition,
    Diagnosis,
    Map,
    Method,
    Problem,
    Score,
    Split,
    Task,
    Thread,
)
from apr_jax.tasks.countdown import render_compact, render_sos, solvers
from apr_jax.tasks.countdown.check_compact import check_thread
from apr_jax.tasks.countdown.config import MAX_NUMBERS, MAX_VALUE, CountdownConfig
from apr_jax.tasks.countdown.events import children
from apr_jax.tasks.countdown.problems import draw, numbers_of, solve, split_problems
from apr_jax.tasks.countdown.puzzle import Puzzle
from apr_jax.tasks.problem_files import cut

# Anchored, without nested repetition, digits bounded: linear time, and int() can't refuse a number
# as too long.
_EQUATION = re.compile(r"([0-9]{1,40})([+\-*/])([0-9]{1,40})=([0-9]{1,40})")
# Of a thread without children: <bos> before its prompt, <join> before its answer, <eos> after it.
_CONTROL_TOKENS = 3
_SHOWN = 60  # Characters of a wrong equation that a reason quotes.
_EXAMPLE = '"22 26 2 -> 46"'
_LINE_EXAMPLE = '{"id": "x-0", "numbers": [22, 26, 2], "target": 46}'


class Countdown(Task):
    """The puzzle of the paper; its problems hold `numbers` and a `target`."""

    Config = CountdownConfig
    config: CountdownConfig
    demonstration_options = frozenset({"solver"})
    example = _LINE_EXAMPLE
    fault_kinds: ClassVar[Mapping[str, str]] = {
        "arithmetic": "a wrong equation, or a hit that was not seen",
        "bookkeeping": (
            "numbers lost or made up, a step from a state that was never reached, a state left out"
        ),
        "message": "a child was told something that does not follow from its parent's state",
    }

    @property
    def _form(self) -> Any:
        return {"compact": render_compact, "sos": render_sos}[self.config.solver.render]

    @property
    def alphabet(self) -> str:
        alphabet: str = self._form.ALPHABET
        return alphabet

    @property
    def phrases(self) -> tuple[str, ...]:
        phrases: tuple[str, ...] = self._form.PHRASES
        return phrases

    @property
    def methods(self) -> Mapping[str, Method]:
        solver = self.config.solver
        requested = Condition("children", 0, solver.max_children)
        bins = Condition("window bins", 1, -(-self.bounds.window // solver.window_bin))
        stated = solver.condition > 0
        return {
            "sos": Method(parallel=False),
            "sos+": Method(parallel=False, condition=bins if stated else None),
            "apr": Method(parallel=True, depth=1, condition=requested if stated else None),
            "apr-nested": Method(parallel=True, depth=2, condition=requested if stated else None),
        }

    def draw(self, seed: int) -> Problem:
        return draw(self.config, seed)

    def key(self, problem: Problem) -> Hashable:
        return Puzzle.of(problem).key

    def group(self, problem: Problem) -> Hashable:
        return numbers_of(problem)

    def split(
        self,
        train: int,
        heldout: int,
        seed: int,
        exclude: Collection[Any] = frozenset(),
        map_draws: Map = map,
    ) -> Split:
        return split_problems(self.config, train, heldout, seed, exclude, map_draws)

    def prompt(self, problem: Problem, condition: int | None = None) -> str:
        """The condition is the number of children (APR) or of window bins (SoS+)."""
        text: str = self._form.prompt_text(Puzzle.of(problem), condition)
        return text

    def demonstrate(self, problem: Problem, method: str, seed: int) -> Thread:
        """A solver's search as a tree of threads; a function of numbers, target, method and seed.

        Raises:
          ValueError: `method` is not one of `methods`.
        """
        solver = self.config.solver
        puzzle = Puzzle.of(problem)
        rng = random.Random(f"{puzzle.numbers}{puzzle.target}{method}{seed}")
        conditioned = method != "sos" and rng.random() < solver.condition
        bounds = self.bounds
        plan = solvers.draw_plan(
            method, solver, rng, conditioned, bounds.children, bounds.max_depth
        )
        search = solvers.search(puzzle.numbers, puzzle.target, plan, rng)
        if solver.render == "sos":
            thread = render_sos.render(search, "", puzzle, method)
        else:
            thread = render_compact.render(search, "", puzzle.target)

        condition = None
        if conditioned and method in solvers.PARALLEL:
            condition = children(search)
        elif conditioned:
            condition = self._window_bins(problem, thread)
        return dataclasses.replace(
            thread, prompt=self.prompt(problem, condition), condition=condition
        )

    def _window_bins(self, problem: Problem, thread: Thread) -> int:
        """Bins of the window that a thread without children takes, with a prompt that states their
        number.
        """
        written = sum(
            count_tokens(part, self.phrases) for part in thread.body if isinstance(part, str)
        )
        written += count_tokens(thread.answer, self.phrases) + _CONTROL_TOKENS

        # The number stands in the prompt, which counts too: one more digit may just fill another
        # bin.
        bins = 1
        while True:
            tokens = written + count_tokens(self.prompt(problem, bins), self.phrases)
            needed = -(-tokens // self.config.solver.window_bin)
            if needed == bins:
                return bins
            bins = needed

    def score(self, problem: Problem, answer: str) -> Score:
        """Checks every step of an answer with exact integers; time linear in its length."""
        if not answer:
            return Score(0.0, correct=False, stated=None, reason="claims no solution")
        puzzle = Puzzle.of(problem)
        equations = tuple(answer.split(","))
        reason = check_path(puzzle.numbers, puzzle.target, equations)
        return Score(
            reward=0.0 if reason else 1.0,
            correct=not reason,
            stated=", ".join(equations),
            reason=reason,
            # No answer of a legal problem is longer; what is wrong anyway votes as it stands.
            vote=",".join(canonical(equations)) if len(equations) < MAX_NUMBERS else None,
        )

    def diagnose(self, problem: Problem, thread: Thread, cut: bool = False) -> Diagnosis | None:
        """Every piece of a compact trace against exact arithmetic; traces in the form of Stream of
        Search are not read.
        """
        if self.config.solver.render != "compact":
            return None
        return check_thread(Puzzle.of(problem), thread, cut)

    def check(self, problem: Problem) -> Problem:
        data = problem.data
        for field in ("numbers", "target"):
            if field not in data:
                raise ValueError(f'has no field "{field}"; expected {_LINE_EXAMPLE}')
        numbers = data["numbers"]
        target = data["target"]
        if not isinstance(numbers, list):
            raise ValueError(
                f'"numbers" {cut(json.dumps(numbers))} must be a list like [22, 26, 2]'
            )
        for value in numbers:
            if not _in_range(value):
                raise ValueError(
                    f'"numbers" holds {cut(json.dumps(value))}; each must be a whole number in'
                    f" 1..{MAX_VALUE}"
                )
        if wrong := _wrong_size(numbers):
            raise ValueError(f'"numbers" {wrong}')
        if not _in_range(target):
            raise ValueError(
                f'"target" {cut(json.dumps(target))} must be a whole number in 1..{MAX_VALUE}'
            )
        return Puzzle(tuple(numbers), target).problem(problem.id)

    def parse(self, text: str) -> Problem:
        """Reads `22 26 2 -> 46` (commas are as good as spaces); the id is the text.

        Raises:
          UsageError: says what is wrong with which part, and how to write it; or that the problem
            has no solution.
        """
        puzzle, shown = _parse_puzzle(text)
        if solve(puzzle.numbers, puzzle.target) is None:
            raise UsageError(
                f"problem {self.show(puzzle.problem(shown))}: has no solution that uses every"
                " number once (exact divisions, no negative numbers); choose another target"
            )
        return puzzle.problem(shown)

    def show(self, problem: Problem) -> str:
        puzzle = Puzzle.of(problem)
        return f"{' '.join(map(str, puzzle.numbers))} -> {puzzle.target}"


def _parse_puzzle(text: str) -> tuple[Puzzle, str]:
    """What `22 26 2 -> 46` says, and the text as messages quote it."""
    shown = text if len(text) <= 80 else text[:77] + "..."
    left, arrow, right = text.partition("->")
    if not arrow:
        raise UsageError(
            f"problem {shown!r}: has no '->' between numbers and target; write it like {_EXAMPLE}"
        )
    words = left.replace(",", " ").split()
    numbers = tuple(_parse_integer(word, shown, "number") for word in words)
    targets = right.split()
    if len(targets) != 1:
        raise UsageError(
            f"problem {shown!r}: has {len(targets)} targets after '->', must be one; write it like"
            f" {_EXAMPLE}"
        )
    puzzle = Puzzle(numbers, _parse_integer(targets[0], shown, "target"))
    if wrong := _wrong_size(numbers):
        raise UsageError(f"problem {shown!r}: {wrong}; write it like {_EXAMPLE}")
    return puzzle, shown


def _parse_integer(word: str, shown: str, role: str) -> int:
    # isdigit alone would let other scripts' digits through.
    if word.isascii() and word.isdigit() and len(word) <= 9 and 1 <= int(word) <= MAX_VALUE:
        return int(word)
    raise UsageError(
        f"problem {shown!r}: {role} {word[:20]!r} must be a whole number in 1..{MAX_VALUE}; write"
        f" it like {_EXAMPLE}"
    )


def _wrong_size(numbers: Sequence[int]) -> str:
    if 2 <= len(numbers) <= MAX_NUMBERS:
        return ""
    return f"has {len(numbers)} numbers, must be 2 to {MAX_NUMBERS}"


def _in_range(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_VALUE


def canonical(solution: Sequence[str]) -> tuple[str, ...]:
    """Equal for solutions that differ only in the order of steps, and of a sum's or product's
    operands.
    """
    return tuple(sorted(map(_canonical_equation, solution)))


def _canonical_equation(equation: str) -> str:
    left, equals, right = equation.partition("=")
    for operator in "+*":
        a, found, b = left.partition(operator)
        if found:
            return operator.join(sorted((a, b))) + equals + right
    return equation


def count_tokens(text: str, phrases: tuple[str, ...]) -> int:
    """Pieces that the tokenizer cuts a text into, known before one is trained: characters, and
    whole phrases.
    """
    if not phrases:
        return len(text)
    found = _any_of(phrases).findall(text)
    return len(text) - sum(map(len, found)) + len(found)


@functools.lru_cache(maxsize=4)
def _any_of(phrases: tuple[str, ...]) -> re.Pattern[str]:
    """Finds phrases as the tokenizer does: from left to right, the longest that matches at a
    place.
    """
    longest_first = sorted(phrases, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))


def check_path(numbers: Sequence[int], target: int, equations: Sequence[str]) -> str:
    """Why a claimed path is wrong, in a few words; "" if it is right.

    Right is: one equation fewer than numbers; each `a?b=c` takes two numbers that are still on the
    table and puts back c, which is what exact arithmetic says and not negative; the number left at
    the end is the target."""
    if len(equations) != len(numbers) - 1:
        return f"has {len(equations)} steps, {len(numbers)} numbers take {len(numbers) - 1}"
    table = list(numbers)
    for equation in equations:
        match = _EQUATION.fullmatch(equation)
        if match is None:
            return f"not an equation: {equation[:_SHOWN]!r}"
        a, op, b, claimed = int(match[1]), match[2], int(match[3]), int(match[4])
        for number in (a, b):
            if number not in table:
                return f"{equation}: {number} is not there"
            table.remove(number)
        result = _result(a, op, b)
        if result is None:
            return f"{equation}: not an exact division"
        if result < 0:
            return f"{equation}: negative"
        if result != claimed:
            return f"{equation}: is {result}"
        table.append(result)
    return "" if table == [target] else f"ends at {table[0]}, not at {target}"


def _result(a: int, op: str, b: int) -> int | None:
    """Exact a op b; None where a division isn't."""
    if op == "/":
        return a // b if b and a % b == 0 else None
    return {"+": a + b, "-": a - b, "*": a * b}[op]
