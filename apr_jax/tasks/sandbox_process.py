"""What runs inside the sandbox: a process that scores answers with a task, one after the other.

`sandbox.py` starts the process and talks to it over a socket. Each message is one line of JSON. The
first one names the task and the limits; every other one is an answer to score.
"""

import json
import resource
import signal
import socket
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from apr_jax.io.terminal import one_line
from apr_jax.tasks.base import Problem, Score, Task
from apr_jax.tasks.registry import TaskConfig, files_beside, make_task

READY = {"ready": True}  # The reply to the first message.
MOST_CHARACTERS = 200  # Of the text of an error.
_MOST_OPEN_FILES = 64
_GIB = 1 << 30


def to_line(message: dict[str, Any]) -> bytes:
    """Returns a message as one line of JSON."""
    return json.dumps(message).encode() + b"\n"


def serve(descriptor: int) -> None:
    """Scores the answers that come over a socket, until the other end is closed.

    Args:
      descriptor: the file descriptor of this end of the socket.
    """
    # The process has a session of its own, so signals of a terminal do not reach it. But the
    # scheduler of a cluster signals every process of a job, and the run, which then finishes its
    # step, still needs verdicts.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    # The other end may go away at any time. Then nobody is left to whom it could be reported.
    with (
        suppress(EOFError, OSError),
        socket.socket(fileno=descriptor) as channel,
        channel.makefile("rb") as lines,
    ):
        first_line = lines.readline()
        if not first_line:
            return
        settings = json.loads(first_line)
        try:
            with files_beside(Path(settings["folder"])):
                task = make_task(TaskConfig.from_dict(settings["task"]))
            _limit_resources(settings["memory_limit"])
        except BaseException as error:
            channel.sendall(to_line({"error": _describe(error)}))
            return
        channel.sendall(to_line(READY))

        for line in lines:
            request = json.loads(line)
            _limit_time(settings["time_limit"])
            reply = _score(task, request)
            signal.setitimer(signal.ITIMER_REAL, 0)
            channel.sendall(to_line(reply))


def _limit_resources(memory_limit: float) -> None:
    """Bounds what this process may take from the machine from now on.

    It may start no process and no thread (Linux does not apply that to root), write no file, and
    have few files open. The task is imported before, which may need more.

    Args:
      memory_limit: GiB of address space.
    """
    limits = {
        resource.RLIMIT_AS: int(memory_limit * _GIB),
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: _MOST_OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        _, hard_limit = resource.getrlimit(kind)
        if hard_limit != resource.RLIM_INFINITY:
            limit = min(limit, hard_limit)
        resource.setrlimit(kind, (limit, limit))


def _limit_time(seconds: float) -> None:
    """Makes the kernel end this process if the next answer takes far longer than `seconds`.

    The parent process does so at the time limit, but it may be dead. The alarm counts seconds of
    the clock. An answer may block the alarm, so processor time is bounded too.
    """
    signal.setitimer(signal.ITIMER_REAL, 2 * seconds + 1)

    _, hard_limit = resource.getrlimit(resource.RLIMIT_CPU)
    limit = int(time.process_time() + seconds) + 2
    if hard_limit != resource.RLIM_INFINITY:
        limit = min(limit, hard_limit)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard_limit))


def _score(task: Task, request: dict[str, Any]) -> dict[str, Any]:
    """Scores one answer; returns the message with the score, or with why there is none."""
    number = request["number"]
    data = request["problem"]
    try:
        problem = Problem(data.pop("id"), data)
        score = task.score(problem, request["answer"])
        if not isinstance(score, Score):
            return {"number": number, "error": f"returned {type(score).__name__}, no Score"}
        reply = {"number": number, **vars(score)}
        json.dumps(reply)  # Raises if a field holds an object that is no JSON.
        return reply
    except BaseException as error:  # SystemExit and the like must not end the process either.
        return {"number": number, "error": f"raised {_describe(error)}"}


def _describe(error: BaseException) -> str:
    """Returns name and message of an error in one line."""
    return one_line(traceback.format_exception_only(error)[-1], MOST_CHARACTERS)
