"""A decoded tree as one JSON line: what the model did, thread by thread, and whether it was right."""

from __future__ import annotations

from typing import Any

import numpy as np

from apr_jax.data.tokenizer import END_JOINED, JOIN, JOINED, Tokenizer
from apr_jax.tasks import Problem, Task
from apr_jax.threads import Refusal, Status, ThreadForest


def to_trace(
    forest: ThreadForest, tree: int, problem: Problem, sample: int, answer: str, task: Task, tokenizer: Tokenizer
) -> dict[str, Any]:
    """The line of `traces.jsonl` of one tree.

    Args:
      forest: numpy leaves [B, T, ...].
      tree: which of the B.
      answer: what its root joined.
    """
    verdict = task.verify(problem, answer)
    slots = np.flatnonzero(forest.status[tree] != Status.FREE)
    return {
        "id": problem.id,
        "sample": sample,
        "numbers": list(problem.numbers),
        "target": problem.target,
        "solution": None if verdict.solution is None else list(verdict.solution),
        "claimed": verdict.claimed,
        "correct": verdict.correct,
        "reason": verdict.reason,
        "total_tokens": int(forest.total_tokens[tree]),
        "sequential_tokens": int(forest.sequential_tokens[tree]),
        "children": int(forest.children[tree]),
        "max_thread_tokens": int(forest.peak[tree].max()),
        "refusals": {cause.name: int(forest.refusals[tree, cause]) for cause in Refusal},
        "threads": [_thread(forest, tree, int(slot), tokenizer) for slot in slots],
    }


def _thread(forest: ThreadForest, tree: int, slot: int, tokenizer: Tokenizer) -> dict[str, Any]:
    at = (tree, slot)
    length = int(forest.length[at])
    tokens, sampled, island = (field[at][:length] for field in (forest.tokens, forest.sampled, forest.island))
    spans = _spans(tokens, sampled, island, tokenizer)
    return {
        "slot": slot,
        "parent": int(forest.parent[at]),
        "round": int(forest.round[at]),
        "depth": int(forest.depth[at]),
        "status": Status(int(forest.status[at])).name,
        "tokens": int(sampled.sum()),
        "text": "".join(text for _, text in spans),
        "start": int(forest.start[at]),
        "end": int(forest.end[at]),
        "peak": int(forest.peak[at]),
        "spans": spans,
    }


def _spans(tokens: np.ndarray, sampled: np.ndarray, island: np.ndarray, tokenizer: Tokenizer) -> list[list[str]]:
    """The stream as [kind, text] pieces in time order; kinds: given, sampled, spawn, joined, join."""
    spans: list[list[str]] = []
    kind, first = "given", 0

    def close(end: int) -> None:
        if end > first:
            spans.append([kind, tokenizer.show(tokens[first:end])])

    answering = joining = False
    for place, token in enumerate(tokens):
        joining = joining or token == JOINED
        answering = answering or (bool(sampled[place]) and token == JOIN)
        now = "sampled"
        if island[place]:
            now = "spawn"
        elif joining:
            now = "joined"
        elif not sampled[place]:
            now = "given"
        elif answering:
            now = "join"
        joining = joining and token != END_JOINED
        if now != kind:
            close(place)
            kind, first = now, place
    close(len(tokens))
    return [span for span in spans if span[1]]
