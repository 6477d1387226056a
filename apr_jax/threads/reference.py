"""The definition of a thread tree in plain Python.

It runs one thread at a time, without a cache, and recomputes everything. The device engine must
agree with it in every field. It shares with the engine only the words (`Status`, control pieces,
`Limits`), the keys, and the draw of one token from given logits; the protocol, spawns, joins and
limits are written anew.
"""

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
_ALL_CLASSES = frozenset(
    (
        p.ALLOW_TEXT,
        p.ALLOW_SPAWN,
        p.ALLOW_MSG,
        p.ALLOW_END_SPAWN,
        p.ALLOW_JOIN,
        p.ALLOW_EOS,
        p.ALLOW_OTHER,
    )
)


class _Token(NamedTuple):
    """One entry of a token sequence; names are ThreadForest's, defaults those of a prompt token."""

    tokens: int
    position: int
    hidden_block: int = 0
    sampled: bool = False
    logprob: float = 0.0
    allowed: int = 0


@dataclasses.dataclass
class _Thread:
    thread_index: int
    seen: list[int]  # The context, from which the next token follows.
    key: np.ndarray
    free: range  # Thread indices that its descendants may take.
    budget: int  # Tokens that it may still sample.
    clock: int = 0
    parent: int = NO_PARENT
    round: int = 0
    depth: int = 0
    child: int = 0
    forced: int = NOT_FORCED  # Children that it must make.
    made: int = 0  # Children that it has made.
    spawns: int = 0
    opened_at: int = 0  # Length of `seen` before the open `<spawn>`.
    messages: list[list[int]] | None = None  # Those of the open spawn block, if there is one.
    answer: list[int] | None = None  # The tokens since `<join>`, if there is one.
    status: Status = Status.RUNNING

    def __post_init__(self):
        self.refusals = [0] * len(Refusal)
        self.start = self.clock
        self.peak = len(self.seen)
        self.sequence = [_Token(token, place) for place, token in enumerate(self.seen)]

    @property
    def length(self) -> int:
        return len(self.sequence)

    def append(self, token: int, *choice: Any) -> None:
        """Writes a token behind what the thread sees.

        Args:
          token: its id.
          choice: the other fields of a sampled `_Token`; none for a prompt token.
        """
        self.sequence.append(_Token(token, len(self.seen), *choice))
        self.seen.append(token)
        self.peak = max(self.peak, len(self.seen))


def interpret(
    logits_of: LogitsOf, prompts: Prompts, tree: int, key: jax.Array, limits: Limits
) -> ThreadForest:
    """Decodes the thread tree of one prompt.

    Args:
      logits_of: the policy, a function of the tokens that a thread sees.
      prompts: a batch of prompts.
      tree: which of them is decoded.
      key: the rollout's key.
      limits: what the tree may do.

    Returns:
      a forest whose fields are numpy arrays without the batch axis B.
    """
    prompt = np.asarray(prompts.tokens)[tree, : int(prompts.length[tree])].tolist()
    root_key = np.asarray(keys.root_key(key, np.asarray(prompts.tree)[[tree]]))[0]
    root = _Thread(ROOT, prompt, root_key, range(1, limits.max_threads), limits.max_tokens)
    root.forced = int(prompts.children[tree])
    settings = [
        np.asarray(setting)[[tree]]
        for setting in (prompts.temperature, prompts.top_k, prompts.top_p)
    ]
    threads = [root]

    def sample(thread: _Thread) -> tuple[int, float, int]:
        logits = np.asarray(logits_of(thread.seen), np.float32)[None]
        place = np.asarray([thread.length], np.int32)
        allowed = np.asarray([_allowed(thread, limits)], np.uint8)
        token, logprob = _draw(logits, thread.key[None], place, *settings, allowed)
        return int(token[0]), float(logprob[0]), int(allowed[0])

    _run(root, sample, limits, threads)
    return _forest(threads, limits)


def _run(thread: _Thread, sample: Callable, limits: Limits, threads: list[_Thread]) -> None:
    """Decodes a thread to its end, and its children whenever it spawns."""
    while thread.status == Status.RUNNING:
        token, logprob, allowed = sample(thread)
        _follow(thread, token)
        hidden_block = thread.spawns if thread.messages is not None else 0
        thread.append(token, hidden_block, True, logprob, allowed)
        thread.clock += 1
        thread.budget -= 1
        if thread.status != Status.RUNNING:
            return

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
    """Follows the protocol for one token: in a spawn block, in the answer, or while thinking."""
    is_text = token >= len(p.CONTROL_PIECES)
    if thread.messages is not None:
        if token == p.MSG:
            thread.messages.append([])
        elif is_text and thread.messages:
            thread.messages[-1].append(token)
        elif token != p.END_SPAWN:
            thread.status = Status.MALFORMED
    elif thread.answer is not None:
        if is_text:
            thread.answer.append(token)
        else:
            thread.status = Status.DONE if token == p.EOS else Status.MALFORMED
    elif token == p.SPAWN:
        thread.spawns += 1
        thread.opened_at = len(thread.seen)
        thread.messages = []
    elif token == p.JOIN:
        thread.answer = []
    elif not is_text:
        thread.status = Status.NO_ANSWER if token == p.EOS else Status.MALFORMED


def _allowed(thread: _Thread, limits: Limits) -> int:
    """Returns the classes of tokens that may come next.

    If the rollout is constrained, they are those of the protocol. A forced number of children
    forbids some of them.
    """
    classes = _constrained(thread, limits) if limits.constrain else set(_ALL_CLASSES)

    if thread.forced != NOT_FORCED:
        missing = thread.forced - thread.made
        messages = thread.messages
        if messages is None and thread.answer is None:
            classes -= {p.ALLOW_JOIN, p.ALLOW_EOS} if missing > 0 else {p.ALLOW_SPAWN}
        elif messages == []:
            classes -= {p.ALLOW_END_SPAWN}
        elif messages and len(messages) >= min(limits.children, missing):
            classes -= {p.ALLOW_MSG}
    return sum(classes)


def _constrained(thread: _Thread, limits: Limits) -> set[int]:
    """Returns the classes of tokens that keep the protocol and refuse no message."""
    # After this token and `</spawn>`, so many children and the thread can have a token each.
    affordable = thread.budget - 3
    free = len(thread.free) if thread.depth < limits.max_depth else 0

    if thread.messages:
        classes = {p.ALLOW_END_SPAWN}
        if len(thread.messages) <= affordable:
            classes.add(p.ALLOW_TEXT)
        if len(thread.messages) < min(limits.children, free, affordable):
            classes.add(p.ALLOW_MSG)
        return classes
    if thread.messages is not None:
        return {p.ALLOW_MSG}
    if thread.answer is not None:
        return {p.ALLOW_TEXT, p.ALLOW_EOS}
    if free >= 1 and affordable >= 2:
        return {p.ALLOW_TEXT, p.ALLOW_JOIN, p.ALLOW_SPAWN}
    return {p.ALLOW_TEXT, p.ALLOW_JOIN}


def _spawn(thread: _Thread, limits: Limits) -> list[_Thread]:
    """Starts children for the first messages, as many as threads and tokens last for.

    Threads and tokens that are left are divided evenly.
    """
    messages = thread.messages or []
    started = []
    if not messages:
        thread.refusals[Refusal.NO_MESSAGE] += 1
    for number, message in enumerate(messages):
        if thread.depth >= limits.max_depth:
            thread.refusals[Refusal.TOO_DEEP] += 1
        elif number >= limits.children:
            thread.refusals[Refusal.TOO_MANY] += 1
        elif number >= len(thread.free):
            thread.refusals[Refusal.NO_THREAD_INDEX] += 1
        elif number >= thread.budget - 1:
            thread.refusals[Refusal.NO_BUDGET] += 1
        else:
            started.append(message)

    count = len(started)
    thread.made += count
    tokens_each = thread.budget // (count + 1)
    threads_each = 0
    if thread.depth + 1 < limits.max_depth:
        kept = max(0, thread.forced - thread.made)  # For the children that it still must make.
        threads_each = max(0, len(thread.free) - count - kept) // (count + 1)

    # First the children's own thread indices, then the shares of their descendants.
    low = thread.free.start
    shares = [low + count + index * threads_each for index in range(count + 1)]
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
        block.append(p.MSG)
        if child.status == Status.DONE:
            block += child.answer or []
    block.append(p.END_JOINED)

    thread.clock = max([thread.clock, *(child.clock for child in children)])
    thread.budget += sum(child.budget for child in children)
    thread.messages = None

    window_full = thread.opened_at + len(block) > limits.window - 1
    sequence_full = thread.length + len(block) > limits.max_thread_tokens - 1
    if window_full or sequence_full:
        thread.status = Status.OUT_OF_WINDOW
    elif thread.clock >= limits.max_sequential:
        thread.status = Status.OUT_OF_BUDGET
    else:
        del thread.seen[thread.opened_at :]
        for token in block:
            thread.append(token)


def _forest(threads: list[_Thread], limits: Limits) -> ThreadForest:
    """Writes all threads of a tree into arrays."""
    dtypes = {"sampled": np.bool_, "logprob": np.float32, "allowed": np.uint8}
    shape = (limits.max_threads, limits.max_thread_tokens)
    fields: dict[str, np.ndarray] = {}

    # What a token has: [T, L].
    for name in _Token._fields:
        fields[name] = np.zeros(shape, dtypes.get(name, np.int32))
        for thread in threads:
            values = [getattr(token, name) for token in thread.sequence]
            fields[name][thread.thread_index, : thread.length] = values

    # What a thread has: [T].
    for name in ("length", "status", "parent", "round", "depth", "child", "start", "clock", "peak"):
        unused = NO_PARENT if name == "parent" else 0
        fields[name] = np.full(limits.max_threads, unused, np.int32)
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
