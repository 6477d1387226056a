"""Several real processes train as one: the same curve and parameters, the same end for all, and a
lost one is told.
"""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers.together import ROOT, train
from helpers.whole_runs import Interrupt, assert_close, changed, logged, repeatable

from apr_jax.config import MeshConfig
from apr_jax.errors import UsageError
from apr_jax.io.runtime import HEARTBEAT_SECONDS, join_processes
from apr_jax.train import sft
from apr_jax.train.checkpoint import BEST, FOLDER, load_checkpoint
from apr_jax.train.config import ObjectiveConfig, RewardConfig
from apr_jax.train.rl.trainer import train_rl
from apr_jax.train.sft import train_sft

# Metrics of how the trees of a step are packed into rows. Each process packs its own.
PACKING = ("rows", "padding")


def _config(config, shards, steps=6):
    """A config for `shards` devices whose trees differ in reward: a model this small never hits a
    target, but its tokens have a price.

    Otherwise the gradient of the first step would be rounding, and Adam would make an update of it.
    """
    reward = RewardConfig(token_price=0.01)
    return changed(
        config,
        sft={"batch_rows": 4, "streams": 4, "steps": steps},
        rl={"micro_batch_rows": 4, "reward": reward},
        mesh=MeshConfig(data=shards),
    )


def _assert_rewards_differ(workdir):
    """Every step of RL had a gradient to follow."""
    steps = logged(workdir)[1:]
    assert all(line["zero_std_groups"] < 2 for line in steps), "nothing would be learned"
    assert all(line["grad_norm"] > 1e-2 for line in steps), "rounding would be learned"


def _train_together(count, stages, config, data_dir, tmp_path):
    """The stages by one process with `count` devices, and by `count` processes with one."""
    config = _config(config, count)
    train_sft(config, data_dir, tmp_path / "alone_sft", "apr", progress=False)
    if "rl" in stages:
        train_rl(config, data_dir, tmp_path / "alone_rl", tmp_path / "alone_sft", progress=False)
        _assert_rewards_differ(tmp_path / "alone_rl")
    for stage in stages:
        more = ("--init", tmp_path / "alone_sft") if stage == "rl" else ()
        for status, said in train(
            count, config, tmp_path, data_dir, stage, tmp_path / stage, *more
        ).wait():
            assert status == 0, said
        assert_close(tmp_path / stage, tmp_path / f"alone_{stage}", but=PACKING)


@pytest.mark.thorough
def test_two_processes_train_as_one(config, data_dir, tmp_path):
    _train_together(2, ["sft"], config, data_dir, tmp_path)


@pytest.mark.slow
def test_two_processes_that_share_a_row_train_as_one(config, data_dir, tmp_path):
    """Of six devices two have a row in common: those of the second row are in both processes."""
    config = changed(
        config,
        sft={"batch_rows": 3, "streams": 3, "steps": 4},
        rl={"micro_batch_rows": 3},
        mesh=MeshConfig(data=3, tensor=2),
    )
    train_sft(config, data_dir, tmp_path / "alone", "apr", progress=False)
    devices = {index: {"JAX_NUM_CPU_DEVICES": "3"} for index in range(2)}
    run = train(2, config, tmp_path, data_dir, "sft", tmp_path / "both", environments=devices)
    for status, said in run.wait():
        assert status == 0, said
    assert_close(tmp_path / "both", tmp_path / "alone")


@pytest.mark.slow
def test_two_processes_reinforce_as_one_despite_one_sigterm(config, data_dir, checkpoint, tmp_path):
    """SIGTERM as soon as step 1 is saved, in the rollout of step 2 as a rule: both throw it away,
    and do it again.
    """
    config = changed(_config(config, 2), rl={"steps": 5})
    workdir = tmp_path / "rl"
    train_rl(config, data_dir, tmp_path / "alone", checkpoint, progress=False)
    _assert_rewards_differ(tmp_path / "alone")
    run = train(2, config, tmp_path, data_dir, "rl", workdir, "--init", checkpoint)
    run.until_step(1, workdir)
    run.processes[1].terminate()
    for status, said in run.wait():
        assert status == 143, said
        assert "stopped by SIGTERM; the run is saved" in said
    assert re.search(r"stopped after step [12]; saved in", run.said(0)), "not a whole step more"
    for status, said in train(
        2, config, tmp_path, data_dir, "rl", workdir, "--init", checkpoint
    ).wait():
        assert status == 0, said
    assert_close(workdir, tmp_path / "alone", but=PACKING)


@pytest.mark.slow
def test_two_processes_carry_trees_over_as_one_despite_a_kill(
    config, data_dir, checkpoint, tmp_path
):
    """Which trees a step learns from, and how old their tokens are, is the same in both.

    The run whose first process is killed goes on from its last checkpoint, in which the unfinished
    trees of both are, and ends with the same bits as an unbroken one.
    """
    rl = {"steps": 8, "problems": 4, "max_staleness": 2, "validate_every": 0}
    config = changed(_config(config, 2), rl=rl)
    alone = tmp_path / "alone"
    train_rl(config, data_dir, alone, checkpoint, progress=False)
    assert any(0 < line["older_tokens"] < 1 for line in logged(alone)), "nothing was carried over"
    assert all(line["grad_norm"] > 1e-2 for line in logged(alone)), "rounding would be learned"

    def start(workdir):
        return train(2, config, tmp_path, data_dir, "rl", workdir, "--init", checkpoint)

    for status, said in start(tmp_path / "unbroken").wait(900):
        assert status == 0, said
    assert_close(tmp_path / "unbroken", alone, but=PACKING)

    run = start(tmp_path / "broken")
    run.until_step(3, tmp_path / "broken", 600)
    _until(lambda: _steps(tmp_path / "broken"), run)  # A save goes on while the next step runs.
    _lose(run, 0)
    assert max(_steps(tmp_path / "broken")) < 8
    for status, said in start(tmp_path / "broken").wait(900):
        assert status == 0, said
    assert repeatable(tmp_path / "broken") == repeatable(tmp_path / "unbroken")
    jax.tree.map(
        np.testing.assert_array_equal,
        load_checkpoint(tmp_path / "broken").params,
        load_checkpoint(tmp_path / "unbroken").params,
    )


@pytest.mark.slow
def test_trees_stay_in_the_process_that_grew_them(config, data_dir, checkpoint, tmp_path):
    """Between processes travel some numbers of each tree, the checksums of a checkpoint, and rows
    that one process has too many of.

    A model that cannot break the protocol grows trees of very different size, so the processes have
    unlike numbers of rows. Each has one row of a chunk.
    """
    rl = {
        "steps": 4,
        "problems": 4,
        "group": 4,
        "micro_batch_rows": 2,
        "validate_every": 0,
        "objective": ObjectiveConfig(advantage="none", kl=0.0),
    }
    limits = dataclasses.replace(config.limits, constrain=True)
    config = changed(_config(config, 2), rl=rl, limits=limits)
    train_rl(config, data_dir, tmp_path / "alone", checkpoint, progress=False)

    counted = {index: _counting(tmp_path / f"counting{index}") for index in range(2)}
    more = ("--init", checkpoint)
    run = train(2, config, tmp_path, data_dir, "rl", tmp_path / "both", *more, environments=counted)
    for status, said in run.wait(900):
        assert status == 0, said
    assert_close(tmp_path / "both", tmp_path / "alone", but=PACKING)

    columns = config.limits.max_thread_tokens
    trees = 16 * 18 * config.limits.max_threads * columns
    for index in range(2):
        sizes = [int(line) for line in (tmp_path / f"counting{index}/sent").read_text().split()]
        assert any(size % (26 * columns) == 0 for size in sizes), "no row has moved"
        assert max(sizes) < trees / 8


@pytest.mark.slow
def test_two_processes_make_up_for_a_postponed_validation(config, data_dir, tmp_path, monkeypatch):
    """Both answer, the first completes the line and the checkpoint, and both go on.

    A run of one process had put the validation off.
    """
    config = changed(
        _config(config, 2), sft={"batch_rows": 4, "streams": 4, "steps": 6, "validate_every": 4}
    )
    due = 4
    train_sft(config, data_dir, tmp_path / "alone", "apr", progress=False)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "make_sft_step", Interrupt(sft.make_sft_step, due, signal.SIGTERM))
        with pytest.raises(SystemExit):
            train_sft(config, data_dir, tmp_path / "both", "apr", progress=False)

    def saved():
        return json.loads((tmp_path / "both" / FOLDER / str(due) / "meta" / "metadata").read_text())

    assert saved()["unvalidated"] and not saved()["metrics"]
    for status, said in train(2, config, tmp_path, data_dir, "sft", tmp_path / "both").wait():
        assert status == 0, said
    assert not saved()["unvalidated"] and BEST in saved()["metrics"]
    assert_close(tmp_path / "both", tmp_path / "alone")


@pytest.mark.slow
def test_four_processes_train_as_one(config, data_dir, tmp_path):
    _train_together(4, ["sft", "rl"], config, data_dir, tmp_path)


def _flip_a_bit_of_the_largest_file(folder):
    file = max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"NUM_PROCESSES": "2", "PROCESS_ID": "2"},
            "JAX_PROCESS_ID=2: must be in 0..1, because JAX_NUM_PROCESSES=2",
        ),
        (
            {"NUM_PROCESSES": "two", "PROCESS_ID": "0"},
            "JAX_NUM_PROCESSES=two: must be a whole number",
        ),
        (
            {"COORDINATOR_ADDRESS": "here", "PROCESS_ID": "0"},
            "JAX_COORDINATOR_ADDRESS=here: must be host:port",
        ),
    ],
)
def test_numbers_that_do_not_fit_are_refused(monkeypatch, settings, told):
    for name, value in ({"COORDINATOR_ADDRESS": "127.0.0.1:1234"} | settings).items():
        monkeypatch.setenv(f"JAX_{name}", value)
    with pytest.raises(UsageError, match=told):
        join_processes()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"COORDINATOR_ADDRESS": "127.0.0.1:1234"}, "set JAX_NUM_PROCESSES and JAX_PROCESS_ID too"),
        ({"COORDINATOR_ADDRESS": "127.0.0.1:1234", "NUM_PROCESSES": "2"}, "set JAX_PROCESS_ID too"),
        ({"COORDINATOR_ADDRESS": "127.0.0.1:1234", "PROCESS_ID": "0"}, "set JAX_NUM_PROCESSES too"),
        (
            {"COORDINATOR_ADDRESS": "auto"},
            "JAX_COORDINATOR_ADDRESS=auto: this is no host of a TPU slice",
        ),
    ],
)
def test_numbers_that_are_missing_are_named(settings, told, tmp_path):
    """In a process of its own: JAX joins others before it works at all, or never."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("JAX_")}
    environment |= {f"JAX_{name}": text for name, text in settings.items()}
    code = "from apr_jax.cli.main import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "reproduce",
        "--config",
        "experiments/nano.py",
        "--out",
        tmp_path,
    ]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 2 and told in line


# Until the others have ended, a machine's load included; docs/checkpoints.md names both. A killed
# process breaks connections, which is noticed at once (under a second, as a rule); one that hangs
# keeps them open, and only its heartbeats are missed.
KILLED_SECONDS = 10
HUNG_SECONDS = HEARTBEAT_SECONDS + 5


def _lose(run, index, number=signal.SIGKILL):
    """Kills or stops a process; the others must end by themselves in time, and say why: in our
    line, or in JAX's own.
    """
    run.processes[index].send_signal(number)
    began = time.monotonic()
    deadline = began + (KILLED_SECONDS if number == signal.SIGKILL else HUNG_SECONDS)
    for other in set(range(len(run.processes))) - {index}:
        status = run.processes[other].wait(max(0.0, deadline - time.monotonic()))
        said = run.said(other)
        ours = (
            status == 1
            and f"process {other}: another process of this run is gone; what was saved in" in said
        )
        # Whoever loses the first process, which all report to, or one that hangs, may be ended by
        # JAX before it can speak.
        jaxs = status == -signal.SIGABRT and "another task died" in said
        assert ours or jaxs, (status, said)
        assert ours or other > 0 or number == signal.SIGSTOP, said
    run.kill()


@pytest.mark.slow
def test_restart_after_a_lost_process_equals_unbroken_run(config, data_dir, tmp_path):
    """The loss of one process ends the other.

    One run of two: the first is killed, then the second, then one hangs, then one gets SIGTERM,
    then a disk errs.
    """
    config = _config(config, 2, steps=60)
    for status, said in train(2, config, tmp_path, data_dir, "sft", tmp_path / "unbroken").wait():
        assert status == 0, said
    workdir = tmp_path / "broken"
    saved = 0
    for lost, number, at in (
        (0, signal.SIGKILL, 10),
        (1, signal.SIGKILL, 20),
        (1, signal.SIGSTOP, 30),
    ):
        run = train(2, config, tmp_path, data_dir, "sft", workdir)
        run.until_step(at, workdir)
        _lose(run, lost, number)
        assert max(_steps(workdir)) > saved
        saved = max(_steps(workdir))
    run = train(2, config, tmp_path, data_dir, "sft", workdir)
    run.until_step(40, workdir)
    run.processes[1].terminate()
    for status, said in run.wait():
        assert status == 143, said
        assert "stopped by SIGTERM; the run is saved" in said
    newest = max(_steps(workdir))
    _flip_a_bit_of_the_largest_file(workdir / "checkpoints" / str(newest))
    for status, said in train(2, config, tmp_path, data_dir, "sft", workdir).wait():
        assert status == 0, said
        assert f"checkpoints/{newest}: damaged" in said, "both must go on from the same step"
    assert repeatable(workdir) == repeatable(tmp_path / "unbroken")
    jax.tree.map(
        np.testing.assert_array_equal,
        load_checkpoint(workdir).params,
        load_checkpoint(tmp_path / "unbroken").params,
    )


# A sitecustomize.py: as soon as the module that it names is imported, `change(module)` runs.
_AT_IMPORT = """import sys, time
from importlib import abc, machinery


class Finder(abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "{module}":
            return None
        sys.meta_path.remove(self)
        spec = machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def run(module):
            execute(module)
            change(module)

        spec.loader.exec_module = run
        return spec


sys.meta_path.insert(0, Finder())


"""

_AT_EACH_BATCH = """def change(module):
    take = module.LocalRows.__next__
    module.LocalRows.__next__ = lambda rows: (action(), take(rows))[1]


def action():
    {action}
"""

# Each line of the file `sent`: bytes of what a process gives to a collective of JAX's.
_COUNTING = """def change(module):
    import jax

    def counting(function):
        def count(values, *others, **options):
            with open({file!r}, "a") as file:
                print(sum(leaf.nbytes for leaf in jax.tree.leaves(values)), file=file)
            return function(values, *others, **options)

        return count

    for name in ("process_allgather", "broadcast_one_to_all"):
        setattr(module, name, counting(getattr(module, name)))
"""


def _at_import(folder, module, change):
    """The environment of a process that runs the function `change` on a module when it is
    imported.
    """
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_AT_IMPORT.format(module=module) + change)
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def _at_each_batch(folder, action):
    """The environment of a process that runs the statement `action` before it reads rows."""
    return _at_import(folder, "apr_jax.data.pipeline", _AT_EACH_BATCH.format(action=action))


def _counting(folder):
    """The environment of a process that notes in `folder` how much it sends to the others."""
    change = _COUNTING.format(file=str(folder / "sent"))
    return _at_import(folder, "jax.experimental.multihost_utils", change)


@pytest.mark.slow
def test_a_slow_host_is_named(config, data_dir, tmp_path):
    """One of four reads its data slowly, as from a bad disk."""
    config = _config(config, 4, steps=45)
    slow = {2: _at_each_batch(tmp_path / "slow", "time.sleep(0.3)")}
    ended = train(4, config, tmp_path, data_dir, "sft", tmp_path / "run", environments=slow).wait(
        600
    )
    assert [status for status, _ in ended] == [0] * 4, ended[0][1]
    told = [line for line in ended[0][1].splitlines() if "holds the others up" in line]
    assert len(told) == 1, "once, not every time"
    assert re.match(
        rf"step 21: process 2 \({socket.gethostname()}\) holds the others up: its host works at a"
        r" step",
        told[0],
    )
    assert not any("holds the others up" in said for _, said in ended[1:])


def _steps(workdir):
    folder = workdir / "checkpoints"
    return (
        [int(entry.name) for entry in folder.glob("*") if entry.name.isdigit()]
        if folder.exists()
        else []
    )


def _until(holds, run, seconds=600):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline and all(
            process.poll() is None for process in run.processes
        ), run.all_said()
        time.sleep(0.002)


@pytest.mark.slow
def test_error_of_one_process_ends_the_others(config, data_dir, tmp_path):
    """Not after the minutes for which an orderly end waits for all."""
    config = _config(config, 2, steps=45)
    failing = {1: _at_each_batch(tmp_path / "failing", "raise KeyError('of one process')")}
    run = train(2, config, tmp_path, data_dir, "sft", tmp_path / "run", environments=failing)
    assert run.processes[1].wait(120) == 1, run.said(1)
    assert run.processes[0].wait(KILLED_SECONDS) == 1, run.said(0)
    assert "of one process" in run.said(1)
    assert "process 0: another process of this run is gone" in run.said(0)


@pytest.mark.slow
def test_four_hosts_recover_from_a_lost_one(config, data_dir, tmp_path):
    """A host is lost in a step, in a save and in a rollout.

    Each time all start again from the last checkpoint, and the result is that of the unbroken run,
    to the bit.
    """
    config = _config(config, 4, steps=16)
    rl = dataclasses.replace(config.train.rl, steps=6, save_every=2, validate_every=6)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, rl=rl))

    def start(stage, name):
        more = ("--init", tmp_path / "unbroken_sft") if stage == "rl" else ()
        return train(4, config, tmp_path, data_dir, stage, tmp_path / f"{name}_{stage}", *more)

    for stage in ("sft", "rl"):
        for status, said in start(stage, "unbroken").wait(900):
            assert status == 0, said
    workdir = tmp_path / "broken_sft"
    run = start("sft", "broken")
    run.until_step(3, workdir, 600)
    _lose(run, 3)
    saved = max(_steps(workdir))
    run = start("sft", "broken")
    # A folder without a number is a save under way.
    _until(
        lambda: (
            _steps(workdir)
            and max(_steps(workdir)) > saved
            and len(_steps(workdir)) < _entries(workdir)
        ),
        run,
    )
    _lose(run, 1)
    run = start("sft", "broken")
    _until(lambda: max(_steps(workdir)) >= 8, run)
    run.processes[2].terminate()
    began = time.monotonic()
    for status, said in run.wait(120):
        assert status == 143, said
    assert time.monotonic() - began < _SECONDS_TO_SAVE
    assert re.search(r"stopped after step \d+; saved in \d+\.\d s", run.said(0))
    for status, said in start("sft", "broken").wait(900):
        assert status == 0, said
    workdir = tmp_path / "broken_rl"
    run = start("rl", "broken")
    run.until_step(3, workdir, 600)  # Its line is written when the next rollout is under way.
    _lose(run, 2)
    assert 2 <= max(_steps(workdir)) < 6
    for status, said in start("rl", "broken").wait(900):
        assert status == 0, said
    for stage in ("sft", "rl"):
        broken = tmp_path / f"broken_{stage}"
        unbroken = tmp_path / f"unbroken_{stage}"
        assert repeatable(broken) == repeatable(unbroken)
        jax.tree.map(
            np.testing.assert_array_equal,
            load_checkpoint(broken).params,
            load_checkpoint(unbroken).params,
        )
    # One process of one device, as on a laptop, evaluates what four hosts have trained.
    laptop = [
        sys.executable,
        "-m",
        "apr_jax",
        "eval",
        "--checkpoint",
        tmp_path / "broken_rl",
        "--out",
        tmp_path / "eval",
    ]
    laptop += ["--problems", data_dir / "test.jsonl"]
    alone = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
    subprocess.run(
        list(map(str, laptop)), cwd=ROOT, env=alone, check=True, capture_output=True, timeout=600
    )
    assert json.loads((tmp_path / "eval" / "summary.json").read_text())["n"] > 0


_SECONDS_TO_SAVE = 30  # What Cloud TPU gives a spot slice between notice and end.


def _entries(workdir):
    return len(list((workdir / "checkpoints").iterdir()))
