"""Demonstrations of the test problems.

Their accuracy and cost are those that a perfect imitator of the demonstrations would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from apr_jax.data.demonstrate import sequential_tokens
from apr_jax.data.encode import tokenize_tree
from apr_jax.errors import UsageError
from apr_jax.tasks import Problem, Task
from apr_jax.text.tokenizer import Tokenizer

_SEED = 1_000_003  # Far from the seeds of training demonstrations, which count from 0.


def demonstrated(
    task: Task, problems: list[Problem], tokenizer: Tokenizer, methods: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Demonstrates each problem once by each method.

    Returns:
      method -> one trace a problem, with `id`, `correct` and the measures in tokens. A method is
      left out if the tokenizer cannot write its demonstrations.
    """
    demonstrations: dict[str, list[dict[str, Any]]] = {}
    for method in methods:
        try:
            demonstrations[method] = [
                _trace(task, problem, method, _SEED + index, tokenizer)
                for index, problem in enumerate(problems)
            ]
        # The tokenizer was trained on other demonstrations, and lacks a character of these.
        except UsageError:
            continue
    return demonstrations


def _trace(
    task: Task, problem: Problem, method: str, seed: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Demonstrates a problem, and writes it like the trace of an answer."""
    thread = task.demonstrate(problem, method, seed)
    streams = tokenize_tree(thread, tokenizer)
    sampled = [int(stream.sampled.sum()) for stream in streams]
    return {
        "id": problem.id,
        "sample": 0,
        "correct": task.score(problem, thread.answer).correct,
        "total_tokens": sum(sampled),
        "sequential_tokens": sequential_tokens(streams),
        "children": len(streams) - 1,
        "max_thread_tokens": max(int(stream.position.max()) + 1 for stream in streams),
    }
