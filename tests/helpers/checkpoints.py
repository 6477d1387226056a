"""Saves and restores steps whose content tells which step they are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from apr_jax.train.checkpoint import FOLDER, Checkpoints
from apr_jax.train.checkpoint.retention import BEST
from apr_jax.train.config import OptimizerConfig
from apr_jax.train.optimizer import make_optimizer

OPTIMIZER = make_optimizer(OptimizerConfig(name="muon"), 10)


def state_at(state, step):
    """A state that tells its step in every array."""
    state = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), state)
    return dataclasses.replace(state, step=jnp.asarray(step, jnp.int32))


def save_steps(workdir, run, blank, scores):
    with Checkpoints(workdir, run) as checkpoints:
        for step, score in scores.items():
            metrics = {} if score is None else {BEST: score}
            checkpoints.save(state_at(blank, step), metrics, {"position": step})


def assert_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def restored_step(workdir, run, blank):
    """The step that is restored, after checking that it is whole."""
    with Checkpoints(workdir, run) as checkpoints:
        found = checkpoints.restore_latest(blank)
    step = int(found.state.step)
    assert_equal(found.state, state_at(blank, step))
    assert found.data == {"position": step}
    return step


def assert_reported(told, workdir, step):
    """If the newest step, 4, was not restored, one line says so."""
    if step == 4:
        assert told == ""
    else:
        assert step == 2
        assert told.count("\n") == 1
        assert f"checkpoint {workdir / FOLDER / '4'}: damaged (" in told
