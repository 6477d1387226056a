"""Trackers: what TensorBoard and Weights & Biases get of a run, by their own packages."""

import functools
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.whole_runs import logged, shown
from wandb.proto import wandb_internal_pb2

from apr_jax.errors import UserError
from apr_jax.train.metrics.recorder import Recorder
from apr_jax.train.metrics.trackers import open_tracker, require_tracker

ROOT = Path(__file__).parents[3]
_BLOCK = 32 * 1024


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


def _recorder(workdir, start, tracker):
    opened = functools.partial(open_tracker, tracker, title="tiny apr rl", config={"seed": 3})
    return Recorder(workdir, start, 9, 1, "rl", ("trees",), (), progress=False, open_tracker=opened)


def _train(workdir, start, stop, tracker):
    with _recorder(workdir, start, tracker) as recorder:
        for step in range(start + 1, stop + 1):
            # As in the loop: the tree of a step comes before the numbers of the step before it.
            recorder.show_text(step, "validation_tree", f"of <{start}>\n  & {step}")
            recorder.record(step, {"loss": start + step / 8})
        recorder.flush()


def _records(path):
    """Reads a file of wandb: blocks of records, a long record in several parts."""
    data = path.read_bytes()
    place = 7  # A header.
    record = b""
    while place + 7 <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # A whole record, or the last part of one.
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def _starts(workdir):
    """The records of each start of a run that W&B wrote offline, in the order of the starts."""
    files = sorted(
        workdir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime
    )
    return [_whole(path) for path in files]


def _whole(path):
    """The records of a file, once wandb's own process has written the last one."""
    deadline = time.monotonic() + 60
    while True:
        records = list(_records(path))
        kinds = [record.WhichOneof("record_type") for record in records]
        if "exit" in kinds or time.monotonic() > deadline:
            assert "exit" in kinds, kinds
            return records
        time.sleep(0.1)


def _history(records):
    """What W&B was given, {step: {name: value as JSON}}."""
    history = [
        record.history for record in records if record.WhichOneof("record_type") == "history"
    ]
    return {
        row.step.num: {item.key or item.nested_key[0]: item.value_json for item in row.item}
        for row in history
    }


def test_wandb_gets_every_line_and_tree(tmp_path, offline):
    _train(tmp_path, 0, 3, "wandb")
    (records,) = _starts(tmp_path)
    history = _history(records)
    assert {step: float(row["loss"]) for step, row in history.items()} == {
        line["step"]: line["loss"] for line in logged(tmp_path)
    }

    pages = {page.read_text() for page in tmp_path.glob("wandb/offline-run-*/files/media/html/*")}
    assert len(pages) == 3
    assert all("validation_tree" in row for row in history.values())
    assert any("<pre>of &lt;0&gt;\n  &amp; 2</pre>" in page for page in pages)

    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name) == ("apr_jax", "tiny apr rl")
    assert {one.key: one.value_json for one in run.config.update}["seed"] == "3"


def test_a_run_goes_on_as_the_same_run_of_wandb(tmp_path, offline):
    _train(tmp_path, 0, 4, "wandb")
    _train(tmp_path, 4, 6, "wandb")
    starts = _starts(tmp_path)
    ids = [
        record.run.run_id
        for records in starts
        for record in records
        if record.WhichOneof("record_type") == "run"
    ]
    assert len(ids) == 2 and ids[0] == ids[1]
    assert [list(_history(records)) for records in starts] == [[1, 2, 3, 4], [5, 6]]


def test_numbers_of_a_step_that_wandb_has_are_left_out(tmp_path, offline, capfd):
    """A killed run does steps again; W&B would take none of them, and warn of each."""
    tracker = open_tracker("wandb", tmp_path, 0, "tiny", {})
    for step in (1, 2, 2, 1, 3):
        tracker.numbers(step, {"loss": float(step)})
    tracker.close()
    (records,) = _starts(tmp_path)
    assert list(_history(records)) == [1, 2, 3]
    said = capfd.readouterr().err
    assert "wandb: Run summary" in said and "WARNING" not in said


# A run whose wandb dies behind its first line, in a process of its own: wandb does not recover.
_BEREFT = """
import functools, os, signal, sys, time
from pathlib import Path
from apr_jax.train.metrics.recorder import Recorder
from apr_jax.train.metrics.trackers import open_tracker

opened = functools.partial(open_tracker, "wandb", title="tiny", config={})
workdir = Path(sys.argv[1])
with Recorder(workdir, 0, 9, 1, "rl", (), (), progress=False, open_tracker=opened) as recorder:
    recorder.record(1, {"loss": 1.0})
    recorder.flush()
    tasks = Path("/proc/self/task").glob("*/children")
    for child in " ".join(task.read_text() for task in tasks).split():
        os.kill(int(child), signal.SIGKILL)
    time.sleep(1)
    for step in (2, 3):
        recorder.record(step, {"loss": 1.0})
        recorder.flush()
"""


def test_a_run_goes_on_when_wandb_dies(tmp_path, offline):
    command = [sys.executable, "-c", _BEREFT, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # Where other tests ran wandb in this process, the run would use, and not kill, wandb's process.
    environment.pop("WANDB_SERVICE", None)
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0
    assert [line["step"] for line in logged(tmp_path)] == [1, 2, 3]
    said = ended.stderr
    assert said.count("wandb has failed") == 1 and "metrics.jsonl has everything" in said


def test_a_damaged_id_is_one_line(tmp_path, offline):
    (tmp_path / "wandb.json").write_text("{}")
    with pytest.raises(UserError, match=r"wandb.json: must be an object with the id"):
        open_tracker("wandb", tmp_path, 0, "tiny", {})


@pytest.mark.parametrize(
    ("tracker", "package"), [("wandb", "wandb"), ("tensorboard", "tensorboardX")]
)
def test_a_missing_package_is_told_by_its_extra(monkeypatch, tracker, package):
    require_tracker(tracker)
    monkeypatch.setitem(sys.modules, package, None)  # So that Python finds no such package.
    with pytest.raises(
        UserError, match=rf"needs the package {package}; pip install 'apr_jax\[{tracker}"
    ):
        require_tracker(tracker)


def test_tensorboard_gets_text_as_it_is(tmp_path):
    with _recorder(tmp_path, 0, "tensorboard") as recorder:
        recorder.show_text(4, "validation_tree", "a *b*\n\n<join>")
    # Markdown shows what is indented by four as code, line by line.
    assert shown(tmp_path) == {("validation_tree/text_summary", 4): "    a *b*\n    \n    <join>\n"}


def test_tensorboard_shows_a_step_that_is_done_again_once(tmp_path):
    """A killed run goes on from its last checkpoint: what it had shown of the steps after it is
    taken back.
    """
    for start, stop in ((0, 5), (3, 7)):
        with _recorder(tmp_path, start, "tensorboard") as recorder:
            for step in range(start + 1, stop + 1):
                recorder.record(step, {"loss": start + step / 8})
                recorder.show_text(step, "validation_tree", f"of {start}")
            recorder.flush()
        # Starts of one second write to one file.
        for file in (tmp_path / "tensorboard").glob("events.out*"):
            file.rename(file.with_name(f"events.{start}"))
    found = shown(tmp_path)
    assert {step: value for (name, step), value in found.items() if name == "loss"} == {
        step: 3 * (step > 3) + step / 8 for step in range(1, 8)
    }
    assert [found["validation_tree/text_summary", step].strip() for step in (3, 4)] == [
        "of 0",
        "of 3",
    ]
