"""A demonstration as the forest that a rollout would have recorded, for the viewer's tests."""

import numpy as np

from apr_jax.data.encode import ThreadTokens, tokenize_tree
from apr_jax.tasks import Spawn, Thread
from apr_jax.text.tokenizer import END_SPAWN, Tokenizer
from apr_jax.threads import Status, ThreadForest


def family(levels: tuple[int, ...], name: str = "") -> Thread:
    """A thread that spawns levels[0] children, which spawn levels[1] each, and so on."""
    if not levels:
        return Thread(name, (f"{name}+{name}",), name[:2])
    children = tuple(family(levels[1:], f"{name}{place}") for place in range(levels[0]))
    return Thread(name, ("12", Spawn(children), "3"), name)


def to_forest(demonstration: Thread, tokenizer: Tokenizer, seed: int = 0) -> ThreadForest:
    """One tree, numpy leaves [1, T, ...]; the log-probs are made up."""
    streams = tokenize_tree(demonstration, tokenizer)
    max_threads = len(streams)
    longest = max(len(stream.tokens) for stream in streams)
    fields = {
        name: np.zeros((1, max_threads, longest), np.int32)
        for name in ("tokens", "position", "hidden_block")
    }
    sampled = np.zeros((1, max_threads, longest), bool)
    scalars = {}
    for thread_index, stream in enumerate(streams):
        for name, field in (*fields.items(), ("sampled", sampled)):
            field[0, thread_index, : len(stream.tokens)] = getattr(stream, name)
    for name in ("parent", "round", "depth", "child"):
        scalars[name] = np.array([[getattr(stream, name) for stream in streams]], np.int32)
    start, end = np.zeros((1, max_threads), np.int32), np.zeros((1, max_threads), np.int32)
    _time(streams, 0, 0, start[0], end[0])
    logprob = np.where(
        sampled, -np.random.default_rng(seed).exponential(0.3, sampled.shape), 0
    ).astype(np.float32)
    return ThreadForest(
        **fields,
        **scalars,
        sampled=sampled,
        logprob=logprob,
        allowed=np.zeros((1, max_threads, longest), np.uint8),
        length=np.array([[len(stream.tokens) for stream in streams]], np.int32),
        status=np.full((1, max_threads), Status.DONE, np.int32),
        start=start,
        end=end,
        peak=fields["position"].max(axis=-1) + 1,
        total_tokens=sampled.sum(axis=(1, 2)),
        sequential_tokens=end[:, 0],
        children=np.array([max_threads - 1], np.int32),
        refusals=np.zeros((1, 5), np.int32),
        truncations=np.zeros(1, np.int32),
    )


def _time(
    streams: list[ThreadTokens], thread_index: int, clock: int, start: np.ndarray, end: np.ndarray
) -> None:
    """Sets when the thread and its descendants begin and end."""
    start[thread_index], stream, spawns = clock, streams[thread_index], 0
    for token, chosen in zip(stream.tokens, stream.sampled, strict=True):
        clock += int(chosen)
        if chosen and token == END_SPAWN:
            mine = [
                k
                for k, other in enumerate(streams)
                if other.parent == thread_index and other.round == spawns
            ]
            for child in mine:
                _time(streams, child, clock, start, end)
            clock = max(end[child] for child in mine)
            spawns = spawns + 1
    end[thread_index] = clock
