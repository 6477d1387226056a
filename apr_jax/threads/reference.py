"""The definition of a thread tree, in plain Python: one thread at a time, no cache, everything recomputed.

The device engine must agree with it in every field. It shares with the engine only the words (`Status`, control pieces,
`Limits`), the keys and the draw of one token from given logits; the protocol, spawns, joins and limits are written anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from apr_jax.threads import protocol as p
from apr_jax.threads.forest import NO_PARENT, ROOT, Status, ThreadForest
from apr_jax.threads.limits import Limits
from apr_jax.threads.sampling import draw

# The tokens that a thread sees -> logits [V] of the next one.
LogitsOf = Callable[[Sequence[int]], np.ndarray]

_draw = jax.jit(draw)
_child_key = jax.jit(p.child_key)


@dataclasses.dataclass
class _Thread:
    """A thread at work; `seen` is its context, the lists hold its stream."""

    slot: int
    seen: list[int]
    key: np.ndarray
    free: range  # Slots that its descendants may take.
    budget: int
    clock: int = 0
    parent: int = NO_PARENT
    round: int = 0
    depth: int = 0
    child: int = 0
    status: Status = Status.RUNNING
    answer: tuple[int, ...] = ()
    refusals: int = 0

    def __post_init__(self):
        self.start = self.clock
        self.peak = len(self.seen)
        self.tokens = list(self.seen)
        self.position = list(range(len(self.seen)))
        self.island = [0] * len(self.seen)
        self.sampled = [False] * len(self.seen)
        self.logprob = [0.0] * len(self.seen)

    def append(self, token: int, island: int, logprob: float | None) -> None:
        """Writes a token behind what the thread sees; given tokens have no log-prob."""
        self.tokens.append(token)
        self.position.append(len(self.seen))
        self.island.append(island)
        self.sampled.append(logprob is not None)
        self.logprob.append(logprob or 0.0)
        self.seen.append(token)
        self.peak = max(self.peak, len(self.seen))


def interpret(
    logits_of: LogitsOf, prompt: Sequence[int], tree: int, temperature: float, key: jax.Array, limits: Limits
) -> ThreadForest:
    """One thread tree; the fields are numpy arrays without the batch axis B."""
    root_key = np.asarray(p.root_key(key, np.asarray([tree], np.int32)))[0]
    root = _Thread(ROOT, list(prompt), root_key, range(1, limits.slots), limits.max_tokens)
    threads = [root]
    _run(root, logits_of, temperature, limits, threads)
    return _forest(threads, limits)


def _run(thread: _Thread, logits_of: LogitsOf, temperature: float, limits: Limits, threads: list[_Thread]) -> None:
    """Decodes the thread to its end, and its children whenever it spawns."""
    spawns = 0
    opened_at = -1  # Length of `seen` before the open `<spawn>`.
    messages: list[list[int]] | None = None  # Of the open spawn block.
    answer: list[int] | None = None  # Since `<join>`.
    while thread.status == Status.RUNNING:
        token, logprob = _sample(thread, logits_of, temperature)
        text = token >= len(p.CONTROL_PIECES)
        if token == p.SPAWN and messages is None and answer is None:
            spawns, opened_at, messages = spawns + 1, len(thread.seen), []
        in_block = messages is not None
        thread.append(token, spawns if in_block else 0, logprob)
        thread.clock += 1
        thread.budget -= 1
        closes = in_block and token == p.END_SPAWN
        if messages is not None:
            if token == p.MSG:
                messages.append([])
            elif text and messages:
                messages[-1].append(token)
            elif not closes and not (token == p.SPAWN and len(thread.seen) == opened_at + 1):
                thread.status = Status.MALFORMED
        elif answer is not None:
            if text:
                answer.append(token)
            else:
                thread.status = Status.DONE if token == p.EOS else Status.MALFORMED
        elif token == p.JOIN:
            answer = []
        elif token == p.EOS:
            thread.status = Status.NO_ANSWER
        elif not text:
            thread.status = Status.MALFORMED

        if thread.status == Status.RUNNING:
            full = len(thread.seen) >= limits.window or len(thread.tokens) >= limits.stream
            if full and not closes:
                thread.status = Status.OUT_OF_WINDOW
            elif thread.clock >= limits.max_sequential or thread.budget <= 0:
                thread.status = Status.OUT_OF_BUDGET
            elif closes:
                children = _spawn(thread, messages or [], spawns - 1, limits, threads)
                for child in children:
                    _run(child, logits_of, temperature, limits, threads)
                _join(thread, children, opened_at, limits)
                messages = None
    if thread.status == Status.DONE:
        thread.answer = tuple(answer or ())


def _sample(thread: _Thread, logits_of: LogitsOf, temperature: float) -> tuple[int, float]:
    logits = np.asarray(logits_of(thread.seen), np.float32)[None]
    index = np.asarray([len(thread.tokens)], np.int32)
    token, logprob = _draw(logits, thread.key[None], index, np.asarray([temperature], np.float32))
    return int(token[0]), float(logprob[0])


def _spawn(
    thread: _Thread, messages: list[list[int]], spawn_round: int, limits: Limits, threads: list[_Thread]
) -> list[_Thread]:
    """Of the first C messages, starts as many as slots and tokens last for; both are divided evenly."""
    allowed = min(len(thread.free), thread.budget - 1) if thread.depth < limits.max_depth else 0
    started = messages[: min(limits.children, allowed)]
    thread.refusals += len(messages) - len(started) + (not messages)
    count, low = len(started), thread.free.start
    tokens_each = thread.budget // (count + 1)
    slots_each = (len(thread.free) - count) // (count + 1) if thread.depth + 1 < limits.max_depth else 0
    thread.budget -= count * tokens_each
    children = []
    for index, message in enumerate(started):
        first_free = low + count + index * slots_each
        children.append(
            _Thread(
                slot=low + index,
                seen=[p.BOS, *message],
                key=np.asarray(_child_key(thread.key, np.int32(spawn_round), np.int32(index))),
                free=range(first_free, first_free + slots_each),
                budget=tokens_each,
                clock=thread.clock,
                parent=thread.slot,
                round=spawn_round,
                depth=thread.depth + 1,
                child=index,
            )
        )
    thread.free = range(low + count + count * slots_each, thread.free.stop)
    threads.extend(children)
    return children


def _join(thread: _Thread, children: list[_Thread], opened_at: int, limits: Limits) -> None:
    """Hides the spawn block and puts the children's answers where it stood."""
    block = [p.JOINED]
    for child in children:
        block += [p.MSG, *child.answer]
    block.append(p.END_JOINED)
    thread.clock = max([thread.clock, *(child.clock for child in children)])
    thread.budget += sum(child.budget for child in children)
    if opened_at + len(block) > limits.window - 1 or len(thread.tokens) + len(block) > limits.stream - 1:
        thread.status = Status.OUT_OF_WINDOW
    elif thread.clock >= limits.max_sequential:
        thread.status = Status.OUT_OF_BUDGET
    else:
        del thread.seen[opened_at:]
        for token in block:
            thread.append(token, 0, None)


def _forest(threads: list[_Thread], limits: Limits) -> ThreadForest:
    def streams(values: Callable[[_Thread], list], dtype: type) -> np.ndarray:
        out: np.ndarray = np.zeros((limits.slots, limits.stream), dtype)
        for thread in threads:
            out[thread.slot, : len(thread.tokens)] = values(thread)
        return out

    def scalars(value: Callable[[_Thread], int], blank: int = 0) -> np.ndarray:
        out = np.full(limits.slots, blank, np.int32)
        for thread in threads:
            out[thread.slot] = value(thread)
        return out

    truncated = (Status.OUT_OF_WINDOW, Status.OUT_OF_BUDGET)
    return ThreadForest(
        tokens=streams(lambda t: t.tokens, np.int32),
        position=streams(lambda t: t.position, np.int32),
        island=streams(lambda t: t.island, np.int32),
        sampled=streams(lambda t: t.sampled, np.bool_),
        logprob=streams(lambda t: t.logprob, np.float32),
        length=scalars(lambda t: len(t.tokens)),
        status=scalars(lambda t: t.status, Status.FREE),
        parent=scalars(lambda t: t.parent, NO_PARENT),
        round=scalars(lambda t: t.round),
        depth=scalars(lambda t: t.depth),
        child=scalars(lambda t: t.child),
        start=scalars(lambda t: t.start),
        end=scalars(lambda t: t.clock),
        peak=scalars(lambda t: t.peak),
        total_tokens=np.int32(sum(sum(t.sampled) for t in threads)),
        sequential_tokens=np.int32(threads[ROOT].clock),
        children=np.int32(len(threads) - 1),
        refusals=np.int32(sum(t.refusals for t in threads)),
        truncations=np.int32(sum(t.status in truncated for t in threads)),
    )
