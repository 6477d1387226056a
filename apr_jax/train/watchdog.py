"""Ends a run whose step does not move any more, so that whoever looks after it starts it again.

    WORKDIR/heartbeat.json    the last step, when it ended, how long a step takes
    WORKDIR/hang/<step>.txt   where every thread stood when the run was ended

A process that dies is noticed by its cluster, and by the other processes of the run. A process that
hangs is noticed by nobody: a verifier waits for ever, a collective waits for a process that waits
for something else, a disk does not answer. It lives, its heartbeats come, and its devices cost.

The life of a watchdog:
1. Whatever shows that the run moves resets its clock: the end of a step, of a rollout, of a batch
   of a validation, of a save. The time of a step is the median of the last ones; validations, saves
   and the first step of a start, which compiles, do not count.
2. A thread looks at the clock. If the run did not move for `factor` median steps, and for `floor`
   seconds at least, which leave room for what compiles, saves or evaluates, the thread writes the
   stacks of all threads to standard error and into the run's folder, and ends the process with exit
   status `HUNG`. The main thread hangs, so there can be no orderly end; the run goes on from its
   last save.

Code that hangs while it keeps the interpreter's lock stops the watchdog too. Then the time in
heartbeat.json stands still.
"""

import collections
import datetime
import faulthandler
import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import jax

from apr_jax.errors import UserError
from apr_jax.io.json_files import write_json
from apr_jax.io.lease import Lease
from apr_jax.io.storage import is_remote, write_text

HUNG = 75  # Exit status of a run that was ended for not moving: EX_TEMPFAIL, "try again".
FILE = "heartbeat.json"
FOLDER = "hang"
_LOOK_SECONDS = 0.2
_MEDIAN_STEPS = 50  # Steps over which the median is taken.
_BEAT_SECONDS = 10.0  # The file is written at most once in this time...
_REMOTE_BEAT_SECONDS = 60.0  # ...or in this, if it is in a bucket.
_KEEP_SECONDS = 30.0  # So long may it take to write the stacks: the disk may be what hangs.


class Watchdog:
    """Watches over the steps of a run; a context manager.

    Args:
      workdir: folder of the run.
      step: the step from which the run goes on.
      factor: the run is ended when it has not moved for this many median steps,
        and for at least `floor` seconds.
      floor: seconds that a run may always stand still, see `factor`.
      lease: lease of the workdir, which is checked before each write.
    """

    def __init__(
        self, workdir: Path, step: int, factor: float, floor: float, lease: Lease | None = None
    ):
        self._workdir = workdir
        self._factor = factor
        self._floor = floor
        self._lease = lease
        process = f".process{jax.process_index()}" if jax.process_count() > 1 else ""
        self._heartbeat = workdir / FILE.replace(".json", f"{process}.json")
        self._suffix = f"{process}.txt"

        self._lock = threading.Lock()  # Of what the watching thread reads and writes, too.
        self._step = step
        self._seconds: collections.deque[float] = collections.deque(maxlen=_MEDIAN_STEPS)
        self._still = 0.0  # Seconds since the run has moved.

        self._began: float | None = None  # When the step under way began; None in the first one.
        self._aside = 0.0  # Seconds of it that are not the step's.
        self._beaten = -_REMOTE_BEAT_SECONDS
        self._ended = threading.Event()
        self._watching = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._beat()
        self._watching.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        del rest
        self._ended.set()
        self._watching.join()
        if kind is None:
            self._beat()

    def moves(self) -> None:
        """Notes that the run moves, within a step."""
        with self._lock:
            self._still = 0.0

    def ends_step(self, step: int) -> None:
        """Notes that a step has ended, and writes the heartbeat from time to time."""
        now = time.monotonic()
        with self._lock:
            if self._began is not None:
                self._seconds.append(now - self._began - self._aside)
            self._still = 0.0
            self._step = step
        self._began = now
        self._aside = 0.0
        if now - self._beaten >= self._pause():
            self._beat()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Keeps what happens inside, validation or saving, out of the time of a step."""
        began = time.monotonic()
        self.moves()
        try:
            yield
        finally:
            self.moves()
            self._aside += time.monotonic() - began

    def _limit(self) -> float:
        """Returns for how many seconds the run may stand still."""
        median = statistics.median(self._seconds) if self._seconds else 0.0
        return max(self._floor, self._factor * median)

    def _pause(self) -> float:
        """Returns the least seconds between two heartbeats."""
        return _REMOTE_BEAT_SECONDS if is_remote(self._heartbeat) else _BEAT_SECONDS

    def _beat(self) -> None:
        """Writes the heartbeat.

        A heartbeat that cannot be written does not end the run. If the disk is full, checkpoints
        and metrics cannot be written either, and their errors say so.

        Raises:
          LostLease: another run has taken over the folder.
        """
        if self._lease is not None:
            self._lease.check()
        self._beaten = time.monotonic()
        with self._lock:
            values = {
                "step": self._step,
                "time": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
                "median_seconds": statistics.median(self._seconds) if self._seconds else None,
                "limit_seconds": self._limit(),
                "host": socket.gethostname(),
                "pid": os.getpid(),
            }
        with suppress(OSError, UserError):
            write_json(self._heartbeat, values)

    def _watch(self) -> None:
        """Looks again and again whether the run has moved."""
        before = time.monotonic()
        while not self._ended.wait(_LOOK_SECONDS):
            now = time.monotonic()
            self._look(now - before)
            before = now

    def _look(self, seconds: float) -> None:
        """Ends the process if the run has stood still for too long.

        Args:
          seconds: the time since the last look.
        """
        with self._lock:
            # If this process was stopped meanwhile, the clock went on and the run could not move.
            self._still += min(seconds, 2 * _LOOK_SECONDS)
            still = self._still
            limit = self._limit()
        if still > limit:
            self._end(still, limit)

    def _end(self, still: float, limit: float) -> None:
        """Says where every thread stands, and ends the process.

        Args:
          still: for how many seconds the run has not moved.
          limit: for how many it may stand still.
        """
        path = self._workdir / FOLDER / f"{self._step}{self._suffix}"
        line = (
            f"process {jax.process_index()} ({socket.gethostname()}): the run has not moved for"
            f" {still:.0f} s after step {self._step}, and {limit:.0f} s are allowed"
            f" (train.hang_seconds={self._floor:g}, train.hang_factor={self._factor:g}); it ends"
            f" with status {HUNG}; the stacks of all threads follow, and are in {path}; the same"
            " command goes on from the last save"
        )
        with suppress(OSError):
            # The thread that hangs may hold Python's own stream.
            os.write(2, f"apr: error: {line}\n".encode())
            faulthandler.dump_traceback(2)

        keeping = threading.Thread(target=self._keep, args=(path, line), daemon=True)
        keeping.start()
        keeping.join(_KEEP_SECONDS)
        os._exit(HUNG)

    def _keep(self, path: Path, line: str) -> None:
        """Writes a line and the stacks of all threads to a file of the run's folder."""
        with suppress(OSError, UserError), tempfile.TemporaryFile() as stacks:
            if self._lease is not None:
                self._lease.check()
            faulthandler.dump_traceback(stacks)
            stacks.seek(0)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, f"{line}\n{stacks.read().decode(errors='replace')}")
