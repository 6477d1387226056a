"""Reads demonstrations and hands out packed batches, endlessly, in an order that a checkpoint can
return to.

The life of a sample:
  1. `builder.read` gives random access to the demonstration trees of a method; stream s of S takes
     every S-th one.
  2. Grain shuffles their numbers anew each epoch and repeats; a few threads read blocks of trees
     ahead.
  3. The packer collects the threads of trees until they fill R rows of L tokens and packs them.
     What finds no room waits and goes first into the next batch: no thread is lost, none comes
     twice, a tree may be split.
  4. One more thread keeps finished batches ready while the device computes.
  5. `Held` puts the rows of the streams one below the other. A process of several opens only the
     streams in which its rows lie, so the batch depends on the number of streams, a setting, and
     not on that of processes or devices.

The state of the iterator is small and JSON-able: how many blocks were taken, and which threads
wait, by number. Restoring reads the waiting threads again."""

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
from apr_jax.data.packing import Rows, place, scatter
from apr_jax.errors import UsageError, UserError

_FIELDS = ("tokens", "position", "hidden_block", "sampled")
_BLOCK = 8  # Trees read together; Grain's cost an element would be felt otherwise.
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)  # Blocks.
_READY = 2  # Batches kept ready.
_MEASURED = 8  # Batches that tell how full packed rows are, to half a percent at scale paper.

# Threads one after the other: the values of _FIELDS [sum of lengths], and length, tree (its number
# since the start of training) and thread index, one a thread. Always ordered by tree and thread
# index.
_Pool = dict[str, np.ndarray]


class Batches(Iterator[Rows]):
    """An iterator over batches that a checkpoint can return to; its threads stop when Python
    exits.
    """

    def __init__(self, batches: grain.DatasetIterator[Rows]):
        self._batches: grain.DatasetIterator[Rows] | None = batches
        # Grain's iterator must be gone before its modules are, or it complains at exit.
        atexit.register(_close, weakref.ref(self))

    @property
    def _open(self) -> grain.DatasetIterator[Rows]:
        if self._batches is None:
            raise ValueError("the iterator over batches is closed")
        return self._batches

    def __next__(self) -> Rows:
        return next(self._open)

    def get_state(self) -> dict[str, Any]:
        """JSON-able; what follows the last batch that was handed out, whatever was read ahead."""
        return self._open.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was called: the same batches follow, bit for bit."""
        self._open.set_state(state)

    def close(self) -> None:
        """Stops the threads."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


class LocalRows(Iterator[Rows]):
    """The rows of a batch that one process holds, from the streams in which they lie.

    Args:
      open_stream: opens stream s, which gives `rows` / `streams` rows.
      rows: of the whole batch.
      held: which of them are wanted, in order.
    """

    def __init__(
        self, open_stream: Callable[[int], Batches], streams: int, rows: int, held: Sequence[int]
    ):
        self._size = rows // streams
        needed = sorted({row // self._size for row in held})
        self._streams = {stream: open_stream(stream) for stream in needed}
        offset = {stream: number * self._size for number, stream in enumerate(needed)}
        self._rows = [offset[row // self._size] + row % self._size for row in held]

    def __next__(self) -> Rows:
        parts = [_renumbered(next(batches), stream) for stream, batches in self._streams.items()]
        if len(parts) == 1 and len(self._rows) == self._size:
            return parts[0]
        return Rows(
            **{
                name: np.concatenate([vars(part)[name] for part in parts])[self._rows]
                for name in vars(parts[0])
            }
        )

    def get_state(self) -> dict[str, Any]:
        """JSON-able; by stream, those of this process."""
        return {str(stream): batches.get_state() for stream, batches in self._streams.items()}

    def set_state(self, states: dict[str, Any]) -> None:
        """Takes those of this process out of the states of all streams."""
        for stream, batches in self._streams.items():
            batches.set_state(states[str(stream)])


def _renumbered(rows: Rows, stream: int) -> Rows:
    """With numbers for its trees that no other stream of the batch has."""
    tree = np.where(rows.tree < 0, rows.tree, rows.tree + np.int32(stream * rows.tree.size))
    return dataclasses.replace(rows, tree=tree)


def _close(batches: "weakref.ref[Batches]") -> None:
    if (alive := batches()) is not None:
        alive.close()


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
    """Batches of demonstrations from one of several streams; together these see every tree once an
    epoch.

    Args:
      data_dir: what `build` wrote.
      method: whose demonstrations.
      rows: R of the stream's batches.
      length: L of a row, at least the longest stream.
      seed: of the shuffling.
      stream, streams: which of the streams.
      split: "train" or "validation".
      epochs: None goes on for ever; else the last batch is filled up with padding.

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
    numbers = (
        grain.MapDataset.range(len(source))[stream::streams].seed(seed).shuffle().repeat(epochs)
    )
    blocks = numbers.batch(_BLOCK).map(functools.partial(_read_block, source))
    packed = _Packed(blocks, rows, length)
    return Batches(
        iter(grain.experimental.ThreadPrefetchIterDataset(packed, prefetch_buffer_size=_READY))
    )


def steps_of_an_epoch(
    data_dir: Path, method: str, rows: int, length: int, seed: int, streams: int = 1
) -> float:
    """Batches that hold as many tokens as all training demonstrations of a method together.

    How many tokens there are stands in data.json; how many a batch holds, besides padding, the
    first batches tell. A function of the data and its arguments, so that every start of a run finds
    the same number.

    Args:
      rows: of the whole batch, of all streams.

    Raises:
      UserError, UsageError: as `sft_batches`.
    """
    batches = sft_batches(data_dir, method, rows // streams, length, seed, 0, streams)
    held = [int(np.count_nonzero(next(batches).segment)) for _ in range(_MEASURED)]
    batches.close()
    stored: int = json.loads((Path(data_dir) / "data.json").read_text())["methods"][method][
        "train"
    ]["stored_tokens"]
    return stored / (streams * sum(held) / len(held))


def _check(data_dir: Path, method: str, split: str, rows: int, length: int) -> None:
    if rows < 1:
        raise UsageError(f"rows={rows} must be at least 1")
    try:
        longest = json.loads((data_dir / "data.json").read_text())["methods"][method][split][
            "longest_stream"
        ]
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"data {data_dir}: data.json knows nothing of {method!r}, the build was interrupted; "
            "run `apr data build` again"
        ) from None
    if length < longest:
        raise UsageError(
            f"length={length} must be at least {longest}, the longest {split} stream of {method!r}"
        )


class _Packed(grain.IterDataset[Rows]):
    """Packs blocks of trees into batches."""

    def __init__(self, blocks: grain.MapDataset[_Pool], rows: int, length: int):
        super().__init__(blocks.to_iter_dataset(_READ))
        self._blocks = blocks
        self._shape = rows, length

    def __iter__(self) -> "_PackedIterator":
        return _PackedIterator(iter(self._parent), self._blocks, *self._shape)


class _PackedIterator(grain.DatasetIterator[Rows]):
    """See `_Packed`; the waiting threads are its only state beside the number of blocks taken."""

    def __init__(
        self,
        parent: grain.DatasetIterator[_Pool],
        blocks: grain.MapDataset[_Pool],
        rows: int,
        length: int,
    ):
        super().__init__(parent)
        self._blocks = blocks
        self._rows, self._length = rows, length
        self._taken = 0
        self._waiting = _join([])

    def __next__(self) -> Rows:
        pools = [self._waiting]
        tokens = len(self._waiting["tokens"])
        while tokens < self._rows * self._length:
            block = next(self._parent, None)
            if block is None:
                break
            pools.append(_numbered(block, self._taken))
            self._taken += 1
            tokens += len(block["tokens"])
        if not tokens:
            raise StopIteration
        pool = _join(pools)
        placement = place(
            pool["length"], self._length, self._rows, first=len(self._waiting["length"])
        )
        left_over = placement.row < 0
        self._waiting = _select(pool, left_over)
        # Trees are counted from 0 in each batch; those that only wait are not in it.
        numbers = np.unique(pool["tree"][~left_over])
        tree = np.searchsorted(numbers, pool["tree"])
        count = len(pool["tokens"])
        recorded: dict[str, np.ndarray] = {
            "logprob": np.zeros(count, np.float32),
            "allowed": np.zeros(count, np.uint8),
        }
        fields = {name: pool[name] for name in _FIELDS} | recorded
        return scatter(placement, pool["length"], tree, fields, self._rows, self._length)

    def get_state(self) -> dict[str, Any]:
        waiting = [self._waiting["tree"].tolist(), self._waiting["thread_index"].tolist()]
        return {"blocks": self._parent.get_state(), "taken": self._taken, "waiting": waiting}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["blocks"])
        self._taken = state["taken"]
        tree, thread_index = (np.array(values, np.int64) for values in state["waiting"])
        pools = []
        for number in np.unique(tree // _BLOCK).tolist():
            block = _numbered(self._blocks[number], number)
            mine = tree // _BLOCK == number
            waits = set(zip(tree[mine].tolist(), thread_index[mine].tolist(), strict=True))
            threads = zip(block["tree"].tolist(), block["thread_index"].tolist(), strict=True)
            pools.append(_select(block, np.array([thread in waits for thread in threads])))
        self._waiting = _join(pools)


def _read_block(source: dataset.TreeSource, numbers: np.ndarray) -> _Pool:
    """The threads of some trees; "tree" counts from 0."""
    # One by one: array_record's reading of many at once costs twice as much for records this small.
    examples = [source[number] for number in numbers.tolist()]
    threads = [len(example["length"]) for example in examples]
    return {
        **{
            name: np.concatenate([example[name] for example in examples])
            for name in (*_FIELDS, "length")
        },
        "tree": np.repeat(np.arange(len(examples)), threads),
        "thread_index": np.concatenate([np.arange(count) for count in threads]),
    }


def _numbered(block: _Pool, number: int) -> _Pool:
    """The trees of a block by their number since the start of training."""
    return {**block, "tree": block["tree"] + number * _BLOCK}


def _join(pools: list[_Pool]) -> _Pool:
    if not pools:
        return {
            name: np.zeros(0, np.int64) for name in (*_FIELDS, "length", "tree", "thread_index")
        }
    return {name: np.concatenate([pool[name] for pool in pools]) for name in pools[0]}


def _select(pool: _Pool, threads: np.ndarray) -> _Pool:
    """The threads where the mask holds."""
    tokens = np.repeat(threads, pool["length"])
    return {name: values[tokens if name in _FIELDS else threads] for name, values in pool.items()}
