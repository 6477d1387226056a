"""The XManager launcher on this machine: real processes, and TensorBoard beside them."""

import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from helpers.whole_runs import write_config

from apr_jax.errors import UserError
from apr_jax.train.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "experiments"))
import launch

pytest.importorskip("xmanager")
NANO = "experiments/nano.py"


@pytest.fixture
def busy():
    """A port on which something else answers."""
    server = http.server.HTTPServer(("localhost", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_taken_port_is_told_before_anything_is_launched(busy, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("xmanager.xm_local.create_experiment", None)
    for port, told in (
        (busy, "something else answers there already"),
        (70000, "must be in 1..65535"),
    ):
        assert (
            launch.main(
                ["--config", NANO, "--out", str(tmp_path), "--tensorboard", "--port", str(port)]
            )
            == 2
        )
        (line,) = capfd.readouterr().err.splitlines()
        assert f"--port {port}: {told}" in line


def test_a_tensorboard_that_does_not_start_is_told(busy, monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "_answers", lambda port: False)
    with (
        pytest.raises(
            UserError, match=f"TensorBoard does not start, see above; another --port than {busy}"
        ),
        launch.tensorboard(str(tmp_path), busy),
    ):
        pytest.fail("it is said to run")


def test_a_tensorboard_that_ends_is_not_said_to_stay(monkeypatch, capfd):
    answers = iter([False, True])
    monkeypatch.setattr(launch, "_answers", lambda port: next(answers))
    started = []
    popen = subprocess.Popen

    def short(command, **settings):
        started.append(popen([sys.executable, "-c", "raise SystemExit(3)"], **settings))
        started[0].poll = lambda: None  # Until it is looked at again, when the runs are done.
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", short)
    with launch.tensorboard("runs/x", 6007):
        started[0].wait()
        del started[0].poll
    said = capfd.readouterr().err
    assert (
        "TensorBoard ended by itself (status 3); python -m tensorboard.main --logdir runs/x --port"
        " 6007" in said
    )
    assert "stays at" not in said


def a_file(folder):
    folder.write_text("no folder")


def a_damaged_database(folder):
    folder.mkdir()
    (folder / "experiments.sqlite3").write_bytes(b"no database" * 1000)


@pytest.mark.parametrize("damage", [a_file, a_damaged_database])
def test_notes_that_xmanager_cannot_keep_are_told(damage, monkeypatch, tmp_path, capfd):
    from xmanager.xm_local.storage import database

    damage(tmp_path / ".xmanager")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", str(tmp_path))
    # The real one is made once in a process, whatever HOME is later.
    monkeypatch.setattr(
        database,
        "database",
        lambda: database.Database(database.SqliteConnector, database.sqlite_settings()),
    )
    # Should it go on, it must not train.
    monkeypatch.setattr(launch, "job_of", lambda flags, unit, name: None)
    monkeypatch.setattr(launch, "spec_of", lambda flags, job: {})
    assert launch.main(["--config", NANO, "--out", str(tmp_path / "run")]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(
        f"launch: error: XManager can't note the experiment in {tmp_path}/.xmanager ("
    )
    assert "if it is damaged, move it away" in line
    assert not (tmp_path / "run").exists()


@pytest.fixture
def tiny(config, tmp_path):
    return write_config(config, tmp_path / "tiny.py")


@pytest.mark.slow
def test_a_local_sweep_runs_beside_tensorboard(tiny, tmp_path):
    """Two real runs one after the other on shared data; TensorBoard answers meanwhile, and goes
    when told to.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = [
        "--config",
        tiny,
        "--out",
        tmp_path / "out",
        "--sweep",
        "train.sft.steps=2,4",
        "--tensorboard",
    ]
    words += ["--port", port]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "JAX_NUM_CPU_DEVICES": "2",
        "XLA_FLAGS": "",
    }
    log = (tmp_path / "log").open("w+")
    command = [sys.executable, "experiments/launch.py", *map(str, words)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 800
    while "TensorBoard stays at" not in (said := (tmp_path / "log").read_text()):
        assert time.monotonic() < deadline and process.poll() is None, said
        time.sleep(0.5)
    assert (
        f"http://localhost:{port}" in said
        and urllib.request.urlopen(f"http://localhost:{port}").status == 200
    )
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://localhost:{port}")
    for steps in (2, 4):
        run = tmp_path / "out" / f"train.sft.steps_{steps}"
        assert load_checkpoint(run / "apr" / "rl").config.train.sft.steps == steps
        assert (run / "report.html").is_file() and not (run / "data").exists()
    assert (tmp_path / "out" / "data" / "data.json").is_file()


@pytest.mark.slow
def test_a_job_that_fails_is_told(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    command = [sys.executable, "experiments/launch.py", "--config", tiny, "--out", tmp_path / "out"]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1 and "launch it again to go on" in ended.stderr
