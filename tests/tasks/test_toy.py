"""The toy task: guessing is right one time in ten, and spawning always."""

import pytest

from apr_jax.tasks import Problem, Spawn, TaskConfig, make_task
from apr_jax.tasks.toy import HiddenDigit

TASK = HiddenDigit()


def test_spawning_always_solves_and_guessing_rarely_does():
    """A guess is right one time in ten."""
    right = {True: 0, False: 0}
    seen = {True: 0, False: 0}
    for seed in range(4_000):
        problem = TASK.draw(seed)
        thread = TASK.demonstrate(problem, "ask", seed)
        spawns = isinstance(thread.body[0], Spawn)
        seen[spawns] += 1
        right[spawns] += TASK.score(problem, thread.answer).correct
    assert right[True] == seen[True] > 0
    assert 0.07 < right[False] / seen[False] < 0.13
    assert abs(sum(right.values()) / 4_000 - 0.55) < 0.03, (
        "half the time certain, half the time 1 in 10"
    )


def test_text_and_scores():
    task = make_task(TaskConfig("hidden_digit"))
    problem = Problem("p", {"digits": [7, 8]})
    assert task.prompt(problem) == task.show(problem) == "7+8"
    assert task.score(problem, "5").correct and task.score(problem, "5").reward == 1
    for answer in ("", "15", "5 ", "05", "٥"):
        assert not task.score(problem, answer).correct and not task.score(problem, answer).reward
    assert task.score(problem, "").stated is None
    assert TASK.draw(3) == TASK.draw(3)
    assert TASK.demonstrate(problem, "ask", 1) == TASK.demonstrate(problem, "ask", 1)
    assert all(TASK.demonstrate(problem, "guess", seed).body == ("?",) for seed in range(20))


@pytest.mark.parametrize("digits", [None, 7, [1], [1, 10], [1, "2"], [1, 2.5], [1, 2, 3]])
def test_a_problem_that_holds_no_two_digits_is_refused(digits):
    with pytest.raises(ValueError, match=r"must be a list of two digits, like \[3, 4\]"):
        TASK.check(Problem("p", {"digits": digits}))
