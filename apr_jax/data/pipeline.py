"""The pipeline: packed batches of demonstrations, without end.

A checkpoint can return to any place in their order.

The life of a sample:
  1. `dataset.read` gives random access to the demonstration trees of a method. Stream s of S takes
     every S-th tree.
  2. Grain shuffles the numbers of the trees anew in each epoch. A few threads of the host read
     blocks of trees ahead.
  3. `_PackedIterator` collects the threads of trees until they fill R rows of L tokens, and packs
     them. A thread that finds no room waits and is placed first in the next batch. So no thread is
     lost and none comes twice, but the threads of a tree may be in different batches.
  4. One more thread of the host keeps finished batches ready while the device computes.
  5. `LocalRows` puts the rows of the streams one below the other. If there are several processes,
     each opens only the streams in which its rows lie. So the batch depends on the number of
     streams, which is a setting, and not on the number of processes or devices.

The state of an iterator is small and JSON-able: how many blocks were taken, and which threads wait,
by their numbers. When it is restored, the waiting threads are read again.
"""

import atexit
import dataclasses
import functools
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from apr_jax.data import dataset
from apr_jax.data.packing import Placement, Rows, place, scatter
from apr_jax.errors import UsageError, UserError

_FIELDS = ("tokens", "position", "hidden_block", "sampled")
_BLOCK = 8  # Trees that are read together, because Grain has a cost for each element.
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)  # In blocks.
_READY = 2  # Batches that are kept ready.
# Batches from which the mean number of tokens in a batch is estimated; at scale `paper` the
# estimate is off by at most half a percent.
_MEASURED = 8

# The n threads of some trees, ordered by tree and thread index:
#   tokens, position, hidden_block, sampled   [sum of lengths], one thread after the other
#   length, thread_index                      [n]
#   tree                                      [n], number of the tree since the start of training
_Pool = dict[str, np.ndarray]


class Batches(Iterator[Rows]):
    """An iterator over batches to which a checkpoint can return.

    Its threads of the host stop when Python exits.
    """

    def __init__(self, batches: grain.DatasetIterator[Rows]):
        self._batches: grain.DatasetIterator[Rows] | None = batches
        # Grain's iterator must be gone before Grain's modules are, or it prints errors at exit.
        atexit.register(_close, weakref.ref(self))

    @property
    def _open(self) -> grain.DatasetIterator[Rows]:
        if self._batches is None:
            raise ValueError("the iterator over batches is closed")
        return self._batches

    def __next__(self) -> Rows:
        return next(self._open)

    def get_state(self) -> dict[str, Any]:
        """Returns, as JSON, the place behind the last batch that was returned.

        Batches that were read ahead do not count.
        """
        return self._open.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes back to where `get_state` was called: the same batches follow, bit for bit."""
        self._open.set_state(state)

    def close(self) -> None:
        """Stops the threads of the host."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


class LocalRows(Iterator[Rows]):
    """The rows of a batch that one process holds, from the streams in which they lie.

    Args:
      open_stream: opens stream s, whose batches have `rows` / `streams` rows.
      streams: number of streams.
      rows: rows of the whole batch.
      held: the rows that this process holds, in order.
    """

    def __init__(
        self, open_stream: Callable[[int], Batches], streams: int, rows: int, held: Sequence[int]
    ):
        self._size = rows // streams
        needed = sorted({row // self._size for row in held})
        self._streams = {stream: open_stream(stream) for stream in needed}

        # The held rows as rows of the opened streams' batches, one below the other.
        offset = {stream: number * self._size for number, stream in enumerate(needed)}
        self._rows = [offset[row // self._size] + row % self._size for row in held]

    def __next__(self) -> Rows:
        parts = [_renumbered(next(batches), stream) for stream, batches in self._streams.items()]
        if len(parts) == 1 and len(self._rows) == self._size:
            return parts[0]

        fields = {}
        for name in vars(parts[0]):
            stacked = np.concatenate([vars(part)[name] for part in parts])  # [opened rows, L]
            fields[name] = stacked[self._rows]  # [held rows, L]
        return Rows(**fields)

    def get_state(self) -> dict[str, Any]:
        """Returns the states of this process's streams, by stream, as JSON."""
        return {str(stream): batches.get_state() for stream, batches in self._streams.items()}

    def set_state(self, states: dict[str, Any]) -> None:
        """Sets this process's streams to their states among those of all streams."""
        for stream, batches in self._streams.items():
            batches.set_state(states[str(stream)])


def _renumbered(rows: Rows, stream: int) -> Rows:
    """Gives the trees numbers that no other stream of the batch has."""
    tree = np.where(rows.tree < 0, rows.tree, rows.tree + np.int32(stream * rows.tree.size))
    return dataclasses.replace(rows, tree=tree)


def _close(reference: "weakref.ref[Batches]") -> None:
    """Closes an iterator if it still exists."""
    batches = reference()
    if batches is not None:
        batches.close()


def sft_batches(
    data_dir: Path,
    method: str,
    rows: int,
    length: int,
    seed: int,
    stream: int = 0,
    streams: int = 1,
    split: str = "train",
    epochs: int | None = None,
) -> "Batches":
    """Opens batches of demonstrations from one of several streams.

    Together, the streams see every tree once an epoch.

    Args:
      data_dir: folder that `build` has filled.
      method: the method of the demonstrations.
      rows: R, rows of the stream's batches.
      length: L of a row, at least that of the longest thread.
      seed: seed of the shuffling.
      stream: which of the streams.
      streams: number of streams.
      split: "train" or "validation".
      epochs: number of epochs, after which the last batch is filled up with padding; None: the
        batches have no end.

    Returns:
      an iterator over `Rows` [rows, length] of numpy arrays.

    Raises:
      UserError: there are no such data, or their build was interrupted.
      UsageError: `length` is too small for the data, or there are more streams than demonstrations.
    """
    source = dataset.read(data_dir, method, split, (*_FIELDS, "length"))
    _check(Path(data_dir), method, split, rows, length)
    if len(source) < streams:
        raise UsageError(
            f"data {data_dir}: {len(source)} {split} demonstrations are too few for {streams}"
            " streams"
        )
    own_trees = grain.MapDataset.range(len(source))[stream::streams]
    # Each stream has an order of its own, or all would read neighbours of the file at once.
    numbers = own_trees.seed(seed * streams + stream).shuffle().repeat(epochs)
    blocks = numbers.batch(_BLOCK).map(functools.partial(_read_block, source))
    packed = _Packed(blocks, rows, length)
    ready = grain.experimental.ThreadPrefetchIterDataset(packed, prefetch_buffer_size=_READY)
    return Batches(iter(ready))


def steps_of_an_epoch(
    data_dir: Path, method: str, rows: int, length: int, seed: int, streams: int = 1
) -> float:
    """Estimates how many batches hold as many tokens as all training demonstrations of a method.

    data.json states the number of tokens of all demonstrations. How many of a batch's columns hold
    a token is measured on the first batches. The result follows from the data and the arguments, so
    that every start of a run finds the same number.

    Args:
      data_dir: folder that `build` has filled.
      method: the method of the demonstrations.
      rows: rows of the whole batch, of all streams.
      length: L of a row.
      seed: seed of the shuffling.
      streams: number of streams.

    Raises:
      UserError, UsageError: as `sft_batches`.
    """
    batches = sft_batches(data_dir, method, rows // streams, length, seed, 0, streams)
    held = [int(np.count_nonzero(next(batches).segment)) for _ in range(_MEASURED)]
    batches.close()

    stored: int = _split_statistics(Path(data_dir), method, "train")["stored_tokens"]
    return stored / (streams * sum(held) / len(held))


def _split_statistics(data_dir: Path, method: str, split: str) -> dict[str, Any]:
    """Reads what data.json says about the demonstrations of a split."""
    built = json.loads((data_dir / "data.json").read_text())
    numbers: dict[str, Any] = built["methods"][method][split]
    return numbers


def _check(data_dir: Path, method: str, split: str, rows: int, length: int) -> None:
    """Checks the shape of a batch.

    Raises:
      UserError: data.json does not know the data, because their build was interrupted.
      UsageError: there is no row, or it is too short for the data.
    """
    if rows < 1:
        raise UsageError(f"rows={rows} must be at least 1")
    try:
        longest = _split_statistics(data_dir, method, split)["longest_stream"]
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"data {data_dir}: data.json does not know {method!r}, the build was interrupted; run"
            " `apr data build` again"
        ) from None
    if length < longest:
        raise UsageError(
            f"length={length} must be at least {longest}, the longest {split} thread of {method!r}"
        )


class _Packed(grain.IterDataset[Rows]):
    """Packs blocks of trees into batches, see `_PackedIterator`."""

    def __init__(self, blocks: grain.MapDataset[_Pool], rows: int, length: int):
        super().__init__(blocks.to_iter_dataset(_READ))
        self._blocks = blocks
        self._rows = rows
        self._length = length

    def __iter__(self) -> "_PackedIterator":
        return _PackedIterator(iter(self._parent), self._blocks, self._rows, self._length)


class _PackedIterator(grain.DatasetIterator[Rows]):
    """An iterator that collects threads until they fill a batch, and packs them.

    Its state is the number of blocks that it has taken, and the threads that wait for the next
    batch because they found no room in the last one.

    Args:
      parent: gives blocks of trees in their order.
      blocks: the same blocks by number, from which a restored iterator reads the waiting threads.
      rows: R of a batch.
      length: L of a row.
    """

    def __init__(
        self,
        parent: grain.DatasetIterator[_Pool],
        blocks: grain.MapDataset[_Pool],
        rows: int,
        length: int,
    ):
        super().__init__(parent)
        self._blocks = blocks
        self._rows = rows
        self._length = length
        self._taken = 0
        self._waiting = _join([])

    def __next__(self) -> Rows:
        pool = self._collect()
        if len(pool["tokens"]) == 0:
            raise StopIteration

        # The threads that waited are the first of the pool.
        waited = len(self._waiting["length"])
        placement = place(pool["length"], self._length, self._rows, first=waited)
        is_placed = placement.row >= 0  # [n]
        self._waiting = _select(pool, ~is_placed)
        return self._scatter(pool, placement, is_placed)

    def _collect(self) -> _Pool:
        """Takes blocks until their threads, and those that wait, have tokens enough for a batch.

        After the last block they may be fewer, or none.
        """
        pools = [self._waiting]
        tokens = len(self._waiting["tokens"])
        while tokens < self._rows * self._length:
            block = next(self._parent, None)
            if block is None:
                break
            pools.append(_numbered(block, self._taken))
            self._taken += 1
            tokens += len(block["tokens"])
        return _join(pools)

    def _scatter(self, pool: _Pool, placement: Placement, is_placed: np.ndarray) -> Rows:
        """Writes the placed threads of the pool into rows."""
        # The trees of a batch are counted from 0; those of which all threads wait are not in it.
        trees = np.unique(pool["tree"][is_placed])
        tree = np.searchsorted(trees, pool["tree"])  # [n]

        fields = {name: pool[name] for name in _FIELDS}
        # Nothing was recorded of demonstrations.
        count = len(pool["tokens"])
        fields["logprob"] = np.zeros(count, np.float32)
        fields["allowed"] = np.zeros(count, np.uint8)
        return scatter(placement, pool["length"], tree, fields, self._rows, self._length)

    def get_state(self) -> dict[str, Any]:
        """Returns the state as JSON: the waiting threads are named by tree and thread index."""
        waiting = [self._waiting["tree"].tolist(), self._waiting["thread_index"].tolist()]
        return {"blocks": self._parent.get_state(), "taken": self._taken, "waiting": waiting}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes back to a state, and reads the waiting threads again."""
        self._parent.set_state(state["blocks"])
        self._taken = state["taken"]

        trees, thread_indices = state["waiting"]
        waiting = set(zip(trees, thread_indices, strict=True))
        numbers_of_blocks = sorted({tree // _BLOCK for tree in trees})
        self._waiting = _join([self._read_waiting(number, waiting) for number in numbers_of_blocks])

    def _read_waiting(self, number: int, waiting: set[tuple[int, int]]) -> _Pool:
        """Reads the waiting threads, given by tree and thread index, of one block."""
        block = _numbered(self._blocks[number], number)
        threads = zip(block["tree"].tolist(), block["thread_index"].tolist(), strict=True)
        return _select(block, np.array([thread in waiting for thread in threads]))


def _read_block(source: dataset.TreeSource, numbers: np.ndarray) -> _Pool:
    """Reads the threads of some trees; in the result, "tree" counts from 0."""
    # One by one: for records as small as these, array_record takes twice as long to read many at
    # once.
    examples = [source[number] for number in numbers.tolist()]
    thread_counts = [len(example["length"]) for example in examples]
    pool = {
        name: np.concatenate([example[name] for example in examples])
        for name in (*_FIELDS, "length")
    }
    pool["tree"] = np.repeat(np.arange(len(examples)), thread_counts)  # [n]
    pool["thread_index"] = np.concatenate([np.arange(count) for count in thread_counts])  # [n]
    return pool


def _numbered(block: _Pool, number: int) -> _Pool:
    """Numbers the trees of a block from the start of training on."""
    return {**block, "tree": block["tree"] + number * _BLOCK}


def _join(pools: list[_Pool]) -> _Pool:
    """Puts the threads of several pools one after the other."""
    if not pools:
        names = (*_FIELDS, "length", "tree", "thread_index")
        return {name: np.zeros(0, np.int64) for name in names}
    return {name: np.concatenate([pool[name] for pool in pools]) for name in pools[0]}


def _select(pool: _Pool, threads: np.ndarray) -> _Pool:
    """Returns the threads of a pool for which the mask, bool [n], holds."""
    tokens = np.repeat(threads, pool["length"])  # [sum of lengths]
    return {name: values[tokens if name in _FIELDS else threads] for name, values in pool.items()}
