"""The toy task: what an imitator of it would score, and that only the spawning habit is always
right.
"""

from apr_jax.tasks import HiddenDigit, Problem, Spawn
from apr_jax.tasks.base import Task

TASK = HiddenDigit()


def test_spawning_is_always_right_and_guessing_one_time_in_ten():
    right = {True: 0, False: 0}
    seen = {True: 0, False: 0}
    for seed in range(4_000):
        problem = TASK.problem(seed)
        thread = TASK.demonstration(problem, "apr", seed)
        spawns = isinstance(thread.body[0], Spawn)
        seen[spawns] += 1
        right[spawns] += TASK.verify(problem, thread.answer).correct
    assert right[True] == seen[True] > 0
    assert 0.07 < right[False] / seen[False] < 0.13
    assert abs(sum(right.values()) / 4_000 - 0.55) < 0.03, (
        "half the time certain, half the time 1 in 10"
    )


def test_text_and_verdicts():
    task: Task = TASK
    problem = Problem("p", (7, 8), 5)
    assert task.prompt(problem) == "7+8" and task.prompt(problem, 1) == "7+8#1"
    assert task.verify(problem, "5").correct
    for answer in ("", "15", "5 ", "05", "٥"):
        assert not task.verify(problem, answer).correct
    assert not task.verify(problem, "").claimed
    assert TASK.problem(3) == TASK.problem(3)
    assert TASK.demonstration(problem, "apr", 1) == TASK.demonstration(problem, "apr", 1)
    assert all(TASK.demonstration(problem, "sos+", seed).body == ("?",) for seed in range(20))
