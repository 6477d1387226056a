"""Several sandboxed workers side by side: outcomes are those of one, in less time."""

import contextlib
import os
import random
import time

import pytest
from helpers.obedient import PROBLEM, RIGHT, Obedient

from apr_jax.tasks import Failure, SandboxedVerifier, Score, sandbox
from apr_jax.tasks.sandbox_worker import State


def _pairs(*answers):
    return [(PROBLEM, answer) for answer in answers]


def _wait_until_all_are_ready(verifier):
    deadline = time.monotonic() + 60
    while any(worker.state is not State.READY for worker in verifier._workers):
        assert time.monotonic() < deadline
        verifier.verify(_pairs(*["wait 0.05"] * len(verifier._workers)))


def test_slow_answers_are_scored_side_by_side():
    seconds = []
    for workers in (1, 4):
        with SandboxedVerifier(Obedient(), time_limit=20.0, workers=workers) as verifier:
            _wait_until_all_are_ready(verifier)
            began = time.monotonic()
            assert verifier.verify(_pairs(*["wait 0.3"] * 8)) == [RIGHT] * 8
            seconds.append(time.monotonic() - began)
    assert seconds[1] < 0.6 * seconds[0], "0.25 of it, on an idle machine"


def test_outcomes_come_in_the_order_of_the_answers():
    waits = [0.2, 0.0, 0.1, 0.0, 0.05, 0.0]
    answers = [f"wait {seconds} and state {index}" for index, seconds in enumerate(waits)]
    with SandboxedVerifier(Obedient(), time_limit=20.0, workers=3) as verifier:
        _wait_until_all_are_ready(verifier)
        outcomes = verifier.verify(_pairs(*answers))
    assert [outcome.stated for outcome in outcomes] == ["0", "1", "2", "3", "4", "5"]


def test_an_answer_that_hangs_holds_up_no_other():
    with SandboxedVerifier(Obedient(), time_limit=3.0, workers=2) as verifier:
        _wait_until_all_are_ready(verifier)
        began = time.monotonic()
        hung, *others = verifier.verify(_pairs("hold the lock", *["tell the time"] * 9))
    assert hung is Failure.TIMED_OUT
    assert all(float(outcome.stated) < began + 3.0 for outcome in others)


def test_a_worker_that_dies_costs_its_answer_and_its_process_alone():
    with SandboxedVerifier(Obedient(), time_limit=20.0, workers=2) as verifier:
        _wait_until_all_are_ready(verifier)
        processes = [worker.process for worker in verifier._workers]
        outcomes = verifier.verify(_pairs("die", *["wait 0.05"] * 5))
        assert outcomes == [Failure.RAISED, *[RIGHT] * 5]
        assert verifier._workers[0].process is not processes[0]
        assert verifier._workers[1].process is processes[1]


@pytest.mark.thorough
@pytest.mark.parametrize("most_unknown", [None, 2])
def test_outcomes_do_not_depend_on_the_number_of_workers(most_unknown, capfd):
    """Neither do the lines that say how many answers have no verdict."""
    kinds = ["fine", "wrong", "wait 0.02", "raise", "nothing"]
    answers = random.Random(3).choices(kinds, [5, 3, 3, 1, 1], k=40)
    answers[5] = answers[17] = "sleep"
    answers[9] = "die"
    found = []
    for workers in (1, 3):
        with SandboxedVerifier(Obedient(), time_limit=1.0, workers=workers) as verifier:
            _wait_until_all_are_ready(verifier)
            outcomes = verifier.verify(_pairs(*answers), most_unknown)
        found.append((outcomes, sorted(capfd.readouterr().err.splitlines())))
    assert found[0][0] == found[1][0]
    if most_unknown is not None:
        rest = found[0][0].count(Failure.UNVERIFIED)
        assert rest > 0
        line = f"{most_unknown + 1} answers of a batch have no verdict; its other {rest} are not"
        assert all(any(line in said for said in lines) for _, lines in found)


def test_a_batch_that_is_given_up_hands_out_no_more():
    with SandboxedVerifier(Obedient(), time_limit=20.0, workers=3) as verifier:
        _wait_until_all_are_ready(verifier)
        before = verifier._number
        outcomes = verifier.verify(_pairs("fine", *["raise"] * 999), most_unknown=1)
        assert outcomes == [RIGHT, *[Failure.RAISED] * 2, *[Failure.UNVERIFIED] * 997]
        assert verifier._number - before <= 3 + 2, "what was needed, and what two others had"


def test_of_a_batch_that_is_given_up_the_answers_behind_the_failure_are_unverified():
    """One worker alone would have verified those before it, and would not have come to the rest."""
    with SandboxedVerifier(Obedient(), time_limit=20.0, workers=2) as verifier:
        _wait_until_all_are_ready(verifier)
        behind = verifier.verify(_pairs("raise", "wait 0.2", "fine"), most_unknown=0)
        before = verifier.verify(_pairs("wait 0.2", "raise", "fine"), most_unknown=0)
    assert behind == [Failure.RAISED, Failure.UNVERIFIED, Failure.UNVERIFIED]
    assert before == [RIGHT, Failure.RAISED, Failure.UNVERIFIED]


def test_a_worker_that_cannot_start_again_leaves_its_part_to_the_others(monkeypatch, capfd):
    monkeypatch.setattr(sandbox, "_START_PAUSE", 0.0)
    with SandboxedVerifier(Obedient(), time_limit=20.0, workers=2) as verifier:
        _wait_until_all_are_ready(verifier)
        with monkeypatch.context() as patch:
            patch.setattr(verifier._workers[0], "make_task", lambda: "no memory")
            outcomes = verifier.verify(_pairs("die", *["wait 0.2"] * 4))
            assert outcomes == [Failure.RAISED, *[RIGHT] * 4]
            assert verifier._workers[0].state is State.OUT
        _wait_until_all_are_ready(verifier)
    said = capfd.readouterr().err.splitlines()
    assert said[-1] == "verifier: no memory; the other workers go on without it"


def test_a_batch_after_an_interrupted_one_gets_its_own_outcomes(monkeypatch):
    with SandboxedVerifier(Obedient(), time_limit=20.0, workers=2) as verifier:
        _wait_until_all_are_ready(verifier)
        with monkeypatch.context() as patch:
            patch.setattr(sandbox, "wait_for", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                verifier.verify(_pairs("wait 0 and state old", "wait 0 and state old"))
        time.sleep(0.2)
        outcomes = verifier.verify(_pairs(*["wait 0 and state new"] * 4))
    assert [outcome.stated for outcome in outcomes] == ["new"] * 4


def _interrupt(workers, seconds):
    raise KeyboardInterrupt


def test_an_answer_larger_than_the_buffer_of_a_socket_arrives_whole():
    length = 5_000_000
    with SandboxedVerifier(Obedient(), time_limit=60.0, workers=2) as verifier:
        outcomes = verifier.verify(_pairs(*[f"measure {'x' * length}"] * 3))
    stated = str(length + len("measure "))
    assert outcomes == [Score(1.0, correct=True, stated=stated)] * 3


def test_no_worker_is_left_when_the_run_ends_by_an_error():
    with (
        contextlib.suppress(KeyboardInterrupt),
        SandboxedVerifier(Obedient(), time_limit=20.0, workers=3) as verifier,
    ):
        _wait_until_all_are_ready(verifier)
        raise KeyboardInterrupt
    assert len(verifier._workers) == 3
    assert all(worker.process.poll() is not None for worker in verifier._workers)


def test_no_number_of_workers_means_one_for_each_core():
    with SandboxedVerifier(Obedient(), time_limit=5.0, workers=0) as verifier:
        assert len(verifier._workers) == len(os.sched_getaffinity(0))
