"""Files that appear whole or not at all, errors that name them, and buckets that cannot be
asked.
"""

import errno
import logging
import os
import socket
import stat
import threading
import time
from pathlib import Path

import pytest

from apr_jax.errors import UserError
from apr_jax.io import storage
from apr_jax.io.storage import (
    as_path,
    require_reachable,
    wait_for_bucket,
    write_bytes,
    write_text,
)


def test_a_file_is_replaced(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("ß\n", "", "longer\n" * 1000):
        write_text(path, text)
        assert path.read_bytes() == text.encode()
        assert list(tmp_path.iterdir()) == [path]


def test_links_and_pipes_stay_what_they_are(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "text"

    os.mkfifo(pipe := tmp_path / "pipe")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "text")
    assert os.read(reader, 10) == b"text" and stat.S_ISFIFO(pipe.stat().st_mode)
    os.close(reader)


@pytest.mark.parametrize("there", [True, False])
def test_full_disk_names_file_and_leaves_it_unchanged(tmp_path, monkeypatch, there):
    """The error of a write that finds no room names no file of its own."""
    path = tmp_path / "a.bin"
    if there:
        path.write_bytes(b"older")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as error:  # noqa: PT011 - which one is asked below.
        write_bytes(path, b"newer")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(path))
    assert [(found, found.read_bytes()) for found in tmp_path.iterdir()] == (
        [(path, b"older")] if there else []
    )


def test_missing_folder_or_folder_at_path_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    for path, kind in (
        (tmp_path / "no" / "a", FileNotFoundError),
        (tmp_path / "folder", IsADirectoryError),
    ):
        with pytest.raises(kind) as error:
            write_text(path, "text")
        assert error.value.filename == str(path)
    assert [found.name for found in tmp_path.rglob("*")] == ["folder"]


class Unreachable:
    """A bucket as gcsfs shows it without a network: whoever asks what is there gets an error,
    `exists` says no.
    """

    def ls(self, path, refresh):
        assert path == "bucket/run" and refresh
        raise ConnectionError("Cannot connect to host storage.googleapis.com:443")


def test_unreachable_bucket_is_not_called_empty(monkeypatch):
    pytest.importorskip("gcsfs")
    fsspec = pytest.importorskip("fsspec")
    path = as_path("gs://bucket/run")
    monkeypatch.setattr(fsspec, "filesystem", lambda scheme: Unreachable())
    with pytest.raises(UserError, match="gs://bucket/run: ConnectionError: Cannot connect to host"):
        require_reachable(path)

    def empty(self, path, refresh):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Unreachable, "ls", empty)
    require_reachable(path)
    require_reachable(Path("here"))
    assert not logging.getLogger("gcsfs").isEnabledFor(logging.ERROR), "its pages are not shown"


@pytest.fixture
def service(monkeypatch):
    """A socket whose address is taken for that of the buckets' service; it does not listen yet."""
    pytest.importorskip("gcsfs")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setattr(storage, "_TELL_SECONDS", 0.1)
        yield listener


def test_without_a_network_a_line_tells_and_the_wait_ends(service, monkeypatch, capfd):
    """It took 150 s in silence."""
    monkeypatch.setattr(storage, "_ANSWER_SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(
        UserError,
        match=r"gs://bucket/run: no answer of 127.0.0.1 for 0.5 s \(.*refused\); see that",
    ):
        wait_for_bucket(as_path("gs://bucket/run"))
    assert time.monotonic() - began < 5
    assert (
        capfd.readouterr().err == "gs://bucket/run: waits up to 0.5 s for an answer of 127.0.0.1\n"
    )


def test_a_service_that_answers_late_is_waited_for(service):
    late = threading.Timer(0.3, service.listen)
    late.start()
    wait_for_bucket(as_path("gs://bucket/run"))
    late.join()


def test_nothing_is_told_where_the_service_answers(service, capfd):
    service.listen()
    wait_for_bucket(as_path("gs://bucket/run"))
    wait_for_bucket(Path("here"))
    time.sleep(0.2)
    assert capfd.readouterr().err == ""
