"""How this library starts Python processes, and how these end together with it.

`python -c` and `python -m` put the current folder in front of the import path. Any process that is
started in a folder with a user's file `random.py` would import it, and so run it, instead of the
standard library's module. So the standard library is put first everywhere.
"""

import os
import signal
import sys
import sysconfig
import threading
from collections.abc import Iterable
from types import FrameType
from typing import Any, Self

from apr_jax.errors import Stopped

# With this variable Python puts neither the current folder nor that of the script in front.
_SAFE_PATH = "PYTHONSAFEPATH"


def standard_library_first(path: Iterable[str]) -> list[str]:
    """Puts the standard library's entries of an import path first, and the rest in its order.

    An entry "" becomes the current folder. Everything that can be imported from `path` still can
    be, except a module that hides one of the standard library's.
    """
    folders = [os.path.abspath(entry) for entry in path]
    standard = [folder for folder in folders if _is_standard(folder)]
    return list(dict.fromkeys([*standard, *folders]))


def _is_standard(folder: str) -> bool:
    libraries = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    compiled = {os.path.join(library, "lib-dynload") for library in libraries}
    archive = f"python{sys.version_info.major}{sys.version_info.minor}.zip"
    return folder in libraries | compiled or os.path.basename(folder) == archive


def protect_imports() -> None:
    """Puts the standard library first on the import path, here and in all processes started here.

    That holds for every Python process that this one starts, also through other libraries.
    """
    sys.path[:] = standard_library_first(sys.path)
    os.environ[_SAFE_PATH] = "1"


def start_fork_server() -> None:
    """Starts the server that forks the workers of `multiprocessing`, and its resource tracker.

    What runs already is left alone. Both are started by `python -c`, which would put the current
    folder in front of the import path, so that is switched off meanwhile.
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
    """Makes this worker of `multiprocessing` end as soon as the process that started it is gone.

    Without this a worker that waits for work would wait for ever when its parent is killed, because
    it holds the other end of that pipe itself. And the fork server runs as long as any worker does.
    """
    from multiprocessing import parent_process

    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


class StopSignals:
    """A context manager in which SIGINT, SIGTERM and SIGHUP are noted, for `check` to raise.

    A handler that raises at once would do so at any place, also where Python drops exceptions, as
    in a finalizer. After the first signal the usual handlers are back, so a second one acts at
    once. Signals that other code handles, or ignores as `nohup` does, are left alone.
    """

    def __init__(self) -> None:
        self._old: dict[int, Any] = {}
        self._noted = 0

    def __enter__(self) -> Self:
        # Only the main thread may set handlers.
        if threading.current_thread() is threading.main_thread():
            usual = (signal.SIG_DFL, signal.default_int_handler)
            for stop_signal in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                handler = signal.getsignal(stop_signal)
                if handler in usual:
                    self._old[stop_signal] = handler
        for number in self._old:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def check(self) -> None:
        """Raises KeyboardInterrupt (SIGINT) or Stopped (the others) if a signal was noted."""
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
