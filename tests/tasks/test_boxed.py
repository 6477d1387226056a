"""The box around a verifier: what raises, hangs or dies costs one answer."""

import errno
import os
import re
import signal
import time

import pytest

from apr_jax.errors import UserError
from apr_jax.tasks import (
    BoxedVerifier,
    Countdown,
    CountdownConfig,
    Failure,
    HiddenDigit,
    Problem,
    SolverConfig,
    Verdict,
    boxed,
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


@pytest.mark.parametrize(
    ("answer", "failure", "why"), [("sleep", Failure.TIMED_OUT, "took more"), ("die", Failure.RAISED, "ended its")]
)
def test_a_verifier_that_fails_on_everything_holds_a_batch_up_for_eight_answers(
    answer, failure, why, capfd, monkeypatch
):
    """However large the batch is; the next batch gets its eight again."""
    started = []
    start = BoxedVerifier._start
    monkeypatch.setattr(BoxedVerifier, "_start", lambda self: [started.append(1), start(self)])
    with BoxedVerifier(Moody(), time_limit=0.3) as box:
        assert box.verify([(PROBLEM, answer)] * 1_000) == [failure] * 1_000
        assert len(started) == 1 + 8
        rare = [(PROBLEM, "fine"), (PROBLEM, answer)]
        assert box.verify(rare * 8 + rare) == [RIGHT, failure] * 8 + [failure] * 2
    assert len(started) == 1 + 8 + 8
    first, rest = capfd.readouterr().err.splitlines()
    assert first.startswith(f"verifier: {why}")
    assert rest == "verifier: 8 answers of a batch hung or ended its process; its other 992 count as wrong"


def test_what_keeps_the_process_from_starting_is_said(monkeypatch, capfd):
    class Hidden(HiddenDigit):
        """A class that no import finds; pickled by its name, as one of the script that is run would be."""

    monkeypatch.setitem(globals(), "Hidden", Hidden)
    Hidden.__qualname__ = "Hidden"
    name = f"{Hidden.__module__}.Hidden"
    with BoxedVerifier(Hidden(), time_limit=5.0) as box:
        told = (
            rf"verifier: its process cannot make the task {name} \(AttributeError: .*Hidden.*\); its class must be in a"
        )
        with pytest.raises(UserError, match=told):
            box.verify([(PROBLEM, "fine")])
    with BoxedVerifier(Moody(), time_limit=5.0) as box:
        box._process.kill()
        box._process.poll = lambda: None  # Between the look at the process and its first words.
        with pytest.raises(UserError, match=r"cannot make the task \S*Moody \(the process ended\)"):
            box.verify([(PROBLEM, "fine")])
    monkeypatch.setattr(boxed, "_START_LIMIT", 0.001)
    told = r"not ready after 0.001 s: the import of \S*Moody hangs, or the machine is too busy"
    with BoxedVerifier(Moody(), time_limit=5.0) as box, pytest.raises(UserError, match=told):
        box.verify([(PROBLEM, "fine")])
    assert capfd.readouterr().err == "", "no traceback of the process either"


def _refuse(*args, **options):
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        (
            "_START_LIMIT",
            0.001,
            r"its process was not ready after 0.001 s: the import of \S*Moody hangs, or the machine",
        ),
        ("subprocess.Popen", _refuse, r"its process cannot be started \(Cannot allocate memory\): free memory,"),
    ],
)
def test_a_process_that_cannot_be_started_again_costs_the_rest_of_a_batch(field, value, told, capfd, monkeypatch):
    """A run of days must not end because the machine was busy for a minute; only the first start may end it."""
    with BoxedVerifier(Moody(), time_limit=5.0) as box:
        assert box.verify([(PROBLEM, "fine")]) == [RIGHT]
        capfd.readouterr()
        for _ in range(2):
            with monkeypatch.context() as patch:
                patch.setattr(f"apr_jax.tasks.boxed.{field}", value)
                pairs = [(PROBLEM, text) for text in ("fine", "die", "fine", "fine")]
                assert box.verify(pairs) == [RIGHT] + [Failure.RAISED] * 3
            assert box.verify([(PROBLEM, "fine")]) == [RIGHT], "the next batch has a process again"
        said = capfd.readouterr().err.splitlines()
        assert len(said) == 2, "each kind once"
        assert re.fullmatch(rf"verifier: {told}.*; 2 answers count as wrong, and the next batch tries again", said[1])
    monkeypatch.setattr(f"apr_jax.tasks.boxed.{field}", value)
    with (
        BoxedVerifier(Moody(), time_limit=5.0) as box,
        pytest.raises(UserError, match=rf"verifier: {told}.*; mend that, and start the same command again"),
    ):
        box.verify([(PROBLEM, "fine")])


def test_the_box_is_quick():
    """A verifier does some 2,000 answers a second: the way into the box and back must not show beside it."""
    with BoxedVerifier(Moody(), time_limit=5.0) as box:
        box.verify([(PROBLEM, "fine")])
        began = time.perf_counter()
        box.verify([(PROBLEM, "fine")] * 2_000)
        assert time.perf_counter() - began < 2.0
