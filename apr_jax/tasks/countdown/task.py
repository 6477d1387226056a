"""The task Countdown: combine all given numbers with + - * / to make a target.

The life of a problem:
1. `problems` draws it: numbers, and a target that they can make.
2. `Countdown.prompt` writes it down for the root thread, in some demonstrations with a condition on
   the effort.
3. `Countdown.demonstrate` runs a symbolic solver on it, and writes the solver's events as a tree of
   threads.
4. A model's answer, equations joined by commas, goes to `Countdown.score`, which recomputes every
   step.
"""

import dataclasses
import functools
import json
import math
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
    flatten,
)
from apr_jax.tasks.countdown import (
    bidirectional,
    check_bidirectional,
    render_compact,
    render_sos,
    solvers,
)
from apr_jax.tasks.countdown.all_solutions import SOLUTION, score_all, search_all
from apr_jax.tasks.countdown.check_compact import check_thread
from apr_jax.tasks.countdown.config import (
    MAX_NUMBERS,
    MAX_NUMBERS_OF_ALL,
    MAX_VALUE,
    CountdownConfig,
)
from apr_jax.tasks.countdown.problems import draw, numbers_of, solve, split_problems
from apr_jax.tasks.countdown.puzzle import Puzzle
from apr_jax.tasks.problem_files import cut

# Matching takes linear time, because no repetition is nested in another. The number of digits is
# bounded because int() refuses very long numbers.
_EQUATION = re.compile(r"([0-9]{1,40})([+\-*/])([0-9]{1,40})=([0-9]{1,40})")
# A thread without children has <bos> before its prompt, <join> before its answer, <eos> at its end.
_CONTROL_TOKENS = 3
_SHOWN = 60  # Characters of a wrong equation that a reason quotes.
_EXAMPLE = '"22 26 2 -> 46"'  # A problem on the command line.
_LINE_EXAMPLE = '{"id": "x-0", "numbers": [22, 26, 2], "target": 46}'  # In a problems file.


class Countdown(Task):
    """The task of the paper; a problem holds `numbers` and a `target`."""

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
        "check": "a root rejected a right solution that it had found",
        "answer": "where all solutions are asked for: a thread joined others than it had found",
    }

    @property
    def _wants_all(self) -> bool:
        """Whether all solutions are asked for."""
        return self.config.solutions == "all"

    @property
    def _is_bidirectional(self) -> bool:
        """Whether demonstrations search from the numbers and from the target."""
        return self.config.solver.search == "bidirectional"

    @property
    def _most_numbers(self) -> int:
        """How many numbers a problem may have."""
        return MAX_NUMBERS_OF_ALL if self._wants_all else MAX_NUMBERS

    @property
    def _form(self) -> Any:
        """The module of the text form that the settings name."""
        return {"compact": render_compact, "sos": render_sos}[self.config.solver.render]

    @property
    def alphabet(self) -> str:
        """Every character of prompts, messages, traces and answers."""
        alphabet: str = self._form.ALPHABET
        return alphabet

    @property
    def phrases(self) -> tuple[str, ...]:
        """Strings that traces repeat word for word, and numbers that are one token."""
        repeated: tuple[str, ...] = self._form.PHRASES
        return repeated + _numbers(self.config.solver.number_pieces)

    @property
    def methods(self) -> Mapping[str, Method]:
        """The solvers, with the conditions that their prompts may state."""
        if self._wants_all:
            return {"serial": Method(parallel=False), "parallel": Method(parallel=True, depth=1)}
        solver = self.config.solver
        requested: Condition | None = None
        bins: Condition | None = None
        if solver.condition > 0:
            requested = Condition("children", 0, solver.max_children)
            most_bins = math.ceil(self.bounds.window / solver.window_bin)
            bins = Condition("window bins", 1, most_bins)
        if self._is_bidirectional:
            return {
                "sos+": Method(parallel=False, condition=bins),
                "apr": Method(parallel=True, depth=1, condition=requested),
            }
        return {
            "sos": Method(parallel=False),
            "sos+": Method(parallel=False, condition=bins),
            "apr": Method(parallel=True, depth=1, condition=requested),
            "apr-nested": Method(parallel=True, depth=2, condition=requested),
        }

    def draw(self, seed: int) -> Problem:
        """Draws a random problem that has a solution."""
        return draw(self.config, seed)

    def key(self, problem: Problem) -> Hashable:
        """Returns sorted numbers and target, which are equal for problems that are the same."""
        return Puzzle.of(problem).key

    def group(self, problem: Problem) -> Hashable:
        """Returns the sorted numbers: problems that share them tell something about each other."""
        return numbers_of(problem)

    def split(
        self,
        train: int,
        heldout: int,
        seed: int,
        exclude: Collection[Any] = frozenset(),
        map_draws: Map = map,
        apart_from: Collection[Any] = frozenset(),
    ) -> Split:
        """Splits problems so that no two parts share numbers; see `problems.split_problems`."""
        return split_problems(self.config, train, heldout, seed, exclude, map_draws, apart_from)

    def prompt(self, problem: Problem, condition: int | None = None) -> str:
        """Writes down a problem, with the number of children or of window bins if one is given."""
        text: str = self._form.prompt_text(Puzzle.of(problem), condition)
        return text

    def demonstrate(self, problem: Problem, method: str, seed: int) -> Thread:
        """Returns a solver's search as a tree of threads.

        It is a function of numbers, target, method and seed.

        Raises:
          ValueError: `method` is not one of `methods`.
        """
        solver = self.config.solver
        puzzle = Puzzle.of(problem)
        if self._wants_all:
            self.check_method(method)
            search = search_all(puzzle, self.methods[method].parallel)
            return render_compact.render(search, self.prompt(problem), puzzle.target)
        rng = random.Random(f"{puzzle.numbers}{puzzle.target}{method}{seed}")
        conditioned = method != "sos" and rng.random() < solver.condition
        bounds = self.bounds
        plan = solvers.draw_plan(
            method, solver, rng, conditioned, bounds.children, bounds.max_depth
        )
        if self._is_bidirectional:
            self.check_method(method)
            spawned = min(plan.beam, plan.max_spawn) if method in solvers.PARALLEL else 0
            thread = bidirectional.demonstrate(puzzle, "", solver, rng, spawned)
        elif solver.render == "sos":
            search = solvers.search(puzzle.numbers, puzzle.target, plan, rng)
            thread = render_sos.render(search, "", puzzle, method)
        else:
            search = solvers.search(puzzle.numbers, puzzle.target, plan, rng)
            thread = render_compact.render(search, "", puzzle.target)

        condition = None
        if conditioned and method in solvers.PARALLEL:
            condition = len(flatten(thread)) - 1
        elif conditioned:
            condition = self._window_bins(problem, thread)
        return dataclasses.replace(
            thread, prompt=self.prompt(problem, condition), condition=condition
        )

    def _window_bins(self, problem: Problem, thread: Thread) -> int:
        """Counts the window bins of a thread without children whose prompt states their number."""
        written = sum(
            count_tokens(part, self.phrases) for part in thread.body if isinstance(part, str)
        )
        written += count_tokens(thread.answer, self.phrases) + _CONTROL_TOKENS

        # The prompt counts too, and it holds the number: one more digit may fill another bin.
        bins = 1
        while True:
            tokens = written + count_tokens(self.prompt(problem, bins), self.phrases)
            needed = math.ceil(tokens / self.config.solver.window_bin)
            if needed == bins:
                return bins
            bins = needed

    def score(self, problem: Problem, answer: str) -> Score:
        """Checks every step of an answer with exact integers, in time linear in its length.

        Where all solutions are asked for, the reward is the share of them that the answer states.
        """
        if not answer:
            return Score(0.0, correct=False, stated=None, reason="claims no solution")
        puzzle = Puzzle.of(problem)
        if self._wants_all:
            wrong_because = {
                part: check_path(puzzle.numbers, puzzle.target, part.split(","))
                for part in answer.split(SOLUTION)
            }
            return score_all(puzzle, answer, wrong_because)
        equations = tuple(answer.split(","))
        reason = check_path(puzzle.numbers, puzzle.target, equations)

        # Solutions that differ only in the order of steps vote together. No solution has more
        # equations than this, and a wrong answer may vote as it stands.
        vote = None
        if len(equations) < MAX_NUMBERS:
            vote = ",".join(canonical(equations))
        return Score(
            reward=0.0 if reason else 1.0,
            correct=not reason,
            stated=", ".join(equations),
            reason=reason,
            vote=vote,
        )

    def diagnose(self, problem: Problem, thread: Thread, cut: bool = False) -> Diagnosis | None:
        """Checks every piece of a compact trace; returns None for the form of Stream of Search."""
        if self.config.solver.render != "compact":
            return None
        puzzle = Puzzle.of(problem)
        if self._is_bidirectional:
            return check_bidirectional.check_thread(
                puzzle, thread, self.config.solver.max_intermediate, cut
            )
        return check_thread(puzzle, thread, cut, self._wants_all)

    def check(self, problem: Problem) -> Problem:
        """Returns a problem of a file as the task goes on with it.

        Raises:
          ValueError: `numbers` or `target` is missing, or a problem cannot have such a value.
        """
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
        if wrong := _wrong_size(numbers, self._most_numbers):
            raise ValueError(f'"numbers" {wrong}')
        if not _in_range(target):
            raise ValueError(
                f'"target" {cut(json.dumps(target))} must be a whole number in 1..{MAX_VALUE}'
            )
        return Puzzle(tuple(numbers), target).problem(problem.id)

    def parse(self, text: str) -> Problem:
        """Reads a problem such as `22 26 2 -> 46`, with spaces or commas; its id is the text.

        Raises:
          UsageError: the text is no problem, or the problem has no solution.
        """
        puzzle, shown = _parse_puzzle(text, self._most_numbers)
        if solve(puzzle.numbers, puzzle.target) is None:
            raise UsageError(
                f"problem {self.show(puzzle.problem(shown))}: has no solution that uses every"
                " number once (exact divisions, no negative numbers); choose another target"
            )
        return puzzle.problem(shown)

    def show(self, problem: Problem) -> str:
        """Returns a problem in the form that `parse` reads."""
        puzzle = Puzzle.of(problem)
        return f"{' '.join(map(str, puzzle.numbers))} -> {puzzle.target}"


def _parse_puzzle(text: str, most: int) -> tuple[Puzzle, str]:
    """Reads a text such as `22 26 2 -> 46`, of at most so many numbers.

    Returns:
      the puzzle, and the text as messages quote it.
    """
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
    if wrong := _wrong_size(numbers, most):
        raise UsageError(f"problem {shown!r}: {wrong}; write it like {_EXAMPLE}")
    return puzzle, shown


def _parse_integer(word: str, shown: str, role: str) -> int:
    """Reads a number or target; `shown` and `role` are for the message if it is none."""
    # `isdigit` alone holds for digits of other scripts, too.
    if word.isascii() and word.isdigit() and len(word) <= 9 and 1 <= int(word) <= MAX_VALUE:
        return int(word)
    raise UsageError(
        f"problem {shown!r}: {role} {word[:20]!r} must be a whole number in 1..{MAX_VALUE}; write"
        f" it like {_EXAMPLE}"
    )


def _wrong_size(numbers: Sequence[int], most: int) -> str:
    """Says what is wrong with the number of numbers, or "" if nothing is."""
    if 2 <= len(numbers) <= most:
        return ""
    return f"has {len(numbers)} numbers, must be 2 to {most}"


def _in_range(value: Any) -> bool:
    """Tells whether a value of a JSON file can be a number or a target."""
    return type(value) is int and 1 <= value <= MAX_VALUE


def canonical(solution: Sequence[str]) -> tuple[str, ...]:
    """Returns the equations of a solution in a standard order.

    The result is equal for solutions that differ only in the order of their steps, or of the
    operands of sums and products.
    """
    return tuple(sorted(map(_canonical_equation, solution)))


def _canonical_equation(equation: str) -> str:
    """Returns an equation with the operands of a sum or product in a standard order."""
    left, equals, right = equation.partition("=")
    for operator in "+*":
        a, separator, b = left.partition(operator)
        if separator:
            return operator.join(sorted((a, b))) + equals + right
    return equation


@functools.lru_cache(maxsize=4)
def _numbers(most: int) -> tuple[str, ...]:
    """Returns the numbers of several digits up to `most`, as texts write them."""
    return tuple(str(number) for number in range(10, most + 1))


def count_tokens(text: str, phrases: tuple[str, ...]) -> int:
    """Counts the tokens of a text, as any tokenizer of the task would cut it.

    Each phrase is a token, and each character outside of phrases.
    """
    if not phrases:
        return len(text)
    matches = _any_of(phrases).findall(text)
    return len(text) - sum(map(len, matches)) + len(matches)


@functools.lru_cache(maxsize=4)
def _any_of(phrases: tuple[str, ...]) -> re.Pattern[str]:
    """Returns a pattern that finds phrases as the tokenizer does, the longest first."""
    longest_first = sorted(phrases, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))


def check_path(numbers: Sequence[int], target: int, equations: Sequence[str]) -> str:
    """Says in a few words why the equations of an answer are no solution, or "" if they are one.

    A solution has one equation fewer than there are numbers. Each equation takes two numbers that
    are still there, and puts its result back. The result must be exact and not negative. The number
    that is left at the end is the target.
    """
    if len(equations) != len(numbers) - 1:
        return f"has {len(equations)} steps, {len(numbers)} numbers take {len(numbers) - 1}"
    table = list(numbers)
    for equation in equations:
        match = _EQUATION.fullmatch(equation)
        if match is None:
            return f"not an equation: {equation[:_SHOWN]!r}"
        a = int(match[1])
        op = match[2]
        b = int(match[3])
        claimed = int(match[4])
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
    """Computes `a op b`; None if it is a division that leaves a remainder."""
    if op == "/":
        return a // b if b and a % b == 0 else None
    return {"+": a + b, "-": a - b, "*": a * b}[op]
