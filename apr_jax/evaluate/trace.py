"""A decoded tree as one JSON line: what the model did, thread by thread, token by token, and
whether it was right.

Text is there to read. Ids and log-probs, which would make a line seven times as long, stand packed
beside it in `streams`: the ids of all threads, one after the other, then their log-probs,
compressed, in base64. A log-prob takes 16 bits; an id takes 16, or 32 if the tree has one that 16
do not hold. `unpack_streams` gives them back."""

from __future__ import annotations

import base64
import itertools
import zlib
from typing import Any

import numpy as np

from apr_jax.data.integers import fitted, unsigned
from apr_jax.tasks import Failure, Problem, Score, Task
from apr_jax.text.tokenizer import CONTROL_PIECES, JOIN, Tokenizer
from apr_jax.threads import Refusal, Status, ThreadForest

KINDS = ("given", "sampled", "spawn", "joined", "join")  # Of spans.
_MILLI = 1000  # Log-probs are kept to a thousandth of a nat.
_SURPRISE = np.dtype("<u2")  # Of log-probs as stored, their sign turned.
# The smallest log-prob that 16 bits hold in thousandths; less likely tokens are given as this.
_LEAST = -65.535


def to_trace(
    forest: ThreadForest,
    tree: int,
    problem: Problem,
    sample: int,
    answer: str,
    task: Task,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """The line of `traces.jsonl` of one tree, whose answer is verified in this process.

    Args:
      forest: numpy leaves [B, T, ...].
      tree: which of the B.
      answer: what its root joined.
    """
    return graded_trace(forest, tree, problem, sample, task.score(problem, answer), task, tokenizer)


def graded_trace(
    forest: ThreadForest,
    tree: int,
    problem: Problem,
    sample: int,
    outcome: Score | Failure,
    task: Task,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """The same of an answer that was scored before: `claimed`, `correct` and `reward` are None if
    there is no verdict on it.
    """
    if isinstance(outcome, Score):
        verdict = {
            "stated": outcome.stated,
            "vote": outcome.voted,
            "claimed": outcome.stated is not None,
            "correct": outcome.correct,
            "reward": outcome.reward,
            "reason": outcome.reason,
        }
    else:
        verdict = dict.fromkeys(("stated", "vote", "claimed", "correct", "reward"))
        verdict["reason"] = f"no verdict: {outcome.value}"
    thread_indices = np.flatnonzero(forest.status[tree] != Status.FREE)
    written = np.arange(forest.tokens.shape[-1]) < forest.length[tree, thread_indices, None]
    tokens, logprobs = (
        field[tree, thread_indices][written] for field in (forest.tokens, forest.logprob)
    )
    return {
        "id": problem.id,
        "sample": sample,
        "problem": task.show(problem),
        "data": dict(problem.data),
        **verdict,
        "total_tokens": int(forest.total_tokens[tree]),
        "sequential_tokens": int(forest.sequential_tokens[tree]),
        "children": int(forest.children[tree]),
        "max_thread_tokens": int(forest.peak[tree].max()),
        "refusals": {cause.name: int(forest.refusals[tree, cause]) for cause in Refusal},
        "threads": [
            _thread(forest, tree, int(thread_index), tokenizer) for thread_index in thread_indices
        ],
        "pieces": {str(token): _piece(int(token), tokenizer) for token in np.unique(tokens)},
        "streams": _pack(tokens, logprobs),
    }


def _piece(token: int, tokenizer: Tokenizer) -> str:
    return CONTROL_PIECES[token] if token < len(CONTROL_PIECES) else tokenizer.decode([token])


def _pack(tokens: np.ndarray, logprobs: np.ndarray) -> str:
    ids = fitted(tokens, unsigned(int(tokens.max(initial=0))).newbyteorder("<"), "token id")
    surprise = fitted(
        np.rint(-_MILLI * np.maximum(logprobs, _LEAST)), _SURPRISE, "log-prob in thousandths"
    )
    return base64.b64encode(zlib.compress(ids.tobytes() + surprise.tobytes(), 9)).decode()


def unpack_streams(trace: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, log-probs in nats to a thousandth; 0 where nothing was sampled) of each thread,
    [length] both.
    """
    packed = zlib.decompress(base64.b64decode(trace["streams"]))
    *ends, count = np.cumsum([sum(thread["lengths"]) for thread in trace["threads"]]).tolist()
    # How wide the ids are follows from the size: all else is known.
    ids_size = len(packed) - count * _SURPRISE.itemsize
    ids = np.frombuffer(packed[:ids_size], f"<u{ids_size // count}")
    surprise = np.frombuffer(packed[ids_size:], _SURPRISE)
    return list(zip(np.split(ids, ends), np.split(surprise / -_MILLI, ends), strict=True))


def _thread(
    forest: ThreadForest, tree: int, thread_index: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    at = (tree, thread_index)
    length = int(forest.length[at])
    tokens, sampled, hidden_block = (
        field[at][:length] for field in (forest.tokens, forest.sampled, forest.hidden_block)
    )
    kinds = _kinds(tokens, sampled, hidden_block)
    bounds = [*map(int, np.flatnonzero(np.diff(kinds, prepend=-1))), length]
    spans = [
        [KINDS[kinds[begin]], tokenizer.show(tokens[begin:end])]
        for begin, end in itertools.pairwise(bounds)
    ]
    return {
        "thread_index": thread_index,
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
        "lengths": [end - begin for begin, end in itertools.pairwise(bounds)],
    }


def _kinds(tokens: np.ndarray, sampled: np.ndarray, hidden_block: np.ndarray) -> np.ndarray:
    """Place in KINDS of each token of a stream: what is given after the prompt is what children
    joined.
    """
    began, answering = np.cumsum(sampled) > 0, np.cumsum(sampled & (tokens == JOIN)) > 0
    cases = {
        "spawn": hidden_block > 0,
        "joined": ~sampled & began,
        "given": ~sampled,
        "join": answering,
    }
    return np.select(
        [*cases.values()], [KINDS.index(kind) for kind in cases], KINDS.index("sampled")
    )
