"""Tells from a library's error whether a file is damaged or the machine is to blame.

Orbax, TensorStore, gcsfs and others raise errors of many types, which often differ in their text
alone. A damaged step of a run is set aside, and an older one takes its place. But a step that
cannot be read because of the machine, a permission or the network is left alone: the same command
can read it later.
"""

import errno
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

# What parsers raise where the contents of a file are not what was written, whatever the library.
# Errors of other types do not tell of contents.
_PARSER_ERRORS = (ValueError, LookupError, TypeError, EOFError, OSError)

# Numbers of an OSError that say that a file is missing, or that a folder is a file or the other way
# round.
_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}

# How TensorStore, gRPC, XLA and Python's threads word errors of which no file is the cause.
_MACHINE_MESSAGES = re.compile(
    r"RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|CANCELLED"
    r"|forbidden|out of memory|cannot allocate memory|can't start new thread|too many open"
    r" files|unable to initialize backend",
    re.IGNORECASE,
)

# Packages whose errors tell of the way to a bucket.
_NETWORK_PACKAGES = ("aiohttp", "gcsfs", "google", "requests", "urllib3")

# How TensorStore ends the message of an error of the operating system.
_SYSTEM_ERROR = re.compile(r"\[OS error (\d+)")

_MESSAGE_LENGTH = 160


def shows_damage(error: BaseException) -> bool:
    """Returns whether an error from reading files can mean that they are damaged.

    Damage shows in a checksum, in a parser that fails, or in a file that is missing. A device that
    is not there, too little memory, too many threads or open files, a missing permission, a disk or
    a network that does not answer: these pass, and say nothing about the files.
    """
    original = _unwrapped(error)
    is_about_contents = isinstance(original, _PARSER_ERRORS) or _is_assertion_of_orbax(original)
    return is_about_contents and not is_of_machine(error)


def is_of_machine(error: BaseException) -> bool:
    """Returns whether an error comes from the machine, a permission or the network, not a file.

    The error, or any of those that led to it, may show that.
    """
    return any(map(_tells_of_machine, _causes(error)))


def is_of_system(error: BaseException) -> bool:
    """Returns whether TensorStore passes on a system's error or lacks a permission."""
    return _SYSTEM_ERROR.search(str(error)) is not None or "PERMISSION_DENIED" in str(error)


def what_went_wrong(error: BaseException) -> str:
    """Returns the first line of the error's message, shortened; or its type if it has none."""
    original = _unwrapped(error)
    lines = str(original).strip().splitlines() or [type(original).__name__]
    return lines[0][:_MESSAGE_LENGTH]


def _is_assertion_of_orbax(error: BaseException) -> bool:
    """Returns whether Orbax asserted something about what it had read.

    Assertions of other packages say nothing about a file.
    """
    if not isinstance(error, AssertionError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and "orbax" in Path(frames[-1].filename).parts


def _unwrapped(error: BaseException) -> BaseException:
    """Returns the error that Orbax has wrapped into a bare `Exception`, or the error itself."""
    while type(error) is Exception and error.__cause__ is not None:
        error = error.__cause__
    return error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yields the error and all errors that led to it, each once."""
    remaining = [error]
    seen: set[int] = set()
    while remaining:
        cause = remaining.pop()
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        for earlier in (cause.__cause__, cause.__context__):
            if earlier is not None:
                remaining.append(earlier)
        if isinstance(cause, BaseExceptionGroup):
            remaining += cause.exceptions


def _tells_of_machine(error: BaseException) -> bool:
    """Returns whether one error, taken by itself, has its cause in the machine."""
    package = type(error).__module__.partition(".")[0]
    if isinstance(error, MemoryError) or package in _NETWORK_PACKAGES:
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in _MISSING

    message = str(error)
    system_error = _SYSTEM_ERROR.search(message)
    if system_error is not None:
        return int(system_error[1]) not in _MISSING
    return _MACHINE_MESSAGES.search(message) is not None
