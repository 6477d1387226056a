"""The definition of a thread tree, in plain Python: one thread at a time, no cache, everything
recomputed.

The device engine must agree with it in every field. It shares with the engine only the words
(`Status`, control pieces, `Limits`), the keys and the draw of one token from given logits; the
protocol, spawns, joins and limits are written anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from apr_jax.threads import keys
from apr_jax.threads import protocol as p
from apr_jax.threads.forest import NO_PARENT, ROOT, Refusal, Status, ThreadForest
from apr_jax.threads.limits import Limits
from apr_jax.threads.prompts import NOT_FORCED, Prompts
from apr_jax.threads.sampling import draw

# The tokens that a thread sees -> logits [V] of the next one.
LogitsOf = Callable[[Sequence[int]], np.ndarray]

_draw = jax.jit(draw)
_child_key = jax.jit(keys.child_key)


class _Token(NamedTuple):
    """One place of a stream; the names are ThreadForest's, the defaults those of a given token."""

    tokens: int
    position: int
    hidden_block: int = 0
    sampled: bool = False
    logprob: float = 0.0
    allowed: int = 0


@dataclasses.dataclass
class _Thread:
    thread_index: int
    seen: list[int]  # The context: what the next token follows from.
    key: np.ndarray
    free: range  # Threads that its descendants may take.
    budget: int  # Tokens that it may still sample.
    clock: int = 0
    parent: int = NO_PARENT
    round: int = 0
    depth: int = 0
    child: int = 0
    forced: int = NOT_FORCED  # Children that it must make.
    made: int = 0  # Children that it made.
    spawns: int = 0
    opened_at: int = 0  # Length of `seen` before the open `<spawn>`.
    messages: list[list[int]] | None = None  # Of the open spawn block.
    answer: list[int] | None = None  # Since `<join>`.
    status: Status = Status.RUNNING

    def __post_init__(self):
        self.refusals = [0] * len(Refusal)
        self.start, self.peak = self.clock, len(self.seen)
        self.stream = [_Token(token, place) for place, token in enumerate(self.seen)]

    @property
    def length(self) -> int:
        return len(self.stream)

    def append(self, token: int, *choice: Any) -> None:
        """Writes a token behind what the thread sees; `choice` is the rest of a sampled
        `_Token`.
        """
        self.stream.append(_Token(token, len(self.seen), *choice))
        self.seen.append(token)
        self.peak = max(self.peak, len(self.seen))


def interpret(
    logits_of: LogitsOf, prompts: Prompts, tree: int, key: jax.Array, limits: Limits
) -> ThreadForest:
    """The thread tree of one of the prompts; the fields are numpy arrays without the batch axis
    B.
    """
    prompt = np.asarray(prompts.tokens)[tree, : int(prompts.length[tree])].tolist()
    root_key = np.asarray(keys.root_key(key, np.asarray(prompts.tree)[[tree]]))[0]
    root = _Thread(ROOT, prompt, root_key, range(1, limits.max_threads), limits.max_tokens)
    root.forced = int(prompts.children[tree])
    sampling = [
        np.asarray(setting)[[tree]]
        for setting in (prompts.temperature, prompts.top_k, prompts.top_p)
    ]
    threads = [root]

    def sample(thread: _Thread) -> tuple[int, float, int]:
        logits = np.asarray(logits_of(thread.seen), np.float32)[None]
        place, allowed = (
            np.asarray([thread.length], np.int32),
            np.asarray([_allowed(thread, limits)], np.uint8),
        )
        token, logprob = _draw(logits, thread.key[None], place, *sampling, allowed)
        return int(token[0]), float(logprob[0]), int(allowed[0])

    _run(root, sample, limits, threads)
    return _forest(threads, limits)


def _run(thread: _Thread, sample: Callable, limits: Limits, threads: list[_Thread]) -> None:
    """Decodes the thread to its end, and its children whenever it spawns."""
    while thread.status == Status.RUNNING:
        token, logprob, allowed = sample(thread)
        _follow(thread, token)
        thread.append(
            token, thread.spawns if thread.messages is not None else 0, True, logprob, allowed
        )
        thread.clock += 1
        thread.budget -= 1
        if thread.status == Status.RUNNING:
            closes = thread.messages is not None and token == p.END_SPAWN
            full = len(thread.seen) >= limits.window or thread.length >= limits.max_thread_tokens
            if full and not closes:
                thread.status = Status.OUT_OF_WINDOW
            elif thread.clock >= limits.max_sequential or thread.budget <= 0:
                thread.status = Status.OUT_OF_BUDGET
            elif closes:
                children = _spawn(thread, limits)
                threads.extend(children)
                for child in children:
                    _run(child, sample, limits, threads)
                _join(thread, children, limits)


def _follow(thread: _Thread, token: int) -> None:
    """What a token does: by whether the thread is within a spawn block, within its answer, or
    thinks.
    """
    text = token >= len(p.CONTROL_PIECES)
    if thread.messages is not None:
        if token == p.MSG:
            thread.messages.append([])
        elif text and thread.messages:
            thread.messages[-1].append(token)
        elif token != p.END_SPAWN:
            thread.status = Status.MALFORMED
    elif thread.answer is not None:
        if text:
            thread.answer.append(token)
        else:
            thread.status = Status.DONE if token == p.EOS else Status.MALFORMED
    elif token == p.SPAWN:
        thread.spawns, thread.opened_at, thread.messages = thread.spawns + 1, len(thread.seen), []
    elif token == p.JOIN:
        thread.answer = []
    elif not text:
        thread.status = Status.NO_ANSWER if token == p.EOS else Status.MALFORMED


def _allowed(thread: _Thread, limits: Limits) -> int:
    """Classes of tokens that may come next: the protocol's if the rollout is constrained, less what
    a forced count forbids.
    """
    messages, thinks = thread.messages, thread.messages is None and thread.answer is None
    # After this token and `</spawn>`, these children and the thread have a token each.
    affordable = thread.budget - 3
    free = len(thread.free) if thread.depth < limits.max_depth else 0
    classes = {1 << bit for bit in range(7)}
    if limits.constrain:
        if messages:
            classes = {p.ALLOW_END_SPAWN}
            classes |= {p.ALLOW_TEXT} if len(messages) <= affordable else set()
            classes |= (
                {p.ALLOW_MSG} if len(messages) < min(limits.children, free, affordable) else set()
            )
        elif messages is not None:
            classes = {p.ALLOW_MSG}
        elif thinks:
            classes = {p.ALLOW_TEXT, p.ALLOW_JOIN}
            classes |= {p.ALLOW_SPAWN} if free >= 1 and affordable >= 2 else set()
        else:
            classes = {p.ALLOW_TEXT, p.ALLOW_EOS}
    if thread.forced != NOT_FORCED:
        missing = thread.forced - thread.made
        if thinks:
            classes -= {p.ALLOW_JOIN, p.ALLOW_EOS} if missing > 0 else {p.ALLOW_SPAWN}
        elif messages == []:
            classes -= {p.ALLOW_END_SPAWN}
        elif messages and len(messages) >= min(limits.children, missing):
            classes -= {p.ALLOW_MSG}
    return sum(classes)


def _spawn(thread: _Thread, limits: Limits) -> list[_Thread]:
    """Of the first C messages, starts as many as threads and tokens last for; both are divided
    evenly.
    """
    started, refused, messages = [], thread.refusals, thread.messages or []
    refused[Refusal.NO_MESSAGE] += not messages
    for number, message in enumerate(messages):
        if thread.depth >= limits.max_depth:
            refused[Refusal.TOO_DEEP] += 1
        elif number >= limits.children:
            refused[Refusal.TOO_MANY] += 1
        elif number >= len(thread.free):
            refused[Refusal.NO_SLOT] += 1
        elif number >= thread.budget - 1:
            refused[Refusal.NO_BUDGET] += 1
        else:
            started.append(message)
    count, low = len(started), thread.free.start
    thread.made += count
    kept = max(0, thread.forced - thread.made)  # For the children that it still must make.
    tokens_each = thread.budget // (count + 1)
    slots_each = (
        max(0, len(thread.free) - count - kept) // (count + 1)
        if thread.depth + 1 < limits.max_depth
        else 0
    )
    shares = [low + count + index * slots_each for index in range(count + 1)]
    thread.budget -= count * tokens_each
    thread.free = range(shares[-1], thread.free.stop)
    return [
        _Thread(
            thread_index=low + index,
            seen=[p.BOS, *message],
            key=np.asarray(_child_key(thread.key, np.int32(thread.spawns - 1), np.int32(index))),
            free=range(shares[index], shares[index + 1]),
            budget=tokens_each,
            clock=thread.clock,
            parent=thread.thread_index,
            round=thread.spawns - 1,
            depth=thread.depth + 1,
            child=index,
        )
        for index, message in enumerate(started)
    ]


def _join(thread: _Thread, children: list[_Thread], limits: Limits) -> None:
    """Hides the spawn block and puts the children's answers where it stood."""
    block = [p.JOINED]
    for child in children:
        block += [p.MSG, *(child.answer or [])] if child.status == Status.DONE else [p.MSG]
    block.append(p.END_JOINED)
    thread.clock = max([thread.clock, *(child.clock for child in children)])
    thread.budget += sum(child.budget for child in children)
    thread.messages = None
    if (
        thread.opened_at + len(block) > limits.window - 1
        or thread.length + len(block) > limits.max_thread_tokens - 1
    ):
        thread.status = Status.OUT_OF_WINDOW
    elif thread.clock >= limits.max_sequential:
        thread.status = Status.OUT_OF_BUDGET
    else:
        del thread.seen[thread.opened_at :]
        for token in block:
            thread.append(token)


def _forest(threads: list[_Thread], limits: Limits) -> ThreadForest:
    dtypes = {"sampled": np.bool_, "logprob": np.float32, "allowed": np.uint8}
    fields: dict[str, np.ndarray] = {}
    for name in _Token._fields:
        fields[name] = np.zeros(
            (limits.max_threads, limits.max_thread_tokens), dtypes.get(name, np.int32)
        )
        for thread in threads:
            fields[name][thread.thread_index, : thread.length] = [
                getattr(token, name) for token in thread.stream
            ]
    for name in ("length", "status", "parent", "round", "depth", "child", "start", "clock", "peak"):
        fields[name] = np.full(limits.max_threads, NO_PARENT if name == "parent" else 0, np.int32)
        for thread in threads:
            fields[name][thread.thread_index] = getattr(thread, name)
    ends = [thread.status for thread in threads]
    return ThreadForest(
        end=fields.pop("clock"),
        **fields,
        total_tokens=np.int32(fields["sampled"].sum()),
        sequential_tokens=np.int32(threads[ROOT].clock),
        children=np.int32(len(threads) - 1),
        refusals=np.sum([thread.refusals for thread in threads], axis=0, dtype=np.int32),
        truncations=np.int32(ends.count(Status.OUT_OF_WINDOW) + ends.count(Status.OUT_OF_BUDGET)),
    )
