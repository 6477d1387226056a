"""Reads demonstrations and hands out packed batches, endlessly, in an order that a checkpoint can return to.

The life of a sample:
  1. `builder.read` gives random access to the demonstration trees of a method; each process takes every P-th one.
  2. Grain shuffles them anew each epoch and repeats; a few threads read ahead.
  3. The packer collects the threads of trees until they fill R rows of L tokens and packs them. What finds no room
     waits and goes first into the next batch: no thread is lost, none comes twice, a tree may be split.
  4. One more thread keeps finished batches ready while the device computes.

The state of the iterator is small and JSON-able: how many trees were taken, and which threads wait, by number.
Restoring reads the waiting threads again.
"""

import json
from pathlib import Path
from typing import Any

import grain
import numpy as np

from apr_jax.data import builder
from apr_jax.data.packing import Rows, place, scatter
from apr_jax.errors import UsageError

_FIELDS = ("tokens", "position", "island", "sampled")
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=64)
_READY = 2  # Batches kept ready.

# Threads one after the other: the values of _FIELDS [sum of lengths], and length, tree (its number since the start of
# training) and slot, one a thread. Always ordered by tree and slot.
_Pool = dict[str, np.ndarray]


def sft_batches(
    data_dir: Path,
    method: str,
    rows: int,
    length: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    split: str = "train",
    epochs: int | None = None,
) -> grain.DatasetIterator[Rows]:
    """Batches of demonstrations; every process gets its own, and together they see every tree once an epoch.

    Args:
      data_dir: what `build` wrote.
      method: whose demonstrations.
      rows: R of this process's batches.
      length: L of a row, at least the longest stream.
      seed: of the shuffling.
      process_index, process_count: which of the processes this one is.
      split: "train" or "validation".
      epochs: None goes on for ever; else the last batch is filled up with padding.

    Returns:
      an iterator over `Rows` [rows, length] of numpy arrays; `get_state()` is JSON-able, and after `set_state` the same
      batches follow, bit for bit.

    Raises:
      UserError: there are no such data.
      UsageError: `length` is too small for the data, or there are more processes than demonstrations.
    """
    source = builder.read(data_dir, method, split, (*_FIELDS, "length"))
    _check(Path(data_dir), method, split, rows, length)
    if len(source) < process_count:
        raise UsageError(
            f"data {data_dir}: {len(source)} {split} demonstrations are too few for {process_count} processes"
        )
    trees = grain.MapDataset.source(source)[process_index::process_count].seed(seed).shuffle().repeat(epochs)
    packed = _Packed(trees, rows, length)
    return iter(grain.experimental.ThreadPrefetchIterDataset(packed, prefetch_buffer_size=_READY))


def _check(data_dir: Path, method: str, split: str, rows: int, length: int) -> None:
    if rows < 1:
        raise UsageError(f"rows={rows} must be at least 1")
    longest = json.loads((data_dir / "data.json").read_text())["methods"][method][split]["longest_stream"]
    if length < longest:
        raise UsageError(f"length={length} must be at least {longest}, the longest {split} stream of {method!r}")


class _Packed(grain.IterDataset[Rows]):
    """Packs the trees of a MapDataset into batches."""

    def __init__(self, trees: grain.MapDataset, rows: int, length: int):
        super().__init__(trees.to_iter_dataset(_READ))
        self._trees = trees
        self._shape = rows, length

    def __iter__(self) -> "_PackedIterator":
        return _PackedIterator(iter(self._parent), self._trees, *self._shape)


class _PackedIterator(grain.DatasetIterator[Rows]):
    """See `_Packed`; the waiting threads are its only state beside the parent's."""

    def __init__(self, parent: grain.DatasetIterator, trees: grain.MapDataset, rows: int, length: int):
        super().__init__(parent)
        self._trees = trees
        self._rows, self._length = rows, length
        self._taken = 0
        self._waiting = _join_pools([])

    def __next__(self) -> Rows:
        pools = [self._waiting]
        tokens = len(self._waiting["tokens"])
        while tokens < self._rows * self._length:
            example = next(self._parent, None)
            if example is None:
                break
            pools.append(_pool(example, self._taken))
            self._taken += 1
            tokens += len(example["tokens"])
        if not tokens:
            raise StopIteration
        pool = _join_pools(pools)
        placement = place(pool["length"], self._length, self._rows, first=len(self._waiting["length"]))
        left_over = placement.row < 0
        self._waiting = _select(pool, left_over)
        # Trees are counted from 0 in each batch; those that only wait are not in it.
        numbers = np.unique(pool["tree"][~left_over])
        tree = np.searchsorted(numbers, pool["tree"])
        fields = {name: pool[name] for name in _FIELDS} | {"logprob": np.zeros(len(pool["tokens"]), np.float32)}
        return scatter(placement, pool["length"], tree, fields, self._rows, self._length)

    def get_state(self) -> dict[str, Any]:
        waiting = [self._waiting["tree"].tolist(), self._waiting["slot"].tolist()]
        return {"trees": self._parent.get_state(), "taken": self._taken, "waiting": waiting}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["trees"])
        self._taken = state["taken"]
        tree, slot = (np.array(values, np.int64) for values in state["waiting"])
        pools = []
        for number in np.unique(tree).tolist():
            pool = _pool(self._trees[number], number)
            pools.append(_select(pool, np.isin(pool["slot"], slot[tree == number])))
        self._waiting = _join_pools(pools)


def _pool(example: dict[str, np.ndarray], number: int) -> _Pool:
    """The threads of one tree."""
    threads = len(example["length"])
    return {
        **{name: example[name] for name in _FIELDS},
        "length": example["length"].astype(np.int64),
        "tree": np.full(threads, number),
        "slot": np.arange(threads),
    }


def _join_pools(pools: list[_Pool]) -> _Pool:
    if not pools:
        return {name: np.zeros(0, np.int64) for name in (*_FIELDS, "length", "tree", "slot")}
    return {name: np.concatenate([pool[name] for pool in pools]) for name in pools[0]}


def _select(pool: _Pool, threads: np.ndarray) -> _Pool:
    """The threads where the mask holds."""
    tokens = np.repeat(threads, pool["length"])
    return {name: values[tokens if name in _FIELDS else threads] for name, values in pool.items()}
