"""Several real processes train as one: the same curve and parameters, the same end for all, and a lost one is told."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from wall_clock import WALL_CLOCK

from apr_jax.config import MeshConfig, to_dict
from apr_jax.errors import UsageError
from apr_jax.learn.checkpoint import load_checkpoint
from apr_jax.learn.metrics import FILE
from apr_jax.learn.rl import train_rl
from apr_jax.learn.sft import train_sft
from apr_jax.runtime import HEARTBEAT_SECONDS, join_processes

ROOT = Path(__file__).parents[2]


def _config(config, shards, steps=6):
    sft = dataclasses.replace(config.learn.sft, rows=4, streams=4, steps=steps)
    rl = dataclasses.replace(config.learn.rl, rows=4)
    learn = dataclasses.replace(config.learn, sft=sft, rl=rl)
    return dataclasses.replace(config, learn=learn, mesh=MeshConfig(data=shards))


class Together:
    """`count` processes of one device each that run `apr train` as one."""

    def __init__(self, count, config, folder, data_dir, stage, workdir, *more):
        file = folder / f"{config.name}{count}.py"
        file.write_text(
            f"from apr_jax.config import from_dict\n\n\ndef experiment():\n    return from_dict({to_dict(config)!r})\n"
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "apr_jax", "train", stage, "--config", file, "--workdir", workdir]
        command += ["--data", data_dir, *more]
        self.processes, self._said = [], []
        for index in range(count):
            names = {"COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "NUM_PROCESSES": str(count), "PROCESS_ID": str(index)}
            environment = os.environ | {f"JAX_{name}": value for name, value in names.items()}
            environment |= {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
            said = tempfile.TemporaryFile()  # noqa: SIM115 - a pipe that nobody reads would stop the process.
            command = list(map(str, command))
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)
            self.processes.append(process)
            self._said.append(said)

    def said(self, index):
        self._said[index].seek(0)
        return self._said[index].read().decode()

    def wait(self, seconds=240):
        """Exit status and words of each, when all have ended."""
        try:
            for process in self.processes:
                process.wait(seconds)
        finally:
            self.kill()
        return [(process.returncode, self.said(index)) for index, process in enumerate(self.processes)]

    def kill(self):
        for process in self.processes:
            process.kill()
            process.wait()

    def until_step(self, step, workdir, seconds=240):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if (workdir / FILE).exists() and f'"step": {step},' in (workdir / FILE).read_text():
                return
            assert all(process.poll() is None for process in self.processes), [self.said(0), self.said(1)]
            time.sleep(0.005)
        raise TimeoutError(f"no step {step} in {workdir / FILE}")


def _lines(workdir):
    lines = [json.loads(line) for line in (workdir / FILE).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in WALL_CLOCK} for line in lines]


def _close(got, expected):
    """Within float32: sums over processes are added up in another order."""
    assert [line["step"] for line in got] == [line["step"] for line in expected]
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.keys() == theirs.keys()
        assert mine.pop("stage") == theirs.pop("stage")
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (mine["step"], name)
        assert mine.get("tokens") == theirs.get("tokens")


def _params_close(got, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), got, expected)


def _train_together(count, stages, config, data_dir, tmp_path):
    """The stages by one process with `count` devices, and by `count` processes with one."""
    config = _config(config, count)
    train_sft(config, data_dir, tmp_path / "alone_sft", "apr", progress=False)
    if "rl" in stages:
        train_rl(config, data_dir, tmp_path / "alone_rl", tmp_path / "alone_sft", progress=False)
    for stage in stages:
        more = ("--init", tmp_path / "alone_sft") if stage == "rl" else ()
        for status, said in Together(count, config, tmp_path, data_dir, stage, tmp_path / stage, *more).wait():
            assert status == 0, said
        together, alone = tmp_path / stage, tmp_path / f"alone_{stage}"
        _close(_lines(together), _lines(alone))
        _params_close(load_checkpoint(together).params, load_checkpoint(alone).params)


def test_two_processes_train_as_one(config, data_dir, tmp_path):
    _train_together(2, ["sft"], config, data_dir, tmp_path)


@pytest.mark.slow
def test_two_processes_reinforce_as_one(config, data_dir, tmp_path):
    _train_together(2, ["rl"], config, data_dir, tmp_path)


@pytest.mark.slow
def test_four_processes_train_as_one(config, data_dir, tmp_path):
    _train_together(4, ["sft", "rl"], config, data_dir, tmp_path)


def _flip_a_bit_of_the_largest_file(folder):
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"NUM_PROCESSES": "2", "PROCESS_ID": "2"}, "JAX_PROCESS_ID=2: must be in 0..1, because JAX_NUM_PROCESSES=2"),
        ({"NUM_PROCESSES": "two", "PROCESS_ID": "0"}, "JAX_NUM_PROCESSES=two: must be a whole number"),
        ({"COORDINATOR_ADDRESS": "here", "PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS=here: must be host:port"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(monkeypatch, settings, told):
    for name, value in ({"COORDINATOR_ADDRESS": "127.0.0.1:1234"} | settings).items():
        monkeypatch.setenv(f"JAX_{name}", value)
    with pytest.raises(UsageError, match=told):
        join_processes()


@pytest.mark.slow
def test_a_lost_process_ends_the_others_and_the_restart_is_the_unbroken_run(config, data_dir, tmp_path):
    """One run of two: the first is killed, then the second, then one hangs, then one gets SIGTERM, then a disk errs."""
    config = _config(config, 2, steps=60)
    for status, said in Together(2, config, tmp_path, data_dir, "sft", tmp_path / "unbroken").wait():
        assert status == 0, said
    workdir, saved = tmp_path / "broken", 0
    for lost, number, at in ((0, signal.SIGKILL, 10), (1, signal.SIGKILL, 20), (1, signal.SIGSTOP, 30)):
        run = Together(2, config, tmp_path, data_dir, "sft", workdir)
        run.until_step(at, workdir)
        run.processes[lost].send_signal(number)
        began = time.monotonic()
        status, said = run.processes[1 - lost].wait(2 * HEARTBEAT_SECONDS), run.said(1 - lost)
        assert time.monotonic() - began < HEARTBEAT_SECONDS + 10
        assert status in (1, -signal.SIGABRT), said
        assert "another process of this run is gone" in said or "another task died" in said
        run.kill()
        steps = [int(entry.name) for entry in (workdir / "checkpoints").iterdir() if entry.name.isdigit()]
        assert max(steps) > saved
        saved = max(steps)
    run = Together(2, config, tmp_path, data_dir, "sft", workdir)
    run.until_step(40, workdir)
    run.processes[1].terminate()
    for status, said in run.wait():
        assert status == 143, said
        assert "stopped by SIGTERM; the run is saved" in said
    newest = max(int(entry.name) for entry in (workdir / "checkpoints").iterdir() if entry.name.isdigit())
    _flip_a_bit_of_the_largest_file(workdir / "checkpoints" / str(newest))
    for status, said in Together(2, config, tmp_path, data_dir, "sft", workdir).wait():
        assert status == 0, said
        assert f"checkpoints/{newest}: damaged" in said, "both must go on from the same step"
    assert _lines(workdir) == _lines(tmp_path / "unbroken")
    jax.tree.map(
        np.testing.assert_array_equal,
        load_checkpoint(workdir).params,
        load_checkpoint(tmp_path / "unbroken").params,
    )
