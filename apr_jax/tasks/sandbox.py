"""Scores answers in a process of their own, so that a bad answer costs itself and never the run.

A task's `score` reads what a model wrote. It may raise, crash, or hang, for example in `pow` of
huge numbers or in a regular expression that backtracks for ever. Nothing less than a process can
contain that: a thread cannot be killed, and C code that keeps the interpreter's lock would even
stop the clock that a time limit needs.

The life of an answer:
1. Problem and answer go to the process (`sandbox_process.py`) as one line of JSON.
2. One line of JSON comes back: a score, or why there is none. It is checked field by field. Nothing
   that comes out of the process is ever unpickled or evaluated.
3. If the line is late, or is no score, or if the process has died, the process is killed, and a new
   one takes the next answer.
4. An answer without a score gets a `Failure`. A failure says nothing about the answer, so callers
   must not count the answer as wrong.
5. If more answers of a batch fail than the caller can use, the rest of the batch is not verified.

The sandbox keeps accidents away from the run, and from its memory, files and secrets. It is no
prison for code that wants to break out; docs/adding_a_task.md says what it does not protect from.
"""

import dataclasses
import enum
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Self

from apr_jax.errors import UserError
from apr_jax.io.subprocesses import standard_library_first
from apr_jax.io.terminal import one_line
from apr_jax.tasks.base import Problem, Score, Task
from apr_jax.tasks.registry import config_of
from apr_jax.tasks.sandbox_process import MOST_CHARACTERS, READY, to_line

_START_LIMIT = 60.0  # Seconds to start Python and import the task, on a busy machine.
# A machine may be short of memory for a moment. Once a process has worked, that must not end a run,
# so starting one is tried several times.
_START_TRIES = 3
_START_PAUSE = 1.0  # Seconds between the tries.
_MOST_BYTES = 1 << 20  # Of a line that comes back.
# With -I neither variables of the environment nor the current folder decide what is imported. The
# import path is the one of this process.
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[2:]; from apr_jax.tasks.sandbox_process import serve;"
    " serve(int(sys.argv[1]))"
)
_ENVIRONMENT = ("LD_LIBRARY_PATH",)  # Variables that Python itself may need.


class Failure(enum.Enum):
    """Why an answer has no score."""

    RAISED = "raised"  # `score` raised, the process died, or what it sent back is no score.
    TIMED_OUT = "timed out"
    UNVERIFIED = "not verified"  # No process could be started, or the batch was given up.


Outcome = Score | Failure


class _NotReady(Exception):
    """No process can score answers at the moment; the message says why."""


class SandboxedVerifier:
    """Scores answers with `task.score` in a process of its own; a context manager.

    The first failure of each kind is reported in one line on standard error.

    Args:
      task: the task; its class must be in a module that Python can import, or in a file.
      time_limit: seconds that one answer may take.
      memory_limit: GiB of address space that the process may take.
    """

    def __init__(self, task: Task, time_limit: float, memory_limit: float = 4.0):
        self._settings = {
            "task": config_of(task).to_dict(),
            "folder": os.getcwd(),
            "time_limit": time_limit,
            "memory_limit": memory_limit,
        }
        self._class = f"{type(task).__module__}.{type(task).__qualname__}"
        self._time_limit = time_limit
        # Answers are numbered. What comes back must have the number of the answer that was sent.
        self._number = 0
        self._reported: set[str] = set()  # Kinds of failures.
        # The present process, None if none could be started, and whether it is ready for answers.
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._was_ready = False  # Whether any process has ever been ready.
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def verify(
        self, pairs: Sequence[tuple[Problem, str]], most_unknown: int | None = None
    ) -> list[Outcome]:
        """Scores a batch of answers.

        Args:
          pairs: problems with their answers.
          most_unknown: once more answers than this have no score, the rest of the batch is not
            verified; None verifies all.

        Returns:
          one outcome for each pair, in order.

        Raises:
          UserError: the process cannot be started, and never could.
        """
        outcomes: list[Outcome] = []
        unknown = 0
        for problem, answer in pairs:
            rest = len(pairs) - len(outcomes)
            if most_unknown is not None and unknown > most_unknown:
                self._report(
                    "rest",
                    f"{unknown} answers of a batch have no verdict; its other {rest} are not"
                    " verified",
                )
                break
            try:
                self._prepare()
            except _NotReady as reason:
                self._report("start", f"{reason}; {rest} answers of a batch are not verified")
                break

            outcome = self._verify(problem, answer)
            outcomes.append(outcome)
            if isinstance(outcome, Failure):
                unknown += 1

        missing = len(pairs) - len(outcomes)
        return outcomes + [Failure.UNVERIFIED] * missing

    def _verify(self, problem: Problem, answer: str) -> Outcome:
        """Scores one answer in the process, which is ready; replaces the process if it fails."""
        self._number += 1
        request = {"number": self._number, "problem": problem.to_json(), "answer": answer}
        try:
            reply = self._ask(request, self._time_limit)
            if _is_late(reply, self._number):
                # An earlier answer made the process send one line too many. This answer is not to
                # blame for that, and is sent to a new process.
                self._restart()
                self._prepare()
                reply = self._ask(request, self._time_limit)
            if _is_error(reply, self._number):
                reason = one_line(str(reply["error"]), MOST_CHARACTERS)
                return self._fail(Failure.RAISED, problem, reason)
            return _parse_score(reply, self._number)
        except _NotReady as error:
            return self._fail(Failure.UNVERIFIED, problem, str(error))
        except TimeoutError:
            failure = Failure.TIMED_OUT
            reason = f"took more than {self._time_limit:g} s"
        except (ValueError, RecursionError) as error:
            # No JSON, JSON that is nested too deeply, or JSON that is no score.
            failure = Failure.RAISED
            reason = f"sent back no verdict ({one_line(str(error), MOST_CHARACTERS)})"
        except (EOFError, OSError):
            # The other end of the socket is closed.
            failure = Failure.RAISED
            reason = "ended its process"
        self._restart()
        return self._fail(failure, problem, reason)

    def _ask(self, message: dict[str, Any], limit: float) -> Any:
        """Sends a message to the process and returns its reply.

        Args:
          message: what is sent.
          limit: seconds until the whole reply must have come.

        Raises:
          TimeoutError: the reply, or a part of it, has not come in time.
          EOFError, OSError: the process has ended.
          ValueError, RecursionError: the reply is not one line of JSON.
        """
        deadline = time.monotonic() + limit
        self._socket.settimeout(limit)
        self._socket.sendall(to_line(message))

        received = bytearray()
        while not received.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            piece = self._socket.recv(1 << 16)
            if not piece:
                raise EOFError
            received += piece
            if len(received) > _MOST_BYTES:
                raise ValueError(f"more than {_MOST_BYTES} bytes")
        return json.loads(received)

    def _fail(self, failure: Failure, problem: Problem, reason: str) -> Failure:
        """Reports why the answer to a problem has no score, and returns the failure."""
        self._report(
            failure.value, f"{reason} on an answer to problem {problem.id}; it is not counted"
        )
        return failure

    def _report(self, kind: str, message: str) -> None:
        """Prints a message to standard error, if it is the first of its kind."""
        if kind not in self._reported:
            self._reported.add(kind)
            print(f"verifier: {one_line(message)}", file=sys.stderr)

    def _prepare(self) -> None:
        """Waits until a process is ready to score answers.

        Raises:
          _NotReady: there is none, though there was one before.
          UserError: there is none, and there never was.
        """
        # No reply is due, so whatever can be read from a process that is ready is its end, or one
        # line too many. No answer is to blame for that.
        is_lost = self._process is None
        if self._ready:
            readable, _, _ = select.select([self._socket], [], [], 0)
            is_lost = bool(readable)
        if is_lost:
            self._restart()
        if self._ready:
            return

        trouble = self._greet()
        tries = 1
        while trouble and self._was_ready and tries < _START_TRIES:
            time.sleep(_START_PAUSE)
            self._restart()
            trouble = self._greet()
            tries += 1
        if not trouble:
            self._ready = True
            self._was_ready = True
            return

        if not self._was_ready:
            raise UserError(f"verifier: {trouble}; mend that, and start the same command again")
        # The new process has the time of the next rollout to get ready.
        self._restart()
        raise _NotReady(trouble)

    def _greet(self) -> str:
        """Has the process make the task; returns why it cannot, or "" if the process is ready."""
        if self._process is None:
            return (
                f"its process cannot be started ({self._start_error}): free memory, processes or"
                " files on this machine"
            )
        try:
            reply = self._ask(self._settings, _START_LIMIT)
        except TimeoutError:
            return (
                f"its process was not ready after {_START_LIMIT:g} s: the import of {self._class}"
                " hangs, or the machine is too busy"
            )
        except (EOFError, OSError):
            reason = "the process ended"
        except (ValueError, RecursionError) as error:
            reason = f"it sent {error}"
        else:
            if reply == READY:
                return ""
            reason = str(reply.get("error") if isinstance(reply, dict) else reply)
        return (
            f"its process cannot make the task {self._class} ({one_line(reason, MOST_CHARACTERS)});"
            " its class must be in a module that Python can import, not in the script that is run"
        )

    def _start(self) -> None:
        """Starts a process, or notes why this machine cannot start one."""
        self._process = None
        self._ready = False
        try:
            own_end, other_end = socket.socketpair()
        except OSError as error:  # Too many files are open.
            self._start_error = error.strerror or str(error)
            return

        descriptor = other_end.fileno()
        command = [sys.executable, "-I", "-c", _PROGRAM, str(descriptor)]
        try:
            with other_end:
                self._process = subprocess.Popen(
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
        self._socket = own_end

    def _stop(self) -> None:
        """Kills the process, if there is one, and everything that it has started."""
        if self._process is None:
            return
        self._socket.close()
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _restart(self) -> None:
        """Replaces the process by a new one."""
        self._stop()
        self._start()


def _is_late(reply: Any, number: int) -> bool:
    """Whether a reply belongs to an answer before answer `number`."""
    return isinstance(reply, dict) and type(reply.get("number")) is int and reply["number"] < number


def _is_error(reply: Any, number: int) -> bool:
    """Whether a reply says why answer `number` has no score."""
    return (
        isinstance(reply, dict)
        and reply.keys() == {"number", "error"}
        and reply["number"] == number
    )


def _parse_score(reply: Any, number: int) -> Score:
    """Returns the score in a reply.

    Args:
      reply: what came back, as parsed JSON.
      number: the number of the answer that was sent.

    Raises:
      ValueError: a field is missing or of another type, or the reply is that of another answer.
    """
    fields = {"number", *(field.name for field in dataclasses.fields(Score))}
    if not isinstance(reply, dict) or reply.keys() != fields:
        raise ValueError("other fields than a score's")
    if type(reply["number"]) is not int or reply["number"] != number:
        raise ValueError("the number of another answer")
    reward = reply["reward"]
    if type(reward) not in (int, float) or not 0 <= reward <= 1:
        raise ValueError("a reward that is no number from 0 to 1")
    if not isinstance(reply["correct"], bool):
        raise ValueError("correct that is neither true nor false")
    for name in ("stated", "vote"):
        if reply[name] is not None and not isinstance(reply[name], str):
            raise ValueError(f"{name} that is no text")
    if not isinstance(reply["reason"], str):
        raise ValueError("a reason that is no text")
    return Score(float(reward), reply["correct"], reply["stated"], reply["reason"], reply["vote"])
