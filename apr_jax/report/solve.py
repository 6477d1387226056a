"""One problem: its thread tree in the terminal and, if wanted, as an HTML page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from apr_jax.evaluate.decoding import task_of
from apr_jax.evaluate.failures import failure, sandboxed
from apr_jax.evaluate.runner import answer_one
from apr_jax.evaluate.trace import to_trace
from apr_jax.io.terminal import Terminal, visible
from apr_jax.report.viewer import write_tree_page
from apr_jax.tasks import Problem, SandboxedVerifier
from apr_jax.threads import ThreadForest
from apr_jax.threads.draw import draw_tree, thread_names
from apr_jax.train.answers import extract_answers
from apr_jax.train.checkpoint.restored import Restored

_WIDTH = 56  # The most columns that the lanes of the threads take.
_NAME_WIDTH = 10  # Columns of the names beside the lanes.

# The animation: how many pictures it has, and how many seconds it lasts.
_FRAMES = 60
_SECONDS = 2.0

_STYLES = {
    "given": "dim",
    "sampled": "",
    "spawn": "magenta",
    "joined": "cyan italic",
    "join": "bold yellow",
}


def solve(restored: Restored, problem: Problem, html: Path | None) -> dict[str, Any]:
    """Decodes the problem's tree greedily and prints it; returns its trace.

    Args:
      restored: the model.
      problem: the problem.
      html: file for the viewer of the tree; None writes none.
    """
    console = Terminal()
    forest, _, trace = grow_tree(restored, problem)
    # An answer without a verdict has not failed.
    is_wrong = trace["correct"] is False
    trace["failure"] = _failure(restored, trace) if is_wrong else ""

    # The page is written before anything is printed, because printing fails if a pipe is closed.
    if html is not None:
        write_tree_page(trace, f"{restored.method}-{restored.stage}", html)
    if console.is_terminal:
        play_tree(forest, console)
    show_tree(forest, trace, console)
    if html is not None:
        console.print(f"viewer   {html}", markup=False, soft_wrap=True)
    return trace


def _failure(restored: Restored, trace: dict[str, Any]) -> str:
    """Says what went wrong in a tree. What its threads joined is scored in a process of its own."""
    task = task_of(restored)
    reward = restored.config.train.rl.reward
    with SandboxedVerifier(task, reward.time_limit, reward.memory_limit) as verifier:
        return failure(trace, task, sandboxed([trace], task, verifier))


def grow_tree(restored: Restored, problem: Problem) -> tuple[ThreadForest, str, dict[str, Any]]:
    """Decodes the problem's tree greedily, and scores its answer in a process of its own.

    Returns:
      a forest of this one tree, its answer, and its trace.
    """
    task = task_of(restored)
    reward = restored.config.train.rl.reward
    forest = answer_one(restored, problem)
    (answer,) = extract_answers(forest, restored.tokenizer)
    with SandboxedVerifier(task, reward.time_limit, reward.memory_limit) as verifier:
        (outcome,) = verifier.verify([(problem, answer)])
    trace = to_trace(forest, 0, problem, 0, outcome, task, restored.tokenizer)
    return forest, answer, trace


def play_tree(forest: ThreadForest, console: Console) -> None:
    """Shows how the first tree was decoded: its lanes grow in the terminal, and then vanish."""
    steps = int(forest.end[0].max())
    width = min(_WIDTH, console.width - _NAME_WIDTH)
    with Live(console=console, transient=True, auto_refresh=False) as live:
        for frame in range(1, _FRAMES + 1):
            step = -(-steps * frame // _FRAMES)  # Rounded up, so that the last frame shows all.
            live.update(_table(forest, width, step), refresh=True)
            time.sleep(_SECONDS / _FRAMES)


def show_tree(forest: ThreadForest, trace: dict[str, Any], console: Console) -> None:
    """Prints the first tree: each thread's lane and text, and below them verdict and cost.

    Args:
      forest: the tree.
      trace: the trace of the same tree.
      console: where to print.
    """
    # The lanes are narrow here, because the texts need the room.
    lanes_width = min(_WIDTH, console.width // 4)
    console.print(_table(forest, lanes_width, None, _texts(trace)))

    verdict, style = _verdict(trace)
    console.print(Text(visible(verdict), style))

    console.print(
        f"{trace['total_tokens']} tokens, {trace['sequential_tokens']} in sequence,"
        f" {trace['children']} children, longest thread {trace['max_thread_tokens']}"
    )


def _verdict(trace: dict[str, Any]) -> tuple[str, str]:
    """Returns the line that says what a tree's answer is worth, and its style."""
    if trace["correct"] is None:
        return f"? {trace['reason']}", "bold yellow"

    stated = trace["stated"] or "no answer"
    if trace["correct"]:
        return f"✓ {stated}", "bold green"
    reason = f" ({trace['reason']})" if trace["reason"] else ""
    return f"✗ {stated}{reason}", "bold red"


def _texts(trace: dict[str, Any]) -> dict[int, Text]:
    """Returns the text of each thread, with a style for each kind of span."""
    texts = {}
    for thread in trace["threads"]:
        text = Text()
        for kind, part in thread["spans"]:
            text.append(visible(part), _STYLES[kind])
        texts[thread["thread_index"]] = text
    return texts


def _table(
    forest: ThreadForest, width: int, until: int | None, texts: dict[int, Text] | None = None
) -> Table:
    """Makes a table of the threads of the first tree: name, lane and, if given, text.

    Args:
      forest: the tree.
      width: columns of the lanes.
      until: the step up to which the lanes are drawn; None draws all of them.
      texts: thread index -> text; None leaves the column out.
    """
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("thread", no_wrap=True)
    table.add_column(f"steps 0 to {int(forest.end[0].max())}", no_wrap=True, width=width + 1)
    if texts is not None:
        table.add_column("text", overflow="fold")

    lanes = draw_tree(forest, 0, width, until)
    for thread_index, name in thread_names(forest, 0).items():
        cells: list[str | Text] = [name, lanes[thread_index]]
        if texts is not None:
            cells.append(texts[thread_index])
        table.add_row(*cells)
    return table
