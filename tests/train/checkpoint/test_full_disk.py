"""A disk that takes no more, being full or read-only: one line says so, at once, and what was saved
before still loads.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.whole_runs import changed, repeatable, train_command, write_config

from apr_jax.errors import DiskError
from apr_jax.text.sentence_piece import SentencePieceTokenizer
from apr_jax.train.checkpoint import FOLDER, Checkpoints, Run, last_step, load_checkpoint
from apr_jax.train.rl.trainer import train_rl
from apr_jax.train.sft import train_sft

ROOT = Path(__file__).parents[3]
_SIZE = 3 * 2**20


@pytest.fixture
def small_disk(tmp_path):
    """A file system of _SIZE bytes: mounted as root, or as anyone in a name space of a process that
    holds it.
    """
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "none", str(path)]
    as_root = subprocess.run(mount, capture_output=True, text=True)
    if not as_root.returncode:
        yield path
        subprocess.run(["umount", str(path)], check=True)
        return
    pipes = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    held = [
        "unshare",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        '"$@" && echo mounted && exec cat',
        "sh",
        *mount,
    ]
    with subprocess.Popen(
        held, **pipes
    ) as holder:  # On leaving, its input is closed: it ends, and with it the disk.
        told = holder.stdout.readline()
        if told != "mounted\n":
            pytest.skip(
                f"no small disk can be mounted here: {as_root.stderr.strip()}; in a name space:"
                f" {told.strip()}"
            )
        yield Path(f"/proc/{holder.pid}/root{path}")


# A command that saves a step, after which the disk is read-only, and another one.
_SAVE_TWICE = """
import subprocess, sys
from pathlib import Path
import jax.numpy as jnp
from apr_jax.cli import main as cli
from apr_jax.config import load
from apr_jax.text.sentence_piece import SentencePieceTokenizer
from apr_jax.train.checkpoint import Checkpoints, Run
from apr_jax.train.state import TrainState

config, workdir, remount = load(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3:]


def save_twice():
    run = Run(config, "apr", "sft", SentencePieceTokenizer.train(["0123456789"]))
    with Checkpoints(workdir, run) as checkpoints:
        for number in (2, 4):
            counts = [jnp.asarray(number, jnp.int32)] * 3
            checkpoints.save(TrainState({"w": jnp.zeros(3)}, (), *counts), {}, {})
            checkpoints.wait()
            subprocess.run(remount, check=True)


cli.app.command("save-twice")(save_twice)
sys.exit(cli.run(["save-twice"]))
"""


@pytest.fixture
def read_only(small_disk):
    """A command that makes the small disk read-only; its files are kept."""
    if str(small_disk).startswith("/proc/"):
        pytest.skip("only root may mount again")
    return ["mount", "-o", "remount,ro", str(small_disk)]


def test_unwritable_checkpoints_folder_ends_run_before_first_step(
    config, tmp_path, small_disk, read_only
):
    """The rest of the workdir may be written."""
    (small_disk / FOLDER).mkdir()
    (tmp_path / FOLDER).symlink_to(small_disk / FOLDER)
    subprocess.run(read_only, check=True)
    run = Run(config, "apr", "sft", SentencePieceTokenizer.train(["0123456789"]))
    began = time.monotonic()
    with pytest.raises(
        DiskError, match=rf"{tmp_path / FOLDER}: cannot write \(Read-only file system\)"
    ):
        Checkpoints(tmp_path, run)
    assert time.monotonic() - began < 5


def test_read_only_disk_ends_run_in_one_line(config, tmp_path, small_disk, read_only):
    """It becomes so in the middle of the run, which ends at once."""
    file = write_config(config, tmp_path / "config.py")
    began = time.monotonic()
    command = [sys.executable, "-c", _SAVE_TWICE, str(file), str(small_disk / "run"), *read_only]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert time.monotonic() - began < 60, "no barrier of Orbax's is waited for"
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"apr: error: {small_disk / 'run' / FOLDER}: cannot write (")
    assert ended.returncode == 1
    assert last_step(small_disk / "run").name == "2"


def _bytes_on_disk(folder):
    """What the files below the folder take of a disk with blocks of a page."""
    page = os.sysconf("SC_PAGE_SIZE")
    files = [entry for entry in folder.rglob("*") if entry.is_file()]
    return sum(-(-entry.stat().st_size // page) * page for entry in files)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "share"), [("sft", 0.65), ("sft", 0.8), ("sft", 0.95), ("rl", 0.95)]
)
def test_full_disk_ends_run_without_losing_checkpoints(
    config, data_dir, checkpoint, tmp_path, small_disk, stage, share
):
    """The run ends in one line.

    There is room for a share of what the unbroken run leaves on disk: for the first steps, not for
    all; where the run ends is another place each time.
    """
    config = changed(config, sft={"steps": 12}, rl={"steps": 12})
    file = write_config(config, tmp_path / "config.py")
    unbroken = tmp_path / "unbroken"
    workdir = small_disk / "run"
    filler = small_disk / "filler"
    if stage == "sft":
        train_sft(config, data_dir, unbroken, "apr", progress=False)
    else:
        train_rl(config, data_dir, unbroken, checkpoint, progress=False)
    filler.write_bytes(bytes(_SIZE - int(share * _bytes_on_disk(unbroken))))
    command = train_command(
        stage, file, data_dir, workdir, *(("--init", checkpoint) if stage == "rl" else ())
    )
    # In a narrow terminal the bar of RL loses the name of the stage.
    wide = os.environ | {"COLUMNS": "200"}
    ended = subprocess.run(command, cwd=ROOT, env=wide, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 1, ended.stderr
    *bar, told = [line for line in ended.stderr.splitlines() if line.strip()]
    assert told.startswith(f"apr: error: {workdir}")
    assert told.endswith(
        "the disk is full; make room and start the same command again, what was saved before is"
        " kept"
    )
    assert all(line.startswith(f"{stage} ") for line in bar), ended.stderr
    last = load_checkpoint(last_step(workdir))
    assert 0 < last.step < 12
    filler.unlink()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=240)
    got, expected = (load_checkpoint(last_step(run)) for run in (workdir, unbroken))
    assert got.step == expected.step == 12
    jax.tree.map(np.testing.assert_array_equal, got.params, expected.params)
    assert repeatable(workdir) == repeatable(unbroken)
    assert all(entry.name.isdigit() for entry in (workdir / FOLDER).iterdir()), (
        "what was left half saved is cleared away"
    )
