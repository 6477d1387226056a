"""Seconds of one problem are medians of repeated runs, one problem at a time, after a run that does
not count.
"""

import types

import numpy as np
import pytest

from apr_jax.evaluate import latency
from apr_jax.evaluate.runner import Runner
from apr_jax.threads import make_prompts
from apr_jax.threads.protocol import BOS

# Of a problem: the seconds of its runs, such that no mean, minimum, maximum or last one is the
# median.
RUNS = {
    11: [2.0, 3.0, 10.0, 1.0, 9.0],
    12: [6.0, 1.0, 4.0, 5.0, 1.0],
}
COMPILING = 100.0


class FakeMachine:
    """A rollout that returns at once, as JAX does, and a clock that moves while somebody waits for
    the result.
    """

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.calls = []
        self.left = 0.0
        monkeypatch.setattr(latency.jax, "block_until_ready", self.wait)
        monkeypatch.setattr(latency, "time", types.SimpleNamespace(perf_counter=lambda: self.now))
        self.runs = {problem: iter(seconds) for problem, seconds in RUNS.items()}

    def rollout(self, params, prompts, key):
        ((_, problem),) = prompts.tokens.tolist()
        self.left = next(self.runs[problem]) if self.calls else COMPILING
        self.calls.append(problem)
        return None, types.SimpleNamespace(steps=np.array([problem, 1]))

    def wait(self, value):
        self.now += self.left
        return value


def test_each_problem_counts_with_the_median_of_its_runs(monkeypatch):
    machine = FakeMachine(monkeypatch)
    runner = Runner(machine.rollout, {}, batch=1, slots=1)
    prompts = make_prompts([[BOS, problem] for problem in RUNS], width=2)
    seconds, steps = latency._timed(runner, prompts, seed=0, repeats=5)
    assert seconds == pytest.approx([3.0, 4.0])
    assert steps == [12, 13]  # Of both devices.
    # By turns: a moment in which the machine is busy slows one run of each.
    assert machine.calls == [11, *[11, 12] * 5]


def test_samples_of_a_problem_are_timed_together(monkeypatch):
    calls = []

    def rollout(params, prompts, key):
        calls.append(prompts.tokens[:, 1].tolist())
        return None, types.SimpleNamespace(steps=np.array([1]))

    monkeypatch.setattr(latency.jax, "block_until_ready", lambda value: value)
    prompts = make_prompts([[BOS, problem] for problem in (11, 11, 12, 12)], width=2)
    runner = Runner(rollout, {}, batch=2, slots=2)
    seconds, _ = latency._timed(runner, prompts, seed=0, repeats=1, trees=2)
    assert calls == [[11, 11], [11, 11], [12, 12]]  # The first one compiles.
    assert len(seconds) == 2
