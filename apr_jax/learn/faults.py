"""What goes wrong with the disk, said once and in one line: libraries say it in pages, from threads of their own."""

import errno
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apr_jax.errors import FullDisk, UserError


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turns a full disk, through whichever library it shows, into a FullDisk that says so, and any OSError into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if _is_full(error):
            raise FullDisk(
                f"{where}: the disk is full; make room and start the same command again, what was saved before is kept"
            ) from None
        if isinstance(error, OSError):
            raise UserError(f"{where}: cannot write ({error.strerror or error})") from None
        raise


def _is_full(error: BaseException | None) -> bool:
    # TensorStore reports a full disk as a ValueError.
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


class Muffled:
    """From its making to `end`, tracebacks that the threads of libraries print are dropped, unless APR_DEBUG is set.

    Orbax raises the same errors again where the run waits for a save, and TensorStore's threads find its event loop closed
    then; TensorBoard's file is only a copy of metrics.jsonl.
    """

    def __init__(self) -> None:
        self._hook, self._any_hook = threading.excepthook, sys.unraisablehook
        self._loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
        if os.environ.get("APR_DEBUG"):
            return
        for logger in self._loggers:
            logger.addFilter(_has_no_traceback)
        threading.excepthook = self._thread_died
        sys.unraisablehook = self._unraisable

    def end(self) -> None:
        threading.excepthook, sys.unraisablehook = self._hook, self._any_hook
        for logger in self._loggers:
            logger.removeFilter(_has_no_traceback)

    def _thread_died(self, args: threading.ExceptHookArgs) -> None:
        if not _is_full(args.exc_value):
            self._hook(args)

    def _unraisable(self, args: "sys.UnraisableHookArgs") -> None:
        if str(args.exc_value) != "Event loop is closed":
            self._any_hook(args)


def _has_no_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info


@contextmanager
def quiet() -> Iterator[None]:
    """Orbax logs pages about damaged files that we report in one line."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
