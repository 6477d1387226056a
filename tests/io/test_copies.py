"""Copies of a bucket's folders on this machine: how many stay, and for how long."""

import os
import subprocess
import sys

import pytest

from apr_jax.io import storage

HOLD = """
import sys
from pathlib import Path
from apr_jax.io.storage import _claim

print(_claim(Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """An empty folder of copies, of which this process holds none."""
    monkeypatch.setattr(storage, "_CLAIMED", {})
    return tmp_path


def make_copy(copies, name, age):
    """Makes a copy that was last used `age` seconds after the beginning of time."""
    copy = copies / name
    (copy / "deep").mkdir(parents=True)
    (copy / "deep" / "file").write_text("x")
    os.utime(copy, (age, age))
    return copy


def names(copies):
    return {entry.name for entry in copies.iterdir()}


@pytest.fixture
def holder():
    """Claims a copy in another process, until it is told to end."""
    started = []

    def hold(copy):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(copy)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "True\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_earlier_versions_of_the_folder_are_removed(copies):
    make_copy(copies, "a-1", 10)
    make_copy(copies, "a-2", 30)
    make_copy(copies, "b-1", 20)
    current = make_copy(copies, "a-3", 40)
    storage._remove_old_copies(current)
    assert names(copies) == {"a-3", "b-1"}


def test_of_other_folders_those_used_last_stay(copies):
    for age, name in enumerate("fcbdeg"):
        make_copy(copies, f"{name}-1", age)
    current = make_copy(copies, "a-1", 0)
    storage._remove_old_copies(current)
    assert names(copies) == {"a-1", "d-1", "e-1", "g-1"}


def test_a_copy_that_a_process_uses_stays_until_the_process_ends(copies, holder):
    used = make_copy(copies, "a-1", 10)
    current = make_copy(copies, "a-2", 20)
    process = holder(used)
    storage._remove_old_copies(current)
    assert (used / "deep" / "file").read_text() == "x"

    process.kill()
    process.wait()
    storage._remove_old_copies(current)
    assert names(copies) == {"a-2"}


def test_using_a_copy_is_noted_and_a_missing_one_is_not_claimed(copies):
    copy = make_copy(copies, "a-1", 10)
    assert storage._claim(copy)
    assert copy.stat().st_mtime > 10
    assert not storage._claim(copies / "a-2")


def test_only_old_partial_copies_are_removed(copies):
    """A young one belongs to a process that copies just now."""
    make_copy(copies, ".partial-old", 10)
    (copies / ".partial-young").mkdir()
    current = make_copy(copies, "a-1", 20)
    storage._remove_old_copies(current)
    assert names(copies) == {".partial-young", "a-1"}
