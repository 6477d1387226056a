"""Threads of different lengths side by side in rows of one length, with little padding.

The life of a sample:
  1. Threads arrive from demonstrations (`pipeline`), or as the threads of a recorded forest
     (`pack_forest`).
  2. `place` decides in which row and from which column on each thread stands: longest thread first,
     in the first row that has room.
  3. `scatter` writes all threads there at once. A thread never spans rows. `segment` tells the
     threads of a row apart, and `tree` the trees of the batch.
  4. The loss goes over the rows: the token at column j is predicted at column j - 1, and counts
     where `sampled` holds at column j.

This is plain numpy on the host. It runs between rollout and update, where 64 trees of 13 threads
take some 5 ms.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from apr_jax.data.encode import ThreadTokens

if TYPE_CHECKING:
    # The type of the record alone: at run time this package needs nothing of `threads`.
    from apr_jax.threads.forest import ThreadForest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """R packed rows of L tokens. Integers are int32.

    Attributes:
      tokens: [R, L] token ids; 0 (`<pad>`) where there is none.
      position: [R, L] position in the thread's window.
      segment: [R, L] 0 for padding; 1, 2, ... for the first, second, ... thread of the row.
      hidden_block: [R, L] as in `ThreadForest`.
      sampled: [R, L] bool, whether the policy chose the token here. Such a token is the target of
        the column before it.
      tree: [R, L] index of the tree in the batch; -1 for padding.
      logprob: [R, L] float32 behaviour log-prob of the token here; 0 for demonstrations and prompt
        tokens.
      allowed: [R, L] uint8 classes of tokens from which the token here was drawn
        (`ThreadForest.allowed`). 0 if nothing was forbidden, or, for demonstrations and prompt
        tokens, nothing was drawn.
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
      row: int64 [n]; -1 if the thread found no room in the given number of rows.
      column: int64 [n] column of the thread's first token.
      segment: int64 [n] number of the thread within its row, from 1.
      rows: number of rows in use.
    """

    row: np.ndarray
    column: np.ndarray
    segment: np.ndarray
    rows: int


def place(lengths: np.ndarray, length: int, rows: int | None = None, first: int = 0) -> Placement:
    """Places threads by first-fit-decreasing: longest first, in the first row that has room.

    With a given number of rows, threads without room are left over. A caller that gives them as the
    first ones of its next call loses none, because the very first thread always finds an empty row.

    Args:
      lengths: int [n] tokens of each thread.
      length: L, columns of a row.
      rows: number of rows; None for as many as needed.
      first: so many threads from the start of `lengths` are placed before all others, in the given
        order.

    Raises:
      ValueError: a thread is longer than a row.
    """
    lengths = lengths.astype(np.int64)  # Unsigned integers would wrap around below.
    count = len(lengths)
    if count and lengths.max() > length:
        longest = int(np.argmax(lengths))
        raise ValueError(
            f"packing: thread {longest} has {lengths[longest]} tokens, a row holds {length}"
        )

    is_first = np.arange(count) < first
    # The sort is stable, so the threads that are placed first keep their order.
    order = np.lexsort((np.where(is_first, 0, -lengths), ~is_first))  # [n] thread numbers

    # As many rows as threads are always enough.
    room = _Room(count if rows is None else rows, length)
    threads_in_row = [0] * room.rows
    row = np.full(count, -1)
    column = np.full(count, -1)
    segment = np.full(count, -1)
    sizes = lengths.tolist()
    for thread in order.tolist():
        size = sizes[thread]
        chosen = room.first_row(size)
        if chosen is None:
            continue
        row[thread] = chosen
        column[thread] = length - room.take(chosen, size)
        threads_in_row[chosen] += 1
        segment[thread] = threads_in_row[chosen]
    return Placement(row, column, segment, rows=sum(number > 0 for number in threads_in_row))


class _Room:
    """Free columns of rows, in which the first row with enough of them is found in log n steps.

    They are the leaves of a binary tree, whose nodes hold the most room of any row below them. The
    children of node i are the nodes 2 i and 2 i + 1, and the root is node 1.

    Args:
      rows: n, number of rows.
      length: free columns of each row at the start.
    """

    def __init__(self, rows: int, length: int):
        self.rows = rows
        self._leaves = 1 << max(0, rows - 1).bit_length()  # A power of two, at least n.
        self._most = [0] * self._leaves + [length] * rows + [0] * (self._leaves - rows)
        for node in reversed(range(1, self._leaves)):
            self._most[node] = max(self._most[2 * node], self._most[2 * node + 1])

    def first_row(self, size: int) -> int | None:
        """Returns the first row that has room for `size` columns, or None if no row has."""
        if self.rows == 0 or self._most[1] < size:
            return None
        node = 1
        while node < self._leaves:
            node *= 2
            if self._most[node] < size:
                node += 1
        return node - self._leaves

    def take(self, row: int, size: int) -> int:
        """Takes `size` columns of a row; returns how many were free before."""
        node = self._leaves + row
        before = self._most[node]
        self._most[node] -= size
        while node > 1:
            node //= 2
            most = max(self._most[2 * node], self._most[2 * node + 1])
            if self._most[node] == most:
                break
            self._most[node] = most
        return before


def scatter(
    placement: Placement,
    lengths: np.ndarray,
    tree: np.ndarray,
    fields: dict[str, np.ndarray],
    rows: int,
    length: int,
) -> Rows:
    """Writes the placed threads into rows; threads without a place are left out.

    Args:
      placement: places of n threads.
      lengths: int [n] tokens of each thread.
      tree: int [n] index of each thread's tree.
      fields: tokens, position, hidden_block, sampled, logprob and allowed, each [sum(lengths)]: the
        values of the n threads, one thread after the other.
      rows: R.
      length: L.
    """
    lengths = lengths.astype(np.int64)
    places = _places(placement, lengths, length)  # [sum(lengths)]
    placed = np.repeat(placement.row >= 0, lengths)  # [sum(lengths)]
    all_placed = bool(placed.all())  # Spares six copies, in the usual case.
    if not all_placed:
        places = places[placed]

    def spread(values: np.ndarray, dtype: type, blank: int = 0) -> np.ndarray:
        """Returns the values in their places, and `blank` in all others: [R, L]."""
        kept = values if all_placed else values[placed]
        return _spread(kept, places, (rows, length), dtype, blank)

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


def _places(placement: Placement, lengths: np.ndarray, length: int) -> np.ndarray:
    """Returns the place of each token in the flattened rows, int64 [sum(lengths)].

    It is the place of the token's thread, and on from there.
    """
    starts = np.cumsum(lengths) - lengths  # [n]
    thread_places = placement.row * length + placement.column  # [n]
    return np.repeat(thread_places - starts, lengths) + np.arange(int(lengths.sum()))


def _spread(
    values: np.ndarray, places: np.ndarray, shape: tuple[int, int], dtype: type, blank: int = 0
) -> np.ndarray:
    """Returns the values in their places of the flattened rows, and `blank` in all others."""
    flat: np.ndarray = np.full(shape, blank, dtype).reshape(-1)
    flat[places] = values
    return flat.reshape(shape)


def pack_trees(
    trees: Sequence[Sequence[ThreadTokens]], length: int, rows: int | None = None
) -> Rows:
    """Packs whole demonstration trees, all at once.

    Args:
      trees: the threads of each tree; at least one tree.
      length: L.
      rows: R; None for as many rows as needed.

    Raises:
      ValueError: a thread is longer than a row, or `rows` rows do not hold all threads.
    """
    threads = [thread for tree in trees for thread in tree]
    lengths = np.array([len(thread.tokens) for thread in threads], np.int64)  # [n]
    tree_index = np.repeat(np.arange(len(trees)), [len(tree) for tree in trees])  # [n]

    placement = place(lengths, length, rows)
    if (placement.row < 0).any():
        raise ValueError(f"packing: {lengths.sum()} tokens do not fit into {rows} rows of {length}")
    row_count = placement.rows if rows is None else rows

    fields = {
        name: np.concatenate([getattr(thread, name) for thread in threads])
        for name in ("tokens", "position", "hidden_block", "sampled")
    }
    fields["logprob"] = np.zeros(len(fields["tokens"]), np.float32)
    fields["allowed"] = np.zeros(len(fields["tokens"]), np.uint8)
    return scatter(placement, lengths, tree_index, fields, row_count, length)


def pack_forest(forest: "ThreadForest", rows: int, length: int) -> Rows:
    """Packs all threads of a recorded forest that hold tokens.

    The number of rows is the first of `rows`, 2 `rows`, 4 `rows`, ... that holds all, so that what
    is compiled for a number of rows is compiled for few.

    Args:
      forest: what `tree_rollout` returned, fetched to the host (numpy leaves).
      rows: the smallest number of rows.
      length: L of a row, at least that of the longest thread.

    Raises:
      ValueError: a thread is longer than a row, or `rows` is below 1.
    """
    packed, _ = pack_marked_forest(forest, None, rows, length)
    return packed


def pack_marked_forest(
    forest: "ThreadForest",
    marks: np.ndarray | None,
    rows: int,
    length: int,
    trees: np.ndarray | None = None,
) -> tuple[Rows, np.ndarray | None]:
    """Packs a forest as `pack_forest` does, together with a mark on each of its tokens.

    Args:
      forest: see `pack_forest`.
      marks: bool [B, T, L]; None if there are none.
      rows: see `pack_forest`.
      length: see `pack_forest`.
      trees: int [B], index of each tree in its batch, if the forest is a part of one; by default
        the trees are counted from 0.

    Returns:
      the rows; and bool [R, L], the mark of each token where the token stands, False for padding.

    Raises:
      ValueError: a thread is longer than a row, or `rows` is below 1.
    """
    if rows < 1:
        raise ValueError(f"packing: rows={rows} must be at least 1")

    thread_lengths = np.asarray(forest.length)  # [B, T]
    tree, thread_index = np.nonzero(thread_lengths)  # [n] each
    lengths = thread_lengths[tree, thread_index]  # [n]
    if len(lengths) and lengths.max() > length:
        longest = int(np.argmax(lengths))
        raise ValueError(
            f"packing: thread index {thread_index[longest]} of tree {tree[longest]} has"
            f" {lengths[longest]} tokens, a row holds {length}"
        )

    placement = place(lengths, length)
    row_count = rows
    while row_count < placement.rows:
        row_count *= 2

    used = np.arange(forest.tokens.shape[2]) < thread_lengths[:, :, None]  # [B, T, L]
    recorded = ("tokens", "position", "hidden_block", "sampled", "logprob", "allowed")
    fields = {name: np.asarray(getattr(forest, name))[used] for name in recorded}
    tree_index = tree if trees is None else trees[tree]
    packed = scatter(placement, lengths, tree_index, fields, row_count, length)
    if marks is None:
        return packed, None
    places = _places(placement, lengths.astype(np.int64), length)
    return packed, _spread(marks[used], places, (row_count, length), np.bool_)


def padding_share(rows: Rows) -> float:
    """Returns the share of the rows' columns that hold no token."""
    return float(np.mean(np.asarray(rows.segment) == 0))
