"""What reaches a terminal: no stranger's control characters, nothing that its encoding lacks, and
tables with all they hold.
"""

import io
import sys
import unicodedata

import pytest
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from apr_jax.evaluate.scores import summarize
from apr_jax.io.terminal import Terminal, one_line, print_whole, serve_any_encoding, visible
from apr_jax.report.terminal_tables import print_table

HOSTILE = "a\x1b]0;owned\x07b\x9b2J\x7f\u202eevil\ufeff\ud800\U000e0041\x00\r"
HARMLESS = "a␛]0;owned␇b\\x9b2J␡\\u202eevil\\ufeff\\ud800\\U000e0041␀␍"
SETTINGS = {"color_system": None, "width": 80}


def obeyed(text):
    """Characters that a terminal obeys, or hides, instead of showing them; the line end aside."""
    return {
        character
        for character in text
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    } - {"\n"}


def test_control_characters_become_pictures():
    assert visible(HOSTILE) == HARMLESS
    assert not obeyed(HARMLESS)
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    assert not obeyed(visible(every))
    plain = "┏ 22 + 26 = 48\n✓ ß 日本 é"
    assert visible(plain) == plain


def test_a_message_becomes_one_harmless_line():
    assert one_line(" a\n b\x1b[2J\t c \u202e") == "a b␛[2J c \\u202e"
    assert one_line("\x1b" * 300, most=5) == "␛" * 5


@pytest.mark.parametrize("force_terminal", [True, False])
def test_whatever_is_printed_is_harmless(force_terminal):
    console = Terminal(file=io.StringIO(), force_terminal=force_terminal, **SETTINGS)
    table = Table(HOSTILE)
    table.add_row(Text(HOSTILE))
    console.print(HOSTILE, markup=False)
    console.print(Text(HOSTILE))
    console.print(table)
    print_whole(table, console)
    assert not obeyed(console.file.getvalue())
    assert console.file.getvalue().count("␛]0;owned") == 6


def test_its_own_control_sequences_still_move_the_cursor():
    console = Terminal(file=io.StringIO(), force_terminal=True, **SETTINGS)
    with Progress(console=console) as bar:
        bar.update(bar.add_task(HOSTILE.partition("\x07")[0], total=2), completed=1)
    said = console.file.getvalue()
    assert "\x1b[?25l" in said, "the cursor is hidden while the bar grows"
    assert "␛]0;own" in said and "\x1b]0;" not in said


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", "-+.+|-`+ -- v ? ?"),
        ("latin-1", "-+.+|-`+ -- v ß ?"),
        ("utf-8", "━┳┄┻╸╺└┻ ━─ ✓ ß 日"),
    ],
)
def test_an_output_of_any_encoding_is_served(monkeypatch, encoding, expected):
    """The pictures of a tree keep their places; a letter that the encoding lacks is a question
    mark.
    """
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(
            sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
        )
    serve_any_encoding()
    for stream in (sys.stdout, sys.stderr):
        print("━┳┄┻╸╺└┻ ━─ ✓ ß 日", file=stream, flush=True)
        assert stream.buffer.getvalue().decode(encoding) == expected + "\n"


def sampled_summaries(name):
    """A row with all columns of `apr eval`, whose interval, name and votes are easily lost."""
    made = {
        "children": 12,
        "max_thread_tokens": 1_024,
        "total_tokens": 12_345,
        "sequential_tokens": 1_234,
    }
    traces = [
        {
            "id": str(k),
            "sample": sample,
            "correct": k < 3,
            "claimed": True,
            "reward": 1.0,
            "vote": str(k),
            "threads": [],
        }
        | made
        for k in range(7)
        for sample in range(4)
    ]
    return {name: summarize(traces)}


@pytest.mark.parametrize("name", ["apr-nested rl", "apr rl " + "x" * 100])
@pytest.mark.parametrize("width", [30, 80, 200])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_table_keeps_all_it_holds(name, width, is_terminal):
    """In a terminal its columns go on below; into a pipe or a file it is as wide as it is, a line a
    row.
    """
    console = Terminal(
        file=io.StringIO(), force_terminal=is_terminal, width=width, color_system=None
    )
    print_table(sampled_summaries(name), console=console)
    said = console.file.getvalue()
    assert "…" not in said

    cells = [
        "42.9 (15.8-75.0)",
        "12,345",
        "1,234",
        "12.00",
        "1,024",
        "100.0",
        "0.0",
        "42.9",
        "42.9",
    ]
    if is_terminal:
        assert max(map(len, said.splitlines())) <= width
        assert width < 80 or all(cell in said for cell in cells)
        flat = "".join(said.split())
        assert len(name) > 20 or all("".join(cell.split()) in flat for cell in cells)
        assert said.count("x") == name.count("x") * said.count("apr"), (
            "the name stands whole at each part of the table"
        )
        assert sum(said.count(title) for title in ("accuracy", "pass@n", "cons@n", "spawned")) == 4
    else:
        (row,) = (line for line in said.splitlines() if line.startswith(name))
        assert row.split() == [*name.split(), *" ".join(cells).split()]
    if len(name) < 20:
        assert said.count(name) == (
            1 if width == 200 or not is_terminal else said.count("accuracy") + said.count("\n\n")
        )
