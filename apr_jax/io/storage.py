"""Where files are: folders of this machine, or of a bucket (gs://bucket/folder).

Every path that a user gives goes through `as_path` or `local_path`. They expand `~`, and refuse by
name what would otherwise become a local folder of a strange name: `s3://x`, `GS://x`, `gs:/x`, an
empty text, a flag in place of a path. `$NAME` is expanded by shells, not here: it is a legal name
of a file.

A path of a bucket is etils' `epath.Path`: it has the methods of pathlib's, and Orbax takes it as it
is. Two things a bucket can't do, and what stands in for them:
  - An object can't be appended to. `Mirror` gives a local folder to write in, and copies what
    changed to the bucket.
  - array_record reads files of this machine alone. `local_copy` copies a folder here once, and
    again when it changed.
"""

import contextlib
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, cast

from apr_jax.errors import LostLease, UsageError, UserError

_SCHEME = "gs://"
# A word of two letters or more, a colon and a slash: an address, whoever else knows it. One letter
# may be a drive.
_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/")
COPIES_VARIABLE = "APR_COPIES"
_PUSH_SECONDS = 60.0


def as_path(path: str | os.PathLike[str]) -> Path:
    """The path of a file or folder, here or in a bucket.

    Args:
      path: what a user wrote, as a string; or a path that was made of it.

    Raises:
      UsageError: there can be no such path, or it is in a bucket and gcsfs is not installed.
    """
    text = checked(path) if isinstance(path, str) else os.fspath(path)
    # What pathlib makes of an address.
    if text.startswith("gs:/") and not text.startswith(_SCHEME):
        raise UsageError(f"{text}: give a path of a bucket as a string, or as one of etils.epath")
    if not text.startswith(_SCHEME):
        return Path(text)
    if importlib.util.find_spec("gcsfs") is None:
        raise UsageError(f"{text}: paths of a bucket need gcsfs; pip install 'apr_jax[gcs]'")
    from etils import epath

    if not os.environ.get("APR_DEBUG"):
        # Of each failed request it logs pages, while the error comes to us in any case, and is said
        # in one line.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return cast(Path, epath.Path(text))


def local_path(path: str | os.PathLike[str]) -> Path:
    """The path of a file or folder of this machine.

    Raises:
      UsageError: there can be no such path, or it is in a bucket.
    """
    if isinstance(path, str):
        path = checked(path)
    if is_remote(path):
        raise UsageError(f"{path}: is in a bucket; must be a file or folder of this machine")
    return Path(path)


def checked(text: str) -> str:
    """What a user wrote as a path, a leading `~` expanded.

    Raises:
      UsageError: there can be no such path: it is empty, is taken for a flag, or is an address
        other than gs://bucket/folder.
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
    """Raises UsageError if the path is an address, and not one of a bucket."""
    found = _ADDRESS.match(text)
    scheme = found["scheme"] if found else "gs" if text.lower().startswith("gs:") else ""
    if not scheme:
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
    """Whether it is in a bucket."""
    return os.fspath(path).startswith(_SCHEME)


def absolute(path: str | os.PathLike[str]) -> Path:
    """The same file for whatever folder the process is in."""
    found = as_path(path)
    return found if is_remote(found) else found.absolute()


def write_text(path: Path, text: str) -> None:
    """Writes a text file as UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, contents: bytes) -> None:
    """Writes a file that appears whole or not at all; an object of a bucket does so by itself.

    Where it can't be written, what was there before stays, and nothing else is left.

    Raises:
      OSError: it can't be written; `filename` is the path.
      UserError: the bucket can't be written.
    """
    if is_remote(path):
        with bucket_errors(path):
            path.write_bytes(contents)
        return
    try:
        # A device or a pipe has nothing to lose; a folder is refused.
        if path.exists() and not path.is_file():
            path.write_bytes(contents)
        else:
            _replace(path, contents)
    except OSError as error:
        # A write that found no room names no file, and nobody knows the one of another name that is
        # moved into place.
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


def _replace(path: Path, contents: bytes) -> None:
    """Puts a new file in the place of the old one."""
    path = path.resolve()  # A link stays one.
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
    """Writes a safetensors file of this machine, which appears whole or not at all, with the mode
    that the umask gives.

    `safetensors` itself makes files that nobody but their owner may read.
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
    """Makes sure that a bucket can be asked, for whoever finds nothing there: without a network
    nothing seems to be there.

    Raises:
      UserError: it can't be asked.
    """
    if not is_remote(path):
        return
    import fsspec

    # It was asked, and there is nothing.
    with (
        bucket_errors(path),
        contextlib.suppress(FileNotFoundError),
    ):
        fsspec.filesystem("gs").ls(os.fspath(path).removeprefix(_SCHEME), refresh=True)


def nearby(folder: Path) -> list[Path]:
    """The folder, and up to two above it."""
    whole = absolute(folder)
    return [
        folder,
        *(parent for parent in whole.parents[:2] if not is_remote(whole) or len(parent.parts) > 2),
    ]


def move(folder: Path, target: Path) -> None:
    """Renames a folder; one of a bucket is copied and deleted."""
    if not is_remote(folder):
        folder.rename(target)
        return
    with bucket_errors(folder):
        _copy_tree(folder, target)
        cast(Any, folder).rmtree()


def copies_folder() -> Path:
    """Where copies of remote folders are kept: $APR_COPIES, by default ~/.cache/apr_jax_copies."""
    return folder_of(COPIES_VARIABLE, "~/.cache/apr_jax_copies")


def folder_of(variable: str, default: str) -> Path:
    """The folder of this machine that an environment variable names, or the default where it is
    unset or empty.

    Raises:
      UsageError: there can be no such folder; the message names the variable.
    """
    try:
        return local_path(os.environ.get(variable) or default).absolute()
    except UsageError as error:
        raise UsageError(f"{variable}={error}") from None


def local_copy(folder: Path, stamp: str) -> Path:
    """The folder itself if it is here; else a copy of it.

    Args:
      folder: its files never change as long as `stamp` does not.
      stamp: name of the file in it whose contents tell.

    Raises:
      UserError: the bucket can't be read.
    """
    if not is_remote(folder):
        return folder
    with bucket_errors(folder):
        contents = (folder / stamp).read_bytes()
        name = hashlib.sha256(os.fspath(folder).encode() + contents).hexdigest()[:16]
        copy = copies_folder() / name
        if not copy.is_dir():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=copy.parent) as partial:
                _copy_tree(folder, Path(partial) / "whole")
                with contextlib.suppress(OSError):  # Another process of this machine was faster.
                    (Path(partial) / "whole").rename(copy)
    return copy


def upload(folder: Path, target: Path, last: str) -> None:
    """Copies a local folder to a bucket; the file `last` goes last, so that where it is, everything
    is.

    Raises:
      UserError: the bucket can't be written.
    """
    with bucket_errors(target):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
        for path in sorted(files, key=lambda path: path == folder / last):
            _copy(path, target / path.relative_to(folder).as_posix())


class Mirror:
    """A local stand-in for a folder whose files are appended to. For a local folder it is the
    folder itself.

    A context manager that closes it.

    Args:
      folder: anywhere; made if missing.
      pulled: patterns of the files that are there already and wanted here.

    Raises:
      UserError: the bucket can't be read or written.
    """

    def __init__(self, folder: Path, pulled: Sequence[str] = ()):
        self._remote = folder if is_remote(folder) else None
        self._sent: dict[Path, tuple[int, int]] = {}
        self._pushed = time.monotonic()
        if self._remote is None:
            self.local = folder
            return
        self.local = Path(tempfile.mkdtemp(prefix="apr_")) / folder.name
        self.local.mkdir()
        with bucket_errors(folder):
            for pattern in pulled:
                for path in folder.glob(pattern):
                    _copy(path, copy := self.local / path.relative_to(folder))
                    self._sent[copy] = _state(copy)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        del rest
        self.close(push=kind is None or not issubclass(kind, LostLease))

    def close(self, push: bool = True) -> None:
        """Drops the stand-in.

        Args:
          push: copy what has changed before.
        """
        if push:
            self.push()
        if self._remote is not None:
            shutil.rmtree(self.local.parent, ignore_errors=True)

    def push(self, seldom: bool = False) -> None:
        """Copies the files that have changed.

        Args:
          seldom: at most once a minute.
        """
        if self._remote is None or (seldom and time.monotonic() - self._pushed < _PUSH_SECONDS):
            return
        self._pushed = time.monotonic()
        with bucket_errors(self._remote):
            for path in sorted(self.local.rglob("*")):
                if path.is_file() and self._sent.get(path) != (state := _state(path)):
                    _copy(path, self._remote / path.relative_to(self.local).as_posix())
                    self._sent[path] = state


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def _copy_tree(folder: Path, target: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            _copy_tree(path, target / path.name)
        else:
            _copy(path, target / path.name)


def _copy(source: Path, target: Path) -> None:
    """A file, here or there, to a file, here or there."""
    if not is_remote(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, target.open("wb") as written:
        shutil.copyfileobj(read, written, 1 << 20)


@contextlib.contextmanager
def bucket_errors(path: Path) -> Iterator[None]:
    """What a bucket says (no such bucket, no permission, no network) in one line; errors of this
    machine pass.
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
