"""A tree in the terminal: all of it, at any width."""

import io

import pytest
from helpers import trees
from helpers.puzzles import countdown
from helpers.traces import scored_trace
from rich.console import Console

from apr_jax.io.terminal import Terminal
from apr_jax.report.solve import show_tree
from apr_jax.tasks.countdown.config import CountdownConfig, SolverConfig
from apr_jax.tasks.countdown.puzzle import make_problem
from apr_jax.text.sentence_piece import SentencePieceTokenizer

NUMBERS = (84, 19, 96, 2)
TARGET = 55


@pytest.fixture
def tree():
    """A demonstration that spawns many threads, as a forest and as a trace."""
    beams = {"parent_beam": 22, "parent_beam_low": 22, "child_beam": 22, "max_children": 22}
    task = countdown(
        CountdownConfig(low=1, high=99),
        SolverConfig(spawn_probability=1.0, shuffle=False, condition=0.0, **beams),
    )
    problem = make_problem("test-0", NUMBERS, TARGET)
    demonstration = task.demonstrate(problem, "apr", seed=0)
    tokenizer = SentencePieceTokenizer.train(["0123456789+-*/=,:;|!"])
    forest = trees.to_forest(demonstration, tokenizer)
    return forest, scored_trace(forest, 0, problem, demonstration.answer, task, tokenizer)


@pytest.mark.parametrize("width", [60, 80, 160])
def test_every_thread_is_shown_with_its_text(width, tree):
    """Texts have most of the room."""
    forest, trace = tree
    console = Console(file=io.StringIO(), width=width)
    show_tree(forest, trace, console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert sum(line.startswith("└ ") for line in lines) == trace["children"] > 15
    columns = [line.split("│") for line in lines if line.count("│") == 2]
    for thread_index, thread in enumerate(trace["threads"]):
        rows = [
            at for at, column in enumerate(columns) if column[0].strip() not in ("", "thread")
        ] + [len(columns)]
        assert (
            "".join(
                column[2].strip() for column in columns[rows[thread_index] : rows[thread_index + 1]]
            )
            == thread["text"]
        )
    assert len(columns[1][2]) > width / 2
    assert ("✓ " + trace["stated"])[:width] in lines


def test_what_a_model_writes_cannot_move_the_cursor(tree):
    """Its tokenizer may hold any character, and so may the answer, and what the verifier says of
    it.
    """
    forest, trace = tree
    hostile = "\x1b]0;owned\x07\x9b2J\r\u202e"
    trace["threads"][1]["spans"].append(["sampled", hostile])
    trace |= {"correct": False, "stated": f"1+1=2{hostile}", "reason": f"not {hostile}"}
    console = Terminal(file=io.StringIO(), width=400, force_terminal=True, color_system=None)
    show_tree(forest, trace, console)
    said = console.file.getvalue()
    assert not {"\x1b", "\x07", "\x9b", "\r", "\u202e"} & set(said)
    assert said.count("␛]0;owned␇\\x9b2J␍\\u202e") == 3
