"""HiddenDigit: a toy task, which shows how little a second one takes. `examples/learn_to_spawn.py`
trains on it.

The prompt shows two digits, `3+4`; the answer is the last digit of their sum. Two habits are
demonstrated, half and half: the root guesses at random (right one time in ten), or it spawns one
child with the message `3+4=`, which knows the digit and joins it. No root was ever shown to work
out the sum itself. A perfect imitator is right in 0.55 of all cases; one that always spawns, in
all. The difference would be for RL to find."""

import random
from typing import Any, Self

from apr_jax.tasks.base import Problem, Reading, Spawn, Thread, Verdict


class HiddenDigit:
    """A `Task`; a problem's `numbers` are the two hints and `target` is the hidden digit."""

    def settings(self) -> dict[str, Any]:
        """It has none."""
        return {}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Self:
        """The only task of this class."""
        return cls(**settings)

    @property
    def alphabet(self) -> str:
        """Digits and the marks of prompt, message and guess."""
        return "0123456789+=?#"

    @property
    def phrases(self) -> tuple[str, ...]:
        """None: nothing is repeated word for word."""
        return ()

    def problem(self, seed: int) -> Problem:
        """A random problem, a function of the seed."""
        rng = random.Random(f"hidden digit {seed}")
        numbers = rng.randrange(10), rng.randrange(10)
        return Problem(f"digit-{seed}", numbers, sum(numbers) % 10)

    def prompt(self, problem: Problem, condition: int | None = None) -> str:
        """The hints: `3+4`; with a condition `3+4#1`."""
        a, b = problem.numbers
        return f"{a}+{b}" if condition is None else f"{a}+{b}#{condition}"

    def demonstration(self, problem: Problem, method: str, seed: int) -> Thread:
        """ "apr": asks a child or guesses, one time in two each; the serial methods always
        guess.
        """
        rng = random.Random(f"{problem.numbers}{method}{seed}")
        prompt = self.prompt(problem)
        if method != "apr" or rng.random() < 0.5:
            return Thread(prompt, ("?",), str(rng.randrange(10)))
        digit = str(problem.target)
        return Thread(prompt, (Spawn((Thread(prompt + "=", (), digit),)),), digit)

    def verify(self, problem: Problem, answer: str) -> Verdict:
        """Right if the answer is the hidden digit and nothing else."""
        if not answer:
            return Verdict(None, claimed=False, correct=False, reason="claims no solution")
        correct = answer == str(problem.target)
        return Verdict(
            (answer,),
            claimed=True,
            correct=correct,
            reason="" if correct else f"the digit is {problem.target}",
        )

    def examine(self, problem: Problem, thread: Thread, cut: bool) -> Reading | None:
        """Its traces say nothing that could be wrong."""
        return None
