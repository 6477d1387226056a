"""Verification in a box: a verifier that raises, hangs or dies costs the answer at hand, never the run.

A verifier reads what a model wrote. Whatever it does with it, `pow` of huge numbers or a regular expression that
backtracks for ever, happens in a process of its own, because nothing less can be stopped: a thread cannot be killed, and C
code that keeps the interpreter's lock would stop the clock too.

The life of a batch:
1. All pairs of problem and answer go to the process in one message; the answers are text and stay text.
2. It sends back one outcome a pair: a `Verdict`, or why there is none.
3. If an outcome is not there within the time limit, the process is killed, the pair counts as TIMED_OUT, and a new process
   takes the rest.
"""

import enum
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Self

from apr_jax.tasks.base import Problem, Task, Verdict

_START_LIMIT = 60.0  # Seconds to start Python and import the task, on a busy machine.


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
        self._told: set[Failure] = set()
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def verify(self, pairs: Sequence[tuple[Problem, str]]) -> list[Outcome]:
        """One outcome a pair, in order.

        Raises:
          RuntimeError: the process cannot be started.
        """
        outcomes: list[Outcome] = []
        while len(outcomes) < len(pairs):
            problem = pairs[len(outcomes)][0]
            if self._process.poll() is not None:  # Ended by someone else, between batches: nobody's answer is to blame.
                self._restart()
            try:
                if not self._ready:
                    self._await_start()
                self._connection.send(pairs[len(outcomes) :])
                for problem, _ in pairs[len(outcomes) :]:
                    if not self._connection.poll(self._limit):
                        outcomes.append(self._fail(Failure.TIMED_OUT, problem, f"took more than {self._limit:g} s"))
                        self._restart()
                        break
                    found = self._connection.recv()
                    outcomes.append(found if isinstance(found, Verdict) else self._fail(Failure.RAISED, problem, found))
            except (EOFError, OSError):  # The other end is gone.
                outcomes.append(self._fail(Failure.RAISED, problem, "ended its process"))
                self._restart()
        return outcomes

    def _fail(self, failure: Failure, problem: Problem, what: str) -> Failure:
        if failure not in self._told:
            self._told.add(failure)
            print(f"verifier: {what} on an answer to problem {problem.id}; it counts as wrong", file=sys.stderr)
        return failure

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        command = [sys.executable, "-c", "import sys; from apr_jax.tasks.boxed import serve; serve(int(sys.argv[1]))"]
        self._process = subprocess.Popen(
            [*command, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},  # What this process can import, that one can.
            start_new_session=True,  # Signals to the group are for this process: it finishes its step, and needs the verdicts.
        )
        theirs.close()
        self._ready = False

    def _await_start(self) -> None:
        try:
            self._connection.send_bytes(self._task)
            self._ready = self._connection.poll(_START_LIMIT) and self._connection.recv()
        except (EOFError, OSError):
            pass
        if not self._ready:
            raise RuntimeError("verifier: its process did not start; can the task's class be imported?")

    def _stop(self) -> None:
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
    task: Task = pickle.loads(connection.recv_bytes())
    connection.send(True)
    while True:
        try:
            pairs = connection.recv()
        except EOFError:
            return
        for problem, answer in pairs:
            connection.send(_verify(task, problem, answer))


def _verify(task: Task, problem: Problem, answer: str) -> Verdict | str:
    try:
        found = task.verify(problem, answer)
        return found if isinstance(found, Verdict) else f"returned {type(found).__name__}, no verdict"
    except BaseException as error:  # SystemExit and the like too: the box stays closed.
        return "raised " + " ".join(traceback.format_exception_only(error)[-1].split())[:200]
