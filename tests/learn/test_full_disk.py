"""A disk that fills up while a run saves: one line says so, and what was saved before still loads."""

import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from whole_runs import changed, logged, train_command, write_config

from apr_jax.learn.checkpoint import FOLDER, load_checkpoint
from apr_jax.learn.sft import train_sft

ROOT = Path(__file__).parents[2]
_SIZE = 3 * 2**20


@pytest.fixture
def small_disk(tmp_path):
    """A file system of _SIZE bytes."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "none", str(path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("room", [450_000, 560_000, 650_000])
def test_a_full_disk_ends_the_run_in_one_line_and_costs_nothing_saved(config, data_dir, tmp_path, small_disk, room):
    """There is room for the first steps (some 200 kB each), not for all; where it ends is another place each time."""
    config = changed(config, sft={"steps": 12})
    file = write_config(config, tmp_path / "config.py")
    train_sft(config, data_dir, tmp_path / "unbroken", "apr", progress=False)
    workdir, filler = small_disk / "run", small_disk / "filler"
    filler.write_bytes(bytes(_SIZE - room))
    command = train_command("sft", file, data_dir, workdir)
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 1, ended.stderr
    *bar, told = [line for line in ended.stderr.splitlines() if line.strip()]
    assert told.startswith(f"apr: error: {workdir}")
    assert told.endswith("the disk is full; make room and start the same command again, what was saved before is kept")
    assert all(line.startswith("sft ") for line in bar), ended.stderr
    last = load_checkpoint(workdir)
    assert 0 < last.step < 12
    filler.unlink()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=240)
    got, expected = load_checkpoint(workdir), load_checkpoint(tmp_path / "unbroken")
    assert got.step == expected.step == 12
    jax.tree.map(np.testing.assert_array_equal, got.params, expected.params)
    steps = [line["step"] for line in logged(workdir)]
    assert steps == list(range(1, 13))
    assert all(entry.name.isdigit() for entry in (workdir / FOLDER).iterdir()), (
        "what was left half saved is cleared away"
    )
