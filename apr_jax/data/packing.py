"""Threads of different lengths side by side in rows of one length, so that the device computes
little padding.

The life of a sample:
  1. Threads arrive as streams: from demonstrations (`pipeline`) or as the threads of a recorded
     forest (`pack_forest`).
  2. `place` decides, longest first, in which row and from which column each one stands: the first
     row with room.
  3. `scatter` writes all of them there at once; a thread never spans rows. Threads of a row are
     told apart by `segment`, trees of the batch by `tree`.
  4. The loss walks the rows: the token at column j is predicted at j - 1, and counts where
     `sampled` holds at j.

Plain numpy on the host: it runs between rollout and update (64 trees of 13 threads: some 5 ms).
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from apr_jax.data.encode import Stream

if TYPE_CHECKING:
    # The shape of the record, not the engine: data knows nothing of threads at run time.
    from apr_jax.threads.forest import ThreadForest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """R packed rows of L tokens. Integers are int32.

    Attributes:
      tokens: [R, L]; 0 (`<pad>`) where there is none.
      position: [R, L] place in the thread's window.
      segment: [R, L] 0 = padding; 1, 2, ... = thread within the row.
      hidden block: [R, L] as in `ThreadForest`.
      sampled: [R, L] bool; the token here was chosen by the policy. It is the target of the column
        before.
      tree: [R, L] index of the tree in the batch; -1 = padding.
      logprob: [R, L] float32 behaviour log-prob of the token here; 0 for demonstrations and given
        tokens.
      allowed: [R, L] uint8 classes of tokens that the token here was drawn from
        (`ThreadForest.allowed`); 0 for demonstrations and given tokens: nothing was forbidden, or
        nothing drawn.
    """

    tokens: np.ndarray
    position: np.ndarray
    segment: np.ndarray
    hidden_block: np.ndarray
    sampled: np.ndarray
    tree: np.ndarray
    logprob: np.ndarray
    allowed: np.ndarray


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where n threads stand.

    Attributes:
      row: int64 [n]; -1 = did not fit into the given number of rows.
      column: int64 [n] of its first token.
      segment: int64 [n] place within its row, from 1.
      rows: rows in use.
    """

    row: np.ndarray
    column: np.ndarray
    segment: np.ndarray
    rows: int


def place(lengths: np.ndarray, length: int, rows: int | None = None, first: int = 0) -> Placement:
    """First-fit-decreasing: each thread, longest first, goes to the first row that still has room
    for it.

    With a given number of rows, threads without room are left over; a caller that puts them in
    front the next time loses none, because the very first thread always finds an empty row.

    Args:
      lengths: int [n] tokens of each thread.
      length: L, columns of a row.
      rows: rows there are; None for as many as it takes.
      first: so many threads from the start of `lengths` are placed before all others, in the order
        given.

    Raises:
      ValueError: a thread is longer than a row.
    """
    lengths = lengths.astype(np.int64)  # Unsigned ones would wrap around below.
    count = len(lengths)
    if count and lengths.max() > length:
        longest = int(np.argmax(lengths))
        raise ValueError(
            f"packing: thread {longest} has {lengths[longest]} tokens, a row holds {length}"
        )
    waiting = np.arange(count) < first
    # Stable: those who wait keep their order.
    order = np.lexsort((np.where(waiting, 0, -lengths), ~waiting))
    room = np.full(count if rows is None else rows, length)
    threads = np.zeros(len(room), np.int64)
    row, column, segment = (np.full(count, -1) for _ in range(3))
    for thread in order.tolist():
        size = lengths[thread]
        fits = room >= size
        found = int(fits.argmax()) if len(room) else 0
        if not len(room) or not fits[found]:
            continue
        row[thread], column[thread] = found, length - room[found]
        room[found] -= size
        threads[found] += 1
        segment[thread] = threads[found]
    return Placement(row, column, segment, int((threads > 0).sum()))


def scatter(
    placement: Placement,
    lengths: np.ndarray,
    tree: np.ndarray,
    fields: dict[str, np.ndarray],
    rows: int,
    length: int,
) -> Rows:
    """Writes the placed threads into `rows` rows; what was not placed is left out.

    Args:
      placement: of n threads.
      lengths: int [n].
      tree: int [n] index of each thread's tree.
      fields: tokens, position, hidden block, sampled, logprob, allowed: the n threads' values one
        after the other, [sum(lengths)].
    """
    lengths = lengths.astype(np.int64)
    total = int(lengths.sum())
    starts = np.cumsum(lengths) - lengths
    at = np.repeat(placement.row * length + placement.column - starts, lengths) + np.arange(total)
    placed = np.repeat(placement.row >= 0, lengths)
    everything = bool(placed.all())
    at = at if everything else at[placed]

    def spread(values: np.ndarray, dtype: type, blank: int = 0) -> np.ndarray:
        out: np.ndarray = np.full(rows * length, blank, dtype)
        out[at] = values if everything else values[placed]
        return out.reshape(rows, length)

    return Rows(
        tokens=spread(fields["tokens"], np.int32),
        position=spread(fields["position"], np.int32),
        segment=spread(np.repeat(placement.segment, lengths), np.int32),
        hidden_block=spread(fields["hidden_block"], np.int32),
        sampled=spread(fields["sampled"], np.bool_),
        tree=spread(np.repeat(tree, lengths), np.int32, blank=-1),
        logprob=spread(fields["logprob"], np.float32),
        allowed=spread(fields["allowed"], np.uint8),
    )


def pack_streams(trees: Sequence[Sequence[Stream]], length: int, rows: int | None = None) -> Rows:
    """Packs whole demonstration trees, all at once.

    Args:
      trees: the streams of each tree, at least one.
      length: L.
      rows: R; None for as many as it takes.

    Raises:
      ValueError: a stream is longer than a row, or `rows` rows don't hold all.
    """
    streams = [stream for tree in trees for stream in tree]
    lengths = np.array([len(stream.tokens) for stream in streams], np.int64)
    index = np.repeat(np.arange(len(trees)), [len(tree) for tree in trees])
    placement = place(lengths, length, rows)
    if (placement.row < 0).any():
        raise ValueError(f"packing: {lengths.sum()} tokens do not fit into {rows} rows of {length}")
    fields = {
        name: np.concatenate([getattr(stream, name) for stream in streams])
        for name in ("tokens", "position", "hidden_block", "sampled")
    }
    fields["logprob"] = np.zeros(len(fields["tokens"]), np.float32)
    fields["allowed"] = np.zeros(len(fields["tokens"]), np.uint8)
    return scatter(
        placement, lengths, index, fields, placement.rows if rows is None else rows, length
    )


def pack_forest(forest: "ThreadForest", rows: int, length: int) -> Rows:
    """Packs every used thread index of a recorded forest (numpy leaves).

    Args:
      forest: as `tree_rollout` returns it, fetched to the host.
      rows: R of the first bucket; the row count is the first of rows, 2 rows, 4 rows, ... that
        holds all, so that the training step compiles for few shapes.
      length: L of a row, at least the longest stream.

    Raises:
      ValueError: a stream is longer than a row, or there is no row to start from.
    """
    if rows < 1:
        raise ValueError(f"packing: rows={rows} must be at least 1")
    thread_lengths = np.asarray(forest.length)
    tree, thread_index = np.nonzero(thread_lengths)
    lengths = thread_lengths[tree, thread_index]
    if len(lengths) and lengths.max() > length:
        longest = int(np.argmax(lengths))
        raise ValueError(
            f"packing: thread index {thread_index[longest]} of tree {tree[longest]} has"
            f" {lengths[longest]} tokens, a row holds {length}"
        )
    placement = place(lengths, length)
    bucket = rows
    while bucket < placement.rows:
        bucket *= 2
    used = np.arange(forest.tokens.shape[2]) < thread_lengths[:, :, None]
    recorded = ("tokens", "position", "hidden_block", "sampled", "logprob", "allowed")
    fields = {name: np.asarray(getattr(forest, name))[used] for name in recorded}
    return scatter(placement, lengths, tree, fields, bucket, length)


def padding_share(rows: Rows) -> float:
    """Share of the columns that hold no token."""
    return float(np.mean(np.asarray(rows.segment) == 0))
