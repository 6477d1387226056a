"""Real runs that hang end with a status of their own, and the same command goes on."""

import dataclasses
import json
import signal
import subprocess
from pathlib import Path

import pytest
from helpers.together import train
from helpers.whole_runs import changed, logged, train_command, write_config

from apr_jax.config import MeshConfig
from apr_jax.data.build import build
from apr_jax.tasks import TaskConfig
from apr_jax.train.config import RewardConfig
from apr_jax.train.watchdog import FILE, HUNG

pytestmark = pytest.mark.slow  # They wait for as long as a run may stand still.

ROOT = Path(__file__).parents[2]
# A task whose score waits for as long as there is a file.
WAITS = """
import time
from pathlib import Path

from apr_jax.tasks.countdown.task import Countdown


class Waits(Countdown):
    def score(self, problem, answer):
        while Path({flag!r}).exists():
            time.sleep(0.1)
        return super().score(problem, answer)
"""


@pytest.fixture
def flag(tmp_path):
    """The file for which scores wait; it is gone at the end, so that nothing waits for ever."""
    path = tmp_path / "wait"
    yield path
    path.unlink(missing_ok=True)


def test_a_verifier_that_never_answers_ends_the_run(config, flag, tmp_path):
    """Its bound on the time of a score, which ends most hangs, is too long to help."""
    task = tmp_path / "waits.py"
    task.write_text(WAITS.format(flag=str(flag)))
    waiting = dataclasses.replace(
        changed(config, sft={"validate_every": 4}, rl={"reward": RewardConfig(time_limit=3600.0)}),
        task=TaskConfig(f"{task}:Waits", **dataclasses.asdict(config.task.options)),
    )
    data = tmp_path / "data"
    build(waiting, data, methods=("apr",), progress=False, workers=1)
    flag.touch()  # Only now, because a build scores its demonstrations.
    workdir = tmp_path / "run"
    command = train_command("sft", write_config(waiting, tmp_path / "config.py"), data, workdir)

    ended = subprocess.run(
        [*command, "--set", "train.hang_seconds=60"], cwd=ROOT, capture_output=True, timeout=600
    )
    said = ended.stderr.decode()
    assert ended.returncode == HUNG, said
    assert "the run has not moved for 60 s after step 3" in said
    stacks = (workdir / "hang" / "3.txt").read_text()
    assert "sandbox.py" in stacks and "in verify" in stacks, "that is where it hangs"
    assert json.loads((workdir / FILE).read_text())["limit_seconds"] == 60
    assert logged(workdir)[-1]["step"] < 4

    flag.unlink()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    assert logged(workdir)[-1]["step"] == config.train.sft.steps
    assert "validation_accuracy" in logged(workdir)[-1]


def test_a_collective_that_waits_for_ever_ends_the_run(config, data_dir, tmp_path):
    """One of two processes is stopped.

    JAX would miss its heartbeats after 30 s. It would not if only the thread that trains stood
    still, which is what the other process sees here.
    """
    two = changed(
        config,
        sft={"batch_rows": 4, "streams": 4, "steps": 100_000, "save_every": 20},
        mesh=MeshConfig(data=2),
    )
    # What compiles is kept on disk, so that the next start has no slow step. A run of fewer steps
    # would not do: its learning rates are in the program.
    first = train(2, two, tmp_path, data_dir, "sft", tmp_path / "first")
    first.until_step(4, tmp_path / "first")
    first.processes[0].send_signal(signal.SIGTERM)
    assert [status for status, _ in first.wait()] == [143, 143]

    workdir = tmp_path / "run"
    run = train(2, two, tmp_path, data_dir, "sft", workdir, "--set", "train.hang_seconds=15")
    run.until_step(30, workdir)
    run.processes[1].send_signal(signal.SIGSTOP)
    try:
        status = run.processes[0].wait(60)
    finally:
        run.kill()
    said = run.said(0)
    assert status == HUNG, said
    assert "process 0 (" in said and "the run has not moved for 15 s" in said
    (stacks,) = (workdir / "hang").iterdir()
    assert stacks.name.endswith(".process0.txt") and "train/loop.py" in stacks.read_text()

    run = train(2, two, tmp_path, data_dir, "sft", workdir)
    step = int(stacks.name.partition(".")[0])
    run.until_step(step + 5, workdir)
    run.processes[0].send_signal(signal.SIGTERM)
    assert [status for status, _ in run.wait()] == [143, 143]
