"""One problem: its thread tree in the terminal, and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from apr_jax.evaluate.report import write_tree_page
from apr_jax.evaluate.run import encode_prompts, make_runner
from apr_jax.evaluate.trace import to_trace
from apr_jax.learn.answers import extract_answers
from apr_jax.learn.checkpoint import Restored
from apr_jax.tasks import Countdown, Problem

_WIDTH = 56  # Columns of the time axis.
_STYLES = {"given": "dim", "sampled": "", "spawn": "magenta", "joined": "cyan italic", "join": "bold yellow"}


def solve(restored: Restored, problem: Problem, html: Path | None) -> dict[str, Any]:
    """Decodes the problem's tree greedily, prints it, and writes its viewer to `html` if given. Returns the trace."""
    limits = restored.config.limits
    (prompt,) = encode_prompts(restored, [problem], limits, None)
    forest = make_runner(restored, limits, 1)([prompt], [0], 0.0)
    (answer,) = extract_answers(forest, restored.tokenizer)
    task = Countdown(restored.config.task, restored.config.solver)
    trace = to_trace(forest, 0, problem, 0, answer, task, restored.tokenizer)
    show_tree(trace, Console())
    if html is not None:
        write_tree_page(trace, f"{restored.method}-{restored.stage}", html)
        Console().print(f"viewer   {html}")
    return trace


def show_tree(trace: dict[str, Any], console: Console) -> None:
    """Threads as lanes over sequential tokens, each with what it wrote; the verdict below."""
    table = Table(show_edge=False, pad_edge=False)
    for title in ("thread", f"sequential tokens 0 to {trace['sequential_tokens']}", "text"):
        table.add_column(title, overflow="fold", no_wrap=title.startswith("seq"))
    for thread in trace["threads"]:
        text = Text()
        for kind, part in thread["spans"]:
            text.append(part, _STYLES[kind])
        name = "root" if thread["depth"] == 0 else "  " * (thread["depth"] - 1) + f"└ {thread['slot']}"
        table.add_row(name, _lane(thread, trace), text)
    console.print(table)
    said = ", ".join(trace["solution"]) if trace["solution"] else "no solution"
    style = "bold green" if trace["correct"] else "bold red"
    why = "" if trace["correct"] or not trace["reason"] else f" ({trace['reason']})"
    console.print(Text(f"{'✓' if trace['correct'] else '✗'} {said}{why}", style))
    console.print(
        f"{trace['total_tokens']} tokens, {trace['sequential_tokens']} in sequence, {trace['children']} children, "
        f"longest thread {trace['max_thread_tokens']}"
    )


def _lane(thread: dict[str, Any], trace: dict[str, Any]) -> str:
    """A bar from the thread's start to its end; dots where it waits for its children."""
    scale = (_WIDTH - 1) / max(1, trace["sequential_tokens"])
    lane = [" "] * _WIDTH
    for place in range(round(thread["start"] * scale), round(thread["end"] * scale) + 1):
        lane[place] = "█"
    for child in trace["threads"]:
        if child["parent"] == thread["slot"]:
            for place in range(round(child["start"] * scale) + 1, round(child["end"] * scale)):
                lane[place] = "·"
    return "".join(lane).rstrip()
