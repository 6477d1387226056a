"""How this library starts Python processes, and how they end with it.

`python -c` and `python -m` put the current folder in front of the import path. A user's file
`random.py` there would be imported, and so run, in place of the standard library's, by any process
that we start in that folder. So the standard library comes first everywhere."""

import os
import signal
import sys
import sysconfig
import threading
from collections.abc import Iterable
from types import FrameType
from typing import Any, Self

from apr_jax.errors import Stopped

_SAFE_PATH = (  # With it Python puts neither the current folder nor that of the script in front.
    "PYTHONSAFEPATH"
)


def standard_library_first(path: Iterable[str]) -> list[str]:
    """The entries of an import path, those of the standard library first, the rest in order; ""
    becomes the current folder.

    So whatever can be imported from `path` can still be, except a module that hides one of the
    standard library's."""
    folders = [os.path.abspath(entry) for entry in path]
    standard = [folder for folder in folders if _is_standard(folder)]
    return list(dict.fromkeys([*standard, *folders]))


def _is_standard(folder: str) -> bool:
    libraries = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    compiled = {os.path.join(library, "lib-dynload") for library in libraries}
    archive = f"python{sys.version_info.major}{sys.version_info.minor}.zip"
    return folder in libraries | compiled or os.path.basename(folder) == archive


def protect_imports() -> None:
    """Puts the standard library first in this process, and in every Python process that it or a
    library of it starts.
    """
    sys.path[:] = standard_library_first(sys.path)
    os.environ[_SAFE_PATH] = "1"


def start_fork_server() -> None:
    """Starts the server that forks the workers of `multiprocessing`, unless it runs, and the
    tracker beside it.

    Both are started with `python -c`, which would put the current folder in front.
    """
    from multiprocessing import forkserver

    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ[_SAFE_PATH]
        else:
            os.environ[_SAFE_PATH] = before


def end_with_parent() -> None:
    """Ends this worker of `multiprocessing` as soon as the process that started it is gone, killed
    or not.

    A worker that waits for work would wait for ever, because it holds the other end of that pipe
    itself; and the fork server runs as long as any worker does."""
    from multiprocessing import parent_process

    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


class StopSignals:
    """Within it SIGINT, SIGTERM and SIGHUP are noted, and `check` raises for them; a second one
    acts as if nobody had noted it.

    A handler that raises by itself would do so anywhere, also where Python drops what is raised, as
    in a finalizer. A signal that somebody else handles, or ignores as `nohup` does, stays theirs.
    Use it as a context manager."""

    def __init__(self) -> None:
        self._old: dict[int, Any] = {}
        self._noted = 0

    def __enter__(self) -> Self:
        # Only the main thread may set handlers.
        if threading.current_thread() is threading.main_thread():
            handlers = {
                number: signal.getsignal(number)
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            }
            usual = (signal.SIG_DFL, signal.default_int_handler)
            self._old = {
                number: handler for number, handler in handlers.items() if handler in usual
            }
        for number in self._old:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def check(self) -> None:
        """Raises KeyboardInterrupt or Stopped if a signal has come."""
        if self._noted == signal.SIGINT:
            raise KeyboardInterrupt
        if self._noted:
            raise Stopped("", self._noted)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._noted = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
