"""The lease of a folder: one writer, whoever comes second is told who the first is, and nobody
waits for the dead.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from apr_jax.errors import LostLease, UserError
from apr_jax.io import lease
from apr_jax.io.lease import FILE, Lease

# Takes the lease when the file is there, and says how it went; holds it until its input ends.
_HOLDER = """
import sys, time
from pathlib import Path
from apr_jax.errors import UserError
from apr_jax.io.lease import Lease

folder, start = map(Path, sys.argv[1:])
print("ready", flush=True)
while not start.exists():
    time.sleep(0.001)
try:
    with Lease(folder, "training"):
        print("holds", flush=True)
        sys.stdin.read()
except UserError as error:
    print(error, flush=True)
"""


class _Holder:
    """Another process that takes the lease of a folder."""

    def __init__(self, folder, start):
        command = [sys.executable, "-c", _HOLDER, str(folder), str(start)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.said() == "ready"

    def said(self):
        return self.process.stdout.readline().strip()

    def end(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(20)


@pytest.fixture
def holders():
    """Starts holders, and ends what is left of them."""
    started = []

    def start(folder, at):
        started.append(_Holder(folder, at))
        return started[-1]

    yield start
    for holder in started:
        holder.process.kill()
        holder.end()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def quick(monkeypatch):
    """Signs of life are given, and waited for, for a hundredth of the time."""
    for name in ("BEAT_SECONDS", "STALE_SECONDS", "_LOOK_SECONDS"):
        monkeypatch.setattr(lease, name, getattr(lease, name) / 100)


def _take(folder):
    with Lease(folder, "training"):
        return json.loads((folder / FILE).read_text())


def _elsewhere(folder, **changes):
    """Leaves the lease of a process of another host in the folder."""
    holder = _take(folder) | {"host": "alpha", "machine": "alpha", "pid": 7} | changes
    (folder / FILE).write_text(json.dumps(holder))
    return holder


def test_lease_names_its_writer_and_is_removed(folder):
    with Lease(folder, "training"):
        found = json.loads((folder / FILE).read_text())
        assert (found["pid"], found["what"]) == (os.getpid(), "training")
        assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC", found["since"])
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit(143)])
def test_lease_is_removed_after_error_or_signal(folder, error):
    with pytest.raises((ValueError, KeyboardInterrupt, SystemExit)), Lease(folder, "training"):
        raise error
    assert list(folder.iterdir()) == []


def test_of_starts_at_once_exactly_one_wins(folder, tmp_path, holders):
    start = tmp_path / "start"
    started = [holders(folder, start) for _ in range(5)]
    start.touch()
    said = [holder.said() for holder in started]
    winner = said.index("holds")
    refused = said[:winner] + said[winner + 1 :]
    told = (
        rf"{folder}: is being written by process {started[winner].process.pid} on host .*"
        r" \(training, since .* UTC\), "
    )
    assert all(re.match(told, line) for line in refused), said
    with pytest.raises(UserError, match=told), Lease(folder, "training"):
        pass
    started[winner].end()
    _take(folder)


def test_a_killed_run_starts_again_at_once(folder, tmp_path, holders):
    """Though nobody has fetched the dead one's status yet, so that its number is still taken."""
    holder = holders(folder, tmp_path)
    assert holder.said() == "holds"
    holder.process.kill()
    while Path(f"/proc/{holder.process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    began = time.monotonic()
    _take(folder)
    assert time.monotonic() - began < 2


def test_a_run_that_is_stopped_still_holds_its_folder(folder, tmp_path, holders):
    holder = holders(folder, tmp_path)
    assert holder.said() == "holds"
    holder.process.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match="is being written by process"), Lease(folder, "training"):
        pass
    holder.process.send_signal(signal.SIGCONT)


def test_reused_process_number_is_no_sign_of_life(folder):
    _elsewhere(folder, machine=lease._machine(), pid=os.getppid(), started="1")
    assert _take(folder)["pid"] == os.getpid()


def test_of_another_host_signs_of_life_are_waited_for(folder, quick, capsys):
    """The clocks of the two have nothing to do with each other: the lease is of tomorrow."""
    _elsewhere(folder)
    tomorrow = time.time() + 86_400
    os.utime(folder / FILE, (tomorrow, tomorrow))
    began = time.monotonic()
    assert _take(folder)["pid"] == os.getpid()
    assert time.monotonic() - began >= lease.STALE_SECONDS
    told = capsys.readouterr().err
    assert (
        told.count("\n") == 1
        and f"{folder}: is held by process 7 on host alpha (training, since" in told
    )


def test_live_lease_of_another_host_refuses_start(folder, quick):
    """That it lives is seen from its beats, since no process number tells it across hosts."""
    _elsewhere(folder)
    ended = threading.Event()

    def live():
        while not ended.wait(lease.BEAT_SECONDS):
            os.utime(folder / FILE)

    beating = threading.Thread(target=live)
    beating.start()
    try:
        with (
            pytest.raises(UserError, match="is being written by process 7 on host alpha"),
            Lease(folder, "training"),
        ):
            pass
    finally:
        ended.set()
        beating.join()


def test_a_lease_gives_signs_of_life(folder, quick):
    with Lease(folder, "training") as held:
        before = (folder / FILE).stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while (folder / FILE).stat().st_mtime_ns == before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (folder / FILE).stat().st_mtime_ns > before
        held.check()


@pytest.mark.parametrize(
    ("happens", "told"),
    [
        (lambda folder: _write_another(folder), "was taken over by process 7 on host alpha"),
        (
            lambda folder: shutil.rmtree(folder),
            f"its {FILE} is gone: the folder was deleted or moved",
        ),
        (lambda folder: (folder / FILE).unlink(), f"its {FILE} is gone"),
    ],
    ids=["taken over", "folder gone", "lease gone"],
)
def test_run_that_lost_its_folder_touches_nothing(folder, happens, told):
    """It is told so, as when its host slept while another one took the folder over."""
    with Lease(folder, "training") as held:
        held.check()
        happens(folder)
        left = (folder / FILE).read_text() if (folder / FILE).exists() else None
        held._alive_at -= 3 * lease.BEAT_SECONDS
        with pytest.raises(LostLease, match=told):
            held.check()
    assert left == ((folder / FILE).read_text() if (folder / FILE).exists() else None)


def _write_another(folder):
    holder = json.loads((folder / FILE).read_text()) | {"host": "alpha", "pid": 7}
    (folder / FILE).write_text(json.dumps(holder))


def test_lease_that_cannot_be_renewed_is_given_up(folder, monkeypatch):
    """A few missed beats are not enough for that."""
    with Lease(folder, "training") as held:
        monkeypatch.setattr(
            held._store, "beat", lambda *arguments: (_ for _ in ()).throw(OSError("no network"))
        )
        held._alive_at -= 2.5 * lease.BEAT_SECONDS
        held.check()
        held._alive_at -= lease.STALE_SECONDS
        with pytest.raises(LostLease, match="could not be renewed for 60 s"):
            held.check()


def test_parts_of_the_same_work_share_it(folder):
    """As `apr reproduce --data OUT` builds data in its own folder."""
    with Lease(folder, "reproduce"):
        with Lease(folder, "data build") as inner:
            inner.check()
        assert json.loads((folder / FILE).read_text())["what"] == "reproduce"
    assert list(folder.iterdir()) == []


def test_a_damaged_lease_is_one_of_an_unknown_process(folder, quick, capsys):
    folder.mkdir()
    (folder / FILE).write_text("{")
    _take(folder)
    assert "is held by an unknown process" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="file/run: cannot write"),
        Lease(tmp_path / "file" / "run", "training"),
    ):
        pass
