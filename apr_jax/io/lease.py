"""Who writes in a folder: a lease, which keeps a second writer out of it.

    FOLDER/lease.json   host and process that write here, since when, what for; gone with them

The life of a lease:
1. A start that finds none writes its own. One that finds another's looks whether its holder lives:
     - on this host the process table says so at once. A killed run can be started again without
       waiting.
     - of another host nothing is known but its signs of life: the lease changes every
       `BEAT_SECONDS`. Where it is seen to change the start is refused; where it does not for
       `STALE_SECONDS` it is taken over. No clock of one host is compared with that of another.
2. While it is held, a thread gives the signs of life, and makes sure that the lease still is this
   run's: a run that slept so long that another one took it over ends when it wakes up, and writes
   nothing more (`Lease.check`).
3. It is removed at the end, whether by an error, a signal or success.

Reading, deciding and writing are one step, of which two starts never do half each: on a disk under
a lock of the folder (flock), in a bucket by a write that holds only for the generation that was
read (if-generation-match)."""

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
from apr_jax.io.runtime import first_decides, is_first
from apr_jax.io.storage import absolute, bucket_errors, is_remote, write_text

FILE = "lease.json"
BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
_LOOK_SECONDS = 1.0
_LOCK = ".lease.lock"
_UNKNOWN, _TAKEN, _REFUSED = range(3)


class Lease:
    """The right to write in a folder; a context manager.

    Taken once more in the same process, by what it does as a part of the same work, it is the same
    lease.

    Args:
      folder: here or in a bucket; made if missing.
      what: the holder does in it, as others are told: "training".
      together: all processes of a run of several take it together. The first one holds it for them.

    Raises:
      UserError: on entering: another run, which lives, holds it, or the folder cannot be written.
    """

    def __init__(self, folder: Path, what: str, together: bool = False):
        self._folder = absolute(folder)
        self._together = together
        self._store: _Store = (
            _Bucket(self._folder) if is_remote(self._folder) else _Disk(self._folder)
        )
        self._text = json.dumps(_myself() | {"what": what, "token": uuid.uuid4().hex}) + "\n"
        self._outer: Lease | None = None
        self._holds = False
        self._lock = threading.Lock()
        self._version: Any = None
        self._alive_at = 0.0
        self._lost = False
        self._refusal: UserError | None = None
        self._watched: tuple[Any, float] | None = (
            None  # The lease of another host, and since when it has been so.
        )
        self._ended = threading.Event()
        self._beating: threading.Thread | None = None

    def __enter__(self) -> Self:
        key = str(self._folder)
        self._outer = _HELD.get(key)
        if self._outer is not None:
            return self
        while True:
            found = first_decides(self._look) if self._together else self._look()
            if found == _TAKEN:
                break
            if found == _REFUSED:
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
            # What is left is taken over like that of a killed run.
            with contextlib.suppress(Exception):
                self._store.remove(self._text, self._version)

    def check(self) -> None:
        """Makes sure that this run still holds the folder; to be called before anything is written.
        It costs nothing as long as there were signs of life.

        Raises:
          LostLease: another run has taken it over, the folder is gone, or for too long nothing
            could be written there.
        """
        if self._outer is not None:
            self._outer.check()
            return
        if not self._holds:
            return
        # The machine slept, or the disk hangs.
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
        with contextlib.suppress(Exception):
            text, version = self._store.read()
            if version is not None:
                return f"was taken over by {_named(_parse(text))}"
        return f"its {FILE} is gone: the folder was deleted or moved"

    def _look(self) -> int:
        """Looks once at what is there, and takes the lease if nobody else has it; the first process
        does it for all.
        """
        try:
            return self._take()
        except UserError as error:
            self._refusal = error
            return _REFUSED

    def _take(self) -> int:
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
            text, version = self._store.read()
            # Another start was faster, or the holder gave a sign of life.
            if version is not None and text != self._text:
                raise self._refused(_parse(text))
            if version is None:
                return _UNKNOWN
            taken = version
        self._version, self._alive_at = taken, _clock()
        return _TAKEN

    def _is_stale(self, holder: dict[str, Any], version: Any) -> bool:
        """Whether the lease of another host has not changed for long enough, as seen from here."""
        now = _clock()
        if self._watched is None:
            self._watched = version, now
            print(
                f"{self._folder}: is held by {_named(holder)}; this start waits for a sign of life"
                f" of it, and goes on if there is none for {STALE_SECONDS:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        seen, since = self._watched
        if seen != version:
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
            # A full disk, a network that is away for a moment: `check` knows when it is too long.
            except Exception:
                return
            if version is None:
                self._lost = True
            else:
                self._version, self._alive_at = version, _clock()


_HELD: dict[str, Lease] = {}  # By folder, those of this process.


class _Store(Protocol):
    """Where a lease is kept. A version changes whenever the lease does; that of no lease is
    None.
    """

    def read(self) -> tuple[str, Any]:
        """Text and version; "" and None if there is none."""

    def put(self, text: str, version: Any) -> Any:
        """Writes the lease in place of that version, and returns the new one; None if another one
        is there by now.
        """

    def beat(self, text: str, version: Any) -> Any:
        """Gives the lease a new version, and returns it; None if it is not this one any more."""

    def remove(self, text: str, version: Any) -> None:
        """Removes the lease, if it still is this one."""


class _Disk:
    """A lease in a folder of this machine, or of a disk that several share."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._path = folder / FILE

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process is in here at the same time."""
        with contextlib.ExitStack() as opened:
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            opened.callback(os.close, folder)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)
            except OSError:  # NFS locks files alone, and only those that may be written.
                file = opened.enter_context((self._folder / _LOCK).open("a"))
                # A disk that knows no locks: a change of the version must do.
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
            with self._alone():
                if self.read()[1] != version:
                    return None
                write_text(self._path, text)
                return self.read()[1]
        except OSError as error:
            raise UserError(f"{self._folder}: cannot write ({error.strerror or error})") from None

    def beat(self, text: str, version: Any) -> Any:
        del version
        try:
            with self._alone():
                if self.read()[0] != text:
                    return None
                os.utime(self._path)  # Takes no space: a full disk has signs of life too.
                return self.read()[1]
        except FileNotFoundError:
            return None

    def remove(self, text: str, version: Any) -> None:
        del version
        with self._alone():
            if self.read()[0] == text:
                self._path.unlink()


class _Bucket:
    """A lease in a bucket; a version is the generation of the object."""

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
        # A write whose answer was lost, and which gcsfs therefore repeated, finds its own
        # generation.
        found, generation = self.read()
        return generation if found == text else None

    def remove(self, text: str, version: Any) -> None:
        del text
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            self._fs.call("DELETE", "b/{}/o/{}", self._bucket, self._key, ifGenerationMatch=version)

    def _write(self, text: str, version: str) -> str | None:
        # As gcsfs says 412: it has another generation by now.
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
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    }


def _machine() -> str:
    """Tells hosts apart that have the same name, one start of a host from the next, and
    containers.
    """
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot} {namespace}"


def _started(pid: int) -> str:
    """When a process was started, in ticks of the machine: numbers of processes come again.

    "" if that is not known.
    """
    return (_state(pid) or ["", ""])[1]


def _state(pid: int) -> list[str] | None:
    """State and start of a process, by /proc; None if it has none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return [fields[0], fields[19]]


def _lives(holder: dict[str, Any]) -> bool | None:
    """Whether the process of a lease lives; None if that cannot be told from here."""
    pid = holder.get("pid")
    if holder.get("machine") != _machine() or not isinstance(pid, int):
        return None
    if pid == os.getpid():  # What this process holds, it would have found in _HELD.
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # It is there, and another user's.
    state = _state(pid)
    if state is None:
        return True
    return state[0] not in "ZX" and holder.get("started") in ("", state[1])


def _parse(text: str) -> dict[str, Any]:
    """What a lease says; nothing if it is damaged."""
    try:
        values = json.loads(text)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _named(holder: dict[str, Any]) -> str:
    if not holder:
        return "an unknown process"
    what, pid, host, since = (
        str(holder.get(name, "?")) for name in ("what", "pid", "host", "since")
    )
    return f"process {pid} on host {host} ({what}, since {since})"


def _clock() -> float:
    """Seconds that go on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
