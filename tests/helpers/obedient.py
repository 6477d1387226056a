"""A task that does what an answer says: raise, hang, die, attack.

It is in a file without JAX, because the sandboxed process imports the file again and again.
"""

import dataclasses
import os
import re
import socket
import subprocess
import time
from pathlib import Path

from apr_jax.tasks import Problem, Score, sandbox_worker
from apr_jax.tasks.toy import HiddenDigit

PROBLEM = Problem("p", {"digits": [1, 2]})
RIGHT = Score(1.0, correct=True, stated="1")


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of the task.

    Attributes:
      proof: path of the file by which an attack shows that it worked.
    """

    proof: str = ""


class Hostile:
    """An object that runs a program when it is unpickled."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


class Obedient(HiddenDigit):
    """Does what the answer says; any other answer is right."""

    Config = Config

    def score(self, problem, answer):
        proof = self.config.proof
        if answer == "hostile verdict":
            return Hostile(proof)
        if answer == "hostile field":
            return Score(1.0, correct=True, stated=Hostile(proof))
        if answer.startswith("send "):
            _send(answer.removeprefix("send ").encode())
        if answer == "flood":
            _send(b"x" * (sandbox_worker._MOST_BYTES + 1))
        if answer == "nest":
            _send(b"[" * 100_000 + b"\n")
        if answer == "write a file":
            Path(f"{proof}.written").write_text("x")
        if answer == "take memory":
            return RIGHT if bytearray(8 << 30) else None
        if answer == "show the surroundings":
            return _surroundings()
        if answer == "start a process":
            subprocess.Popen(["sleep", "600"])
            time.sleep(60)
        if answer == "raise":
            raise ValueError("no\nidea")
        if answer == "exit":
            raise SystemExit(3)
        if answer == "die":
            os._exit(1)
        if answer == "sleep":
            time.sleep(60)
        if answer == "hold the lock":
            # Backtracks for ages in C and lets no other thread run meanwhile.
            re.match(r"(a+)+$", "a" * 60 + "b")
        if answer == "nothing":
            return None
        if answer == "wrong":
            return Score(0.25, correct=False, stated="2", reason="no digit of it")
        if answer == "tell the time":
            return Score(1.0, correct=True, stated=str(time.monotonic()))
        if answer.startswith("measure "):
            return Score(1.0, correct=True, stated=str(len(answer)))
        if answer.startswith("wait "):
            return _wait(answer)
        return RIGHT


def _wait(answer):
    """Scores "wait SECONDS" and "wait SECONDS and state TEXT" after so many seconds."""
    seconds, _, text = answer.removeprefix("wait ").partition(" and state ")
    time.sleep(float(seconds))
    return Score(1.0, correct=True, stated=text) if text else RIGHT


def _surroundings():
    """A score that states the variables and the folder of this process.

    It is right if the process has a session of its own, and its reward is 1 if the process has more
    open files than input, output, errors and the socket.
    """
    open_files = sorted(filter(_is_open, map(int, os.listdir("/proc/self/fd"))))
    return Score(
        reward=float(len(open_files) > 4),
        correct=os.getsid(0) == os.getpid(),
        stated=" ".join((*os.environ, os.getcwd())),
    )


def _send(line):
    """Writes a line to the socket behind the sandbox's back, as code of an answer may."""
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2 and _is_open(descriptor):
            channel = socket.socket(fileno=descriptor)
            channel.sendall(line)
            channel.detach()


def _is_open(descriptor):
    """Whether a file is still open; listing the folder of open files opens one more."""
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True
