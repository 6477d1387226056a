"""The trees of a step as rows for the update: each process packs the trees of its own devices.

A process holds the trees that its devices decoded, and of each chunk of rows the part that its
devices rescore. It packs these trees into those rows. Which device rescores a tree does not matter:
the gradient is a sum over rows. One process alone therefore packs all trees together.

All processes rescore the same number of chunks. If each kept its rows, all would rescore as many as
the process with the longest trees. So that process gives away the rows that are too many, and those
with room take them. Nothing else of the trees travels between processes.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from apr_jax.data.packing import Rows, pack_marked_forest
from apr_jax.threads import ThreadForest
from apr_jax.train.distributed import HeldRows, exchange
from apr_jax.train.step import ForestBatch, rescored_rows


@dataclasses.dataclass(frozen=True)
class HeldTrees:
    """The packed trees of one process.

    Attributes:
      rows: H rows of each chunk, those that its devices hold; chunk by chunk.
      older: bool like the rows, which tokens the policy of an earlier step drew; None without
        carry-over.
      chunk_rows: which rows of a chunk these are.
    """

    rows: Rows
    older: np.ndarray | None
    chunk_rows: HeldRows

    @property
    def used(self) -> int:
        """Returns the number of rows up to the last one that holds tokens."""
        return len(rescored_rows(self.rows, 1).tokens)

    @property
    def owned(self) -> Rows:
        """Returns the rows that this process owns, so that each row counts in one process."""
        if self.chunk_rows.is_owner.all():
            return self.rows
        is_owner = np.resize(self.chunk_rows.is_owner, len(self.rows.tokens))
        return jax.tree.map(lambda x: x[is_owner], self.rows)

    @property
    def has_current_tokens(self) -> bool:
        """Returns whether the policy of this step drew any of the packed tokens."""
        sampled = self.rows.sampled
        return bool(np.any(sampled if self.older is None else sampled & ~self.older))


@dataclasses.dataclass(frozen=True)
class PackedTrees:
    """The trees of a step as rows for the update.

    Attributes:
      held: rows of this process, on the host.
      weights: like the rows, what each token weighs in the loss.
      batch: rows and weights of all processes, on the devices.
      zero_advantage: bool [B], trees that were left out because they cannot change the gradient.
      rows: number of rescored rows of all processes.
      tokens: number of tokens in them.
      flops: FLOPs of one pass over them, forward and backward.
      has_current_tokens: whether the policy of this step drew any of them.
    """

    held: HeldTrees
    weights: np.ndarray
    batch: ForestBatch
    zero_advantage: np.ndarray
    rows: int
    tokens: int
    flops: float
    has_current_tokens: bool


def pack_held_trees(
    forest: ThreadForest,
    older: np.ndarray | None,
    trees: HeldRows,
    chunk_rows: HeldRows,
    length: int,
) -> HeldTrees:
    """Packs the trees that a process holds into the rows that its devices hold.

    Trees and rows that several processes hold are packed by all of them, in the same way.

    Args:
      forest: the trees `trees.mine` of the batch, numpy leaves.
      older: bool [b, T, L], which of their tokens the policy of an earlier step drew; None without
        carry-over.
      trees: which trees of the batch each process holds.
      chunk_rows: which rows of a chunk each process holds.
      length: L of a row.
    """
    if len(chunk_rows.shares) == 1:
        rows, older_in_rows = pack_marked_forest(
            forest, older, len(chunk_rows.mine), length, trees=trees.mine
        )
        return HeldTrees(rows, older_in_rows, chunk_rows)

    packed = []
    for processes, places in chunk_rows.shares.items():
        chosen = trees.shares.get(processes, np.zeros(0, np.int64))  # Places in `trees.mine`.
        packed.append(
            pack_marked_forest(
                jax.tree.map(lambda x, chosen=chosen: x[chosen], forest),
                None if older is None else older[chosen],
                len(places),
                length,
                trees=trees.mine[chosen],
            )
        )

    all_places = list(chunk_rows.shares.values())
    fields = {
        name: _side_by_side(
            [vars(rows)[name] for rows, _ in packed], all_places, blank=-1 if name == "tree" else 0
        )
        for name in vars(packed[0][0])
    }
    all_older = [marks for _, marks in packed if marks is not None]
    older_in_rows = _side_by_side(all_older, all_places) if all_older else None
    return HeldTrees(Rows(**fields), older_in_rows, chunk_rows)


def _side_by_side(parts: list[np.ndarray], places: list[np.ndarray], blank: int = 0) -> np.ndarray:
    """Lays the rows of each part in their places of each chunk.

    Args:
      parts: [chunks x n, L] each, whose numbers of chunks may differ.
      places: int [n] each, from 0 to H - 1.
      blank: what stands in rows that a part has not.

    Returns:
      [most chunks x H, L].
    """
    length = parts[0].shape[1]
    in_chunks = [
        part.reshape(-1, len(own), length) for part, own in zip(parts, places, strict=True)
    ]  # [chunks, n, L] each
    chunks = max(map(len, in_chunks))
    whole = np.full((chunks, sum(map(len, places)), length), blank, parts[0].dtype)
    for part, own in zip(in_chunks, places, strict=True):
        whole[: len(part), own] = part
    return whole.reshape(-1, length)


@dataclasses.dataclass(frozen=True)
class Moves:
    """How many rows each process gives to others, so that all need equally many chunks.

    Attributes:
      chunks: number of chunks that hold the rows of all processes.
      gives: number of rows that each process gives; its last ones.
      takes: number of rows that each process takes. Lay all given rows one behind the other, those
        of the first process first: process i takes the next `takes[i]` of them.
    """

    chunks: int
    gives: tuple[int, ...]
    takes: tuple[int, ...]

    @classmethod
    def of(cls, used: list[int], chunk_rows: HeldRows) -> "Moves":
        """Plans the moves; no row moves where processes hold rows in common.

        Args:
          used: number of rows with tokens of each process.
          chunk_rows: which rows of a chunk each process holds.
        """
        held = [len(rows) for rows in chunk_rows.by_process]
        # Some rows are held by several processes, in which they must stay equal.
        if sum(held) > chunk_rows.count:
            chunks = max(math.ceil(rows / own) for rows, own in zip(used, held, strict=True))
            return cls(chunks, (0,) * len(used), (0,) * len(used))

        chunks = math.ceil(sum(used) / chunk_rows.count)
        room = [chunks * own - rows for rows, own in zip(used, held, strict=True)]
        gives = [max(0, -free) for free in room]
        takes = []
        left = sum(gives)
        for free in room:
            takes.append(min(left, max(0, free)))
            left -= takes[-1]
        return cls(chunks, tuple(gives), tuple(takes))


@dataclasses.dataclass(frozen=True)
class BalancedTrees:
    """Packed trees of which all processes have equally many chunks.

    Attributes:
      held: rows of this process, after it has given and taken.
      chunks: number of chunks that hold the rows of all processes.
      tokens: number of tokens in the rows of all processes.
      flops: FLOPs of one pass over them, forward and backward.
      has_current_tokens: whether the policy of this step drew any of them.
    """

    held: HeldTrees
    chunks: int
    tokens: int
    flops: float
    has_current_tokens: bool


def balance(held: HeldTrees, flops: Callable[[Rows], float]) -> BalancedTrees:
    """Lets processes with many rows give some to others, and counts what all have together.

    All processes must call it.

    Args:
      held: the packed trees of this process.
      flops: returns the FLOPs of one pass over some rows.
    """
    owned = held.owned
    sizes = exchange(
        {
            "used": held.used,
            "tokens": int(np.sum(owned.segment > 0)),
            "flops": float(flops(owned)),
            "current": held.has_current_tokens,
        }
    )
    moves = Moves.of([each["used"] for each in sizes], held.chunk_rows)
    return BalancedTrees(
        move_rows(held, moves),
        moves.chunks,
        tokens=sum(each["tokens"] for each in sizes),
        flops=sum(each["flops"] for each in sizes),
        has_current_tokens=any(each["current"] for each in sizes),
    )


def move_rows(held: HeldTrees, moves: Moves) -> HeldTrees:
    """Gives rows of this process to others, and takes those that are meant for it.

    All processes must call it. Where no row moves, nothing is sent.
    """
    if not any(moves.gives):
        return held
    given = given_rows(held, moves)
    everyone = multihost_utils.process_allgather(given)
    return taken_rows(held, moves, everyone)


def given_rows(held: HeldTrees, moves: Moves) -> tuple[Rows, np.ndarray | None]:
    """Returns `held.rows` and `held.older` of the rows that this process gives, [most, L] each.

    `most` is the smallest power of two that holds what any process gives: a program is compiled for
    each value, and powers of two are few. The padding of a process that gives fewer is never read.
    """
    most = 1 << (max(moves.gives) - 1).bit_length()
    give = moves.gives[jax.process_index()]
    used = held.used

    def cut(values: np.ndarray) -> np.ndarray:
        given = values[used - give : used]
        return np.pad(given, ((0, most - give), (0, 0)))

    given: tuple[Rows, np.ndarray | None] = jax.tree.map(cut, (held.rows, held.older))
    return given


def taken_rows(
    held: HeldTrees, moves: Moves, everyone: tuple[Rows, np.ndarray | None]
) -> HeldTrees:
    """Returns the rows of this process once it has given and taken.

    Args:
      held: its rows before.
      moves: the plan.
      everyone: what all processes give, [processes, most, L] each.
    """
    process = jax.process_index()
    kept = held.used - moves.gives[process]
    first = sum(moves.takes[:process])
    taken = slice(first, first + moves.takes[process])
    size = moves.chunks * len(held.chunk_rows.mine)

    def settle(values: np.ndarray, all_given: np.ndarray, blank: int = 0) -> np.ndarray:
        given = np.concatenate(
            [rows[:count] for rows, count in zip(all_given, moves.gives, strict=True)]
        )
        own = np.concatenate([values[:kept], given[taken]])
        return np.pad(own, ((0, size - len(own)), (0, 0)), constant_values=blank)

    all_rows, all_older = everyone
    fields = {
        name: settle(values, getattr(all_rows, name), blank=-1 if name == "tree" else 0)
        for name, values in vars(held.rows).items()
    }
    older = None
    if held.older is not None and all_older is not None:
        older = settle(held.older, all_older)
    return dataclasses.replace(held, rows=Rows(**fields), older=older)
