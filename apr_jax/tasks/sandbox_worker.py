"""A worker of the sandbox as the run sees it: a process that scores answers, and the way to it.

The process runs `sandbox_process.serve`. One thread of the run serves many workers, so no method
here waits for a process: `send` begins an exchange of one line against one line, and `receive` is
called again and again until the reply has come.
"""

import enum
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from apr_jax.io.subprocesses import standard_library_first
from apr_jax.io.terminal import one_line
from apr_jax.tasks.sandbox_process import MOST_CHARACTERS, READY, to_line

_START_LIMIT = 60.0  # Seconds to start Python and import the task, on a busy machine.
_MOST_BYTES = 1 << 20  # Of a line that comes back.
_PIECE = 1 << 16  # Bytes that are read at once.
# With -I neither variables of the environment nor the current folder decide what is imported. The
# import path is the one of this process.
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[2:]; from apr_jax.tasks.sandbox_process import serve;"
    " serve(int(sys.argv[1]))"
)
_ENVIRONMENT = ("LD_LIBRARY_PATH",)  # Variables that Python itself may need.


class State(enum.Enum):
    """What a worker does."""

    NEW = "new"  # Its process may run, but was not told what the task is.
    MAKING_TASK = "making the task"
    READY = "ready"
    SCORING = "scoring"
    PAUSED = "paused"  # Could not get ready; a new process is tried at the deadline.
    OUT = "out"  # Could not get ready, several times; has no part in the rest of the batch.


class Worker:
    """A process that scores answers, and the socket to it.

    Args:
      settings: the first message to the process: the task and the limits.
      class_name: the class of the task, for messages.

    Attributes:
      state: what the worker does.
      process: the present process; None if none could be started.
      deadline: when, by `time.monotonic`, the reply must have come, or the pause ends.
      tries: how many processes could not get ready, one after the other.
    """

    def __init__(self, settings: dict[str, Any], class_name: str):
        self._settings = settings
        self._class_name = class_name
        self.tries = 0
        self.start()

    def start(self) -> None:
        """Starts a process, or notes why this machine cannot start one."""
        self.state = State.NEW
        self.process: subprocess.Popen[bytes] | None = None
        self.deadline = 0.0
        self._unsent = memoryview(b"")
        self._received = bytearray()
        try:
            own_end, other_end = socket.socketpair()
        except OSError as error:  # Too many files are open.
            self._start_error = error.strerror or str(error)
            return

        descriptor = other_end.fileno()
        command = [sys.executable, "-I", "-c", _PROGRAM, str(descriptor)]
        try:
            with other_end:
                self.process = subprocess.Popen(
                    [*command, *standard_library_first(sys.path)],
                    pass_fds=[descriptor],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    # Keys and passwords of this process must not be within an answer's reach.
                    env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                    # Signals to the process group are for this process, which finishes its step
                    # and needs verdicts for it.
                    start_new_session=True,
                )
        except OSError as error:  # Memory or processes have run out.
            own_end.close()
            self._start_error = error.strerror or str(error)
            return
        own_end.setblocking(False)
        self._socket = own_end

    def stop(self) -> None:
        """Kills the process, if there is one, and everything that it has started."""
        if self.process is None:
            return
        self._socket.close()
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def restart(self) -> None:
        """Replaces the process by a new one."""
        self.stop()
        self.start()

    @property
    def is_talking(self) -> bool:
        """Returns whether a reply is due."""
        return self.state in (State.MAKING_TASK, State.SCORING)

    def begin_batch(self) -> None:
        """Makes the worker fit for another batch, whatever became of the one before."""
        self.tries = 0
        if self.state in (State.SCORING, State.PAUSED):
            # The batch before was interrupted, for example by Ctrl-C; or it ended during the pause.
            self.restart()
        elif self.state is State.OUT:
            self.state = State.NEW
        elif self.state is State.MAKING_TASK:
            # Nobody looked at the clock between the batches.
            self.deadline = time.monotonic() + _START_LIMIT

    def replace_if_lost(self) -> None:
        """Replaces the process of a ready worker if it has ended, or sent a line too many.

        No reply is due, so whatever can be read is one of the two. No answer is to blame for that.
        """
        if wait_for([self], 0):
            self.restart()

    def make_task(self) -> str:
        """Tells the process what the task is; returns why it cannot, or "" if it did."""
        if self.process is None:
            return (
                f"its process cannot be started ({self._start_error}): free memory, processes or"
                " files on this machine"
            )
        self.state = State.MAKING_TASK
        try:
            self.send(self._settings, _START_LIMIT)
        except OSError:
            return self._cannot_make("the process ended")
        return ""

    def finish_task(self, now: float) -> str:
        """Reads whether the process has made the task; the worker is ready if it has.

        Args:
          now: see `receive`.

        Returns:
          why the process cannot make the task; "" if it did, or is still at it.
        """
        try:
            line = self.receive(now)
            if line is None:
                return ""
            reply = json.loads(line)
        except TimeoutError:
            return (
                f"its process was not ready after {_START_LIMIT:g} s: the import of"
                f" {self._class_name} hangs, or the machine is too busy"
            )
        except (EOFError, OSError):
            return self._cannot_make("the process ended")
        except (ValueError, RecursionError) as error:
            return self._cannot_make(f"it sent {error}")

        if reply == READY:
            self.state = State.READY
            self.tries = 0
            return ""
        return self._cannot_make(str(reply.get("error") if isinstance(reply, dict) else reply))

    def _cannot_make(self, reason: str) -> str:
        """Returns the message that the task cannot be made."""
        return (
            f"its process cannot make the task {self._class_name}"
            f" ({one_line(reason, MOST_CHARACTERS)}); its class must be in a module that Python can"
            " import, not in the script that is run"
        )

    def send(self, message: dict[str, Any], limit: float) -> None:
        """Begins an exchange.

        Args:
          message: what is sent. What the socket does not take at once, `receive` sends.
          limit: seconds until the whole reply must have come.

        Raises:
          OSError: the process has ended.
        """
        self.deadline = time.monotonic() + limit
        self._unsent = memoryview(to_line(message))
        self._received.clear()
        self._send_more()

    def receive(self, now: float) -> bytes | None:
        """Returns the line that came back, or None if it has not come yet.

        Args:
          now: a time at which `wait_for` had not yet looked. What came until then is read before
            the deadline is held against it, however late this method is called.

        Raises:
          TimeoutError: the reply, or a part of it, has not come in time.
          EOFError, OSError: the process has ended.
          ValueError: the reply is too long.
        """
        self._send_more()
        with suppress(BlockingIOError):
            while not self._received.endswith(b"\n"):
                piece = self._socket.recv(_PIECE)
                if not piece:
                    raise EOFError
                self._received += piece
                if len(self._received) > _MOST_BYTES:
                    raise ValueError(f"more than {_MOST_BYTES} bytes")
            return bytes(self._received)
        if now >= self.deadline:
            raise TimeoutError
        return None

    def _send_more(self) -> None:
        """Sends as much of the message as the socket takes.

        Raises:
          OSError: the process has ended.
        """
        with suppress(BlockingIOError):
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]

    def register(self, poll: select.poll) -> None:
        """Tells a poll what this worker waits for: a reply, or room to send more."""
        events = select.POLLIN
        if self._unsent:
            events |= select.POLLOUT
        poll.register(self._socket, events)


def wait_for(workers: Sequence[Worker], seconds: float) -> bool:
    """Waits until one of the workers has something to read or room to send more.

    Args:
      workers: workers that have a process.
      seconds: the longest time to wait.

    Returns:
      whether there is such a worker.
    """
    # `select.select` fails on file descriptors from 1024 on, which a large run may reach.
    poll = select.poll()
    for worker in workers:
        worker.register(poll)
    return bool(poll.poll(math.ceil(1000 * seconds)))
