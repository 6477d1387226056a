"""Demonstrations as token sequences: what a rollout would have recorded, had a model written them.

The life of a sample:
  1. A solver's demonstration arrives as a tree of `tasks.Thread`: text and spawns.
  2. Every thread becomes one `ThreadTokens`, its tokens in time order. `<bos>` and the prompt are
     prompt tokens; text, spawn blocks, and `<join>` with the answer count as sampled; what the
     children join is prompt tokens again.
  3. A spawn block is a hidden block (1, 2, ...), which later tokens do not see. So the positions of
     `<joined>` start again where `<spawn>` stood.

        token         <bos> p <spawn> <msg> m </spawn> <joined> <msg> a </joined> <join> a <eos>
        position        0   1    2      3   4    5        2       3   4     5       6    7   8
        hidden block    0   0    1      1   1    1        0       0   0     0       0    0   0
        sampled         .   .    x      x   x    x        .       .   .     .       x    x   x

  4. The threads of a tree are listed by thread index: a spawn gives its children consecutive
     indices; then come the threads that these spawn, then the parent's next spawn.
  5. They are stored (`dataset`), read again and packed (`pipeline`, `packing`).

`read_thread` goes back from token sequences to the tree of text, so that a test can show that
nothing is lost on the way.
"""

import dataclasses

import numpy as np

from apr_jax.tasks.base import Spawn, Thread
from apr_jax.text.tokenizer import (
    BOS,
    END_JOINED,
    END_SPAWN,
    EOS,
    JOIN,
    JOINED,
    MSG,
    SPAWN,
    Tokenizer,
)

NO_PARENT = -1


@dataclasses.dataclass(frozen=True)
class ThreadTokens:
    """The token sequence of one thread of a tree, n tokens.

    Attributes:
      tokens: int32 [n] in time order.
      position: int32 [n] position in the thread's window.
      hidden_block: int32 [n] 0 if all later tokens see the token; k in the thread's k-th spawn
        block.
      sampled: bool [n] whether the author of the thread chose the token.
      parent: thread index of the parent in the tree; NO_PARENT for the root.
      round: which of the parent's spawns made this thread, from 0.
      depth: 0 for the root.
      child: number among the children of that spawn, from 0.
    """

    tokens: np.ndarray
    position: np.ndarray
    hidden_block: np.ndarray
    sampled: np.ndarray
    parent: int
    round: int
    depth: int
    child: int


class _Writer:
    """The token sequence of one thread while it is being written."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.position: list[int] = []
        self.hidden_block: list[int] = []
        self.sampled: list[bool] = []
        self.used = 0  # Number of positions of the window that are in use.

    def write(self, tokens: list[int], sampled: bool, hidden_block: int = 0) -> None:
        """Appends tokens at the next positions."""
        count = len(tokens)
        self.tokens += tokens
        self.position += range(self.used, self.used + count)
        self.hidden_block += [hidden_block] * count
        self.sampled += [sampled] * count
        self.used += count

    def finish(self, parent: int, spawn_round: int, depth: int, child: int) -> ThreadTokens:
        """Returns what was written, with the place of the thread in its tree."""
        return ThreadTokens(
            np.array(self.tokens, np.int32),
            np.array(self.position, np.int32),
            np.array(self.hidden_block, np.int32),
            np.array(self.sampled, bool),
            parent,
            spawn_round,
            depth,
            child,
        )


def tokenize_tree(thread: Thread, tokenizer: Tokenizer) -> list[ThreadTokens]:
    """Returns the token sequences of a demonstration by thread index, the root first.

    Raises:
      UsageError: a text holds a character that is not in the tokenizer's vocabulary.
    """
    sequences: list[ThreadTokens] = []
    _place([thread], NO_PARENT, 0, 0, tokenizer, sequences)
    return sequences


def _place(
    threads: list[Thread],
    parent: int,
    spawn_round: int,
    depth: int,
    tokenizer: Tokenizer,
    sequences: list[ThreadTokens],
) -> None:
    """Appends the threads of one spawn to `sequences`, then the threads that these spawn."""
    first = len(sequences)
    for child, thread in enumerate(threads):
        sequences.append(_write(thread, tokenizer).finish(parent, spawn_round, depth, child))
    for child, thread in enumerate(threads):
        spawns = (part for part in thread.body if isinstance(part, Spawn))
        for nested_round, spawn in enumerate(spawns):
            children = list(spawn.children)
            _place(children, first + child, nested_round, depth + 1, tokenizer, sequences)


def _write(thread: Thread, tokenizer: Tokenizer) -> _Writer:
    """Writes one thread, without the threads that it spawns."""
    encode = tokenizer.encode
    writer = _Writer()
    writer.write([BOS, *encode(thread.prompt)], sampled=False)
    spawns = 0
    for part in thread.body:
        if isinstance(part, str):
            writer.write(encode(part), sampled=True)
            continue
        spawns += 1
        opened_at = writer.used
        block = [SPAWN]
        joined = [JOINED]
        for child in part.children:
            block += (MSG, *encode(child.prompt))
            joined += (MSG, *encode(child.answer))
        writer.write([*block, END_SPAWN], sampled=True, hidden_block=spawns)
        # The block is hidden from here on, so that its positions are free again.
        writer.used = opened_at
        writer.write([*joined, END_JOINED], sampled=False)
    writer.write([JOIN, *encode(thread.answer), EOS], sampled=True)
    return writer


def read_thread(threads: list[ThreadTokens], tokenizer: Tokenizer, thread_index: int = 0) -> Thread:
    """Reads the text of a thread and of all below it: the inverse of `tokenize_tree`.

    Texts that follow each other in a body come back as one.

    Raises:
      ValueError: the tokens do not follow the protocol, or a message or joined answer differs from
        what the child's own tokens say.
    """
    thread = threads[thread_index]
    children = [index for index, other in enumerate(threads) if other.parent == thread_index]
    tokens = thread.tokens.tolist()
    prompt_length = int(np.argmax(thread.sampled))
    join_at = _find(tokens, JOIN, prompt_length, thread_index)

    body: list[str | Spawn] = []
    spawn_round = 0
    start = prompt_length
    while start < join_at:
        if tokens[start] == SPAWN:
            spawned = tuple(
                read_thread(threads, tokenizer, child)
                for child in children
                if threads[child].round == spawn_round
            )
            stop = _check_spawn(tokens, start, spawned, spawn_round, tokenizer, thread_index)
            body.append(Spawn(spawned))
            spawn_round += 1
        else:
            stop = start
            while stop < join_at and tokens[stop] != SPAWN:
                stop += 1
            body.append(tokenizer.decode(tokens[start:stop]))
        start = stop

    if tokens[-1] != EOS:
        raise ValueError(f"thread {thread_index}: does not end with <eos>")
    prompt = tokenizer.decode(tokens[1:prompt_length])
    answer = tokenizer.decode(tokens[join_at + 1 : -1])
    return Thread(prompt, tuple(body), answer)


def _check_spawn(
    tokens: list[int],
    start: int,
    spawned: tuple[Thread, ...],
    spawn_round: int,
    tokenizer: Tokenizer,
    thread_index: int,
) -> int:
    """Checks a spawn block, and the block of joined answers behind it, against the children.

    Args:
      tokens: tokens of the parent.
      start: place of `<spawn>` in them.
      spawned: the children.
      spawn_round: which spawn of the parent it is.
      tokenizer: the tokenizer of the tokens.
      thread_index: thread index of the parent.

    Returns:
      the place behind `</joined>`.

    Raises:
      ValueError: messages or answers are not those of the children.
    """
    closed = _find(tokens, END_SPAWN, start, thread_index)
    end = _find(tokens, END_JOINED, closed, thread_index)

    messages = [child.prompt for child in spawned]
    if _messages(tokens[start + 1 : closed], tokenizer) != messages:
        raise ValueError(
            f"thread {thread_index}: the messages of spawn {spawn_round} are not its children's"
            " prompts"
        )

    answers = [child.answer for child in spawned]
    is_joined = tokens[closed + 1] == JOINED
    if not is_joined or _messages(tokens[closed + 2 : end], tokenizer) != answers:
        raise ValueError(
            f"thread {thread_index}: what spawn {spawn_round} joins is not its children's answers"
        )
    return end + 1


def _find(tokens: list[int], wanted: int, start: int, thread_index: int) -> int:
    """Returns the first place of a control token from `start` on; raises ValueError if none is."""
    try:
        return tokens.index(wanted, start)
    except ValueError:
        raise ValueError(
            f"thread {thread_index}: has no control token {wanted} from place {start} on"
        ) from None


def _messages(tokens: list[int], tokenizer: Tokenizer) -> list[str]:
    """Returns the texts m1, m2, ... of the tokens `<msg> m1 <msg> m2 ...`."""
    starts = [place for place, token in enumerate(tokens) if token == MSG]
    stops = [*starts[1:], len(tokens)]
    return [
        tokenizer.decode(tokens[start + 1 : stop])
        for start, stop in zip(starts, stops, strict=True)
    ]
