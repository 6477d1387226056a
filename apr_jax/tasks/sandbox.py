"""Verification in a box: a verifier that raises, hangs or dies costs the answer at hand, never the
run.

A verifier reads what a model wrote. Whatever it does with it, `pow` of huge numbers or a regular
expression that backtracks for ever, happens in a process of its own, because nothing less can be
stopped: a thread cannot be killed, and C code that keeps the interpreter's lock would stop the
clock too.

The life of an answer:
1. Problem and answer go to the process as a line of JSON; the answer is text and stays text.
2. A line of JSON comes back, a verdict or why there is none. It is checked field by field: nothing
   that comes out of the box is ever unpickled or evaluated.
3. If it is not there within the time limit, the process is killed and a new one takes the next
   answer; so too if the process dies, or sends back anything else.
4. An answer without a verdict is a `Failure`. It says nothing about the answer, so it must not
   count as a wrong one.
5. When more answers of a batch are without a verdict than the caller can use, the rest is not
   verified.

The box keeps accidents away from the run, and from the run's memory, files and secrets what an
answer does by accident. It is no prison for code that wants out: docs/adding_a_task.md says what it
does not protect from."""

import dataclasses
import enum
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from apr_jax.errors import UserError
from apr_jax.io.subprocesses import standard_library_first
from apr_jax.io.terminal import visible
from apr_jax.tasks.base import Problem, Score, Task
from apr_jax.tasks.registry import TaskConfig, config_of, files_beside, make_task

_START_LIMIT = 60.0  # Seconds to start Python and import the task, on a busy machine.
# After the first process that worked: a machine that is short of memory for a moment ends no run.
_START_TRIES = 3
_START_PAUSE = 1.0  # Seconds between them.
_MOST_BYTES = 1 << 20  # Of a line that comes back.
_MOST_FILES = 64  # Open at a time.
_READY = {"ready": True}
_GIB = 1 << 30
# -I: no variable of the environment decides what is imported, nor does the current folder. The
# import path is this process's.
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[2:]; from apr_jax.tasks.sandbox import serve;"
    " serve(int(sys.argv[1]))"
)
_ENVIRONMENT = ("LD_LIBRARY_PATH",)  # All that Python itself may need.


class Failure(enum.Enum):
    """Why there is no verdict."""

    RAISED = "raised"  # Or the process died, or sent back what is no verdict.
    TIMED_OUT = "timed out"
    UNVERIFIED = "not verified"  # There was no process for it, or no use in it.


Outcome = Score | Failure


class SandboxedVerifier:
    """`task.score` in a process of its own; a context manager.

    The first failure of each kind is told in one line on stderr.

    Args:
      task: its class is in a module that can be imported, or in a file.
      time_limit: seconds that one answer may take.
      memory_limit: GiB of address space that the process may take.
    """

    def __init__(self, task: Task, time_limit: float, memory_limit: float = 4.0):
        self._greeting = {
            "task": config_of(task).to_dict(),
            "folder": os.getcwd(),
            "time_limit": time_limit,
            "memory_limit": memory_limit,
        }
        self._class = f"{type(task).__module__}.{type(task).__qualname__}"
        self._limit = time_limit
        self._asked = (
            0  # Answers sent; each line that comes back must give the number of its answer.
        )
        self._told: set[str] = set()
        self._worked = False  # Whether a process has ever been ready.
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def verify(
        self, pairs: Sequence[tuple[Problem, str]], most_unknown: int | None = None
    ) -> list[Outcome]:
        """One outcome a pair, in order.

        Args:
          most_unknown: when more answers than so many are without a verdict, the rest is not
            verified; None verifies all.

        Raises:
          UserError: the process cannot be started, and never could.
        """
        outcomes: list[Outcome] = []
        unknown = 0
        for problem, answer in pairs:
            rest = len(pairs) - len(outcomes)
            if most_unknown is not None and unknown > most_unknown:
                self._tell(
                    "rest",
                    f"{unknown} answers of a batch have no verdict; its other {rest} are not"
                    " verified",
                )
                return outcomes + [Failure.UNVERIFIED] * rest
            if trouble := self._prepare():
                self._tell("start", f"{trouble}; {rest} answers of a batch are not verified")
                return outcomes + [Failure.UNVERIFIED] * rest
            outcomes.append(self._verify(problem, answer))
            unknown += isinstance(outcomes[-1], Failure)
        return outcomes

    def _verify(self, problem: Problem, answer: str) -> Outcome:
        """Asks the process, which is ready, and replaces it if it is lost."""
        self._asked += 1
        request = {
            "number": self._asked,
            "problem": problem.to_json(),
            "answer": answer,
        }
        try:
            reply = self._ask(request, self._limit)
            if _is_late(reply, self._asked):
                # An earlier answer made the process send a line too many: this answer is not to
                # blame, and is asked anew.
                self._restart()
                if trouble := self._prepare():
                    return self._fail(Failure.UNVERIFIED, problem, trouble)
                reply = self._ask(request, self._limit)
            if (
                isinstance(reply, dict)
                and reply.keys() == {"number", "error"}
                and reply["number"] == self._asked
            ):
                return self._fail(Failure.RAISED, problem, _printable(str(reply["error"])))
            return _parse_score(reply, self._asked)
        except TimeoutError:
            failure, what = Failure.TIMED_OUT, f"took more than {self._limit:g} s"
        except (
            ValueError,
            RecursionError,
        ) as error:  # No JSON, JSON of endless depth, or no verdict.
            failure, what = Failure.RAISED, f"sent back no verdict ({_printable(str(error))})"
        except (EOFError, OSError):  # The other end is gone.
            failure, what = Failure.RAISED, "ended its process"
        self._restart()
        return self._fail(failure, problem, what)

    def _ask(self, message: dict[str, Any], limit: float) -> Any:
        """Sends a line to the process and returns what the line says that comes back.

        Raises:
          TimeoutError: it took too long, be it that only a part of a line came.
          EOFError, OSError: the process is gone.
          ValueError, RecursionError: what came is not one line of JSON.
        """
        deadline = time.monotonic() + limit
        self._socket.settimeout(limit)
        self._socket.sendall(_line(message))
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

    def _fail(self, failure: Failure, problem: Problem, what: str) -> Failure:
        self._tell(failure.value, f"{what} on an answer to problem {problem.id}; it is not counted")
        return failure

    def _tell(self, kind: str, what: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            print(f"verifier: {visible(what)}", file=sys.stderr)

    def _start(self) -> None:
        """Starts a process, or notes why the machine has none to give."""
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        command = [sys.executable, "-I", "-c", _PROGRAM]
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:  # Files have run out.
            self._refused = error.strerror or str(error)
            return
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [*command, str(theirs.fileno()), *standard_library_first(sys.path)],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    # Keys and passwords of this process are none of an answer's business.
                    env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                    # Signals to the group are for this process: it finishes its step, and needs the
                    # verdicts.
                    start_new_session=True,
                )
        except OSError as error:  # Memory or processes have run out.
            ours.close()
            self._refused = error.strerror or str(error)
            return
        self._socket = ours

    def _prepare(self) -> str:
        """Waits until a process is ready; returns why there is none, or "".

        Raises:
          UserError: there is none, and none was ever ready.
        """
        # Nobody was asked anything, so what can be read is the end, or a line too many: nobody's
        # answer is to blame.
        if self._process is None or (self._ready and select.select([self._socket], [], [], 0)[0]):
            self._restart()
        if self._ready:
            return ""
        trouble = self._greet()
        for _ in range(_START_TRIES - 1 if self._worked else 0):
            if not trouble:
                break
            time.sleep(_START_PAUSE)
            self._restart()
            trouble = self._greet()
        if not trouble:
            self._ready = True
            self._worked = True
        elif self._worked:
            self._restart()  # Until the next batch it has the time of a rollout.
        else:
            raise UserError(f"verifier: {trouble}; mend that, and start the same command again")
        return trouble

    def _greet(self) -> str:
        """Has the process make the task; returns what went wrong, or ""."""
        if self._process is None:
            return (
                f"its process cannot be started ({self._refused}): free memory, processes or files"
                " on this machine"
            )
        try:
            reply = self._ask(self._greeting, _START_LIMIT)
        except TimeoutError:
            return (
                f"its process was not ready after {_START_LIMIT:g} s: the import of {self._class}"
                " hangs, or the machine is too busy"
            )
        except (EOFError, OSError):
            reply = {"error": "the process ended"}
        except (ValueError, RecursionError) as error:
            reply = {"error": f"it sent {error}"}
        if reply == _READY:
            return ""
        what = reply.get("error") if isinstance(reply, dict) else reply
        return (
            f"its process cannot make the task {self._class} ({_printable(str(what))}); "
            "its class must be in a module that Python can import, not in the script that is run"
        )

    def _stop(self) -> None:
        if self._process is None:
            return
        self._socket.close()
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                # What it started, too: its session is its own.
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _restart(self) -> None:
        self._stop()
        self._start()


def _is_late(reply: Any, number: int) -> bool:
    """Whether a line belongs to an answer before answer `number`."""
    return isinstance(reply, dict) and type(reply.get("number")) is int and reply["number"] < number


def _parse_score(reply: Any, number: int) -> Score:
    """The score in a line; raises ValueError if a field is missing, of another type, or of another
    answer.
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


def _printable(text: str) -> str:
    """One short line without control characters: a terminal obeys them."""
    return "".join(character if character.isprintable() else "?" for character in text)[:200]


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def serve(descriptor: int) -> None:
    """What the process does: verifies what comes in, until the other end is closed."""
    # Its session keeps a terminal's signals away, also while it starts; a scheduler signals every
    # process of a job.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # The other end may go at any time, and nobody is there then to whom it could be said.
    with (
        suppress(EOFError, OSError),
        socket.socket(fileno=descriptor) as channel,
        channel.makefile("rb") as lines,
    ):
        greeting = lines.readline()
        if not greeting:
            return
        wanted = json.loads(greeting)
        try:
            with files_beside(Path(wanted["folder"])):
                task = make_task(TaskConfig.from_dict(wanted["task"]))
            _limit_resources(wanted["memory_limit"])
        except BaseException as error:
            channel.sendall(_line({"error": _one_line(error)}))
            return
        channel.sendall(_line(_READY))
        for line in lines:
            request = json.loads(line)
            _limit_time(wanted["time_limit"])
            reply = _verify(task, request)
            signal.setitimer(signal.ITIMER_REAL, 0)
            channel.sendall(_line(reply))


def _limit_resources(memory_limit: float) -> None:
    """Bounds what the process may take from the machine, once the task is imported.

    No new processes and threads; Linux does not apply that to root. No files are written, and few
    are open."""
    limits = {
        resource.RLIMIT_AS: int(memory_limit * _GIB),
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: _MOST_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        _, highest = resource.getrlimit(kind)
        if highest != resource.RLIM_INFINITY:
            limit = min(limit, highest)
        resource.setrlimit(kind, (limit, limit))


def _limit_time(limit: float) -> None:
    """Has the kernel end this process when an answer takes far too long, for the parent that should
    may be dead.

    The alarm does so by the clock, the limit by processor time, which also counts where an answer
    blocks the alarm."""
    signal.setitimer(signal.ITIMER_REAL, 2 * limit + 1)
    _, highest = resource.getrlimit(resource.RLIMIT_CPU)
    soft = int(time.process_time() + limit) + 2
    if highest != resource.RLIM_INFINITY:
        soft = min(soft, highest)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, highest))


def _verify(task: Task, request: dict[str, Any]) -> dict[str, Any]:
    number = request["number"]
    asked = request["problem"]
    try:
        name = asked.pop("id")
        found = task.score(Problem(name, asked), request["answer"])
        if not isinstance(found, Score):
            return {"number": number, "error": f"returned {type(found).__name__}, no Score"}
        reply = {"number": number, **vars(found)}
        json.dumps(reply)
        return reply
    except BaseException as error:  # SystemExit and the like too: the box stays closed.
        return {"number": number, "error": f"raised {_one_line(error)}"}


def _one_line(error: BaseException) -> str:
    return " ".join(traceback.format_exception_only(error)[-1].split())[:200]
