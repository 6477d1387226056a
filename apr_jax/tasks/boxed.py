"""Verification in a box: a verifier that raises, hangs or dies costs the answer at hand, never the run.

A verifier reads what a model wrote. Whatever it does with it, `pow` of huge numbers or a regular expression that
backtracks for ever, happens in a process of its own, because nothing less can be stopped: a thread cannot be killed, and C
code that keeps the interpreter's lock would stop the clock too.

The life of a batch:
1. All pairs of problem and answer go to the process in one message; the answers are text and stay text.
2. It sends back one outcome a pair: a `Verdict`, or why there is none.
3. If an outcome is not there within the time limit, the process is killed, the pair counts as TIMED_OUT, and a new process
   takes the rest. If the process dies, the pair counts as RAISED, and a new one takes the rest.
4. After the eighth process that a batch costs, its rest is not verified and counts like the eighth answer: a verifier that
   hangs on everything holds a batch up for eight time limits, however large it is.
5. If a new process cannot be started, or is not ready in time, the rest of the batch counts as RAISED, and the next batch
   tries again. Only the very first start is an error: a task that cannot be made there never works, and nothing is lost yet.
"""

import enum
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import Self

from apr_jax.errors import UserError
from apr_jax.tasks.base import Problem, Task, Verdict

_START_LIMIT = 60.0  # Seconds to start Python and import the task, on a busy machine.
_MOST_LOST = 8  # Processes that a batch may cost. Enough that a rare hang costs its own answer alone.
_READY = "ready"


class Failure(enum.Enum):
    """Why there is no verdict."""

    RAISED = "raised"  # Or the process died.
    TIMED_OUT = "timed out"


Outcome = Verdict | Failure


class BoxedVerifier:
    """`task.verify` in a process of its own; a context manager.

    The first failure of each kind is told in one line on stderr.

    Args:
      task: can be pickled; its class can be imported.
      time_limit: seconds that one answer may take.
    """

    def __init__(self, task: Task, time_limit: float):
        self._task, self._limit = pickle.dumps(task), time_limit
        self._class = f"{type(task).__module__}.{type(task).__qualname__}"
        self._told: set[str] = set()
        self._worked = False  # Whether a process has ever been ready.
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def verify(self, pairs: Sequence[tuple[Problem, str]]) -> list[Outcome]:
        """One outcome a pair, in order.

        Raises:
          UserError: the process cannot be started, and never could.
        """
        outcomes: list[Outcome] = []
        lost = 0
        while len(outcomes) < len(pairs):
            rest = len(pairs) - len(outcomes)
            if problem := self._prepare():
                self._tell("start", f"{problem}; {rest} answers count as wrong, and the next batch tries again")
                return outcomes + [Failure.RAISED] * rest
            if lost == _MOST_LOST:
                self._tell(
                    "rest",
                    f"{lost} answers of a batch hung or ended its process; its other {rest} count as wrong",
                )
                return outcomes + [outcomes[-1]] * rest
            outcomes += self._verify_until_lost(pairs[len(outcomes) :])
            lost += 1  # Or all outcomes are there.
        return outcomes

    def _verify_until_lost(self, pairs: Sequence[tuple[Problem, str]]) -> list[Outcome]:
        """The outcomes up to the one that cost the process, which is replaced; all of them if none did."""
        outcomes: list[Outcome] = []
        problem = pairs[0][0]
        try:
            self._connection.send(pairs)
            for problem, _ in pairs:
                if not self._connection.poll(self._limit):
                    outcomes.append(self._fail(Failure.TIMED_OUT, problem, f"took more than {self._limit:g} s"))
                    break
                found = self._connection.recv()
                outcomes.append(found if isinstance(found, Verdict) else self._fail(Failure.RAISED, problem, found))
            else:
                return outcomes
        except (EOFError, OSError):  # The other end is gone.
            outcomes.append(self._fail(Failure.RAISED, problem, "ended its process"))
        self._restart()
        return outcomes

    def _fail(self, failure: Failure, problem: Problem, what: str) -> Failure:
        self._tell(failure.value, f"{what} on an answer to problem {problem.id}; it counts as wrong")
        return failure

    def _tell(self, kind: str, what: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            print(f"verifier: {what}", file=sys.stderr)

    def _start(self) -> None:
        """Starts a process, or notes why the machine has none to give."""
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        command = [sys.executable, "-c", "import sys; from apr_jax.tasks.boxed import serve; serve(int(sys.argv[1]))"]
        try:
            self._connection, theirs = Pipe()
            with theirs:
                self._process = subprocess.Popen(
                    [*command, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    env=os.environ
                    | {"PYTHONPATH": os.pathsep.join(sys.path)},  # What this process can import, that one can.
                    # Signals to the group are for this process: it finishes its step, and needs the verdicts.
                    start_new_session=True,
                )
        except OSError as error:  # Memory, processes or files have run out.
            self._refused = error.strerror or str(error)

    def _prepare(self) -> str:
        """Waits until a process is ready; returns why there is none, or "".

        Raises:
          UserError: there is none, and none was ever ready.
        """
        if self._process is None or self._process.poll() is not None:
            self._restart()  # Ended by someone else, between batches: nobody's answer is to blame.
        if self._ready:
            return ""
        problem = self._greet()
        if not problem:
            self._ready = self._worked = True
        elif self._worked:
            self._restart()  # Until the next batch it has the time of a rollout.
        else:
            raise UserError(f"verifier: {problem}; mend that, and start the same command again")
        return problem

    def _greet(self) -> str:
        """Has the process make the task; returns what went wrong, or ""."""
        if self._process is None:
            return f"its process cannot be started ({self._refused}): free memory, processes or files on this machine"
        try:
            self._connection.send_bytes(self._task)
            if not self._connection.poll(_START_LIMIT):
                return (
                    f"its process was not ready after {_START_LIMIT:g} s: the import of {self._class} hangs, or the "
                    "machine is too busy"
                )
            said = self._connection.recv()
        except (EOFError, OSError):
            said = "the process ended"
        if said == _READY:
            return ""
        return (
            f"its process cannot make the task {self._class} ({said}); "
            "its class must be in a module that Python can import, not in the script that is run"
        )

    def _stop(self) -> None:
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.wait()

    def _restart(self) -> None:
        self._stop()
        self._start()


def serve(descriptor: int) -> None:
    """What the process does: verifies what comes in, until the other end is closed."""
    # Its session keeps a terminal's signals away, also while it starts; a scheduler signals every process of a job.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = Connection(descriptor)
    with suppress(EOFError, OSError):  # The other end is gone.
        pickled = connection.recv_bytes()
        try:
            task: Task = pickle.loads(pickled)
        except Exception as error:
            connection.send(_one_line(error))
            return
        connection.send(_READY)
        while True:
            for problem, answer in connection.recv():
                connection.send(_verify(task, problem, answer))


def _verify(task: Task, problem: Problem, answer: str) -> Verdict | str:
    try:
        found = task.verify(problem, answer)
        return found if isinstance(found, Verdict) else f"returned {type(found).__name__}, no verdict"
    except BaseException as error:  # SystemExit and the like too: the box stays closed.
        return f"raised {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    return " ".join(traceback.format_exception_only(error)[-1].split())[:200]
