"""What the task `MyTask` promises: `pytest test_my_task.py`."""

from pathlib import Path

from apr_jax.config import load
from apr_jax.data.task_check import check_task
from apr_jax.tasks import make_task

CONFIG = load(Path(__file__).with_name("my_task_config.py"))
TASK = make_task(CONFIG.task, CONFIG.limits)


def test_apr_task_check_finds_no_fault():
    findings = check_task(TASK, count=50, seed=0, time_limit=5.0, memory_limit=4.0)
    assert [finding for finding in findings if finding.level == "fault"] == []


def test_demonstrations_are_right():
    for seed in range(20):
        problem = TASK.draw(seed)
        for method in TASK.methods:
            answer = TASK.demonstrate(problem, method, seed).answer
            assert TASK.score(problem, answer).correct


def test_a_wrong_answer_earns_nothing():
    problem = TASK.draw(0)
    for answer in ("", "0", "a sum", "9" * 1_000):
        assert TASK.score(problem, answer).reward == 0.0
