"""A task: add up a list of numbers. Change it step by step into a task of your own.

    apr task check my_task.py:MyTask                 # tries what is promised below
    apr data build --config my_task_config.py --out runs/my_task/data
    apr train sft --config my_task_config.py --workdir runs/my_task/sft
    apr train rl --config my_task_config.py --workdir runs/my_task/rl --init runs/my_task/sft

A serial demonstration adds one number after the other in one thread. A parallel one gives each half
of the list to a child thread, and adds what the children join.
"""

import dataclasses
import random
from collections.abc import Mapping

from apr_jax.tasks import Method, Problem, Score, Spawn, Task, Thread


@dataclasses.dataclass(frozen=True)
class MyTaskConfig:
    """Settings of the task, set by TaskConfig(..., count=6) or --set task.count=6.

    Attributes:
      count: how many numbers a problem has.
      high: the largest number.
    """

    count: int = 4
    high: int = 30

    def __post_init__(self):
        if self.count < 2:
            raise ValueError(f"task.count={self.count} must be at least 2")
        if self.high < 1:
            raise ValueError(f"task.high={self.high} must be at least 1")


class MyTask(Task):
    """What is the sum? The data of a problem are its `terms`."""

    Config = MyTaskConfig
    # Every character that prompts, messages, texts and answers may contain.
    alphabet = "0123456789+=;"
    # The answer of a child is that of a part of the problem.
    children_solve_parts = True
    methods: Mapping[str, Method] = {
        "serial": Method(parallel=False),
        "parallel": Method(parallel=True, depth=1),
    }

    def draw(self, seed: int) -> Problem:
        """Draws a random problem: the same for the same seed, on every machine."""
        rng = random.Random(f"my_task {seed}")
        numbers = [rng.randint(1, self.config.high) for _ in range(self.config.count)]
        return Problem(f"my_task-{seed}", {"terms": numbers})

    def prompt(self, problem: Problem, condition: int | None = None) -> str:
        """Writes what the root thread is given."""
        return _question(problem.data["terms"])

    def demonstrate(self, problem: Problem, method: str, seed: int) -> Thread:
        """Shows how the problem is solved: in one thread, or with two children."""
        numbers = problem.data["terms"]
        if method == "serial":
            return _add(numbers)

        middle = len(numbers) // 2
        children = (_add(numbers[:middle]), _add(numbers[middle:]))
        # The root reads the answers of its children, and adds them.
        text = "+".join(child.answer for child in children) + "="
        total = str(sum(numbers))
        return Thread(self.prompt(problem), (Spawn(children), text + total), total)

    def score(self, problem: Problem, answer: str) -> Score:
        """Says what an answer is worth. It must never raise, whatever the answer is."""
        if not answer:
            return Score(0.0, correct=False, stated=None, reason="states no sum")
        correct = answer == str(sum(problem.data["terms"]))
        return Score(float(correct), correct, answer, "" if correct else "is another number")

    def check(self, problem: Problem) -> Problem:
        """Refuses what is no problem, with the field and what would be right."""
        numbers = problem.data.get("terms")
        if not isinstance(numbers, list) or len(numbers) < 2:
            raise ValueError(f'"terms" {numbers!r} must be a list of at least two numbers')
        if not all(type(number) is int and 0 <= number < 10**9 for number in numbers):
            raise ValueError(f'"terms" {numbers!r} must be whole numbers from 0 to 999999999')
        return problem


def _question(numbers: list[int]) -> str:
    """Writes the question for the sum of some numbers: "3+4=" for 3 and 4."""
    return "+".join(map(str, numbers)) + "="


def _add(numbers: list[int]) -> Thread:
    """Adds one number after the other: "3+4=7;7+5=12" for 3, 4 and 5."""
    steps = []
    total = numbers[0]
    for number in numbers[1:]:
        steps.append(f"{total}+{number}={total + number}")
        total += number
    body = (";".join(steps),) if steps else ()
    return Thread(_question(numbers), body, str(total))
