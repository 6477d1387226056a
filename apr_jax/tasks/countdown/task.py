"""Countdown: combine all given numbers with + - * / to hit a target.

The life of a sample:
  1. `problems` draws a problem: numbers and a target that can be hit.
  2. `Countdown.prompt` writes it down for the root thread, now and then with a condition on the
     effort.
  3. `Countdown.demonstration` runs a symbolic solver on it and renders its events as a tree of
     threads.
  4. A model's answer, equations joined by commas, goes to `Countdown.verify`, which recomputes
     every step.
"""

import dataclasses
import functools
import random
import re
from collections.abc import Sequence
from typing import Any, Self

from apr_jax.tasks.base import Problem, Reading, Thread, Verdict
from apr_jax.tasks.countdown import render_compact, render_sos, solvers
from apr_jax.tasks.countdown.check_compact import check_thread
from apr_jax.tasks.countdown.config import CountdownConfig, SolverConfig
from apr_jax.tasks.countdown.events import children

# Anchored, without nested repetition, digits bounded: linear time, and int() can't refuse a number
# as too long.
_EQUATION = re.compile(r"([0-9]{1,40})([+\-*/])([0-9]{1,40})=([0-9]{1,40})")
# Of a thread without children: <bos> before its prompt, <join> before its answer, <eos> after it.
_CONTROL_TOKENS = 3
_SHOWN = 60  # Characters of a wrong equation that a reason quotes.


class Countdown:
    """The `Task` that this project is about.

    Args:
      config: which problems there are.
      solver: how they are demonstrated and written down.
      max_spawn, max_depth: limits.children and limits.max_depth of the rollout that demonstrations
        are for.
    """

    def __init__(
        self,
        config: CountdownConfig,
        solver: SolverConfig | None = None,
        max_spawn: int = 1_000,
        max_depth: int = 2,
    ):
        self.config = config
        self.solver = solver or SolverConfig()
        self._room = max_spawn, max_depth

    def settings(self) -> dict[str, Any]:
        """Both configs and the room, as JSON."""
        return {
            "task": dataclasses.asdict(self.config),
            "solver": dataclasses.asdict(self.solver),
            "room": list(self._room),
        }

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Self:
        """The task that has these `settings`."""
        return cls(
            CountdownConfig(**settings["task"]),
            SolverConfig(**settings["solver"]),
            *settings["room"],
        )

    @property
    def _form(self) -> Any:
        return {"compact": render_compact, "sos": render_sos}[self.solver.render]

    @property
    def alphabet(self) -> str:
        """Every character of the render's texts."""
        alphabet: str = self._form.ALPHABET
        return alphabet

    @property
    def phrases(self) -> tuple[str, ...]:
        """What the render repeats word for word."""
        phrases: tuple[str, ...] = self._form.PHRASES
        return phrases

    def prompt(self, problem: Problem, condition: int | None = None) -> str:
        """The root's prompt; `condition` is the wanted number of children (APR) or of window bins
        (SoS+).
        """
        return self._form.prompt_text(problem, condition)

    def demonstration(self, problem: Problem, method: str, seed: int) -> Thread:
        """A solver's search as a tree of threads; a function of numbers, target, method and seed
        alone.

        Raises:
          ValueError: `method` is not one of `solvers.METHODS`.
        """
        rng = random.Random(f"{problem.numbers}{problem.target}{method}{seed}")
        conditioned = method != "sos" and rng.random() < self.solver.condition
        plan = solvers.draw_plan(method, self.solver, rng, conditioned, *self._room)
        search = solvers.search(problem.numbers, problem.target, plan, rng)
        if self.solver.render == "sos":
            thread = render_sos.render(search, "", problem, method)
        else:
            thread = render_compact.render(search, "", problem.target)

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
            needed = -(-tokens // self.solver.window_bin)
            if needed == bins:
                return bins
            bins = needed

    def verify(self, problem: Problem, answer: str) -> Verdict:
        """Checks every step of an answer with exact integers; never raises; time linear in the
        answer's length.
        """
        if not answer:
            return Verdict(None, claimed=False, correct=False, reason="claims no solution")
        equations = tuple(answer.split(","))
        reason = check_path(problem.numbers, problem.target, equations)
        return Verdict(equations, claimed=True, correct=not reason, reason=reason)

    def examine(self, problem: Problem, thread: Thread, cut: bool = False) -> Reading | None:
        """Every piece of a compact trace against exact arithmetic; traces in the form of Stream of
        Search are not read.
        """
        return check_thread(problem, thread, cut) if self.solver.render == "compact" else None


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
