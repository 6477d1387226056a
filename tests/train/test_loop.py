"""The loop by itself: a signal ends a run at once, wherever it comes, and the next start makes up
for what was left out.
"""

import dataclasses
import errno
import functools
import io
import os
import signal
import sys

import jax.numpy as jnp
import pytest
from helpers.whole_runs import repeatable

from apr_jax.errors import UnknownAnswers, UserError
from apr_jax.train import loop
from apr_jax.train.checkpoint import BEST
from apr_jax.train.loop import Loop, Stage
from apr_jax.train.metrics.recorder import Recorder
from apr_jax.train.state import TrainState
from apr_jax.train.validation_file import ValidationFile
from apr_jax.train.watchdog import Watchdog

_STEPS = 6


class _Disk:
    """Checkpoints that forget nothing: step -> metrics, data, whether a validation is due."""

    def __init__(self):
        self.saved = {}

    def save(self, state, metrics, data, unvalidated):
        assert int(state.step) not in self.saved, "no step is saved twice"
        self.saved[int(state.step)] = (metrics, data, unvalidated)

    def complete(self, step, metrics):
        self.saved[step] = (metrics, self.saved[step][1], False)

    def wait(self):
        pass


class _Toy:
    """Steps of a rollout and an update, validations in three parts; `done` tells what was begun. A
    signal comes at `hit`.

    At `lost` too many answers are without a verdict.
    """

    def __init__(self, hit=None, number=signal.SIGTERM, lost=None):
        self.hit = hit
        self.number = number
        self.lost = lost
        self.done = []
        self.busy = 0.0

    def _begin(self, *what):
        self.done.append(what)
        if what == self.hit:
            os.kill(os.getpid(), self.number)
        if what == self.lost:
            raise UnknownAnswers("2 of 4 answers have no verdict")

    def advance(self, state, step, stopping):
        self._begin("rollout", step + 1)
        if stopping():
            return state, None
        self._begin("update", step + 1)
        self.busy = 1.0 + step
        return dataclasses.replace(state, step=state.step + 1), {"loss": 0.5 * step}

    def validate(self, state, stopping, file):
        identity = str(int(state.step))
        found = file.read(identity) or {"parts": 0}
        for part in range(found["parts"], 3):
            if stopping():
                return None
            self._begin("validation", int(state.step), part)
            file.write(identity, {"parts": part + 1})
        self.busy = 100.0
        return {"accuracy": int(state.step) / 10}


def _run(toy, disk, workdir, save_every=4, progress=False):
    """From the last step on `disk`, or from 0."""
    workdir.mkdir(exist_ok=True)
    start = max(disk.saved, default=0)
    counts = [jnp.asarray(number, jnp.int32) for number in (start, 0, 0)]
    stage = Stage(
        name="rl",
        steps=_STEPS,
        advance=toy.advance,
        save_every=save_every,
        max_consecutive_skipped=3,
        data_state=lambda: {"price": 0.1},
        batch=lambda step: {},
        host_seconds=lambda: toy.busy,
        validate=toy.validate,
        validate_every=2,
    )
    unvalidated = bool(disk.saved) and disk.saved[start][2]
    with Recorder(workdir, start, _STEPS, 1, "rl", ("trees",), (), progress) as recorder:
        state = TrainState({"w": jnp.zeros(1)}, (), *counts)
        file = ValidationFile(workdir)
        with Watchdog(workdir, start, factor=20.0, floor=600.0) as watchdog:
            loop = Loop(stage, state, disk, recorder, watchdog, file, workdir, bool(disk.saved))
            return loop.run(unvalidated)


@pytest.mark.parametrize(
    ("hit", "stopped", "unvalidated"),
    [
        (("validation", 0, 1), 0, True),
        (("validation", 0, 2), 0, False),
        (("update", 1), 1, False),
        (("rollout", 2), 1, False),
        (("update", 2), 2, True),
        (("validation", 2, 0), 2, True),
        (("validation", 2, 2), 2, False),
        (("rollout", 3), 2, False),
        (("update", 6), 6, True),
        (("validation", 6, 1), 6, True),
    ],
)
def test_signal_stops_training_at_once(tmp_path, hit, stopped, unvalidated):
    """The next start makes up for what it cut off."""
    whole, broken = _Disk(), _Disk()
    _run(_Toy(), whole, tmp_path / "whole")
    toy = _Toy(hit)
    with pytest.raises(SystemExit) as caught:
        _run(toy, broken, tmp_path / "broken")
    assert caught.value.code == 143
    assert toy.done[-1] == hit, "nothing is begun after the signal"
    assert max(broken.saved) == stopped
    assert broken.saved[stopped][2] == unvalidated
    lines = repeatable(tmp_path / "broken")
    steps = [line["step"] for line in lines]
    # A policy that was not trained yet has no other metrics than its scores.
    assert steps == ([] if hit == ("validation", 0, 1) else list(range(stopped + 1)))
    scored = bool(lines) and "validation_accuracy" in lines[-1]
    assert scored == (stopped % 2 == 0 and not unvalidated)
    assert int(_run(_Toy(), broken, tmp_path / "broken").step) == _STEPS
    assert repeatable(tmp_path / "broken") == repeatable(tmp_path / "whole")
    assert {step: broken.saved[step] for step in whole.saved} == whole.saved
    assert [step for step, (scores, *_) in whole.saved.items() if scores] == [0, 2, 4, 6]


def test_run_that_is_stopped_in_each_batch_of_each_validation_ends(tmp_path):
    """Each start comes further by at least one batch, and the run is that of an unbroken one."""
    whole, broken = _Disk(), _Disk()
    _run(_Toy(), whole, tmp_path / "whole")
    parts = [("validation", step, part) for step in (0, 2, 4, 6) for part in range(3)]
    for hit in parts:
        toy = _Toy(hit)
        with pytest.raises(SystemExit):
            _run(toy, broken, tmp_path / "broken")
        assert toy.done[-1] == hit
        begun = [what for what in toy.done if what[0] == "validation"]
        assert begun == [hit], "what an earlier start has found is not looked for again"
    assert int(_run(_Toy(), broken, tmp_path / "broken").step) == _STEPS
    assert repeatable(tmp_path / "broken") == repeatable(tmp_path / "whole")
    assert {step: broken.saved[step] for step in whole.saved} == whole.saved


class _ClosedTerminal(io.StringIO):
    """A terminal whose window was closed at the signal: then whatever is written fails."""

    def __init__(self, toy):
        super().__init__()
        self._toy = toy

    def isatty(self):
        return True

    def write(self, text):
        if self._toy.hit in self._toy.done:
            raise OSError(errno.EIO, "Input/output error")
        return super().write(text)

    def flush(self):
        self.write("")


@pytest.fixture
def hang_up():
    """Sets what SIGHUP does in this process, which may itself run under nohup."""
    old = signal.getsignal(signal.SIGHUP)
    yield functools.partial(signal.signal, signal.SIGHUP)
    signal.signal(signal.SIGHUP, old)


def test_closed_terminal_ends_run_as_sigterm_does(tmp_path, monkeypatch, hang_up):
    """SIGHUP, and nobody to write to: the step is saved all the same."""
    hang_up(signal.SIG_DFL)
    toy = _Toy(("update", 3), signal.SIGHUP)
    disk = _Disk()
    monkeypatch.setattr(sys, "stderr", _ClosedTerminal(toy))
    with pytest.raises(SystemExit) as caught:
        _run(toy, disk, tmp_path, progress=True)
    assert caught.value.code == 129
    assert max(disk.saved) == 3 and toy.done[-1] == ("update", 3)
    assert [line["step"] for line in repeatable(tmp_path)] == [0, 1, 2, 3]


def test_a_run_under_nohup_outlives_its_terminal(tmp_path, hang_up):
    hang_up(signal.SIG_IGN)
    toy = _Toy(("update", 3), signal.SIGHUP)
    assert int(_run(toy, _Disk(), tmp_path).step) == _STEPS
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.parametrize("bad", [3, 4])
def test_fatal_bad_updates_leave_scores_with_last_step(tmp_path, bad):
    """They are found out a step late, or when the metrics are read before a save; step 4 is
    validated.
    """
    toy = _Toy()
    disk = _Disk()
    advance = toy.advance

    def spoiled(state, step, stopping):
        state, metrics = advance(state, step, stopping)
        return state, metrics | {"bad_in_a_row": 3 * (step + 1 == bad)}

    toy.advance = spoiled
    with pytest.raises(UserError, match=f"the last of them in step {bad}; .* saved as step 4"):
        _run(toy, disk, tmp_path, save_every=50)
    assert disk.saved[4] == ({BEST: 0.4}, {"price": 0.1}, False)


def test_a_step_that_is_saved_is_not_saved_again(tmp_path):
    """The rollout of step 3 is given up: the state is that of step 2, on disk with its scores."""
    disk = _Disk()
    with pytest.raises(SystemExit):
        _run(_Toy(("rollout", 3)), disk, tmp_path)
    assert list(disk.saved) == [0, 2]
    assert disk.saved[2] == ({"validation_accuracy": 0.2}, {"price": 0.1}, False)


def test_the_watchdog_is_told_whenever_the_run_moves(tmp_path, monkeypatch):
    """A hang may come in any of them: rollout, update, a part of a validation, a save."""
    toy = _Toy()

    class Told(loop.Watchdog):
        def moves(self):
            toy.done.append("moves")

        def ends_step(self, step):
            toy.done.append(("ended", step))

    monkeypatch.setattr(sys.modules[__name__], "Watchdog", Told)
    _run(toy, _Disk(), tmp_path)
    second = toy.done[toy.done.index(("ended", 1)) + 1 : toy.done.index(("rollout", 3))]
    parts = [("validation", 2, part) for part in range(3)]
    assert second == [
        ("rollout", 2),
        "moves",
        ("update", 2),
        *("moves", "moves", parts[0], "moves", parts[1], "moves", parts[2], "moves"),
        *("moves", ("ended", 2)),
        *("moves", "moves"),  # Around the save.
    ]


def test_straggler_detector_does_not_count_validation(tmp_path, monkeypatch):
    seen = []

    class StragglerDetector:
        def step(self, seconds, step):
            seen.append(seconds)
            return ""

    monkeypatch.setattr(loop, "StragglerDetector", StragglerDetector)
    _run(_Toy(), _Disk(), tmp_path)
    assert seen == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


@pytest.mark.parametrize(
    ("lost", "kept", "unvalidated"),
    [
        (("rollout", 1), 0, False),
        (("rollout", 2), 1, False),
        (("validation", 2, 1), 2, True),
        (("rollout", 4), 3, False),
        (("validation", 6, 0), 6, True),
    ],
)
def test_too_many_unknown_answers_end_the_run(tmp_path, lost, kept, unvalidated):
    """Nothing is lost: the next start goes on from the step that was saved."""
    whole, broken = _Disk(), _Disk()
    _run(_Toy(), whole, tmp_path / "whole")
    toy = _Toy(lost=lost)
    told = (
        rf"training: after step {kept}, 2 of 4 answers have no verdict; that step is saved; .*"
        r" start the same command"
    )
    with pytest.raises(UserError, match=told):
        _run(toy, broken, tmp_path / "broken")
    assert toy.done[-1] == lost, "nothing is learned of them"
    assert max(broken.saved) == kept and broken.saved[kept][2] == unvalidated
    again = _Toy()
    _run(again, broken, tmp_path / "broken")
    # A validation goes on with the part that failed.
    assert again.done[0] == (lost if unvalidated else ("rollout", kept + 1))
    assert broken.saved[_STEPS] == whole.saved[_STEPS]
    assert repeatable(tmp_path / "broken") == repeatable(tmp_path / "whole")


def test_failed_first_validation_says_nothing_was_trained(tmp_path):
    """It fails because answers have no verdict."""
    disk = _Disk()
    with pytest.raises(
        UserError, match=r"at the first validation, 2 of 4 .*; nothing was trained yet; mend"
    ):
        _run(_Toy(lost=("validation", 0, 1)), disk, tmp_path)
    assert not disk.saved
