"""The split of an RL step, on a clock that the test turns."""

import threading

import pytest

from apr_jax.train.metrics import step_times
from apr_jax.train.metrics.step_times import StepTimes


@pytest.fixture
def clock(monkeypatch):
    """now[0] is the time; `ends` lets the update that is waited for end at a time."""
    now = [0.0]
    monkeypatch.setattr(step_times.time, "perf_counter", lambda: now[0])
    gates = []

    def wait(_):
        gates.append(threading.Event())
        started.release()
        gates[-1].wait(10)
        done_at.append(now[0])

    started = threading.Semaphore(0)
    done_at = []
    monkeypatch.setattr(step_times.jax, "block_until_ready", wait)

    def update(step):
        step.updating(None)
        assert started.acquire(timeout=10)

    def ends(step, at):
        now[0] = at
        gates[-1].set()
        step._waiting.join(10)

    return now, update, ends


def _step(now, marks, before=None, rescored=0.0):
    began, queued, fetched, resumed = marks
    now[0] = began
    step = StepTimes(before)
    now[0] = queued
    step.queued()
    now[0] = fetched
    step.fetched()
    with step.rescoring():
        now[0] += rescored
    now[0] = resumed
    step.resumed()
    return step


def _numbers(step):
    return {name: float(value) for name, value in step.metrics().items()}


def test_rollout_queued_behind_an_update_starts_after_it(clock):
    now, update, ends = clock
    first = _step(now, (0.0, 1.0, 5.0, 6.0))
    update(first)
    now[0] = 7.0
    second = StepTimes(first)
    now[0] = 8.0
    second.queued()
    ends(first, 14.0)  # Long after the second step began and queued its rollout.
    now[0] = 20.0
    second.fetched()
    now[0] = 21.0
    second.resumed()
    update(second)
    ends(second, 24.0)
    # The first: one second until it queued, 4 of rollout, 1 of host, 8 of update.
    assert _numbers(first) == pytest.approx(
        {
            "rollout_share": 4 / 14,
            "idle_share": 2 / 14,
            "update_share": 8 / 14,
            "step_seconds": 14.0,
        }
    )
    # The second: the device was busy until 14; 6 of rollout, 1 of host, 3 of update.
    assert _numbers(second) == pytest.approx(
        {"rollout_share": 0.6, "idle_share": 0.1, "update_share": 0.3, "step_seconds": 10.0}
    )


def test_host_late_with_next_rollout_is_idle_time(clock):
    now, update, ends = clock
    first = _step(now, (0.0, 0.0, 1.0, 1.0))
    update(first)
    ends(first, 3.0)
    # It begins at 2, before the update's end at 3, and queues at 5.
    second = _step(now, (2.0, 5.0, 7.0, 8.0), before=first)
    update(second)
    ends(second, 9.0)
    assert _numbers(second) == pytest.approx(
        {"rollout_share": 2 / 6, "idle_share": 3 / 6, "update_share": 1 / 6, "step_seconds": 6.0}
    )


def test_rescoring_while_the_host_waits_is_update(clock):
    now, update, ends = clock
    step = _step(now, (0.0, 0.0, 4.0, 8.0), rescored=3.0)
    update(step)
    ends(step, 10.0)
    assert _numbers(step) == pytest.approx(
        {"rollout_share": 0.4, "idle_share": 0.1, "update_share": 0.5, "step_seconds": 10.0}
    )
    assert step.update_seconds() == 5.0
