"""Files and folders, of this machine or of a bucket (gs://bucket/folder).

Every path that a user gives goes through `as_path` or `local_path`. They expand `~`, and refuse
what would otherwise become a local folder of a strange name: `s3://x`, `GS://x`, `gs:/x`, an empty
text, a flag in place of a path. They leave `$NAME` alone, which shells expand and which is a legal
name of a file.

A path of a bucket is etils' `epath.Path`, which has the methods of pathlib's and which Orbax
accepts. Two things do not work in a bucket, and have a stand-in:
  - Objects cannot be appended to. `Mirror` gives a local folder to write in, and copies what has
    changed to the bucket.
  - array_record reads only files of this machine. `local_copy` copies a folder here once, and again
    when it has changed. Copies that no process uses any more make way for new ones.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, cast

from apr_jax.errors import LostLease, UsageError, UserError

_SCHEME = "gs://"
# An address of any kind: a word, a colon and a slash. A single letter may be a drive instead.
_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/")
COPIES_VARIABLE = "APR_COPIES"
# So many seconds lie between two copies of what has grown, and so many times those of the last one.
_PUSH_SECONDS = 60.0
_PUSH_PAUSE = 19
# A bucket's service is given so long to answer, and after so long a line says what is waited for.
_ANSWER_SECONDS = 30.0
_TELL_SECONDS = 2.0
_TRY_SECONDS = 5.0
_COPIES_KEPT = 4
_PARTIAL = ".partial-"  # Copies under way; the names of other copies do not begin with a dot.
_PARTIAL_SECONDS = 86_400.0  # A partial copy of this age was left by a process that is gone.


def as_path(path: str | os.PathLike[str]) -> Path:
    """Returns the path of a file or folder, of this machine or in a bucket.

    Args:
      path: what a user wrote, as a string, or a path that was made of it.

    Raises:
      UsageError: there can be no such path, or it is in a bucket and gcsfs is not installed.
    """
    text = checked(path) if isinstance(path, str) else os.fspath(path)
    # pathlib turns gs://bucket into gs:/bucket.
    if text.startswith("gs:/") and not text.startswith(_SCHEME):
        raise UsageError(f"{text}: give a path of a bucket as a string, or as one of etils.epath")
    if not text.startswith(_SCHEME):
        return Path(text)
    if importlib.util.find_spec("gcsfs") is None:
        raise UsageError(f"{text}: paths of a bucket need gcsfs; pip install 'apr_jax[gcs]'")
    from etils import epath

    if not os.environ.get("APR_DEBUG"):
        # gcsfs logs pages about each failed request. The error is raised too, and reported in one
        # line.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return cast(Path, epath.Path(text))


def local_path(path: str | os.PathLike[str]) -> Path:
    """Returns the path of a file or folder of this machine.

    Raises:
      UsageError: there can be no such path, or it is in a bucket.
    """
    if isinstance(path, str):
        path = checked(path)
    if is_remote(path):
        raise UsageError(f"{path}: is in a bucket; must be a file or folder of this machine")
    return Path(path)


def checked(text: str) -> str:
    """Checks what a user wrote as a path, and expands a leading `~`.

    Raises:
      UsageError: there can be no such path: it is empty, looks like a flag, or is an address other
        than gs://bucket/folder.
    """
    if not text.strip():
        raise UsageError(f"{text!r}: is empty; must be the path of a file or folder")
    if text != text.strip():
        raise UsageError(f"{text!r}: begins or ends with white space, which no path here may")
    if text.startswith("-"):
        raise UsageError(f"{text}: looks like a flag; a file of that name is ./{text}")
    _refuse_addresses(text)
    if not text.startswith("~"):
        return text
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise UsageError(
            f"{text}: there is no such user, or no home folder; a file of that name is ./{text}"
        )
    return expanded


def _refuse_addresses(text: str) -> None:
    """Raises UsageError if the path is an address other than that of a bucket."""
    address = _ADDRESS.match(text)
    if address:
        scheme = address["scheme"]
    elif text.lower().startswith("gs:"):
        scheme = "gs"
    else:
        return
    rest = text.partition(":")[2].lstrip("/")
    if scheme.lower() == "file":
        raise UsageError(f"{text}: write a path of this machine without file://, as /{rest}")
    if scheme.lower() != "gs":
        raise UsageError(
            f"{text}: {scheme}:// is not supported; must be a path of this machine or"
            " gs://bucket/folder"
        )
    bucket, *folders = rest.split("/")
    if not text.startswith(_SCHEME) or not bucket or text.startswith(f"{_SCHEME}/"):
        raise UsageError(f"{text}: write it as {_SCHEME}{rest or 'bucket/folder'}")
    if {".", ".."} & {bucket, *folders}:
        raise UsageError(f"{text}: a bucket has no folders . and ..; write the whole path")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is in a bucket."""
    return os.fspath(path).startswith(_SCHEME)


def absolute(path: str | os.PathLike[str]) -> Path:
    """Returns a path in a form that does not depend on the current folder."""
    whole = as_path(path)
    return whole if is_remote(whole) else whole.absolute()


def write_text(path: Path, text: str) -> None:
    """Writes a text as UTF-8 by `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, contents: bytes) -> None:
    """Writes a file that appears whole or not at all, as objects of a bucket always do.

    If it cannot be written, an older file stays as it was and nothing else is left behind.

    Raises:
      OSError: the file cannot be written; `filename` is the path.
      UserError: the bucket cannot be written.
    """
    if is_remote(path):
        with bucket_errors(path):
            path.write_bytes(contents)
        return
    try:
        # A device or a pipe is written directly, because it cannot be replaced. (A folder is
        # refused by that.)
        if path.exists() and not path.is_file():
            path.write_bytes(contents)
        else:
            _replace(path, contents)
    except OSError as error:
        # Some errors name no file, and some the temporary one, which a user does not know.
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


def _replace(path: Path, contents: bytes) -> None:
    """Writes a new file beside the old one and moves it into the old one's place."""
    path = path.resolve()  # A link stays a link.
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())  # Else a power cut may leave the new name on an empty file.
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def save_tensors(tensors: dict[str, Any], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file of this machine, which appears whole or not at all.

    Its mode is what the umask gives, whereas `safetensors` itself makes files that only their owner
    may read.

    Args:
      tensors: numpy arrays by name.
      path: of the file.
      metadata: texts that are kept in the file's header.
    """
    from safetensors.numpy import save_file

    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(b"")
    mode = stat.S_IMODE(partial.stat().st_mode)
    save_file(tensors, partial, metadata=metadata)
    partial.chmod(mode)
    with partial.open("rb") as file:
        os.fsync(file.fileno())  # Else a power cut may leave the new name on an empty file.
    os.replace(partial, path)


def require_reachable(path: Path) -> None:
    """Makes sure that a bucket answers, which distinguishes "nothing is there" from "no network".

    Raises:
      UserError: the bucket does not answer.
    """
    if not is_remote(path):
        return
    import fsspec

    # The bucket also answers if there is nothing at this path.
    with bucket_errors(path), contextlib.suppress(FileNotFoundError):
        fsspec.filesystem("gs").ls(os.fspath(path).removeprefix(_SCHEME), refresh=True)


def wait_for_bucket(path: Path) -> None:
    """Waits until the service of a bucket takes connections; does nothing for other paths.

    Without a network gcsfs tries each request again for most of a minute, and says nothing about
    it. So this is asked first.

    Raises:
      UserError: there was no answer for `_ANSWER_SECONDS`.
    """
    if not is_remote(path):
        return
    from gcsfs.core import _location

    address = urllib.parse.urlsplit(_location())
    host = address.hostname or ""
    port = address.port or (80 if address.scheme == "http" else 443)

    told = f"{path}: waits up to {_ANSWER_SECONDS:g} s for an answer of {host}"
    telling = threading.Timer(_TELL_SECONDS, lambda: print(told, file=sys.stderr, flush=True))
    telling.daemon = True
    telling.start()
    try:
        _connect(path, host, port)
    finally:
        telling.cancel()


def _connect(path: Path, host: str, port: int) -> None:
    """Tries to connect to the service of a bucket until that succeeds.

    Raises:
      UserError: it did not succeed for `_ANSWER_SECONDS`.
    """
    deadline = time.monotonic() + _ANSWER_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=_TRY_SECONDS).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() >= deadline:
            raise UserError(
                f"{path}: no answer of {host} for {_ANSWER_SECONDS:g} s ({reason}); see that this"
                " machine has a network, and start the same command again"
            )
        time.sleep(min(1.0, _ANSWER_SECONDS))


def nearby(folder: Path) -> list[Path]:
    """Returns a folder and up to two folders above it."""
    whole = absolute(folder)
    parents = list(whole.parents[:2])
    if is_remote(whole):  # What is above the bucket is no folder.
        parents = [parent for parent in parents if len(parent.parts) > 2]
    return [folder, *parents]


def move(folder: Path, target: Path) -> None:
    """Renames a folder; in a bucket it is copied and deleted."""
    if not is_remote(folder):
        folder.rename(target)
        return
    with bucket_errors(folder):
        _copy_tree(folder, target)
        cast(Any, folder).rmtree()


def copies_folder() -> Path:
    """Returns the folder for copies of remote folders.

    It is $APR_COPIES, by default ~/.cache/apr_jax_copies.
    """
    return folder_of(COPIES_VARIABLE, "~/.cache/apr_jax_copies")


def folder_of(variable: str, default: str) -> Path:
    """Returns the folder of this machine that an environment variable names.

    Args:
      variable: name of the environment variable.
      default: the folder where the variable is unset or empty.

    Raises:
      UsageError: there can be no such folder; the message names the variable.
    """
    try:
        return local_path(os.environ.get(variable) or default).absolute()
    except UsageError as error:
        raise UsageError(f"{variable}={error}") from None


def local_copy(folder: Path, stamp: str) -> Path:
    """Returns a folder of this machine as it is, and copies one of a bucket to this machine.

    The copy stays at least as long as this process lives. After that it stays until its folder in
    the bucket has changed, or `_COPIES_KEPT` other folders were copied.

    Args:
      folder: a folder whose files change only together with its file `stamp`.
      stamp: name of that file. A copy with the same contents of it is used again.

    Raises:
      UserError: the bucket cannot be read.
    """
    if not is_remote(folder):
        return folder
    with bucket_errors(folder):
        contents = (folder / stamp).read_bytes()
        copy = copies_folder() / f"{_digest(os.fspath(folder).encode())}-{_digest(contents)}"
        while not _claim(copy):
            copy.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=copy.parent, prefix=_PARTIAL) as partial:
                _copy_tree(folder, Path(partial) / "whole")
                try:
                    (Path(partial) / "whole").rename(copy)
                except OSError:
                    if not copy.is_dir():
                        raise
                    # Another process of this machine was faster.
    _remove_old_copies(copy)
    return copy


# Open copies of this process. A copy whose folder is locked is in use; the locks end with the
# process, whatever ends it.
_CLAIMED: dict[Path, int] = {}


def _digest(contents: bytes) -> str:
    """Returns 16 hex digits that stand for contents in the name of a copy."""
    return hashlib.sha256(contents).hexdigest()[:16]


def _claim(copy: Path) -> bool:
    """Keeps a copy from being removed for as long as this process lives.

    Returns:
      whether the copy is there.
    """
    if copy in _CLAIMED:
        return True
    try:
        opened = os.open(copy, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    with contextlib.suppress(OSError):  # Some disks know no locks; nothing is removed there.
        fcntl.flock(opened, fcntl.LOCK_SH)
    # While this process waited for the lock, another one may have removed the copy.
    if not copy.is_dir() or not os.path.samestat(os.fstat(opened), copy.stat()):
        os.close(opened)
        return False
    os.utime(copy)  # The time of its last use.
    _CLAIMED[copy] = opened
    return True


def _remove_old_copies(current: Path) -> None:
    """Removes copies that no process uses, and that are not worth keeping.

    Those are earlier versions of the current copy's folder, and of all others, but the latest that
    were used.

    Args:
      current: the copy that was made or used last.
    """
    now = time.time()
    times: dict[Path, float] = {}
    for copy in current.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):  # Another process has just removed it.
            times[copy] = copy.stat().st_mtime
    latest = sorted(times, key=lambda copy: times[copy], reverse=True)
    whole = [copy for copy in latest if copy.is_dir() and not copy.name.startswith(".")]

    folder = current.name.partition("-")[0]
    versions = [copy for copy in whole if copy.name.partition("-")[0] == folder]
    others = [copy for copy in whole if copy not in versions]
    for copy in [*versions, *others[_COPIES_KEPT - 1 :]]:
        if copy != current:
            _remove_if_unused(copy)

    for copy in latest:
        if copy.name.startswith(_PARTIAL) and now - times[copy] > _PARTIAL_SECONDS:
            shutil.rmtree(copy, ignore_errors=True)


def _remove_if_unused(copy: Path) -> None:
    """Removes a copy unless a process has claimed it."""
    with contextlib.suppress(OSError):  # Also: it is locked, or the disk knows no locks.
        opened = os.open(copy, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # From here on nobody finds it under its name, not even half of it.
            gone = copy.with_name(f"{_PARTIAL}{copy.name}")
            copy.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
        finally:
            os.close(opened)


def upload(folder: Path, target: Path, last: str) -> None:
    """Copies a local folder, without hidden files, to a bucket.

    Args:
      folder: of this machine.
      target: in the bucket.
      last: name of the file that is copied last; where it is, everything is.

    Raises:
      UserError: the bucket cannot be written.
    """
    with bucket_errors(target):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
        files.sort(key=lambda path: path == folder / last)
        for path in files:
            _copy(path, target / path.relative_to(folder).as_posix())


class Mirror:
    """A local stand-in, `local`, for a folder whose files are appended to.

    For a folder of this machine it is the folder itself. As a context manager it closes itself.

    Args:
      folder: of this machine or in a bucket.
      pulled: patterns of files in the bucket's folder that are copied here at the start.

    Raises:
      UserError: the bucket cannot be read or written.
    """

    def __init__(self, folder: Path, pulled: Sequence[str] = ()):
        self._remote = folder if is_remote(folder) else None
        self._sent: dict[Path, tuple[int, int]] = {}
        self._pushed = time.monotonic()
        self._pause = _PUSH_SECONDS
        if self._remote is None:
            self.local = folder
            return
        self.local = Path(tempfile.mkdtemp(prefix="apr_")) / folder.name
        self.local.mkdir()
        with bucket_errors(folder):
            for pattern in pulled:
                for path in folder.glob(pattern):
                    copy = self.local / path.relative_to(folder)
                    _copy(path, copy)
                    self._sent[copy] = _state(copy)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        del rest
        # Without its lease a run may not write to the folder any more.
        lost_lease = kind is not None and issubclass(kind, LostLease)
        self.close(push=not lost_lease)

    def close(self, push: bool = True) -> None:
        """Removes the stand-in.

        Args:
          push: whether what has changed is copied before.
        """
        if push:
            self.push()
        if self._remote is not None:
            shutil.rmtree(self.local.parent, ignore_errors=True)

    def push(self, seldom: bool = False) -> None:
        """Copies the files that have changed to the bucket.

        Args:
          seldom: whether to do so at most once a minute, and in at most a twentieth of the time.
        """
        began = time.monotonic()
        if self._remote is None or (seldom and began - self._pushed < self._pause):
            return
        with bucket_errors(self._remote):
            for path in sorted(self.local.rglob("*")):
                if not path.is_file():
                    continue
                state = _state(path)
                if self._sent.get(path) != state:
                    _copy(path, self._remote / path.relative_to(self.local).as_posix())
                    self._sent[path] = state
        # Whole files are copied, so it takes longer as they grow, and then it is done less often.
        self._pushed = time.monotonic()
        self._pause = max(_PUSH_SECONDS, _PUSH_PAUSE * (self._pushed - began))


def _state(path: Path) -> tuple[int, int]:
    """Returns time and size of a file, one of which differs after every change."""
    stat_result = path.stat()
    return stat_result.st_mtime_ns, stat_result.st_size


def _copy_tree(folder: Path, target: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            _copy_tree(path, target / path.name)
        else:
            _copy(path, target / path.name)


def _copy(source: Path, target: Path) -> None:
    """Copies a file, of this machine or of a bucket, to another one of either."""
    if not is_remote(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as source_file, target.open("wb") as target_file:
        shutil.copyfileobj(source_file, target_file, 1 << 20)


@contextlib.contextmanager
def bucket_errors(path: Path) -> Iterator[None]:
    """Turns errors of a bucket (it is missing, no permission, no network) into one-line UserErrors.

    Errors of paths of this machine pass.
    """
    try:
        yield
    except Exception as error:
        if not is_remote(path):
            raise
        raise UserError(
            f"{path}: {type(error).__name__}: {error or 'no answer'}; see that the bucket is there"
            " and that this account may write to it (gcloud auth application-default login)"
        ) from None
