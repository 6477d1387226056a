"""How good the symbolic solvers are: the ceiling of what imitation alone can teach."""

import dataclasses

from apr_jax.tasks.base import Spawn, Thread
from apr_jax.tasks.countdown import Countdown
from apr_jax.tasks.problems import draw


@dataclasses.dataclass(frozen=True)
class SolverRate:
    """One solver on random problems.

    Attributes:
      success: share of demonstrations whose answer verifies.
      children: threads spawned, mean.
      characters: written over all threads of a demonstration, mean.
      longest: characters of the longest thread, prompt included, of all demonstrations.
    """

    success: float
    children: float
    characters: float
    longest: int


def measure_solver(task: Countdown, method: str, count: int, seed: int = 0) -> SolverRate:
    """Demonstrates `count` random problems of the task; about 2,000 a second at four numbers, drawing them included."""
    solved, characters, children, longest = 0, 0, 0, 0
    for place in range(seed, seed + count):
        problem = draw(task.config, place)
        root = task.demonstration(problem, method, place)
        threads = flatten(root)
        solved += task.verify(problem, root.answer).correct
        characters += sum(map(written, threads))
        children += len(threads) - 1
        longest = max(longest, *(len(thread.prompt) + written(thread) for thread in threads))
    return SolverRate(solved / count, children / count, characters / count, longest)


def flatten(thread: Thread) -> list[Thread]:
    """The thread and everything below it, parents first."""
    below = [child for part in thread.body if isinstance(part, Spawn) for child in part.children]
    return [thread, *(one for child in below for one in flatten(child))]


def written(thread: Thread) -> int:
    """Characters that a thread writes itself: its text, its messages and its answer."""
    text = sum(
        len(part) if isinstance(part, str) else sum(len(child.prompt) for child in part.children)
        for part in thread.body
    )
    return text + len(thread.answer)
