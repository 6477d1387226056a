"""A decoded tree as one line of JSON: what each thread wrote, and whether the answer was right.

The text of a trace is there to read. Token ids and log-probs would make a line seven times as long,
so they are packed into one string, `streams`: the ids of all threads, one thread after the other,
then their log-probs, compressed, in base64. A log-prob takes 16 bits. An id takes 16 bits, or 32 if
some id of the tree needs more. `unpack_streams` gives ids and log-probs back.
"""

from __future__ import annotations

import base64
import itertools
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from apr_jax.data.integers import fitted, unsigned
from apr_jax.tasks import Failure, Problem, Score, Task
from apr_jax.text.tokenizer import CONTROL_PIECES, JOIN, Tokenizer
from apr_jax.threads import NO_PARENT, Refusal, Status, ThreadForest

# Kinds of spans: the prompt, sampled text, a spawn block, answers of children, the own answer.
KINDS = ("given", "sampled", "spawn", "joined", "join")

# Log-probs are stored as whole thousandths of a nat, with their sign turned. Any that is below
# `_LEAST_LOGPROB`, the smallest that 16 bits hold, is stored as that one.
_MILLI = 1000
_LOGPROB_TYPE = np.dtype("<u2")
_LEAST_LOGPROB = -65.535


def to_trace(
    forest: ThreadForest,
    tree: int,
    problem: Problem,
    sample: int,
    outcome: Score | Failure,
    task: Task,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """Makes the line of `traces.jsonl` of a tree whose answer was verified already.

    Args:
      forest: numpy leaves [B, T, ...].
      tree: index of the tree, below B.
      problem: the problem of the tree.
      sample: number of the tree among the samples of its problem.
      outcome: the verdict, or why there is none. Without a verdict, `claimed`, `correct` and
        `reward` are None.
      task: shows the problem.
      tokenizer: of the model that grew the tree.
    """
    threads = np.flatnonzero(forest.status[tree] != Status.FREE)  # [U], those that were used
    lengths = forest.length[tree, threads]  # [U]
    is_written = np.arange(forest.tokens.shape[-1]) < lengths[:, None]  # [U, L]
    tokens = forest.tokens[tree, threads][is_written]
    logprobs = forest.logprob[tree, threads][is_written]
    return {
        "id": problem.id,
        "sample": sample,
        "problem": task.show(problem),
        "data": dict(problem.data),
        **_verdict(outcome),
        "total_tokens": int(forest.total_tokens[tree]),
        "sequential_tokens": int(forest.sequential_tokens[tree]),
        "children": int(forest.children[tree]),
        "max_thread_tokens": int(forest.peak[tree].max()),
        "refusals": {cause.name: int(forest.refusals[tree, cause]) for cause in Refusal},
        "threads": [_thread(forest, tree, int(thread), tokenizer) for thread in threads],
        "pieces": {str(token): _piece(int(token), tokenizer) for token in np.unique(tokens)},
        "streams": _pack(tokens, logprobs),
    }


def _verdict(outcome: Score | Failure) -> dict[str, Any]:
    """Returns the fields of a trace that say what its answer is worth."""
    if isinstance(outcome, Score):
        return {
            "stated": outcome.stated,
            "vote": outcome.voted,
            "claimed": outcome.stated is not None,
            "correct": outcome.correct,
            "reward": outcome.reward,
            "reason": outcome.reason,
        }
    unknown = dict.fromkeys(("stated", "vote", "claimed", "correct", "reward"))
    return unknown | {"reason": f"no verdict: {outcome.value}"}


def _piece(token: int, tokenizer: Tokenizer) -> str:
    """Returns the text of one token."""
    return CONTROL_PIECES[token] if token < len(CONTROL_PIECES) else tokenizer.show([token])


def _pack(tokens: np.ndarray, logprobs: np.ndarray) -> str:
    """Packs the tokens of a tree and their log-probs into a string."""
    id_type = unsigned(int(tokens.max(initial=0))).newbyteorder("<")
    ids = fitted(tokens, id_type, "token id")
    thousandths = np.rint(-_MILLI * np.maximum(logprobs, _LEAST_LOGPROB))
    surprise = fitted(thousandths, _LOGPROB_TYPE, "log-prob in thousandths")
    return base64.b64encode(zlib.compress(ids.tobytes() + surprise.tobytes(), 9)).decode()


def unpack_streams(trace: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the token ids and the log-probs of each thread, two arrays [length].

    Log-probs are in nats, to a thousandth; 0 where the token was not sampled.
    """
    packed = zlib.decompress(base64.b64decode(trace["streams"]))
    lengths = [sum(thread["lengths"]) for thread in trace["threads"]]
    *ends, count = np.cumsum(lengths).tolist()

    # The width of an id is not stored. It follows from the size, since all else is known.
    ids_size = len(packed) - count * _LOGPROB_TYPE.itemsize
    ids = np.frombuffer(packed[:ids_size], f"<u{ids_size // count}")
    logprobs = np.frombuffer(packed[ids_size:], _LOGPROB_TYPE) / -_MILLI
    return list(zip(np.split(ids, ends), np.split(logprobs, ends), strict=True))


def to_forest(trace: dict[str, Any]) -> ThreadForest:
    """Returns the tree of a trace as a forest of one tree, numpy leaves, to draw it again.

    A trace does not record `position`, `allowed` and `child`, nor which of several spawn blocks a
    token belongs to: these fields are 0, and `hidden_block` is 1 for all blocks.
    """
    threads = trace["threads"]
    streams = unpack_streams(trace)
    indices = [thread["thread_index"] for thread in threads]
    count = max(indices) + 1
    longest = max(len(ids) for ids, _ in streams)

    tokens = np.zeros((1, count, longest), np.int32)
    logprobs = np.zeros((1, count, longest), np.float32)
    sampled = np.zeros((1, count, longest), bool)
    hidden_block = np.zeros((1, count, longest), np.int32)
    for thread_index, thread, (ids, own) in zip(indices, threads, streams, strict=True):
        kinds = np.repeat([kind for kind, _ in thread["spans"]], thread["lengths"])
        place = (0, thread_index, slice(len(ids)))
        tokens[place] = ids
        logprobs[place] = own
        sampled[place] = ~np.isin(kinds, ("given", "joined"))
        hidden_block[place] = kinds == "spawn"

    def per_thread(value: Callable[[dict[str, Any]], int], absent: int = 0) -> np.ndarray:
        """Returns an array [1, T] of a value of each thread."""
        filled = np.full((1, count), absent, np.int32)
        filled[0, indices] = [value(thread) for thread in threads]
        return filled

    unknown = np.zeros((1, count, longest), np.int32)
    cut = (Status.OUT_OF_WINDOW.name, Status.OUT_OF_BUDGET.name)
    return ThreadForest(
        tokens=tokens,
        position=unknown,
        hidden_block=hidden_block,
        sampled=sampled,
        logprob=logprobs,
        allowed=unknown.astype(np.uint8),
        length=per_thread(lambda thread: sum(thread["lengths"])),
        status=per_thread(lambda thread: Status[thread["status"]]),
        parent=per_thread(lambda thread: thread["parent"], NO_PARENT),
        round=per_thread(lambda thread: thread["round"]),
        depth=per_thread(lambda thread: thread["depth"]),
        child=per_thread(lambda _: 0),
        start=per_thread(lambda thread: thread["start"]),
        end=per_thread(lambda thread: thread["end"]),
        peak=per_thread(lambda thread: thread["peak"]),
        total_tokens=np.array([trace["total_tokens"]], np.int32),
        sequential_tokens=np.array([trace["sequential_tokens"]], np.int32),
        children=np.array([trace["children"]], np.int32),
        # In the order of `Refusal`; an earlier version named one of them otherwise.
        refusals=np.array([list(trace["refusals"].values())], np.int32),
        truncations=np.array([sum(thread["status"] in cut for thread in threads)], np.int32),
    )


def _thread(
    forest: ThreadForest, tree: int, thread_index: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Returns one thread of a trace: its place in the tree, its end, and its text in spans."""
    place = (tree, thread_index)
    length = int(forest.length[place])
    tokens = forest.tokens[place][:length]
    sampled = forest.sampled[place][:length]
    hidden_block = forest.hidden_block[place][:length]

    # A span ends where the next token is of another kind.
    kinds = _kinds(tokens, sampled, hidden_block)
    begins = np.flatnonzero(np.diff(kinds, prepend=-1)).tolist()
    bounds = list(itertools.pairwise([*begins, length]))
    spans = [[KINDS[kinds[begin]], tokenizer.show(tokens[begin:end])] for begin, end in bounds]
    return {
        "thread_index": thread_index,
        "parent": int(forest.parent[place]),
        "round": int(forest.round[place]),
        "depth": int(forest.depth[place]),
        "status": Status(int(forest.status[place])).name,
        "tokens": int(sampled.sum()),
        "text": "".join(text for _, text in spans),
        "start": int(forest.start[place]),
        "end": int(forest.end[place]),
        "peak": int(forest.peak[place]),
        "spans": spans,
        "lengths": [end - begin for begin, end in bounds],
    }


def _kinds(tokens: np.ndarray, sampled: np.ndarray, hidden_block: np.ndarray) -> np.ndarray:
    """Returns the kind of each token of a thread, as an index of KINDS; all arrays are [length]."""
    is_after_prompt = np.cumsum(sampled) > 0
    is_after_join = np.cumsum(sampled & (tokens == JOIN)) > 0
    is_given_later = ~sampled & is_after_prompt  # Only answers of children are given later.
    cases = {  # The first case that holds counts.
        "spawn": hidden_block > 0,
        "joined": is_given_later,
        "given": ~sampled,
        "join": is_after_join,
    }
    indices = [KINDS.index(kind) for kind in cases]
    return np.select(list(cases.values()), indices, default=KINDS.index("sampled"))
