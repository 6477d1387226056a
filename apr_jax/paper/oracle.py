"""The demonstrations' own success: what a perfect imitator of them would reach on the test
problems, and at which cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from apr_jax.data.demonstrate import sequential_tokens
from apr_jax.data.encode import tree_streams
from apr_jax.errors import UsageError
from apr_jax.tasks import Countdown, Problem
from apr_jax.text.tokenizer import Tokenizer

_SEED = 1_000_003  # Away from those of training demonstrations, which count from 0.


def demonstrated(
    task: Countdown, problems: list[Problem], tokenizer: Tokenizer, methods: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Method -> one demonstration a problem, as a trace: id, correct, and the measures in
    tokens.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for method in methods:
        try:
            found[method] = [
                _trace(task, problem, method, place, tokenizer)
                for place, problem in enumerate(problems)
            ]
        # A tokenizer of other demonstrations; those of this method hold characters that it lacks.
        except UsageError:
            continue
    return found


def _trace(
    task: Countdown, problem: Problem, method: str, place: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    thread = task.demonstration(problem, method, _SEED + place)
    streams = tree_streams(thread, tokenizer)
    sampled = [int(stream.sampled.sum()) for stream in streams]
    return {
        "id": problem.id,
        "sample": 0,
        "correct": task.verify(problem, thread.answer).correct,
        "total_tokens": sum(sampled),
        "sequential_tokens": sequential_tokens(streams),
        "children": len(streams) - 1,
        "max_thread_tokens": max(int(stream.position.max()) + 1 for stream in streams),
    }
