"""Progress on the screen: bars of a single command, and one line for each stage of a long one.

A stage of `apr reproduce` builds data, trains or evaluates by the same functions as the single
commands do, and these show bars of their own. Within a stage the bars are hidden, and their
progress moves the line of the stage:

    with StageLine(" 2/13  sos+/sft  imitates demonstrations") as line:
        ...                             # bars in here move the line
        line.finish("1.9 min  loss 0.089")

In a terminal the line is redrawn. In a file or a pipe it grows instead, so that it can be followed
there as well:

     2/13  sos+/sft  imitates demonstrations  25% 50% 75%  1.9 min  loss 0.089
"""

from __future__ import annotations

import sys
from typing import IO, Any, Self, TextIO, cast

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from apr_jax.io.disk_errors import TolerantStream
from apr_jax.io.terminal import Terminal, one_line

# Shares of the work at which the line grows where it cannot be redrawn, in percent.
_MARKS = (25, 50, 75)

_open_lines: list[StageLine] = []  # The line of the stage that runs; at most one.


class StageLine:
    """The line of a stage on standard error; a context manager."""

    def __init__(self, title: str):
        self._title = title
        self._stream = sys.stderr
        self._console = Terminal(file=cast(IO[str], TolerantStream(sys.stderr)), highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._marked = 0  # The last share of `_MARKS` that was written.
        self._is_interrupted = False  # Whether others wrote since the line last grew.

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=16),
                TimeRemainingColumn(),
                TextColumn(
                    "{task.fields[words]}",
                    markup=False,
                    table_column=Column(no_wrap=True, overflow="ellipsis"),
                ),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(self._title, total=None, words="")
            self._bar.start()
        else:
            sys.stderr = cast(TextIO, _Interrupting(self._stream, self))
            self._grow(self._title)
        _open_lines.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        del error
        if self in _open_lines:
            self._close("")

    def move(self, done: float, total: float, words: str) -> None:
        """Shows how much of the work is done, and what the bars say about it."""
        if self._bar is not None:
            assert self._task is not None
            self._bar.update(self._task, completed=done, total=total, words=one_line(words))
            return
        percent = 100 * done / total if total else 0.0
        for mark in _MARKS:
            if self._marked < mark <= percent < 100:
                self._grow(f" {mark}%" if self._marked else f"  {mark}%")
                self._marked = mark

    def finish(self, words: str) -> None:
        """Ends the line with these words."""
        self._close(words)

    def _close(self, words: str) -> None:
        """Leaves the line as it shall stay, with `words` at its end."""
        _open_lines.remove(self)
        end = f"  {one_line(words)}" if words else ""
        if self._bar is not None:
            self._bar.stop()
            self._console.print(f"{self._title}{end}", soft_wrap=True, markup=False)
            return
        self._grow(f"{end}\n")
        sys.stderr = self._stream

    def _grow(self, text: str) -> None:
        """Writes more of a line that cannot be redrawn."""
        if self._is_interrupted:
            text = self._title + text
            self._is_interrupted = False
        self._console.print(text, end="", soft_wrap=True, markup=False)
        self._stream.flush()

    def interrupt(self) -> None:
        """Ends the line for now, because others write; it begins again when the stage goes on."""
        if not self._is_interrupted:
            self._stream.write("\n")
            self._is_interrupted = True


class _Interrupting:
    """Standard error while a line grows on it: what others write begins in a new line."""

    def __init__(self, stream: IO[str], line: StageLine):
        self._stream = stream
        self._line = line

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if text:
            self._line.interrupt()
        return self._stream.write(text)


class Bars(Progress):
    """Progress bars on standard error, or within a stage what moves the line of the stage.

    Args:
      *columns: what a bar shows.
      shown: whether there is anything to see at all.
      words: field of a task that holds what the line of a stage shall say.
      **settings: of rich's `Progress`.
    """

    def __init__(self, *columns: Any, shown: bool, words: str = "", **settings: Any):
        self._line = _open_lines[-1] if shown and _open_lines else None
        self._words = words
        settings.setdefault("console", Terminal(stderr=True))
        super().__init__(*columns, disable=not shown or self._line is not None, **settings)

    def update(self, task_id: TaskID, *args: Any, **changes: Any) -> None:
        """Updates a task as rich does, and moves the line of the stage."""
        super().update(task_id, *args, **changes)
        self._move(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Advances a task as rich does, and moves the line of the stage."""
        super().advance(task_id, advance)
        self._move(task_id)

    def _move(self, task_id: TaskID) -> None:
        if self._line is not None:
            task = self._tasks[task_id]
            words = str(task.fields.get(self._words, ""))
            self._line.move(task.completed, task.total or 0.0, words)
