"""Scores answers in processes of their own, so that a bad answer costs itself and never the run.

A task's `score` reads what a model wrote. It may raise, crash, or hang, for example in `pow` of
huge numbers or in a regular expression that backtracks for ever. Nothing less than a process can
contain that: a thread cannot be killed, and C code that keeps the interpreter's lock would even
stop the clock that a time limit needs.

The life of an answer:
1. Problem and answer go to the first worker that is free (`sandbox_worker.py`), whose process
   (`sandbox_process.py`) reads them as one line of JSON.
2. One line of JSON comes back: a score, or why there is none. It is checked field by field. Nothing
   that comes out of the process is ever unpickled or evaluated.
3. If the line is late, or is no score, or if the process has died, the process is killed, and a new
   one takes another answer. The other workers go on meanwhile.
4. An answer without a score gets a `Failure`. A failure says nothing about the answer, so callers
   must not count the answer as wrong.
5. If more answers of a batch fail than the caller can use, the rest of the batch is not verified.

One thread serves all workers, by waiting on their sockets. So JAX has no other thread to share its
process with, and what one worker does never holds up another.

The sandbox keeps accidents away from the run, and from its memory, files and secrets. It is no
prison for code that wants to break out; docs/adding_a_task.md says what it does not protect from.
"""

import collections
import dataclasses
import enum
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, Self

from apr_jax.errors import UserError
from apr_jax.io.terminal import one_line
from apr_jax.tasks.base import Problem, Score, Task
from apr_jax.tasks.registry import config_of
from apr_jax.tasks.sandbox_process import MOST_CHARACTERS
from apr_jax.tasks.sandbox_worker import State, Worker, wait_for

# A machine may be short of memory for a moment. Once a process has worked, that must not end a run,
# so starting one is tried several times.
_START_TRIES = 3
_START_PAUSE = 1.0  # Seconds between the tries.


class Failure(enum.Enum):
    """Why an answer has no score."""

    RAISED = "raised"  # `score` raised, the process died, or what it sent back is no score.
    TIMED_OUT = "timed out"
    UNVERIFIED = "not verified"  # No process could be started, or the batch was given up.


Outcome = Score | Failure


class _Batch:
    """The answers of a batch, and what is known of them.

    Attributes:
      pairs: problems with their answers.
      outcomes: what came out, by index; without an entry for an answer that has not come back.
      waiting: indices of the answers that no worker has, in the order in which they are handed out.
      sent_twice: indices of the answers that may not be sent a third time.
      is_given_up: whether too many answers failed, so that no new ones are handed out.
    """

    def __init__(self, pairs: Sequence[tuple[Problem, str]], most_unknown: int | None):
        self.pairs = pairs
        self.outcomes: dict[int, Outcome] = {}
        self.waiting = collections.deque(range(len(pairs)))
        self.sent_twice: set[int] = set()
        self.is_given_up = False
        self._most_unknown = len(pairs) if most_unknown is None else most_unknown
        self._unknown = 0

    def record(self, index: int, outcome: Outcome) -> None:
        """Notes the outcome of an answer; gives the batch up if it is one failure too many."""
        self.outcomes[index] = outcome
        if isinstance(outcome, Failure):
            self._unknown += 1
        if self._unknown > self._most_unknown:
            self.is_given_up = True
            # What was handed out once gets its outcome, as it does with one worker.
            self.waiting = collections.deque(
                index for index in self.waiting if index in self.sent_twice
            )

    def send_again(self, index: int) -> None:
        """Puts an answer in front of the others, because its worker was not fit for it."""
        self.sent_twice.add(index)
        self.waiting.appendleft(index)

    def count_verified(self) -> int:
        """Returns how many answers, from the first on, keep their outcome.

        Of a batch that was given up, these are all up to the failure that was one too many: one
        worker alone would not have come to those behind it.
        """
        if not self.is_given_up:
            return len(self.pairs)
        failures = sorted(
            index for index, outcome in self.outcomes.items() if isinstance(outcome, Failure)
        )
        return failures[self._most_unknown] + 1

    def in_order(self) -> list[Outcome]:
        """Returns the outcomes in the order of the pairs."""
        verified = self.count_verified()
        outcomes = [self.outcomes.get(index, Failure.UNVERIFIED) for index in range(verified)]
        return outcomes + [Failure.UNVERIFIED] * (len(self.pairs) - verified)


@dataclasses.dataclass(frozen=True)
class _Request:
    """An answer that a worker has.

    Attributes:
      index: the place of the answer in its batch.
      number: the number that the reply must have.
    """

    index: int
    number: int


class SandboxedVerifier:
    """Scores answers with `task.score` in processes of their own; a context manager.

    The outcomes do not depend on the number of workers, as long as the time limit lets each worker
    finish what one alone would finish. The first failure of each kind is reported in one line on
    standard error.

    Args:
      task: the task; its class must be in a module that Python can import, or in a file.
      time_limit: seconds that one answer may take.
      memory_limit: GiB of address space that each process may take.
      workers: number of processes that score side by side; 0 for one on each core that this process
        may use.
      name: with what its messages begin.
    """

    def __init__(
        self,
        task: Task,
        time_limit: float,
        memory_limit: float = 4.0,
        workers: int = 1,
        name: str = "verifier",
    ):
        settings = {
            "task": config_of(task).to_dict(),
            "folder": os.getcwd(),
            "time_limit": time_limit,
            "memory_limit": memory_limit,
        }
        self._time_limit = time_limit
        self._name = name
        # Answers are numbered. What comes back must have the number of the answer that was sent.
        self._number = 0
        self._reported: set[str] = set()  # Kinds of failures.
        self._was_ready = False  # Whether any process has ever been ready.
        class_name = f"{type(task).__module__}.{type(task).__qualname__}"
        count = workers or len(os.sched_getaffinity(0))
        self._workers = [Worker(settings, class_name) for _ in range(count)]
        self._requests: dict[Worker, _Request] = {}  # The answer of each worker that scores.
        self._trouble = ""  # Why a worker could not get ready, the last time that one could not.

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers:
            worker.stop()

    def verify(
        self, pairs: Sequence[tuple[Problem, str]], most_unknown: int | None = None
    ) -> list[Outcome]:
        """Scores a batch of answers.

        Answers are handed out in order. Once more than `most_unknown` of them have no score, no
        more are handed out. Every answer behind the failure that was one too many is then
        `UNVERIFIED`, even if another worker had it at that moment and scored it.

        Args:
          pairs: problems with their answers.
          most_unknown: how many answers may stay without a score; None if all may.

        Returns:
          one outcome for each pair, in order.

        Raises:
          UserError: no process can be started, and none ever could.
        """
        batch = _Batch(pairs, most_unknown)
        self._requests.clear()
        for worker in self._workers:
            worker.begin_batch()

        while batch.waiting or self._requests:
            self._hand_out(batch)
            if not self._requests and all(worker.state is State.OUT for worker in self._workers):
                self._report_stranded(len(batch.waiting))
                break
            self._take_replies(batch)

        outcomes = batch.in_order()
        if batch.is_given_up:
            verified = batch.count_verified()
            unknown = sum(isinstance(outcome, Failure) for outcome in outcomes[:verified])
            rest = len(outcomes) - verified
            if rest:
                self._report(
                    "rest",
                    f"{unknown} answers of a batch have no verdict; its other {rest} are not"
                    " verified",
                )
        return outcomes

    def _hand_out(self, batch: _Batch) -> None:
        """Gives each worker that is ready an answer, and has the others get ready."""
        for worker in self._workers:
            if worker.state is State.PAUSED and time.monotonic() >= worker.deadline:
                worker.restart()
            if not batch.waiting:
                continue

            if worker.state is State.READY:
                worker.replace_if_lost()
            if worker.state is State.NEW:
                self._note_trouble(worker, worker.make_task())
            if worker.state is State.READY:
                self._send(worker, batch)

    def _send(self, worker: Worker, batch: _Batch) -> None:
        """Sends the next answer to a worker, which is ready."""
        self._number += 1
        request = _Request(batch.waiting.popleft(), self._number)
        self._requests[worker] = request
        worker.state = State.SCORING

        problem, answer = batch.pairs[request.index]
        message = {"number": request.number, "problem": problem.to_json(), "answer": answer}
        try:
            worker.send(message, self._time_limit)
        except OSError:
            self._lose(worker, batch, Failure.RAISED, "ended its process")

    def _take_replies(self, batch: _Batch) -> None:
        """Waits until a reply comes or a deadline passes, and takes what has come."""
        now = time.monotonic()
        talking = [worker for worker in self._workers if worker.is_talking]
        pausing = [worker for worker in self._workers if worker.state is State.PAUSED]
        deadlines = [worker.deadline for worker in talking + pausing]
        if not deadlines:
            return
        wait_for(talking, max(0.0, min(deadlines) - now))

        for worker in talking:
            if worker.state is State.SCORING:
                self._take_verdict(worker, batch, now)
            else:
                self._note_trouble(worker, worker.finish_task(now))
                self._was_ready |= worker.state is State.READY

    def _take_verdict(self, worker: Worker, batch: _Batch, now: float) -> None:
        """Takes the reply of a worker that scores; replaces its process if it fails.

        Args:
          worker: the worker.
          batch: where the outcome goes.
          now: see `Worker.receive`.
        """
        request = self._requests[worker]
        try:
            received = worker.receive(now)
            if received is None:
                return
            line, _, more = received.partition(b"\n")
            reply = json.loads(line)
            if _is_late(reply, request.number) and request.index not in batch.sent_twice:
                # An earlier answer made the process send one line too many. This answer is not to
                # blame for that, and is sent to another process.
                del self._requests[worker]
                batch.send_again(request.index)
                worker.restart()
                return
            if more:
                raise ValueError("more than one line")
            if _is_error(reply, request.number):
                reason = one_line(str(reply["error"]), MOST_CHARACTERS)
                self._finish(worker, batch, self._fail(batch, request, Failure.RAISED, reason))
                return
            self._finish(worker, batch, _parse_score(reply, request.number))
        except TimeoutError:
            reason = f"took more than {self._time_limit:g} s"
            self._lose(worker, batch, Failure.TIMED_OUT, reason)
        except (EOFError, OSError):
            # The other end of the socket is closed.
            self._lose(worker, batch, Failure.RAISED, "ended its process")
        except (ValueError, RecursionError) as error:
            # No JSON, JSON that is nested too deeply, or JSON that is no score.
            reason = f"sent back no verdict ({one_line(str(error), MOST_CHARACTERS)})"
            self._lose(worker, batch, Failure.RAISED, reason)

    def _finish(self, worker: Worker, batch: _Batch, outcome: Outcome) -> None:
        """Notes the outcome of a worker's answer; the worker is ready for the next one."""
        batch.record(self._requests.pop(worker).index, outcome)
        worker.state = State.READY

    def _lose(self, worker: Worker, batch: _Batch, failure: Failure, reason: str) -> None:
        """Notes that a worker failed on its answer, and replaces its process."""
        request = self._requests.pop(worker)
        worker.restart()
        batch.record(request.index, self._fail(batch, request, failure, reason))

    def _fail(self, batch: _Batch, request: _Request, failure: Failure, reason: str) -> Failure:
        """Reports why an answer has no score, and returns the failure."""
        problem, _ = batch.pairs[request.index]
        self._report(
            failure.value, f"{reason} on an answer to problem {problem.id}; it is not counted"
        )
        return failure

    def _note_trouble(self, worker: Worker, trouble: str) -> None:
        """Decides what a worker does that cannot get ready.

        If any worker was ever ready, a new process is tried after a pause, a few times. After that
        the worker has no part in the rest of the batch.

        Args:
          worker: the worker.
          trouble: why it cannot get ready; "" if there is no trouble.
        """
        if not trouble:
            return
        self._trouble = trouble
        worker.tries += 1
        if self._was_ready and worker.tries < _START_TRIES:
            worker.state = State.PAUSED
            worker.deadline = time.monotonic() + _START_PAUSE
            return

        # The new process has the time of the next rollout to get ready.
        worker.restart()
        worker.state = State.OUT
        others_work = any(other.state is not State.OUT for other in self._workers)
        if self._was_ready and others_work:
            self._report("worker", f"{trouble}; the other workers go on without it")

    def _report_stranded(self, rest: int) -> None:
        """Reports that no worker can get ready, so that the rest of a batch is not verified.

        Raises:
          UserError: no worker was ever ready.
        """
        if not self._was_ready:
            raise UserError(
                f"{self._name}: {self._trouble}; mend that, and start the same command again"
            )
        self._report("start", f"{self._trouble}; {rest} answers of a batch are not verified")

    def _report(self, kind: str, message: str) -> None:
        """Prints a message to standard error, if it is the first of its kind."""
        if kind not in self._reported:
            self._reported.add(kind)
            print(f"{self._name}: {one_line(message)}", file=sys.stderr)


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
