"""metrics.jsonl: one line a logged step, whatever interrupts; fetched one step late."""

import io

import jax.numpy as jnp
import pytest
from helpers.whole_runs import logged
from rich.console import Console

from apr_jax.errors import UserError
from apr_jax.train.metrics.recorder import FILE, Recorder, cut_lines


def _recorder(workdir, start=0, steps=9, log_every=1):
    return Recorder(workdir, start, steps, log_every, "sft", ("tokens",), ("loss",), progress=False)


def _train(workdir, start, stop):
    with _recorder(workdir, start) as recorder:
        for step in range(start + 1, stop + 1):
            recorder.record(step, {"loss": jnp.float32(step / 2), "tokens": 10})
        recorder.flush()


@pytest.mark.parametrize(
    "tail", ["", '{"step": 6, "lo', '{"step": 6, "loss": 3.0}', "\x00\x00\x00"]
)
def test_no_gap_and_no_double_line_after_a_resume(tmp_path, tail):
    _train(tmp_path, 0, 5)
    with open(tmp_path / FILE, "a") as file:
        file.write(tail)  # What a killed run may leave behind.
    _train(tmp_path, 3, 9)  # The last checkpoint was of step 3.
    lines = logged(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["loss"] for line in lines] == [step / 2 for step in range(1, 10)]


def test_unterminated_line_is_cut_even_if_json(tmp_path):
    (tmp_path / FILE).write_text('{"step": 1}\n{"step": 2}')
    cut_lines(tmp_path / FILE, 5)
    assert (tmp_path / FILE).read_text() == '{"step": 1}\n'


def test_metrics_are_fetched_one_step_late(tmp_path):
    class LazyMetric:
        """A scalar that must not be read before the next step is recorded."""

        ready = False

        def __float__(self):
            assert self.ready
            return 1.0

    with _recorder(tmp_path) as recorder:
        first, second = LazyMetric(), LazyMetric()
        assert recorder.record(1, {"loss": first}) is None
        first.ready = True
        assert recorder.record(2, {"loss": second}) == {"loss": 1.0}
        second.ready = True
        recorder.flush()
    assert [line["step"] for line in logged(tmp_path)] == [1, 2]


def test_log_every_keeps_important_and_last_lines(tmp_path):
    """The tokens of skipped lines are counted all the same."""
    with _recorder(tmp_path, log_every=4) as recorder:
        recorder._since -= 100.0
        for step in range(1, 10):
            recorder.record(step, {"tokens": 50}, important=step == 6)
        recorder.flush()
    lines = logged(tmp_path)
    assert [line["step"] for line in lines] == [4, 6, 8, 9]
    assert lines[0]["tokens_per_second"] == pytest.approx(4 * 50 / 100, rel=0.05)


def test_nan_is_valid_json(tmp_path):
    with _recorder(tmp_path) as recorder:
        recorder.record(1, {"loss": jnp.nan})
        recorder.flush()
    assert "NaN" not in (tmp_path / FILE).read_text()
    assert logged(tmp_path)[0]["loss"] is None


def test_without_a_tracker_the_only_file_is_metrics_jsonl(tmp_path):
    _train(tmp_path, 0, 2)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_full_disk_is_one_clear_line(tmp_path):
    with _recorder(tmp_path) as recorder:
        recorder._file.close()
        recorder._file = full = open("/dev/full", "w")  # noqa: SIM115 - closed below.
        recorder.record(1, {"loss": 1.0})
        with pytest.raises(UserError, match=r"metrics.jsonl: the disk is full; make room"):
            recorder.flush()
        with pytest.raises(OSError, match="No space left"):
            full.close()  # Python 3.13 warns of a file that is dropped with lines unwritten.
        recorder._file = open("/dev/null", "w")  # noqa: SIM115 - the recorder closes it.


def test_narrow_terminal_shows_progress_and_key_metrics(tmp_path, monkeypatch, capsys):
    """It shows the rates and mfu, too."""
    monkeypatch.setenv("COLUMNS", "80")
    counted = ("tokens", "trees")
    with Recorder(
        tmp_path, 0, 3, 1, "sft", counted, ("loss",), progress=True, peak=1e30
    ) as recorder:
        # Long enough for the time that the test takes not to matter.
        recorder._since = recorder._recorded - 1e6
        recorder.record(1, {"loss": 0.5, "tokens": 1.2345e10, "trees": 5e6, "flops": 4e35})
        recorder.flush()
    said = capsys.readouterr().err
    for part in ("sft", "1/3", "12,345 tokens/s", "5.0 trees/s", "40% mfu", "loss 0.5"):
        assert part in said
    assert "…" not in said


def test_the_remaining_time_is_known_however_slow_steps_are(tmp_path):
    """Ten minutes a step; of steps that take longer than rich's own half a minute it would know
    nothing.
    """
    with _recorder(tmp_path) as recorder:
        (task,) = recorder._bar.tasks
        for step in range(1, 5):
            recorder._bar.get_time = lambda now=600.0 * step: now
            recorder.record(step, {"loss": 1.0})
            recorder.flush()
            assert (task.time_remaining is None) == (step == 1), (
                "one step has no time of its own yet"
            )
        assert task.time_remaining == 5 * 600
        screen = Console(file=io.StringIO(), width=100)
        screen.print(recorder._bar.get_renderable())
        assert "0:50:00" in screen.file.getvalue()


def test_late_numbers_complete_the_last_line(tmp_path):
    """They come after an interruption."""
    _train(tmp_path, 0, 4)
    with _recorder(tmp_path, 4) as recorder:
        recorder.complete(4, {"validation_accuracy": 0.5})
        recorder.record(5, {"loss": 2.5})
        recorder.flush()
    lines = logged(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line.get("validation_accuracy") for line in lines] == [None, None, None, 0.5, None]
    assert (lines[3]["loss"], lines[3]["stage"]) == (2.0, "sft")
    (tmp_path / FILE).unlink()
    with _recorder(tmp_path, 4) as recorder:
        recorder.complete(4, {"validation_accuracy": 0.5})
    assert logged(tmp_path) == [{"step": 4, "stage": "sft", "validation_accuracy": 0.5}]


def test_throughput_leaves_out_what_is_done_aside(tmp_path, monkeypatch):
    # Start; two records; aside, in and out, while the second is pending; a third record; aside; a
    # fourth.
    clock = iter([0.0, 10.0, 20.0, 20.0, 120.0, 125.0, 125.0, 225.0, 235.0])
    monkeypatch.setattr("apr_jax.train.metrics.recorder.time.perf_counter", lambda: next(clock))
    with _recorder(tmp_path) as recorder:
        recorder.record(1, {"tokens": 40.0})
        recorder.record(2, {"tokens": 30.0})
        with recorder.aside():
            pass
        recorder.record(3, {"tokens": 30.0})
        recorder.flush()
        with recorder.aside():
            pass
        recorder.record(4, {"tokens": 20.0})
        recorder.flush()
    assert [line["tokens_per_second"] for line in logged(tmp_path)] == [4.0, 3.0, 6.0, 2.0]
