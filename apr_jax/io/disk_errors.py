"""Errors of the disk and the machine, each reported once and in one line.

Other libraries report them in pages of text, and also from threads of their own.
"""

import errno
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from apr_jax.errors import DiskError, UserError
from apr_jax.io.library_errors import is_of_system, what_went_wrong


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turns errors of the disk into a DiskError that names `where` and the reason.

    Those are a full disk, whichever library reports it, any other OSError, and errors of the system
    that TensorStore reports. All other exceptions pass.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if _is_full(error):
            raise DiskError(
                f"{where}: the disk is full; make room and start the same command again, what was"
                " saved before is kept"
            ) from None
        if isinstance(error, OSError):
            raise DiskError(f"{where}: cannot write ({error.strerror or error})") from None
        if is_of_system(error):  # TensorStore raises ValueErrors.
            raise DiskError(f"{where}: cannot write ({what_went_wrong(error)})") from None
        raise


def check_writable(folder: Path) -> None:
    """Makes sure that files can be made in a folder of this machine.

    The first save of a run may come hours later, which would be late to find out.

    Raises:
      DiskError: no file can be made there.
    """
    with disk_errors(folder), tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x")


def _is_full(error: BaseException | None) -> bool:
    # TensorStore reports a full disk as a ValueError.
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


class TolerantStream:
    """A stream that may vanish; then what is written to it is dropped.

    Writing to a terminal that was closed always fails (EIO), which must not end a run that is about
    to save.
    """

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


class Muffled:
    """Drops tracebacks that threads of other libraries print, until `end` is called.

    Nothing is lost by that: Orbax raises the same errors again where the run waits for a save, and
    then TensorStore's threads find their event loop closed; and TensorBoard's file is only a copy
    of metrics.jsonl. With APR_DEBUG set nothing is dropped.
    """

    def __init__(self) -> None:
        self._thread_hook = threading.excepthook
        self._unraisable_hook = sys.unraisablehook
        self._loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
        if os.environ.get("APR_DEBUG"):
            return
        for logger in self._loggers:
            logger.addFilter(_has_no_traceback)
        threading.excepthook = self._thread_died
        sys.unraisablehook = self._unraisable

    def end(self) -> None:
        """Restores what was there before."""
        threading.excepthook = self._thread_hook
        sys.unraisablehook = self._unraisable_hook
        for logger in self._loggers:
            logger.removeFilter(_has_no_traceback)

    def _thread_died(self, args: threading.ExceptHookArgs) -> None:
        if not (_is_full(args.exc_value) or isinstance(args.exc_value, OSError)):
            self._thread_hook(args)

    def _unraisable(self, args: "sys.UnraisableHookArgs") -> None:
        if str(args.exc_value) != "Event loop is closed":
            self._unraisable_hook(args)


def _has_no_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the pages that Orbax logs about damaged files, which we report in one line."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
