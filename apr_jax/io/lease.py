"""The lease of a folder: it keeps a second run from writing there.

    FOLDER/lease.json   host and process that write here, since when, why; removed at the end

The life of a lease:
1. A start that finds no lease writes its own. A start that finds one asks whether the holder lives:
     - On the same host the process table knows at once, so a killed run can be started again
       without waiting.
     - A holder on another host shows that it lives by changing its lease every `BEAT_SECONDS`. If
       the lease is seen to change, the start is refused. If it does not change for `STALE_SECONDS`,
       it is taken over. Clocks of two hosts are never compared.
2. While a lease is held, a thread changes it regularly, and checks that it still is this run's. A
   run that slept so long that another run took its lease over ends when it wakes up, and writes
   nothing more (`Lease.check`).
3. The lease is removed at the end, be it by an error, a signal or success.

No two starts can both find the folder free: reading, deciding and writing happen under a lock of
the folder (flock) on a disk, and in a bucket by a write that succeeds only if the object's
generation is the one that was read (if-generation-match).
"""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from apr_jax.errors import LostLease, UserError
from apr_jax.io.json_files import json_line
from apr_jax.io.runtime import first_decides, is_first
from apr_jax.io.storage import absolute, bucket_errors, is_remote, write_text

FILE = "lease.json"
BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
_LOOK_SECONDS = 1.0
_LOCK = ".lease.lock"
_UNKNOWN, _TAKEN, _REFUSED = range(3)


class Lease:
    """The right to write in a folder, as a context manager.

    If the same process takes the lease of the same folder once more within it, for a part of the
    same work, the outer lease covers that.

    Args:
      folder: of this machine or in a bucket; made if missing.
      what: what the holder does there, for messages to others, such as "training".
      together: whether all processes of a run take the lease together. The first process holds it
        for all of them.

    Raises:
      UserError: on entering: another run holds the lease and lives, or the folder cannot be
        written.
    """

    def __init__(self, folder: Path, what: str, together: bool = False):
        self._folder = absolute(folder)
        self._together = together
        self._store: _Store
        if is_remote(self._folder):
            self._store = _Bucket(self._folder)
        else:
            self._store = _Disk(self._folder)
        self._text = json_line(_myself() | {"what": what, "token": uuid.uuid4().hex})
        self._outer: Lease | None = None
        self._holds = False
        self._lock = threading.Lock()
        self._version: Any = None
        self._alive_at = 0.0
        self._lost = False
        self._refusal: UserError | None = None
        # The version of another host's lease, and since when it has been that.
        self._watched: tuple[Any, float] | None = None
        self._ended = threading.Event()
        self._beating: threading.Thread | None = None

    def __enter__(self) -> Self:
        key = str(self._folder)
        self._outer = _HELD.get(key)
        if self._outer is not None:
            return self
        while True:
            outcome = first_decides(self._look) if self._together else self._look()
            if outcome == _TAKEN:
                break
            if outcome == _REFUSED:
                raise self._refusal or UserError(
                    f"{self._folder}: was refused to the first process of this run"
                )
        self._holds = not self._together or is_first()
        _HELD[key] = self
        if self._holds:
            self._beating = threading.Thread(
                target=self._give_signs, name=f"lease of {key}", daemon=True
            )
            self._beating.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del error, trace
        if self._outer is not None:
            return
        _HELD.pop(str(self._folder), None)
        if not self._holds:
            return
        self._ended.set()
        with self._lock:
            if self._lost:
                return
            # A lease that cannot be removed is taken over later like that of a killed run.
            with contextlib.suppress(Exception):
                self._store.remove(self._text, self._version)

    def check(self) -> None:
        """Makes sure that this run still holds the lease; to be called before anything is written.

        It costs nothing as long as the lease was renewed in time.

        Raises:
          LostLease: another run has taken the lease over, the folder is gone, or the lease could
            not be renewed for too long.
        """
        if self._outer is not None:
            self._outer.check()
            return
        if not self._holds:
            return
        # After a late renewal (the machine slept, or the disk hangs) the lease must be read again.
        if not self._lost and _clock() - self._alive_at > 2 * BEAT_SECONDS:
            self._beat()
        if self._lost:
            raise LostLease(
                f"{self._folder}: {self._who_has_it()}; this run ends, and writes nothing more"
                " there"
            )
        if _clock() - self._alive_at > STALE_SECONDS:
            raise LostLease(
                f"{self._folder}: {FILE} could not be renewed for {STALE_SECONDS:.0f} s; another"
                " run may have taken the folder over, so this one ends; start the same command"
                " again"
            )

    def _who_has_it(self) -> str:
        """Says in words what became of a lost lease."""
        with contextlib.suppress(Exception):
            text, version = self._store.read()
            if version is not None:
                return f"was taken over by {_named(_parse(text))}"
        return f"its {FILE} is gone: the folder was deleted or moved"

    def _look(self) -> int:
        """Tries once to take the lease, and gives the outcome as a number.

        The number can be sent to the other processes, for which the first one does this.
        """
        try:
            return self._take()
        except UserError as error:
            self._refusal = error
            return _REFUSED

    def _take(self) -> int:
        """Takes the lease if no living run holds it; _UNKNOWN asks for another try.

        Raises:
          UserError: a living run holds it.
        """
        if self._watched is not None:
            time.sleep(_LOOK_SECONDS)

        text, version = self._store.read()
        if version is not None:
            holder = _parse(text)
            lives = _lives(holder)
            if lives:
                raise self._refused(holder)
            if lives is None and not self._is_stale(holder, version):
                return _UNKNOWN

        taken = self._store.put(self._text, version)
        if taken is None:
            # Another start was faster, or the holder has renewed its lease.
            text, version = self._store.read()
            if version is not None and text != self._text:
                raise self._refused(_parse(text))
            if version is None:
                return _UNKNOWN
            taken = version
        self._version = taken
        self._alive_at = _clock()
        return _TAKEN

    def _is_stale(self, holder: dict[str, Any], version: Any) -> bool:
        """Returns whether this process saw no change of another host's lease for long enough."""
        now = _clock()
        if self._watched is None:
            self._watched = version, now
            print(
                f"{self._folder}: is held by {_named(holder)}; this start waits for a sign of life"
                f" from it, and goes on if there is none for {STALE_SECONDS:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        seen_version, since = self._watched
        if seen_version != version:
            raise self._refused(holder)
        return now - since >= STALE_SECONDS

    def _refused(self, holder: dict[str, Any]) -> UserError:
        return UserError(
            f"{self._folder}: is being written by {_named(holder)}, which lives; wait for its end"
            " or stop it, or choose another folder"
        )

    def _give_signs(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self._beat()

    def _beat(self) -> None:
        with self._lock:
            if self._lost or self._ended.is_set():
                return
            try:
                version = self._store.beat(self._text, self._version)
            except Exception:
                # The disk may be full, or the network away for a moment; `check` notices when that
                # takes too long.
                return
            if version is None:
                self._lost = True
            else:
                self._version = version
                self._alive_at = _clock()


_HELD: dict[str, Lease] = {}  # The leases that this process holds, by folder.


class _Store(Protocol):
    """The place where a lease is kept.

    A lease has a version, which changes whenever the lease does. Without a lease it is None.
    """

    def read(self) -> tuple[str, Any]:
        """Reads the lease's text and version; "" and None if there is no lease."""

    def put(self, text: str, version: Any) -> Any:
        """Replaces the lease of this version by `text`.

        Returns the new version, or None if the lease has another version by now.
        """

    def beat(self, text: str, version: Any) -> Any:
        """Gives the lease a new version and returns it; None if it is another run's by now."""

    def remove(self, text: str, version: Any) -> None:
        """Removes the lease if it is still this one."""


class _Disk:
    """A lease in a folder of this machine, or of a disk that several share."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._path = folder / FILE

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps all other processes out of this block meanwhile."""
        with contextlib.ExitStack() as opened:
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            opened.callback(os.close, folder)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)
            except OSError:
                # NFS locks no folders, only files that are open for writing.
                file = opened.enter_context((self._folder / _LOCK).open("a"))
                # Some disks know no locks at all; there the comparison of versions must do.
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def read(self) -> tuple[str, Any]:
        try:
            with self._path.open(encoding="utf-8", errors="replace") as file:
                text = file.read()
                state = os.fstat(file.fileno())
        except (FileNotFoundError, NotADirectoryError):
            return "", None
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read ({error.strerror or error})") from None
        return text, (text, state.st_ino, state.st_mtime_ns)

    def put(self, text: str, version: Any) -> Any:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                if self.read()[1] != version:
                    return None
                write_text(self._path, text)
                return self.read()[1]
        except OSError as error:
            raise UserError(f"{self._folder}: cannot write ({error.strerror or error})") from None

    def beat(self, text: str, version: Any) -> Any:
        del version
        try:
            with self._locked():
                if self.read()[0] != text:
                    return None
                os.utime(self._path)  # It takes no space, so it works on a full disk too.
                return self.read()[1]
        except FileNotFoundError:
            return None

    def remove(self, text: str, version: Any) -> None:
        del version
        with self._locked():
            if self.read()[0] == text:
                self._path.unlink()


class _Bucket:
    """A lease in a bucket; its version is the generation of the object."""

    def __init__(self, folder: Path):
        import fsspec

        self._path = folder / FILE
        self._bucket, _, self._key = os.fspath(self._path).partition("://")[2].partition("/")
        self._fs: Any = fsspec.filesystem("gcs")

    def read(self) -> tuple[str, Any]:
        with bucket_errors(self._path):
            try:
                headers, content = self._fs.call(
                    "GET", "b/{}/o/{}", self._bucket, self._key, alt="media"
                )
            except FileNotFoundError:
                return "", None
            return content.decode(errors="replace"), headers["x-goog-generation"]

    def put(self, text: str, version: Any) -> Any:
        with bucket_errors(self._path):
            return self._write(text, version or "0")

    def beat(self, text: str, version: Any) -> Any:
        written = self._write(text, version)
        if written is not None:
            return written
        # If the answer to a write was lost, gcsfs has repeated the write, which then fails because
        # of the generation that its first attempt has made.
        current, generation = self.read()
        return generation if current == text else None

    def remove(self, text: str, version: Any) -> None:
        del text
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            self._fs.call("DELETE", "b/{}/o/{}", self._bucket, self._key, ifGenerationMatch=version)

    def _write(self, text: str, version: str) -> str | None:
        """Writes the object if its generation is `version`, and returns the new generation."""
        # gcsfs reports another generation (status 412) by this error.
        with contextlib.suppress(FileExistsError):
            written = self._fs.call(
                "POST",
                f"{self._fs._location}/upload/storage/v1/b/{self._bucket}/o",
                uploadType="media",
                name=self._key,
                ifGenerationMatch=version,
                headers={"Content-Type": "text/plain"},
                data=text.encode(),
                json_out=True,
            )
            return str(written["generation"])
        return None


def _myself() -> dict[str, Any]:
    """Describes this process as the holder of a lease."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    }


def _machine() -> str:
    """Identifies where process numbers are unique: this host, this start of it, this container.

    The host's name alone does not: hosts may share one.
    """
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot} {namespace}"


def _started(pid: int) -> str:
    """Returns when a process was started, in ticks of the machine; "" if that is not known.

    It tells apart processes that have the same number, one after the other.
    """
    return (_state(pid) or ["", ""])[1]


def _state(pid: int) -> list[str] | None:
    """Returns state and start of a process as /proc has them; None if it is not listed there."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return [fields[0], fields[19]]


def _lives(holder: dict[str, Any]) -> bool | None:
    """Returns whether the process that holds a lease lives; None if this host cannot tell."""
    pid = holder.get("pid")
    if holder.get("machine") != _machine() or not isinstance(pid, int):
        return None
    if pid == os.getpid():  # A lease of this process would be in _HELD, so this is an old one.
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # The process exists and is another user's.
    state = _state(pid)
    if state is None:
        return True
    return state[0] not in "ZX" and holder.get("started") in ("", state[1])


def _parse(text: str) -> dict[str, Any]:
    """Returns the content of a lease; empty if it is damaged."""
    try:
        values = json.loads(text)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _named(holder: dict[str, Any]) -> str:
    """Describes the holder of a lease in words."""
    if not holder:
        return "an unknown process"
    known = {name: holder.get(name, "?") for name in ("what", "pid", "host", "since")}
    return "process {pid} on host {host} ({what}, since {since})".format(**known)


def _clock() -> float:
    """Returns a clock in seconds that goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
