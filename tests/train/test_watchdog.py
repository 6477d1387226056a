"""A run that does not move is ended, and says where it stands; one that moves never is."""

import json
import os
import re
import subprocess
import sys
import types

import jax
import pytest

from apr_jax.config import ConfigError, override
from apr_jax.train import watchdog
from apr_jax.train.watchdog import FILE, HUNG, Watchdog

HANGS = """
import sys
import time
from pathlib import Path

from apr_jax.train.watchdog import Watchdog


def a_verifier_that_waits_for_ever():
    time.sleep(600)


with Watchdog(Path(sys.argv[1]), 7, factor=1.0, floor=1.0) as watchdog:
    watchdog.ends_step(8)
    a_verifier_that_waits_for_ever()
"""


def test_a_hung_process_says_where_and_ends_with_its_own_status(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == HUNG == 75, ended.stderr
    line = ended.stderr.splitlines()[0]
    assert line.startswith("apr: error: process 0 (")
    assert "the run has not moved for 1 s after step 8, and 1 s are allowed" in line
    assert f"are in {tmp_path}/hang/8.txt; the same command goes on" in line
    kept = (tmp_path / "hang" / "8.txt").read_text()
    for text in (ended.stderr, kept):
        assert "the run has not moved" in text
        assert "in a_verifier_that_waits_for_ever" in text
        assert "in _watch" in text, "the stacks are those of all threads"


def test_a_folder_that_cannot_be_written_does_not_keep_a_hung_process(tmp_path):
    (tmp_path / "file").touch()
    ended = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path / "file")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == HUNG
    assert "in a_verifier_that_waits_for_ever" in ended.stderr


class _Watched:
    """A watchdog whose clock is set by hand, and which tells that it would end the process."""

    def __init__(self, folder, monkeypatch, factor=5.0, floor=10.0):
        self.now = 1000.0
        self.ended = []
        clock = types.SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(watchdog, "time", clock)
        self.dog = Watchdog(folder, 0, factor, floor)
        monkeypatch.setattr(self.dog, "_end", lambda *numbers: self.ended.append(numbers))
        self.steps = 0

    def takes_step(self, seconds):
        self.now += seconds
        self.steps += 1
        self.dog.ends_step(self.steps)

    def stands_still(self, seconds):
        """Lets time pass; returns whether the process was ended meanwhile."""
        for _ in range(round(seconds / watchdog._LOOK_SECONDS)):
            self.dog._look(watchdog._LOOK_SECONDS)
        return bool(self.ended)


@pytest.fixture
def watched(tmp_path, monkeypatch):
    return _Watched(tmp_path, monkeypatch)


def test_before_the_median_is_known_the_floor_counts(watched):
    assert not watched.stands_still(9.8)
    watched.dog.moves()
    assert not watched.stands_still(9.8)
    assert watched.stands_still(0.6)


def test_a_run_may_stand_still_for_so_many_median_steps(watched):
    """The first step of a start compiles and does not count; a slow one moves no median."""
    for seconds in (100, 4, 4, 50):
        watched.takes_step(seconds)
    assert not watched.stands_still(19.8)
    assert watched.stands_still(0.6)


def test_validations_and_saves_are_no_part_of_a_step(watched):
    watched.takes_step(100)
    for _ in range(3):
        with watched.dog.aside():
            watched.now += 1000
        watched.takes_step(1)
    assert not watched.stands_still(9.8)
    assert watched.stands_still(0.6)


def test_a_process_that_was_stopped_itself_is_not_ended(watched):
    """As after SIGSTOP and SIGCONT: the clock went on, and the run could not."""
    watched.dog._look(3600.0)
    assert not watched.ended
    assert watched.stands_still(10.2)


def test_time_and_step_are_on_disk(watched, tmp_path):
    watched.takes_step(100)
    watched.takes_step(20)
    found = json.loads((tmp_path / FILE).read_text())
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC", found["time"])
    assert (found["step"], found["median_seconds"], found["limit_seconds"]) == (2, 20, 100)
    assert found["pid"] == os.getpid()

    watched.takes_step(9)
    assert json.loads((tmp_path / FILE).read_text())["step"] == 2, "it is written now and then"
    watched.takes_step(2)
    assert json.loads((tmp_path / FILE).read_text())["step"] == 4


def test_the_last_step_is_on_disk_at_the_end(tmp_path):
    with Watchdog(tmp_path, 3, factor=20.0, floor=600.0) as dog:
        assert json.loads((tmp_path / FILE).read_text())["step"] == 3
        for step in (4, 5):
            dog.ends_step(step)
    assert json.loads((tmp_path / FILE).read_text())["step"] == 5


def test_each_process_has_a_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    _Watched(tmp_path, monkeypatch).takes_step(1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["heartbeat.process1.json"]


@pytest.mark.parametrize("setting", ["train.hang_factor=0", "train.hang_seconds=inf"])
def test_watching_cannot_be_turned_off(config, setting):
    with pytest.raises(ConfigError, match=rf"{setting.partition('=')[0]}=.* must be at least 1"):
        override(config, [setting])
