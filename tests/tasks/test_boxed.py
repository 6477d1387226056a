"""The box around a verifier: what raises, hangs or dies costs one answer."""

import os
import re
import signal
import time

import pytest

from apr_jax.tasks import (
    BoxedVerifier,
    Countdown,
    CountdownConfig,
    Failure,
    HiddenDigit,
    Problem,
    SolverConfig,
    Verdict,
)

RIGHT = Verdict(("1",), claimed=True, correct=True)
PROBLEM = Problem("p", (1, 2), 3)


class Moody(HiddenDigit):
    """Does what the answer says."""

    def verify(self, problem, answer):
        if answer == "raise":
            raise ValueError("no\nidea")
        if answer == "exit":
            raise SystemExit(3)
        if answer == "die":
            os._exit(1)
        if answer == "sleep":
            time.sleep(60)
        if answer == "hold the lock":
            re.match(r"(a+)+$", "a" * 60 + "b")  # Backtracks for ages in C and lets no other thread run meanwhile.
        if answer == "nothing":
            return None
        return RIGHT


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        ("raise", Failure.RAISED),
        ("exit", Failure.RAISED),
        ("die", Failure.RAISED),
        ("nothing", Failure.RAISED),
        ("sleep", Failure.TIMED_OUT),
        ("hold the lock", Failure.TIMED_OUT),
    ],
)
def test_one_answer_is_lost_and_the_others_are_not(answer, failure, capfd):
    with BoxedVerifier(Moody(), time_limit=0.5) as box:
        pairs = [(PROBLEM, text) for text in ("fine", answer, "fine", answer)]
        assert box.verify(pairs) == [RIGHT, failure, RIGHT, failure]
        assert box.verify(pairs[:1]) == [RIGHT]
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("verifier: ") and "problem p; it counts as wrong" in said[0]
    if answer == "raise":
        assert "raised ValueError: no idea on" in said[0]


def test_the_same_verdicts_as_without_a_box():
    task = Countdown(CountdownConfig(3, 1, 9, 1, 30), SolverConfig())
    problem = Problem("p", (2, 3, 4), 20)
    answers = ["2+3=5,5*4=20", "2+3=5,5*4=21", "", "x", "__import__('os').abort()", "9**9**9**9"]
    with BoxedVerifier(task, time_limit=5.0) as box:
        got = box.verify([(problem, answer) for answer in answers])
    assert got == [task.verify(problem, answer) for answer in answers]
    assert [verdict.correct for verdict in got] == [True] + [False] * 5


def test_signals_to_the_group_and_a_process_that_someone_killed_cost_nothing():
    with BoxedVerifier(Moody(), time_limit=5.0) as box:
        assert box.verify([(PROBLEM, "fine")]) == [RIGHT]
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(box._process.pid, number)
        assert box.verify([(PROBLEM, "fine")]) == [RIGHT]
        first = box._process
        first.kill()
        first.wait()
        assert box.verify([(PROBLEM, "fine")]) == [RIGHT]
        second = box._process
    assert second.poll() is not None, "no process is left behind"


def test_a_signal_to_the_group_of_this_process_never_reaches_the_box():
    with BoxedVerifier(Moody(), time_limit=5.0) as box:
        assert os.getpgid(box._process.pid) != os.getpgid(0)


def test_a_task_that_cannot_be_read_is_said():
    with BoxedVerifier(Moody(), time_limit=5.0) as box:
        box._task = b"no pickle"
        with pytest.raises(RuntimeError, match="its process did not start"):
            box.verify([(PROBLEM, "fine")])


def test_the_box_is_quick():
    """A verifier does some 2,000 answers a second: the way into the box and back must not show beside it."""
    with BoxedVerifier(Moody(), time_limit=5.0) as box:
        box.verify([(PROBLEM, "fine")])
        began = time.perf_counter()
        box.verify([(PROBLEM, "fine")] * 2_000)
        assert time.perf_counter() - began < 2.0
