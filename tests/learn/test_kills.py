"""One run that is killed again and again, at any moment, ends like a run that nobody touched: to the bit, line for line."""

import dataclasses
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from wall_clock import WALL_CLOCK

from apr_jax.config import to_dict
from apr_jax.learn.checkpoint import FOLDER, load_checkpoint
from apr_jax.learn.metrics import FILE
from apr_jax.learn.rl import train_rl
from apr_jax.learn.sft import train_sft

ROOT = Path(__file__).parents[2]
_SFT_STEPS, _RL_STEPS = 300, 120
# How a life of the process ends: signal, and when it comes.
_ENDS = [
    (signal.SIGKILL, "any time"),
    (signal.SIGTERM, "any time"),
    (signal.SIGKILL, "during a save"),
    (signal.SIGTERM, "during a save"),
]
_SFT_ENDS = [*_ENDS, (signal.SIGKILL, "at the start"), *_ENDS, (signal.SIGTERM, "at the start"), *_ENDS]
_RL_ENDS = [*_ENDS, (signal.SIGKILL, "at the start"), *_ENDS]


@pytest.fixture(scope="module")
def long_config(config):
    sft = dataclasses.replace(config.learn.sft, steps=_SFT_STEPS, save_every=3)
    rl = dataclasses.replace(config.learn.rl, steps=_RL_STEPS, save_every=2, validate_every=7)
    return dataclasses.replace(config, learn=dataclasses.replace(config.learn, sft=sft, rl=rl))


@pytest.fixture(scope="module")
def config_file(long_config, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "long.py"
    values = to_dict(long_config)
    path.write_text(f"from apr_jax.config import from_dict\n\n\ndef experiment():\n    return from_dict({values!r})\n")
    return path


def _lines(workdir):
    lines = [json.loads(line) for line in (workdir / FILE).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in WALL_CLOCK} for line in lines]


def _step(workdir):
    """The last whole line's."""
    if not (workdir / FILE).exists():
        return -1
    whole = (workdir / FILE).read_text().rpartition("\n")[0]
    return json.loads(whole.splitlines()[-1])["step"] if whole else -1


def _saving(workdir):
    return any(not entry.name.isdigit() for entry in (workdir / FOLDER).glob("*"))


def _live_and_die(command, workdir, number, when, draw):
    """Starts the command, and sends it the signal; returns its exit status, whether a save was under way, and its words."""
    process, saving = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL), False
    try:
        if when == "at the start":
            time.sleep(draw.uniform(0.5, 4))
        else:
            began, wanted = time.monotonic(), _step(workdir) + draw.randint(2, 9)
            while process.poll() is None and time.monotonic() - began < 120:
                saving = _step(workdir) >= wanted and _saving(workdir)
                if saving or (when == "any time" and _step(workdir) >= wanted):
                    break
                time.sleep(0.001)
            if when == "any time":
                time.sleep(draw.uniform(0, 0.2))
        process.send_signal(number)
        said = process.communicate(timeout=120)[1].decode()
        return process.returncode, saving, said
    finally:
        process.kill()


def _survive(ends, command, workdir, steps):
    draw, during_saves = random.Random(len(ends)), 0
    for number, when in ends:
        status, saving, said = _live_and_die(command, workdir, number, when, draw)
        during_saves += saving
        assert saving or when != "during a save"
        if number == signal.SIGKILL or when == "at the start":  # No handler yet: there is nothing to save.
            assert status in (-number, 143), said
        else:
            assert status == 143, said
            assert "stopped by SIGTERM; the run is saved" in said
            assert max(int(entry.name) for entry in (workdir / FOLDER).glob("*") if entry.name.isdigit()) == _step(
                workdir
            )
        assert _step(workdir) < steps, "the run ended before the kills did"
    assert during_saves >= sum(when == "during a save" for _, when in ends)
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=240)


def _assert_same_run(broken, unbroken, steps):
    assert _lines(broken) == _lines(unbroken)
    metas = [json.loads((run / FOLDER / str(steps) / "meta" / "metadata").read_text()) for run in (broken, unbroken)]
    assert metas[0]["sums"] == metas[1]["sums"], "parameters and optimizer"
    assert metas[0]["data_sum"] == metas[1]["data_sum"], "place in the data"
    last = [load_checkpoint(run / FOLDER / str(steps)).params for run in (broken, unbroken)]
    jax.tree.map(np.testing.assert_array_equal, *last)


@pytest.mark.slow
def test_sft_survives_being_killed_14_times(long_config, config_file, data_dir, tmp_path):
    assert len(_SFT_ENDS) == 14
    train_sft(long_config, data_dir, tmp_path / "unbroken", "apr", progress=False)
    workdir = tmp_path / "broken"
    paths = ["--config", config_file, "--data", data_dir, "--workdir", workdir]
    command = [sys.executable, "-m", "apr_jax", "train", "sft", *map(str, paths)]
    _survive(_SFT_ENDS, command, workdir, _SFT_STEPS)
    _assert_same_run(workdir, tmp_path / "unbroken", _SFT_STEPS)


@pytest.mark.slow
def test_rl_survives_being_killed_9_times(config, long_config, config_file, data_dir, tmp_path):
    assert len(_RL_ENDS) == 9
    train_sft(config, data_dir, tmp_path / "sft", "apr", progress=False)
    train_rl(long_config, data_dir, tmp_path / "unbroken", tmp_path / "sft", progress=False)
    workdir = tmp_path / "broken"
    paths = ["--config", config_file, "--data", data_dir, "--workdir", workdir, "--init", tmp_path / "sft"]
    command = [sys.executable, "-m", "apr_jax", "train", "rl", *map(str, paths)]
    _survive(_RL_ENDS, command, workdir, _RL_STEPS)
    _assert_same_run(workdir, tmp_path / "unbroken", _RL_STEPS)
