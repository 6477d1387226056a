"""Errors that a user can cause and mend. The command line prints their message, never a traceback.

And what tells the errors of libraries apart: is a file damaged, or are the machine, a permission,
the network to blame?"""

import errno
import re
import traceback
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """Something failed: a damaged checkpoint, a full disk. Exit status 1."""


class UsageError(UserError):
    """Something was asked for in a wrong way: a bad flag, file or problem. Exit status 2."""


class DiskError(UserError):
    """Nothing more can be written: the disk is full, read-only, or closed to this user.

    Exit status 1, at once.
    """


class Stopped(BaseException):
    """SIGTERM, or SIGHUP of a terminal that is closed. Exit status 128 + `number`. No `except
    Exception` keeps it.

    Args:
      message: what was saved; empty where it is raised.
      number: of the signal.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


class UnknownAnswers(UserError):
    """Too many answers of a batch are without a verdict. Exit status 1."""


class LostProcess(UserError):
    """This or another process of a run of several is lost, and with it all of them.

    Exit status 1, at once.
    """


class LostLease(LostProcess):
    """Another run has taken the folder over in which this one wrote.

    Exit status 1, at once, and nothing more is written.
    """


# What parsers raise at contents that are not what was written, whatever the library. Anything else
# is not about contents.
_PARSERS_SAY = (ValueError, LookupError, TypeError, EOFError, OSError)

# An OSError of these numbers tells that a file is missing, or is a folder, or the other way round.
_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}

# How TensorStore, gRPC, XLA and Python's threads word what no file is to blame for.
_MACHINE_SAYS = re.compile(
    r"RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|CANCELLED"
    r"|forbidden|out of memory|cannot allocate memory|can't start new thread|too many open"
    r" files|unable to initialize backend",
    re.IGNORECASE,
)
# Packages whose errors are about the way to a bucket.
_NETWORKS = (
    "aiohttp",
    "gcsfs",
    "google",
    "requests",
    "urllib3",
)
_SYSTEM_ERROR = re.compile(r"\[OS error (\d+)")  # As TensorStore ends its messages.


def shows_damage(error: BaseException) -> bool:
    """Whether an error that came while files were read can mean that they are damaged.

    Damage is what a sum or a parser shows, or a file that is missing. A device that is not there,
    too little memory, too many threads or open files, a missing permission, a disk or a network
    that does not answer: these pass, and say nothing about the files."""
    error_itself = _unwrapped(error)
    parsed = isinstance(error_itself, _PARSERS_SAY) or _asserted_by_a_reader(error_itself)
    return parsed and not is_of_machine(error)


def _asserted_by_a_reader(error: BaseException) -> bool:
    """Whether Orbax found that what it had read cannot be; a bare assertion of anyone else tells of
    no file.
    """
    if not isinstance(error, AssertionError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and "orbax" in Path(frames[-1].filename).parts


def _unwrapped(error: BaseException) -> BaseException:
    """What Orbax wraps into an exception of no type of its own."""
    while type(error) is Exception and error.__cause__ is not None:
        error = error.__cause__
    return error


def is_of_machine(error: BaseException) -> bool:
    """Whether the error, or one that led to it, tells of the machine, its permissions or its
    network, not of a file.
    """
    return any(map(_tells_of_machine, _causes(error)))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that led to it."""
    left = [error]
    seen: set[int] = set()
    while left:
        cause = left.pop()
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        left += [other for other in (cause.__cause__, cause.__context__) if other is not None]
        if isinstance(cause, BaseExceptionGroup):
            left += cause.exceptions


def _tells_of_machine(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__module__.partition(".")[0] in _NETWORKS:
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in _MISSING
    text = str(error)
    told = _SYSTEM_ERROR.search(text)
    if told is not None:
        return int(told[1]) not in _MISSING
    return _MACHINE_SAYS.search(text) is not None


def what_went_wrong(error: BaseException) -> str:
    """The error in at most one line; where it has no message, its type."""
    error = _unwrapped(error)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]


def is_of_system(error: BaseException) -> bool:
    """Whether TensorStore passes on what the operating system said, or that a permission is
    missing.
    """
    return _SYSTEM_ERROR.search(str(error)) is not None or "PERMISSION_DENIED" in str(error)
