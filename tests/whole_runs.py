"""What the tests of whole runs share: a config with other settings, the command, a signal at a step, what a run logged."""

import dataclasses
import json
import os
import sys

import jax
import numpy as np
import pytest

from apr_jax.config import to_dict
from apr_jax.learn.checkpoint import load_checkpoint
from apr_jax.learn.metrics import FILE

# Names of metrics that are times or rates: two equal runs differ in them and in nothing else.
SHARES = ("rollout_share", "idle_share", "update_share")
WALL_CLOCK = ("tokens_per_second", "trees_per_second", "ceiling_share", "data_seconds", "step_seconds", *SHARES)


def changed(config, sft=None, rl=None, **fields):
    """The config with other values of `learn.sft`, `learn.rl` and its own fields."""
    learn = dataclasses.replace(
        config.learn,
        sft=dataclasses.replace(config.learn.sft, **(sft or {})),
        rl=dataclasses.replace(config.learn.rl, **(rl or {})),
    )
    return dataclasses.replace(config, learn=learn, **fields)


def write_config(config, path):
    """Makes the config an experiment file."""
    values = to_dict(config)
    path.write_text(f"from apr_jax.config import from_dict\n\n\ndef experiment():\n    return from_dict({values!r})\n")
    return path


def train_command(stage, config_file, data_dir, workdir, *more):
    """`apr train`, to be started from the root of the repository."""
    paths = ["--config", config_file, "--data", data_dir, "--workdir", workdir, *more]
    return [sys.executable, "-m", "apr_jax", "train", stage, *map(str, paths)]


class Interrupt:
    """Wraps a step maker so that the given signal arrives during call number `at`, as from a user."""

    def __init__(self, make, at, number):
        self._make, self._left, self._number = make, at, number

    def __call__(self, *args):
        step = self._make(*args)

        def interrupted(*args):
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), self._number)
            return step(*args)

        return interrupted


def logged(workdir):
    """Every line of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / FILE).read_text().splitlines()]


def repeatable(workdir):
    """The same without what depends on the clock."""
    return [{name: value for name, value in line.items() if name not in WALL_CLOCK} for line in logged(workdir)]


def assert_close(workdir, other, but=()):
    """The runs logged the same lines and ended with the same parameters, within float32; metrics named by `but` aside.

    On other devices sums are taken in another order. What is logged is a mean over hundreds of tokens: 1e-4 of it, or 1e-5
    where it is a small difference (losses of advantages that cancel out, KL). Parameters may be off by more: the optimizer
    divides gradients by their size, so where one is next to nothing its rounding decides. 1e-4 is a tenth of one update of
    RL (learning rate 1e-3) and a hundredth of a supervised one (1e-2).
    """
    got, expected = repeatable(workdir), repeatable(other)
    assert [line["step"] for line in got] == [line["step"] for line in expected]
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.keys() == theirs.keys()
        assert mine["stage"] == theirs["stage"]
        assert mine.get("tokens") == theirs.get("tokens")
        for name in theirs.keys() - {"stage", *but}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), (mine["step"], name)
    params = load_checkpoint(workdir).params, load_checkpoint(other).params
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), *params)
