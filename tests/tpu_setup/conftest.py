"""What several tests of the scripts need: the cloud that is ours, and a true wheel."""

import subprocess
import sys

import pytest
from clouds import ROOT, Cloud


@pytest.fixture
def cloud(tmp_path):
    folder = tmp_path / "cloud"
    folder.mkdir()
    return Cloud(folder)


@pytest.fixture(scope="session")
def wheel():
    """The wheel of this tree, as `make wheel` makes it."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        "dist",
        ".",
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    return max((ROOT / "dist").glob("apr_jax-*.whl"), key=lambda path: path.stat().st_mtime)
