"""Output of the commands in a terminal: harmless whatever it holds, in any encoding, uncut.

The text that a model wrote, a tokenizer's pieces and the names in a file may hold escape sequences,
which would clear the screen, rename the window or hide what stands there. `visible` replaces them
by pictures. Everything that a `Terminal` prints passes through it, so callers need not think of it.
"""

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

# Unicode categories of characters that a terminal obeys instead of showing: control characters,
# characters that reorder, join or hide their neighbours, line and paragraph separators, and halves
# of surrogate pairs, which cannot be written in UTF-8.
_CONTROL = ("Cc", "Cf", "Cs", "Zl", "Zp")
_PICTURES = 0x2400  # The picture of "\x00"; those of the other characters below 0x20 follow it.
_DELETE_PICTURE = "\u2421"

# What replaces characters that an encoding lacks, one for one, so that a drawn tree keeps its form.
_PLAIN = str.maketrans("━┳┄┻╸╺└─│✓✗…", "-+.+|-`-|vx~")
_ERRORS = "apr_jax.plain"
_UNLIMITED = 100_000


def visible(text: str) -> str:
    r"""Replaces control characters by pictures, such as `␛` for an escape; line ends stay.

    A character that has no picture is replaced by its code, such as `\x9b`.
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
        return _DELETE_PICTURE
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def one_line(text: str, most: int | None = None) -> str:
    """Returns a text in one line, with its control characters made visible.

    Messages may quote what a model or a stranger wrote; this makes them safe to print.

    Args:
      text: any text; white space and line ends become single blanks.
      most: number of characters at which the line is cut off; None cuts nothing off.
    """
    return visible(" ".join(text.split()))[:most]


class Terminal(Console):
    """A rich console that lets no control sequences reach the terminal except rich's own."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(visible(segment.text), segment.style)


def serve_any_encoding() -> None:
    """Makes standard output and standard error accept characters that their encoding lacks.

    A character with a plain counterpart becomes that (`━` becomes `-`), all others become `?`.
    """
    codecs.register_error(_ERRORS, _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    plain = error.object[error.start : error.end].translate(_PLAIN)
    return "".join(character if character.isascii() else "?" for character in plain), error.end


class Whole:
    """A table of which nothing is cut off, for `console.print(Whole(table), crop=False)`.

    In a terminal, text that does not fit into its column goes on in the next line. In a file or a
    pipe the table is as wide as its contents.
    """

    def __init__(self, table: Table):
        self._table = table
        for column in table.columns:
            column.overflow = "fold"
            column.no_wrap = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not console.is_terminal:
            width = max(options.max_width, natural_width(console, self._table))
            options = options.update(width=width)
        yield from console.render(self._table, options)


def natural_width(console: Console, table: Table) -> int:
    """Returns the number of columns that a table takes where the width is not limited."""
    unlimited = console.options.update(width=_UNLIMITED)
    return Measurement.get(console, unlimited, table).maximum


def print_whole(table: Table, console: Console | None = None) -> None:
    """Prints a table of which nothing is cut off."""
    (console or Terminal(highlight=False)).print(Whole(table), crop=False)
