"""Saving: round trip, metrics that come later, donation, a full disk."""

import errno
import logging
import os
import shutil
import sys
import threading
import types

import jax
import numpy as np
import pytest
from helpers.checkpoints import assert_equal, restored_step, save_steps, state_at

from apr_jax.errors import DiskError, UserError
from apr_jax.io.disk_errors import disk_errors
from apr_jax.train.checkpoint import FOLDER, Checkpoints, load_checkpoint
from apr_jax.train.checkpoint.retention import BEST

# Orbax's reading threads trip over damage too, after the error is known.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("late_complaints"),
]


def test_round_trip(saved, run, blank):
    with Checkpoints(saved, run) as checkpoints:
        found = checkpoints.restore_latest(blank)
    assert_equal(found.state, state_at(blank, 4))
    assert jax.tree.structure(found.state) == jax.tree.structure(blank)
    assert found.data == {"position": 4}
    assert not found.unvalidated


def test_step_gets_scores_after_it_was_saved(run, blank, tmp_path):
    """As when a run was stopped before the validation of the step: then it is the best."""
    save_steps(tmp_path, run, blank, {1: 0.4, 2: None})
    with Checkpoints(tmp_path, run) as checkpoints:
        checkpoints.save(state_at(blank, 3), {}, {"position": 3}, unvalidated=True)
        checkpoints.wait()
        assert checkpoints.restore_latest(blank).unvalidated
        checkpoints.complete(3, {BEST: 0.5})
        assert not checkpoints.restore_latest(blank).unvalidated
    assert restored_step(tmp_path, run, blank) == 3
    assert load_checkpoint(tmp_path).step == 3


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_step_survives_an_interrupted_write_of_scores(run, blank, tmp_path, monkeypatch, where):
    """The disk fills up, or the process dies, before the new file is whole, or before it takes the
    place of the old one.
    """
    with Checkpoints(tmp_path, run) as checkpoints:
        checkpoints.save(state_at(blank, 2), {}, {"position": 2}, unvalidated=True)
        checkpoints.wait()

        def full(*arguments, **options):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, where, full)
            with pytest.raises(UserError, match="the disk is full"):
                checkpoints.complete(2, {BEST: 0.5})
        assert checkpoints.restore_latest(blank).unvalidated
    assert restored_step(tmp_path, run, blank) == 2


def test_donation_does_not_change_a_running_save(tmp_path, run, blank):
    spoil = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
    state = state_at(blank, 1)
    expected = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path, run) as checkpoints:
        checkpoints.save(state, {}, {})
        spoil(state)
        checkpoints.wait()
        assert_equal(checkpoints.restore_latest(blank).state, expected)


def test_an_unfinished_save_is_ignored(copied, run, blank):
    shutil.copytree(copied / FOLDER / "2", copied / FOLDER / "6.orbax-checkpoint-tmp")
    assert restored_step(copied, run, blank) == 4
    assert load_checkpoint(copied).step == 4


def test_threads_stay_muffled_after_a_full_disk(run, tmp_path, capfd, caplog, monkeypatch):
    """Those of Orbax fail until the process ends, and the one line about the disk stands alone."""
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail_in_a_thread():
        raise full

    with pytest.raises(DiskError), Checkpoints(tmp_path, run) as checkpoints, disk_errors(tmp_path):
        raise full
    thread = threading.Thread(target=fail_in_a_thread)
    thread.start()
    thread.join()
    closed = types.SimpleNamespace(exc_value=RuntimeError("Event loop is closed"))
    sys.unraisablehook(closed)
    logging.getLogger("asyncio").error("a callback failed", exc_info=full)
    checkpoints._muffled.end()
    assert not capfd.readouterr().err and not caplog.records


def test_a_full_disk_says_so(tmp_path):
    with (
        pytest.raises(UserError, match="the disk is full; make room"),
        disk_errors(tmp_path),
        open("/dev/full", "w") as f,
    ):
        f.write("x" * 100_000)
    # The way TensorStore reports it.
    with pytest.raises(UserError, match="the disk is full"), disk_errors(tmp_path):
        raise ValueError(
            "RESOURCE_EXHAUSTED: Error writing x: No space left on device [OS error 28: ENOSPC]"
        )
