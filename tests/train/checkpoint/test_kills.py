"""One run that is killed again and again, at any moment, ends like a run that nobody touched: to
the bit, line for line.
"""

import json
import os
import pty
import random
import select
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.whole_runs import changed, repeatable, train_command, write_config

from apr_jax.train.checkpoint import FOLDER, load_checkpoint
from apr_jax.train.config import RewardConfig
from apr_jax.train.metrics.recorder import FILE
from apr_jax.train.rl.trainer import train_rl
from apr_jax.train.sft import train_sft

ROOT = Path(__file__).parents[3]
_SFT_STEPS = 300
_RL_STEPS = 120
# How a life of the process ends: signal, and when it comes.
_ENDS = [
    (signal.SIGKILL, "any time"),
    (signal.SIGTERM, "any time"),
    (signal.SIGKILL, "during a save"),
    (signal.SIGTERM, "during a save"),
]
_SFT_ENDS = [
    *_ENDS,
    (signal.SIGKILL, "at the start"),
    *_ENDS,
    (signal.SIGTERM, "at the start"),
    *_ENDS,
]
_RL_ENDS = [*_ENDS, (signal.SIGKILL, "at the start"), *_ENDS]


@pytest.fixture(scope="module")
def long_config(config):
    """The RL of it has two PPO epochs, and a price of tokens that is another one after each
    step.
    """
    reward = RewardConfig(token_price=0.01, token_budget=40, price_step=0.0007)
    rl = {"steps": _RL_STEPS, "save_every": 2, "validate_every": 7, "reward": reward}
    return changed(config, sft={"steps": _SFT_STEPS, "save_every": 3}, rl=rl)


@pytest.fixture(scope="module")
def config_file(long_config, tmp_path_factory):
    return write_config(long_config, tmp_path_factory.mktemp("config") / "long.py")


def _step(workdir):
    """The last whole line's."""
    if not (workdir / FILE).exists():
        return -1
    whole = (workdir / FILE).read_text().rpartition("\n")[0]
    return json.loads(whole.splitlines()[-1])["step"] if whole else -1


def _saving(workdir):
    return any(not entry.name.isdigit() for entry in (workdir / FOLDER).glob("*"))


def _live_and_die(command, workdir, number, when, draw):
    """Starts the command, and sends it the signal; returns its exit status, whether a save was
    under way, and its words.
    """
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    saving = False
    try:
        if when == "at the start":
            time.sleep(draw.uniform(0.5, 4))
        else:
            began = time.monotonic()
            wanted = _step(workdir) + draw.randint(2, 9)
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
    draw = random.Random(len(ends))
    during_saves = 0
    for number, when in ends:
        status, saving, said = _live_and_die(command, workdir, number, when, draw)
        during_saves += saving
        assert saving or when != "during a save"
        # No handler yet: there is nothing to save.
        if number == signal.SIGKILL or when == "at the start":
            assert status in (-number, 143), said
        else:
            assert status == 143, said
            assert "stopped by SIGTERM; the run is saved" in said
            assert max(
                int(entry.name) for entry in (workdir / FOLDER).glob("*") if entry.name.isdigit()
            ) == _step(workdir)
        assert _step(workdir) < steps, "the run ended before the kills did"
    assert during_saves >= sum(when == "during a save" for _, when in ends)
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=240)


def _assert_same_run(broken, unbroken, steps):
    assert repeatable(broken) == repeatable(unbroken)
    metas = [
        json.loads((run / FOLDER / str(steps) / "meta" / "metadata").read_text())
        for run in (broken, unbroken)
    ]
    assert metas[0]["sums"] == metas[1]["sums"], "parameters and optimizer"
    assert metas[0]["data_sum"] == metas[1]["data_sum"], "place in the data"
    last = [load_checkpoint(run / FOLDER / str(steps)).params for run in (broken, unbroken)]
    jax.tree.map(np.testing.assert_array_equal, *last)


@pytest.mark.slow
def test_sft_survives_being_killed_14_times(long_config, config_file, data_dir, tmp_path):
    assert len(_SFT_ENDS) == 14
    train_sft(long_config, data_dir, tmp_path / "unbroken", "apr", progress=False)
    workdir = tmp_path / "broken"
    command = train_command("sft", config_file, data_dir, workdir)
    _survive(_SFT_ENDS, command, workdir, _SFT_STEPS)
    _assert_same_run(workdir, tmp_path / "unbroken", _SFT_STEPS)


@pytest.mark.slow
def test_rl_survives_being_killed_9_times(long_config, config_file, data_dir, checkpoint, tmp_path):
    assert len(_RL_ENDS) == 9
    train_rl(long_config, data_dir, tmp_path / "unbroken", checkpoint, progress=False)
    workdir = tmp_path / "broken"
    command = train_command("rl", config_file, data_dir, workdir, "--init", checkpoint)
    _survive(_RL_ENDS, command, workdir, _RL_STEPS)
    _assert_same_run(workdir, tmp_path / "unbroken", _RL_STEPS)


@pytest.mark.slow
def test_sft_saves_when_its_terminal_is_closed(long_config, data_dir, tmp_path, request):
    """A real terminal, of which the other end goes away: SIGHUP, and every word to it fails."""
    config = changed(long_config, sft={"steps": 100_000, "save_every": 100_000})
    file = write_config(config, tmp_path / "config.py")
    workdir = tmp_path / "run"
    command = train_command("sft", file, data_dir, workdir)
    terminal, end_of_child = pty.openpty()
    # A session's first process that opens a terminal gets it as its controlling one. The shell does
    # so in the child: to fork this process, which runs JAX's threads, could deadlock.
    opening = ["sh", "-c", 'exec "$@" <>"$0" >&0 2>&0', os.ttyname(end_of_child), *command]
    # If the tests run under nohup, the child must not be deaf to SIGHUP as they are.
    ours = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    child = subprocess.Popen(opening, cwd=ROOT, start_new_session=True)
    signal.signal(signal.SIGHUP, ours)
    request.addfinalizer(child.kill)  # It would train for hours if the test failed.
    deadline = time.monotonic() + 240
    while _step(workdir) < 5 and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 4096)  # Else the bar would fill it up.
    os.close(end_of_child)
    os.close(terminal)
    assert child.wait(timeout=240) == 129
    saved = [int(entry.name) for entry in (workdir / FOLDER).iterdir() if entry.name.isdigit()]
    assert max(saved) == _step(workdir) >= 5
    assert not (workdir / "lease.json").exists()


@pytest.mark.slow
def test_one_of_two_simultaneous_trainings_goes_on_unharmed(
    long_config, config_file, data_dir, tmp_path
):
    """The other ends with one line; a third one, later, too.

    What the first one writes is that of a run that was alone.
    """
    train_sft(long_config, data_dir, tmp_path / "alone", "apr", progress=False)
    workdir = tmp_path / "run"
    command = train_command("sft", config_file, data_dir, workdir)
    pipes = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    two = [subprocess.Popen(command, **pipes) for _ in range(2)]
    while _step(workdir) < 5 and any(process.poll() is None for process in two):
        time.sleep(0.01)
    third = subprocess.run(command, **pipes, check=False, timeout=240)
    said = [process.communicate(timeout=240)[0] for process in two]
    assert sorted(process.returncode for process in two) == [0, 1], said
    refused = next(words for words, process in zip(said, two, strict=True) if process.returncode)
    for status, words in ((1, refused), (third.returncode, third.stdout)):
        (line,) = words.splitlines()
        assert status == 1 and line.startswith(
            f"apr: error: {workdir}: is being written by process "
        )
    _assert_same_run(workdir, tmp_path / "alone", _SFT_STEPS)


# `apr`, killed as soon as a function of RL, made by the maker that is named, has been called so
# many times: what it is to compute is then queued, and nobody has waited for it.
_KILLED_INSIDE = """
import os, signal, sys
from apr_jax.cli import main as cli
from apr_jax.train import grader
from apr_jax.train.rl import trainer

maker, left = sys.argv.pop(1), int(sys.argv.pop(1))
module = trainer if maker == "make_rl_step" else grader
make = getattr(module, maker)

def make_deadly(*settings):
    function = make(*settings)

    def deadly(*values):
        global left
        left -= 1
        result = function(*values)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return deadly

setattr(module, maker, make_deadly)
cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("max_staleness", "rollout", "calls"),
    # The first policy is validated by one rollout, so the fifth is that of step 4. With carry-over,
    # the rollouts of the steps are made by another maker.
    [(0, "make_policy_rollout", 5), (2, "make_policy_carry_over", 4)],
    ids=["whole trees", "carry-over"],
)
def test_rl_survives_being_killed_inside_a_step(
    long_config, data_dir, checkpoint, tmp_path, max_staleness, rollout, calls
):
    """During a rollout, between the two updates on a forest, and after them, before the price of a
    token moves on.

    With carry-over the trees under way are those of the last checkpoint.
    """
    config = changed(long_config, rl={"steps": 10, "max_staleness": max_staleness})
    steps = 10
    train_rl(config, data_dir, tmp_path / "unbroken", checkpoint, progress=False)
    prices = [line["token_price"] for line in repeatable(tmp_path / "unbroken")[1:]]
    assert len(set(prices)) == steps and config.train.rl.ppo_epochs == 2
    workdir = tmp_path / "broken"
    file = write_config(config, tmp_path / "config.py")
    python, _, _, *arguments = train_command("rl", file, data_dir, workdir, "--init", checkpoint)
    for maker, count in ((rollout, calls), ("make_rl_step", 5), ("make_rl_step", 6)):
        command = [python, "-c", _KILLED_INSIDE, maker, str(count), *arguments]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=240)
        assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
        assert 0 < _step(workdir) < steps
    subprocess.run(
        [python, "-m", "apr_jax", *arguments],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=240,
    )
    _assert_same_run(workdir, tmp_path / "unbroken", steps)
    if max_staleness:
        assert any(line["carried_trees"] for line in repeatable(workdir)[1:])


# `apr`, with a signal to itself at the first update that makes a validation due, or at the end of
# that validation at the next start, before or after its scores stand in the file that is named
# (which may be replaced before, too).
_KILLED_AT_A_VALIDATION = """
import os, signal, sys
from apr_jax.cli import main as cli
from apr_jax.train.rl import trainer

file, when, left, due = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1)), int(sys.argv.pop(1))
make, replace = trainer.make_rl_step, os.replace

def make_stopped(*settings):
    step = make(*settings)

    def stopped(state, *rest):
        global left
        if int(state.step) + 1 == due and left:  # Once: a second signal ends it at once.
            left = 0
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, *rest)

    return stopped

def deadly(source, target):
    global left
    left -= str(target).endswith(file)
    if left == 0:
        if when == "after":
            replace(source, target)
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(source, target)

if file == "none":
    trainer.make_rl_step = make_stopped
else:
    os.replace = deadly
cli.main()
"""


@pytest.mark.slow
def test_making_up_for_a_validation_survives_kills(long_config, data_dir, checkpoint, tmp_path):
    """SIGTERM at a step that is due for it, then SIGKILL around each of the two files in which its
    scores go.
    """
    config = changed(long_config, rl={"steps": 10})
    due = 7
    steps = 10
    train_rl(config, data_dir, tmp_path / "unbroken", checkpoint, progress=False)
    workdir = tmp_path / "broken"
    file = write_config(config, tmp_path / "config.py")
    python, _, _, *arguments = train_command("rl", file, data_dir, workdir, "--init", checkpoint)
    ends = [("none", "-", "1", 143)]
    # The metrics are cut at the start, which replaces them once.
    files = ((FILE, "2"), ("metadata", "1"))
    ends += [
        (name, when, left, -signal.SIGKILL) for name, left in files for when in ("before", "after")
    ]
    for *end, status in ends:
        command = [python, "-c", _KILLED_AT_A_VALIDATION, *end, str(due), *arguments]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=240)
        assert ended.returncode == status, ended.stderr.decode()
        assert (
            max(int(entry.name) for entry in (workdir / FOLDER).iterdir() if entry.name.isdigit())
            == due
        )
    subprocess.run(
        [python, "-m", "apr_jax", *arguments],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=240,
    )
    _assert_same_run(workdir, tmp_path / "unbroken", steps)
