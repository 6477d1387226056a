"""A disk that fills up while a run saves: one line says so, and what was saved before still loads."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from apr_jax.config import to_dict
from apr_jax.learn.checkpoint import FOLDER, load_checkpoint
from apr_jax.learn.metrics import FILE
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
    sft = dataclasses.replace(config.learn.sft, steps=12)
    config = dataclasses.replace(config, learn=dataclasses.replace(config.learn, sft=sft))
    file = tmp_path / "config.py"
    file.write_text(
        f"from apr_jax.config import from_dict\n\n\ndef experiment():\n    return from_dict({to_dict(config)!r})\n"
    )
    train_sft(config, data_dir, tmp_path / "unbroken", "apr", progress=False)
    workdir, filler = small_disk / "run", small_disk / "filler"
    filler.write_bytes(bytes(_SIZE - room))
    paths = ["--config", file, "--data", data_dir, "--workdir", workdir]
    command = [sys.executable, "-m", "apr_jax", "train", "sft", *map(str, paths)]
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
    steps = [json.loads(line)["step"] for line in (workdir / FILE).read_text().splitlines()]
    assert steps == list(range(1, 13))
    assert all(entry.name.isdigit() for entry in (workdir / FOLDER).iterdir()), (
        "what was left half saved is cleared away"
    )
