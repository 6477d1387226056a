"""Everything of a run may be in a bucket: through gcsfs and TensorStore, as with the real one,
against an emulator of it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers.puzzles import read_problems
from helpers.together import Together
from helpers.whole_runs import repeatable

from apr_jax.errors import LostLease, UsageError, UserError
from apr_jax.evaluate.runner import evaluate
from apr_jax.io import storage
from apr_jax.io.lease import Lease, _Bucket, _started
from apr_jax.io.storage import (
    Mirror,
    absolute,
    as_path,
    is_remote,
    local_copy,
    move,
    nearby,
    upload,
    write_text,
)
from apr_jax.paper import stages
from apr_jax.train.checkpoint import load_checkpoint
from apr_jax.train.checkpoint.step_files import steps_in
from apr_jax.train.metrics.recorder import FILE, Recorder
from apr_jax.train.sft import train_sft

pytestmark = pytest.mark.thorough

pytest.importorskip("gcsfs")
pytest.importorskip("gcp_storage_emulator")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """What makes gcsfs and TensorStore take the emulator for Google's servers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Path(__file__).parents[1] / "helpers" / "bucket_server.py"
    command = [sys.executable, str(server), "start", "--host", "127.0.0.1", "--port", str(port)]
    without_advantage = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    emulator = subprocess.Popen(
        [*command, "--in-memory", "--default-bucket", "bucket"], **without_advantage
    )
    while emulator.poll() is None:
        with socket.socket() as there:
            if there.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    address = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", address)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        patch.setenv("APR_COPIES", str(tmp_path_factory.mktemp("copies")))
        yield
    emulator.kill()
    emulator.wait()


@pytest.fixture
def folder(environment, request):
    return as_path(f"gs://bucket/{request.node.name}")


def test_a_path_of_a_bucket_stays_one(tmp_path):
    there = as_path("gs://bucket/a/b")
    assert is_remote(there) and str(absolute(there) / "c") == "gs://bucket/a/b/c"
    assert [str(path) for path in nearby(there)] == [
        "gs://bucket/a/b",
        "gs://bucket/a",
        "gs://bucket",
    ]
    assert as_path(str(tmp_path)) == tmp_path and type(as_path(tmp_path)) is type(tmp_path)


def test_without_gcsfs_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UsageError,
        match=r"gs://bucket/a: paths of a bucket need gcsfs; pip install 'apr_jax\[gcs\]'",
    ):
        as_path("gs://bucket/a")


def test_mirror_brings_old_files_and_pushes_changes(folder):
    write_text(folder / "old.txt", "one\n")
    write_text(folder / "other.bin", "not wanted")
    with Mirror(folder, ["*.txt"]) as mirror:
        assert mirror.local.name == folder.name
        assert [path.name for path in mirror.local.iterdir()] == ["old.txt"]
        with (mirror.local / "old.txt").open("a") as file:
            file.write("two\n")
        mirror.push(seldom=True)
        assert (folder / "old.txt").read_text() == "one\n", "not a minute has passed"
        mirror.push()
        assert (folder / "old.txt").read_text() == "one\ntwo\n"
        (mirror.local / "deep").mkdir()
        (mirror.local / "deep" / "new.txt").write_text("three")
    assert (folder / "deep" / "new.txt").read_text() == "three"
    assert not mirror.local.exists()


def test_what_takes_long_to_copy_is_copied_seldom(folder, monkeypatch):
    """Whole files are copied, however little was added to them."""
    monkeypatch.setattr(storage, "_PUSH_SECONDS", 0.0)
    copied = []
    copy = storage._copy

    def slow_copy(*paths):
        copied.append(paths)
        time.sleep(0.5)  # So the next one is due after 9.5 s.
        copy(*paths)

    with Mirror(folder, ["*.txt"]) as mirror:
        monkeypatch.setattr(storage, "_copy", slow_copy)
        for number in range(20):
            (mirror.local / "log.txt").write_text(str(number))
            mirror.push(seldom=True)
        assert (folder / "log.txt").read_text() == "0" and len(copied) == 1
    assert (folder / "log.txt").read_text() == "19"


def test_late_scores_reach_bucket_before_checkpoint_is_completed(folder):
    """The checkpoint is completed next: whoever is killed then must not find a line without
    them.
    """
    write_text(folder / FILE, '{"step": 4}\n')
    with Recorder(folder, 4, 8, 1, "sft", (), (), progress=False) as recorder:
        recorder.complete(4, {"validation_accuracy": 0.5})
        assert json.loads((folder / FILE).read_text())["validation_accuracy"] == 0.5


def test_of_many_leases_in_a_bucket_one_is_written(folder):
    """All have seen that there is none: a write holds only for the generation that was read."""
    stores = [_Bucket(folder) for _ in range(8)]
    assert [store.read() for store in stores] == [("", None)] * len(stores)
    with ThreadPoolExecutor(len(stores)) as pool:
        written = list(
            pool.map(lambda number: stores[number].put(f"lease {number}", None), range(len(stores)))
        )
    (winner,) = [number for number, version in enumerate(written) if version is not None]
    text, version = stores[0].read()
    assert (text, version) == (f"lease {winner}", written[winner])
    loser = stores[winner - 1]
    assert loser.beat("mine", "1") is None
    newer = stores[winner].beat(text, version)
    assert newer not in (None, version) and loser.read() == (text, newer)
    loser.remove("mine", version)
    assert loser.read() == (text, newer), "another's is never removed"
    stores[winner].remove(text, newer)
    assert loser.read() == ("", None)


def test_second_writer_in_a_bucket_is_refused(
    folder,
):
    """A writer that lost its lease is told so, and writes nothing more."""
    with Lease(folder, "training") as first:
        text, version = _Bucket(folder).read()
        assert json.loads(text)["pid"] == os.getpid()
        other = os.getppid()  # A process that lives.
        taken = json.dumps(
            json.loads(text) | {"pid": other, "started": _started(other), "host": "elsewhere"}
        )
        assert _Bucket(folder).put(taken, version)
        first._beat()
        with pytest.raises(
            LostLease,
            match=rf"{folder}: was taken over by process {other} on host elsewhere \(training",
        ):
            first.check()
    assert _Bucket(folder).read()[0] == taken
    with (
        pytest.raises(UserError, match=f"is being written by process {other} on host elsewhere"),
        Lease(folder, "training"),
    ):
        pass


def test_local_copy_is_renewed_only_when_stamp_changes(folder, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "stamp").write_text("1")
    (tmp_path / "deep" / "file").write_bytes(bytes(range(256)))
    upload(tmp_path, folder, last="stamp")
    copy = local_copy(folder, "stamp")
    assert (copy / "deep" / "file").read_bytes() == bytes(range(256))
    (copy / "seen").touch()
    assert (local_copy(folder, "stamp") / "seen").exists()
    write_text(folder / "stamp", "2")
    assert not (local_copy(folder, "stamp") / "seen").exists()
    assert local_copy(tmp_path, "stamp") == tmp_path
    assert copy.is_dir(), "this process may still read the earlier version"


def test_a_step_counts_once_orbax_has_committed_it(folder):
    """In a bucket a step is written under its own name, and a last file says that it is whole."""
    steps = folder / "checkpoints"
    write_text(steps / "4" / "meta" / "metadata", "{}")
    assert steps_in(steps) == []
    for path in (folder, steps / "4"):
        with pytest.raises(UserError, match=f"checkpoint {steps}/4: its save has not ended"):
            load_checkpoint(path)

    write_text(steps / "2" / "commit_success.txt", "")
    write_text(steps / "2" / "meta" / "metadata", "{}")
    assert steps_in(steps) == [2]
    with pytest.raises(UserError, match=rf"checkpoint {steps}/2: damaged \(meta is not"):
        load_checkpoint(folder)


def test_a_folder_moves(folder):
    write_text(folder / "4" / "deep" / "file", "x")
    move(folder / "4", folder / "damaged" / "4.0")
    assert (folder / "damaged" / "4.0" / "deep" / "file").read_text() == "x"
    assert not (folder / "4").exists()


def test_a_file_that_is_being_replaced_is_read_again(folder, monkeypatch):
    """Between asking for its size and reading it, it was replaced by a longer one: what comes is
    cut off.
    """
    monkeypatch.setattr(stages, "_POLL_SECONDS", 0.5)
    write_text(folder / "stages.json", '{"data": {"done"')
    whole = threading.Timer(
        0.8, lambda: write_text(folder / "stages.json", '{"data": {"done": true}}')
    )
    whole.start()
    assert stages.read_json(folder / "stages.json") == {"data": {"done": True}}
    whole.join()
    write_text(folder / "stages.json", "{")
    with pytest.raises(UserError, match="is damaged"):
        stages.read_json(folder / "stages.json")


def test_what_is_missing_is_one_line(folder):
    with pytest.raises(
        UserError, match=rf"{folder}: FileNotFoundError.*see that the bucket is there"
    ):
        local_copy(folder, "data.json")


def test_stage_in_a_bucket_trains_resumes_and_evaluates(config, data_dir, tmp_path, folder):
    """As with folders of this machine: the same lines, the same parameters, and the damaged step is
    set aside.
    """
    upload(data_dir, folder / "data", last="data.json")
    train_sft(config, data_dir, tmp_path / "sft", "apr", progress=False)
    train_sft(config, folder / "data", folder / "sft", "apr", progress=False)
    assert repeatable(folder / "sft") == repeatable(tmp_path / "sft")
    newest = folder / "sft" / "checkpoints" / str(config.train.sft.steps)
    (newest / "meta" / "metadata").write_text("{}")
    train_sft(config, folder / "data", folder / "sft", "apr", progress=False)
    assert (
        folder / "sft" / "damaged" / f"{config.train.sft.steps}.0" / "meta" / "metadata"
    ).read_text() == "{}"
    assert repeatable(folder / "sft") == repeatable(tmp_path / "sft")
    restored = load_checkpoint(folder / "sft")
    assert restored.step == config.train.sft.steps
    for mine, theirs in zip(
        _leaves(restored), _leaves(load_checkpoint(tmp_path / "sft")), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    assert list((folder / "sft" / "tensorboard").iterdir())
    problems = read_problems(data_dir / "test.jsonl")
    here = evaluate(restored, problems, tmp_path / "eval", progress=False)
    there = evaluate(restored, problems, folder / "eval", progress=False)
    assert (
        json.loads((folder / "eval" / "summary.json").read_text())["accuracy"]
        == here["accuracy"]
        == there["accuracy"]
    )
    assert (folder / "eval" / "traces.jsonl").read_text() == (
        tmp_path / "eval" / "traces.jsonl"
    ).read_text()


@pytest.mark.slow
def test_pod_reproduces_in_a_bucket_after_a_kill(config, tmp_path, folder):
    """Two processes, one command; killed in RL and started again: the run is the one that two
    processes make on a disk without a kill. Then a laptop evaluates and shows it.
    """
    here = tmp_path / "here"
    for status, said in Together(2, config, tmp_path, "reproduce", "--out", here).wait(600):
        assert status == 0, said
    run = Together(2, config, tmp_path, "reproduce", "--out", folder)
    deadline = time.monotonic() + 600
    while not (folder / "apr" / "rl" / "checkpoints" / "1" / "meta" / "metadata").exists():
        assert time.monotonic() < deadline and all(
            process.poll() is None for process in run.processes
        ), run.all_said()
        time.sleep(0.1)
    run.processes[1].send_signal(signal.SIGKILL)
    run.processes[0].wait(60)
    run.kill()
    for index, (status, said) in enumerate(
        Together(2, config, tmp_path, "reproduce", "--out", folder).wait(600)
    ):
        assert status == 0, said
        assert ("% right" in said) == (index == 0), "the first process alone shows the results"
    for stage in ("sos+/sft", "apr/sft", "sos+/rl", "apr/rl"):
        assert repeatable(folder / stage) == repeatable(here / stage)
        assert list((folder / stage / "tensorboard").iterdir())
        for mine, theirs in zip(
            _leaves(load_checkpoint(folder / stage)),
            _leaves(load_checkpoint(here / stage)),
            strict=True,
        ):
            np.testing.assert_array_equal(mine, theirs)
    assert (folder / "report.html").read_text().count("apr-rl") > 0
    problems = here / "data" / "test.jsonl"
    out = folder / "again"
    command = ["eval", "--checkpoint", folder / "apr" / "rl", "--problems", problems, "--out", out]
    subprocess.run(
        [sys.executable, "-m", "apr_jax", *map(str, command)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"XLA_FLAGS": ""},
        check=True,
    )
    summaries = [
        json.loads((path / "summary.json").read_text())
        for path in (out, folder / "eval" / "apr-rl")
    ]
    assert summaries[0]["accuracy"] == summaries[1]["accuracy"]


def _leaves(restored):
    import jax

    return jax.tree.leaves(restored.params)
