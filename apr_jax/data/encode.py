"""Demonstrations as token streams: exactly what the rollout would have recorded, had a model
written them.

The life of a sample:
  1. A solver's demonstration arrives as a tree of `tasks.Thread`: text and spawns.
  2. Every thread becomes one stream in time order: `<bos>` and its prompt are given; text, spawn
     blocks and the answer after `<join>` count as sampled; what children join is given again.
  3. A spawn block is an hidden block (1, 2, ...): later tokens don't see it, so the positions of
     `<joined>` start over where `<spawn>` stood.

        token     <bos> p <spawn> <msg> m </spawn> <joined> <msg> a </joined> <join> a <eos>
        position    0   1    2      3   4    5        2       3   4     5       6    7   8
        hidden block      0   0    1      1   1    1        0       0   0     0       0    0   0
        sampled     .   .    x      x   x    x        .       .   .     .       x    x   x

  4. The streams of a tree are listed by thread index: a spawn gives its children consecutive
     threads, then their own spawns follow, then the parent's next spawn. They are stored
     (`builder`), read and packed (`pipeline`, `packing`).

`read_thread` goes back from streams to the tree of text, so that nothing can get lost on the way
unseen."""

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
class Stream:
    """One thread of a tree, n tokens.

    Attributes:
      tokens: int32 [n] in time order.
      position: int32 [n] place in the thread's window.
      hidden block: int32 [n] 0 = visible to all later tokens; k = the thread's k-th spawn block.
      sampled: bool [n] whether the thread's author chose the token.
      parent: thread index of the parent in the tree, NO_PARENT for the root.
      round: which of the parent's spawns made this thread, from 0.
      depth: 0 for the root.
      child: place among the children of that spawn, from 0.
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
    """The stream of one thread in the making."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.position: list[int] = []
        self.hidden_block: list[int] = []
        self.sampled: list[bool] = []
        self.used = 0  # Positions of the window in use.

    def write(self, tokens: list[int], sampled: bool, hidden_block: int = 0) -> None:
        count = len(tokens)
        self.tokens += tokens
        self.position += range(self.used, self.used + count)
        self.hidden_block += [hidden_block] * count
        self.sampled += [sampled] * count
        self.used += count

    def stream(self, parent: int, spawn_round: int, depth: int, child: int) -> Stream:
        return Stream(
            np.array(self.tokens, np.int32),
            np.array(self.position, np.int32),
            np.array(self.hidden_block, np.int32),
            np.array(self.sampled, bool),
            parent,
            spawn_round,
            depth,
            child,
        )


def tree_streams(thread: Thread, tokenizer: Tokenizer) -> list[Stream]:
    """The streams of a demonstration by thread index, the root first.

    Raises:
      UsageError: a text holds a character that the tokenizer never saw.
    """
    streams: list[Stream] = []
    _place([thread], NO_PARENT, 0, 0, tokenizer, streams)
    return streams


def _place(
    threads: list[Thread],
    parent: int,
    spawn_round: int,
    depth: int,
    tokenizer: Tokenizer,
    streams: list[Stream],
) -> None:
    """Gives the threads of one spawn consecutive threads, then their spawns."""
    first = len(streams)
    for child, thread in enumerate(threads):
        streams.append(_write(thread, tokenizer).stream(parent, spawn_round, depth, child))
    for child, thread in enumerate(threads):
        spawns = (part for part in thread.body if isinstance(part, Spawn))
        for nested_round, spawn in enumerate(spawns):
            _place(list(spawn.children), first + child, nested_round, depth + 1, tokenizer, streams)


def _write(thread: Thread, tokenizer: Tokenizer) -> _Writer:
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
        block, joined = [SPAWN], [JOINED]
        for child in part.children:
            block += (MSG, *encode(child.prompt))
            joined += (MSG, *encode(child.answer))
        writer.write([*block, END_SPAWN], sampled=True, hidden_block=spawns)
        writer.used = opened_at
        writer.write([*joined, END_JOINED], sampled=False)
    writer.write([JOIN, *encode(thread.answer), EOS], sampled=True)
    return writer


def read_thread(streams: list[Stream], tokenizer: Tokenizer, thread_index: int = 0) -> Thread:
    """The inverse of `tree_streams` (neighbouring texts of a body come back as one).

    Raises:
      ValueError: the tokens do not follow the protocol, or a message or joined answer is not what
        the child's own stream says.
    """
    stream = streams[thread_index]
    children = [place for place, other in enumerate(streams) if other.parent == thread_index]
    tokens = stream.tokens.tolist()
    given = int(np.argmax(stream.sampled))
    body: list[str | Spawn] = []
    at, end = given, _find(tokens, JOIN, given, thread_index)
    while at < end:
        if tokens[at] != SPAWN:
            stop = min((place for place in range(at, end) if tokens[place] == SPAWN), default=end)
            body.append(tokenizer.decode(tokens[at:stop]))
            at = stop
            continue
        spawn_round = sum(isinstance(part, Spawn) for part in body)
        spawned = tuple(
            read_thread(streams, tokenizer, k) for k in children if streams[k].round == spawn_round
        )
        closed = _find(tokens, END_SPAWN, at, thread_index)
        stop = _find(tokens, END_JOINED, closed, thread_index)
        messages = [child.prompt for child in spawned]
        answers = [child.answer for child in spawned]
        if _messages(tokens[at + 1 : closed], tokenizer) != messages:
            raise ValueError(
                f"stream {thread_index}: the messages of spawn {spawn_round} are not its children's"
                " prompts"
            )
        if (
            tokens[closed + 1] != JOINED
            or _messages(tokens[closed + 2 : stop], tokenizer) != answers
        ):
            raise ValueError(
                f"stream {thread_index}: what spawn {spawn_round} joins is not its children's"
                " answers"
            )
        body.append(Spawn(spawned))
        at = stop + 1
    if tokens[-1] != EOS:
        raise ValueError(f"stream {thread_index}: does not end with <eos>")
    return Thread(
        tokenizer.decode(tokens[1:given]), tuple(body), tokenizer.decode(tokens[end + 1 : -1])
    )


def _find(tokens: list[int], wanted: int, start: int, thread_index: int) -> int:
    try:
        return tokens.index(wanted, start)
    except ValueError:
        raise ValueError(
            f"stream {thread_index}: has no control token {wanted} from place {start} on"
        ) from None


def _messages(tokens: list[int], tokenizer: Tokenizer) -> list[str]:
    """Splits `<msg> m1 <msg> m2 ...`."""
    starts = [place for place, token in enumerate(tokens) if token == MSG]
    return [
        tokenizer.decode(tokens[start + 1 : stop])
        for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True)
    ]
