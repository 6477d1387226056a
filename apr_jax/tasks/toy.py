"""HiddenDigit: a toy task, on which reinforcement learning finds out that spawning pays.

The prompt shows two digits, as in `3+4`; the answer is the last digit of their sum. In one half of
the demonstrations the root guesses at random, which is right one time in ten. In the other half it
spawns one child with the message `3+4=`, which knows the digit and joins it. No demonstration shows
a root that works out the sum itself.

So a perfect imitator is right in 0.55 of all cases, and a policy that always spawns is right in
all. The difference is what RL learns (`examples/learn_to_spawn.py`, `experiments/hidden_digit.py`).
"""

import random
from collections.abc import Mapping

from apr_jax.tasks.base import Method, Problem, Score, Spawn, Task, Thread


class HiddenDigit(Task):
    """A task that shows two digits (`digits`) and asks for the last digit of their sum."""

    alphabet = "0123456789+=?"
    methods: Mapping[str, Method] = {
        "guess": Method(parallel=False),
        "ask": Method(parallel=True, depth=1),
    }

    def draw(self, seed: int) -> Problem:
        rng = random.Random(f"hidden digit {seed}")
        return Problem(f"digit-{seed}", {"digits": [rng.randrange(10), rng.randrange(10)]})

    def group(self, problem: Problem) -> str:
        """Makes every draw a group of its own.

        There are only 100 different problems, so they must repeat. That does no harm, because what
        is learned is a habit, not the sums.
        """
        return problem.id

    key = group

    def prompt(self, problem: Problem, condition: int | None = None) -> str:
        a, b = problem.data["digits"]
        return f"{a}+{b}"

    def demonstrate(self, problem: Problem, method: str, seed: int) -> Thread:
        """Asks a child or guesses, with even odds; the method "guess" always guesses."""
        rng = random.Random(f"{problem.data['digits']}{method}{seed}")
        prompt = self.prompt(problem)
        if method == "guess" or rng.random() < 0.5:
            return Thread(prompt, ("?",), str(rng.randrange(10)))
        digit = _hidden(problem)
        return Thread(prompt, (Spawn((Thread(prompt + "=", (), digit),)),), digit)

    def score(self, problem: Problem, answer: str) -> Score:
        if not answer:
            return Score(0.0, correct=False, stated=None, reason="states no digit")
        correct = answer == _hidden(problem)
        reason = "" if correct else f"the digit is {_hidden(problem)}"
        return Score(float(correct), correct, answer, reason)

    def check(self, problem: Problem) -> Problem:
        digits = problem.data.get("digits")
        legal = [[a, b] for a in range(10) for b in range(10)]
        if digits not in legal:
            raise ValueError(f'"digits" {digits!r} must be a list of two digits, like [3, 4]')
        return problem


def _hidden(problem: Problem) -> str:
    """Returns the digit that is asked for."""
    return str(sum(problem.data["digits"]) % 10)
