"""What the commands show in a terminal: text of strangers made harmless, any encoding served, and
tables whole.

The text that a model wrote, a tokenizer's pieces, and the names in a file may hold escape
sequences, which would clear the screen, rename the window or hide what stands there. `visible`
shows them as pictures; whatever a `Terminal` prints has passed through it, so that no caller need
think of it."""

from __future__ import annotations

import codecs
import io
import sys
import unicodedata
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table

# Categories of characters that a terminal obeys instead of showing: controls, what reorders, joins
# or hides its neighbours, lines and paragraphs, and halves of surrogate pairs, which cannot be
# written in UTF-8.
_CONTROL = ("Cc", "Cf", "Cs", "Zl", "Zp")
_PICTURES = 0x2400  # Of "\x00"; those of the other C0 follow it.
_DELETED = "\u2421"

# Instead of what an encoding lacks, one character for one: a tree keeps its form.
_PLAIN = str.maketrans("━┳┄┻╸╺└─│✓✗…", "-+.+|-`-|vx~")
_ERRORS = "apr_jax.plain"
_BOUNDLESS = 100_000


def visible(text: str) -> str:
    """The text with its control characters as pictures (`␛` for an escape) or, where there is none,
    as `\\x9b`; lines stay.
    """
    if text.isprintable():
        return text
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character == "\n" or unicodedata.category(character) not in _CONTROL:
        return character
    code = ord(character)
    if code < 0x20:
        return chr(_PICTURES + code)
    if code == 0x7F:
        return _DELETED
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class Terminal(Console):
    """A rich console whose own control sequences are the only ones that reach the terminal."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def serve_any_encoding() -> None:
    """Makes standard output and error take what their encoding lacks: `━` becomes `-`, what has no
    likeness `?`.
    """
    codecs.register_error(_ERRORS, _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end].translate(_PLAIN)
    return "".join(character if character.isascii() else "?" for character in lacking), error.end


class Whole:
    """A table with nothing cut off, for `console.print(Whole(table), crop=False)`.

    In a terminal what finds no room in a column goes on in the next line; into a file or a pipe the
    table is as wide as it is."""

    def __init__(self, table: Table):
        self._table = table
        for column in table.columns:
            column.overflow = "fold"
            column.no_wrap = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not console.is_terminal:
            options = options.update(
                width=max(options.max_width, natural_width(console, self._table))
            )
        yield from console.render(self._table, options)


def natural_width(console: Console, table: Table) -> int:
    """Columns that a table takes if it may have as many as it likes."""
    return Measurement.get(console, console.options.update(width=_BOUNDLESS), table).maximum


def print_whole(table: Table, console: Console | None = None) -> None:
    """Prints a table with nothing cut off."""
    (console or Terminal(highlight=False)).print(Whole(table), crop=False)
