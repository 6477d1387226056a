"""One problem: its thread tree in the terminal, and as a page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from apr_jax.evaluate.decoding import task_of
from apr_jax.evaluate.failures import failure
from apr_jax.evaluate.runner import answer_one
from apr_jax.evaluate.trace import to_trace
from apr_jax.io.terminal import Terminal, visible
from apr_jax.report.viewer import write_tree_page
from apr_jax.tasks import Problem
from apr_jax.threads import ThreadForest
from apr_jax.threads.draw import draw_tree, thread_names
from apr_jax.train.answers import extract_answers
from apr_jax.train.checkpoint.restored import Restored

_WIDTH = 56  # Columns of the lanes, at most.
_NAMES = 10  # Columns of the names beside them.
_FRAMES, _SECONDS = 60, 2.0  # Of the animation.
_STYLES = {
    "given": "dim",
    "sampled": "",
    "spawn": "magenta",
    "joined": "cyan italic",
    "join": "bold yellow",
}


def solve(restored: Restored, problem: Problem, html: Path | None) -> dict[str, Any]:
    """Decodes the problem's tree greedily, prints it, and writes its viewer to `html` if given.

    Returns the trace.
    """
    console = Terminal()
    forest, _, trace = grow_tree(restored, problem)
    trace["failure"] = failure(trace, task_of(restored))
    # First, so that it is there whatever the terminal or the pipe behind it does.
    if html is not None:
        write_tree_page(trace, f"{restored.method}-{restored.stage}", html)
    if console.is_terminal:
        play_tree(forest, console)
    show_tree(forest, trace, console)
    if html is not None:
        console.print(f"viewer   {html}", markup=False, soft_wrap=True)
    return trace


def grow_tree(restored: Restored, problem: Problem) -> tuple[ThreadForest, str, dict[str, Any]]:
    """Decodes the problem's tree greedily: the forest of one tree, its answer, and its trace."""
    forest = answer_one(restored, problem)
    (answer,) = extract_answers(forest, restored.tokenizer)
    trace = to_trace(forest, 0, problem, 0, answer, task_of(restored), restored.tokenizer)
    return forest, answer, trace


def play_tree(forest: ThreadForest, console: Console) -> None:
    """The first tree once more in the order in which it was decoded: its lanes grow in the
    terminal, then make room.
    """
    steps = int(forest.end[0].max())
    with Live(console=console, transient=True, auto_refresh=False) as live:
        for frame in range(1, _FRAMES + 1):
            table = _table(
                forest, min(_WIDTH, console.width - _NAMES), -(-steps * frame // _FRAMES)
            )
            live.update(table, refresh=True)
            time.sleep(_SECONDS / _FRAMES)


def show_tree(forest: ThreadForest, trace: dict[str, Any], console: Console) -> None:
    """Threads as lanes over decode steps, each with what it wrote; the verdict below."""
    texts = {}
    for thread in trace["threads"]:
        texts[thread["thread_index"]] = text = Text()
        for kind, part in thread["spans"]:
            text.append(visible(part), _STYLES[kind])
    # The texts need the room.
    console.print(_table(forest, min(_WIDTH, console.width // 4), None, texts))
    said = trace["stated"] or "no answer"
    style = "bold green" if trace["correct"] else "bold red"
    why = "" if trace["correct"] or not trace["reason"] else f" ({trace['reason']})"
    console.print(Text(visible(f"{'✓' if trace['correct'] else '✗'} {said}{why}"), style))
    console.print(
        f"{trace['total_tokens']} tokens, {trace['sequential_tokens']} in sequence,"
        f" {trace['children']} children, longest thread {trace['max_thread_tokens']}"
    )


def _table(
    forest: ThreadForest, width: int, until: int | None, texts: dict[int, Text] | None = None
) -> Table:
    """Names, lanes of so many columns up to a step and, if given, texts of the threads of the first
    tree.
    """
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("thread", no_wrap=True)
    table.add_column(f"steps 0 to {int(forest.end[0].max())}", no_wrap=True, width=width + 1)
    if texts is not None:
        table.add_column("text", overflow="fold")
    lanes = draw_tree(forest, 0, width, until)
    for thread_index, name in thread_names(forest, 0).items():
        table.add_row(name, lanes[thread_index], *([] if texts is None else [texts[thread_index]]))
    return table
