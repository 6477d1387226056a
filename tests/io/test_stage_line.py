"""The line of a stage: redrawn in a terminal, growing in a pipe, moved by the bars within."""

import io
import sys

import pytest
from rich.progress import TextColumn

from apr_jax.io.stage_line import Bars, StageLine


def pipe_of(monkeypatch):
    """Makes standard error a pipe. A fixture cannot: pytest sets it again before the test."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def half_done(shown=True):
    """Bars that are half done, and say so."""
    with Bars(TextColumn("a bar"), shown=shown, words="numbers") as bars:
        task = bars.add_task("", total=4, numbers="")
        bars.advance(task)
        bars.update(task, completed=2, numbers="loss 0.5")
        return bars


def test_a_line_grows_in_a_pipe(monkeypatch):
    pipe = pipe_of(monkeypatch)
    with StageLine("1/2  data") as line:
        assert pipe.getvalue() == "1/2  data", "it is there before the work is done"
        half_done()
        assert pipe.getvalue() == "1/2  data  25% 50%"
        line.finish("0.1 min: all well")
    with StageLine("2/2  report") as line:
        line.finish("0.0 min")
    assert pipe.getvalue() == "1/2  data  25% 50%  0.1 min: all well\n2/2  report  0.0 min\n"


def test_what_others_write_gets_a_line_of_its_own(monkeypatch):
    pipe = pipe_of(monkeypatch)
    with StageLine("1/2  data") as line:
        print("warning: a\nwarning: b", file=sys.stderr)
        line.move(3, 4, "")
        line.finish("0.1 min")
    assert sys.stderr is pipe
    assert pipe.getvalue().splitlines() == [
        "1/2  data",
        "warning: a",
        "warning: b",
        "1/2  data  25% 50% 75%  0.1 min",
    ]


def test_a_stage_that_fails_ends_its_line(monkeypatch):
    pipe = pipe_of(monkeypatch)
    with pytest.raises(ZeroDivisionError), StageLine("1/2  data"):
        raise ZeroDivisionError
    assert pipe.getvalue() == "1/2  data\n"
    assert sys.stderr is pipe


def test_hostile_words_cannot_move_the_cursor(monkeypatch):
    pipe = pipe_of(monkeypatch)
    with StageLine("1/2  \x1b[2Jdata") as line:
        line.finish("a\nb\x1b]0;owned\x07")
    assert pipe.getvalue() == "1/2  ␛[2Jdata  a b␛]0;owned␇\n"


def test_bars_show_themselves_outside_of_a_stage(monkeypatch):
    pipe = pipe_of(monkeypatch)
    half_done()
    assert "a bar" in pipe.getvalue()


@pytest.mark.parametrize("in_a_stage", [True, False])
def test_bars_that_are_not_shown_say_nothing(monkeypatch, in_a_stage):
    pipe = pipe_of(monkeypatch)
    if in_a_stage:
        with StageLine("1/2  data") as line:
            half_done(shown=False)
            line.finish("")
        assert pipe.getvalue() == "1/2  data\n"
    else:
        half_done(shown=False)
        assert pipe.getvalue() == ""


def test_a_terminal_keeps_the_finished_line_alone(monkeypatch):
    class Screen(io.StringIO):
        def isatty(self):
            return True

    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    with StageLine("1/2  data") as line:
        bars = half_done()
        assert bars.disable, "the bars give way to the line"
        line._bar.refresh()
        assert "loss 0.5" in screen.getvalue()
        line.finish("0.1 min")
    assert screen.getvalue().splitlines()[-1].endswith("1/2  data  0.1 min")
    assert "\x1b[2K" in screen.getvalue(), "what moved is erased"
