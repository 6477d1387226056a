"""A verifier that fails; in a file without JAX, because its process imports the file anew after
each hang.
"""

import time

from apr_jax.tasks.countdown.puzzle import Puzzle
from apr_jax.tasks.countdown.task import Countdown


class Misbehaves(Countdown):
    """Raises, hangs or does its work, by turns of the problem."""

    def score(self, problem, answer):
        turn = sum(Puzzle.of(problem).numbers) % 3
        if turn == 0:
            raise RuntimeError("no verdict")
        if turn == 1:
            time.sleep(600)
        return super().score(problem, answer)
