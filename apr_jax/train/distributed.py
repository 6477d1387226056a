"""What the processes of one run tell each other. With one process, the functions here cost nothing.

Every process runs the same program on the rows of its own devices. Before anything that decides how
the program goes on (a signal, a reward, a checkpoint that cannot be read), the processes agree on
it. Otherwise they would take different ways, and wait for each other forever.
"""

import dataclasses
import functools
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from apr_jax.errors import LostProcess, UserError
from apr_jax.model.sharding import batch_sharding

_STRAGGLER_STEPS = 20  # Steps over which the times of the hosts are averaged.
# A host is called slow if it works so many seconds at a step, and so many times as long as others.
_SLOW_SECONDS = 0.05
_SLOW_FACTOR = 2.0

_BLOCK = 256  # Bytes; texts are exchanged in whole blocks, so that few sizes are compiled for.

# Words in the messages of Gloo and the coordination service when another process is gone.
_LOST_PROCESS_MESSAGES = (
    "Gloo",
    "heartbeat",
    "Connection reset",
    "Connection closed",
    "coordination",
    "Barrier",
    "Socket closed",
)


@contextmanager
def lost_processes(workdir: Path) -> Iterator[None]:
    """Turns the errors of collectives and barriers, when another process is gone, into one line.

    Raises:
      LostProcess: another process of the run is gone.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:  # Each transport has error types of its own.
        message = str(error)
        if jax.process_count() > 1 and any(words in message for words in _LOST_PROCESS_MESSAGES):
            raise LostProcess(
                f"process {jax.process_index()}: another process of this run is gone; what was"
                f" saved in {workdir} is kept; start all processes again, and they go on from there"
            ) from error
        raise


@dataclasses.dataclass(frozen=True)
class HeldRows:
    """Which rows of a batch that is split over a mesh each process holds.

    Devices that share a row (mesh axis `tensor`) may belong to several processes. Then all of these
    hold the row, and one of them is its owner.

    Attributes:
      count: number of rows.
      by_process: the rows of each process, int [n] in order.
    """

    count: int
    by_process: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, batch: int, mesh: Mesh, count: int | None = None) -> "HeldRows":
        """Returns those of the first `count` rows of a batch of `batch` rows; by default of all."""
        count = batch if count is None else count
        if jax.process_count() == 1:
            return cls.alone(count)
        held: list[set[int]] = [set() for _ in range(jax.process_count())]
        for device, (part,) in batch_sharding(mesh).devices_indices_map((batch,)).items():
            held[device.process_index].update(range(*part.indices(count)))
        return cls(count, tuple(np.array(sorted(rows), np.int64) for rows in held))

    @classmethod
    def alone(cls, count: int) -> "HeldRows":
        """Returns those of a batch of `count` rows of which this one process holds all."""
        return cls(count, (np.arange(count),))

    @property
    def mine(self) -> np.ndarray:
        """Returns the rows of this process, int [n] in order."""
        return self.by_process[jax.process_index()]

    @functools.cached_property
    def owner(self) -> np.ndarray:
        """Returns the process that owns each row, int [count].

        Those that hold a row in common own such rows by turns, so that all have equally much to do.
        """
        rows = np.arange(self.count)
        holds = np.array([np.isin(rows, held) for held in self.by_process])  # [processes, count]
        turn = rows % holds.sum(axis=0)  # [count], 0 for the first process that holds the row.
        return np.argmax(np.cumsum(holds, axis=0) == turn + 1, axis=0)

    @property
    def is_owner(self) -> np.ndarray:
        """Returns which of its rows this process owns, bool [n]."""
        return self.owner[self.mine] == jax.process_index()

    @functools.cached_property
    def shares(self) -> dict[tuple[int, ...], np.ndarray]:
        """Returns the rows of this process by the processes that hold them, as places in `mine`.

        As a rule no other process holds them, and there is one share, of all places. If process 0
        holds rows 0 to 3 and process 1 rows 2 to 5, process 0 has the shares `{(0,): [0, 1],
        (0, 1): [2, 3]}`. The shares of two batches over one mesh have the same keys, except those
        without a row.
        """
        holds = np.array([np.isin(self.mine, rows) for rows in self.by_process])  # [processes, n]
        places: dict[tuple[int, ...], list[int]] = {}
        for place, is_holder in enumerate(holds.T):
            places.setdefault(tuple(np.flatnonzero(is_holder).tolist()), []).append(place)
        return {processes: np.array(each) for processes, each in places.items()}

    def gather(self, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Puts together, in all processes, what each process knows of its rows.

        Every process sends 4 bytes for each number. Of a row that several processes hold, the
        owner's values count.

        Args:
          values: int32 or float32 [n] each, those of the rows in `mine`.

        Returns:
          the same names, [count] each.
        """
        if jax.process_count() == 1:
            return values
        most = max(map(len, self.by_process))
        padded = {name: np.pad(each, (0, most - len(each))) for name, each in values.items()}
        gathered = multihost_utils.process_allgather(padded)  # [processes, most] each

        whole = {name: np.zeros(self.count, each.dtype) for name, each in values.items()}
        for process, rows in enumerate(self.by_process):
            is_owned = self.owner[rows] == process
            for name, each in gathered.items():
                whole[name][rows[is_owned]] = each[process, : len(rows)][is_owned]
        return whole


def place_on_mesh(array: Any, sharding: NamedSharding) -> jax.Array:
    """Lays out on the mesh an array that every process holds whole.

    Nothing travels between processes. (`jax.device_put` would first compare the arrays of all
    processes, and hold them all on every device.)
    """
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def fetch_held(tree: Any) -> Any:
    """Copies arrays that are split over their first axis into memory: the rows of this process.

    They are the rows in `HeldRows.mine`. Nothing travels between processes.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def parts(array: jax.Array) -> list[jax.Array]:
        """Returns the parts on this process's devices, each once, in order."""
        by_start = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
        return [by_start[start] for start in sorted(by_start)]

    leaves, structure = jax.tree.flatten(tree)
    fetched = jax.device_get([parts(leaf) for leaf in leaves])
    return structure.unflatten([np.concatenate(each) for each in fetched])


def of_first(values: np.ndarray) -> np.ndarray:
    """Returns the values of the first process, in all processes."""
    if jax.process_count() == 1:
        return values
    return np.asarray(multihost_utils.broadcast_one_to_all(values))


def all_of(holds: bool) -> bool:
    """Returns whether `holds` is true in all processes; waits for all of them."""
    if jax.process_count() == 1:
        return holds
    return bool(np.all(multihost_utils.process_allgather(np.int32(holds))))


def barrier() -> None:
    """Waits until all processes have come here."""
    all_of(True)


def exchange(mine: Any) -> list[Any]:
    """Gives every process the JSON values of all processes, in the order of these."""
    if jax.process_count() == 1:
        return [mine]
    text = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    blocks = -(-int(sizes.max()) // _BLOCK)
    padded = np.zeros(blocks * _BLOCK, np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)  # [processes, bytes]
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def merge(mine: dict[str, Any]) -> dict[str, Any]:
    """Merges the JSON dicts of all processes, because one process writes a checkpoint for all."""
    if jax.process_count() == 1:
        return mine
    merged: dict[str, Any] = {}
    for each in exchange(mine):
        merged |= each
    return dict(sorted(merged.items()))


class StragglerDetector:
    """Names the process whose host holds up the others.

    A step takes equally long in all processes: as long as in the slowest one. What differs is the
    time for which a host works at the step alone, waiting for nobody: reading data, verifying
    answers. These times are gathered behind every `_STRAGGLER_STEPS`-th step and read one step
    later, so nobody waits for them.
    """

    def __init__(self) -> None:
        self._alone = jax.process_count() == 1
        if self._alone:
            return
        self._names = merge({f"{jax.process_index():06}": socket.gethostname()})
        self._mesh = Mesh(np.asarray(jax.devices()), ("all",))
        self._split = NamedSharding(self._mesh, PartitionSpec("all"))
        whole = NamedSharding(self._mesh, PartitionSpec())
        # Adding 0 x step makes the collective wait for its turn behind the step.
        self._gather = jax.jit(lambda busy, step: busy + 0 * step, out_shardings=whole)
        self._owners = np.array([device.process_index for device in jax.devices()])
        self._pending: jax.Array | None = None
        self._steps = 0
        self._busy = 0.0  # Seconds since the last gathering.
        self._reported = -1  # The process that was called slow last, or -1.

    def step(self, seconds: float, step: jax.Array) -> str:
        """Notes a step; returns a line to show, or "". It is to be called once in each step.

        Args:
          seconds: for which this host worked at the step alone.
          step: number of the step, on the device; the gathering waits for it.
        """
        if self._alone:
            return ""
        gathered = self._pending
        self._pending = None

        self._steps += 1
        self._busy += seconds
        if self._steps % _STRAGGLER_STEPS == 0:
            mine = np.full(jax.local_device_count(), self._busy / _STRAGGLER_STEPS, np.float32)
            self._pending = self._gather(
                jax.make_array_from_process_local_data(self._split, mine), step
            )
            self._busy = 0.0
        return "" if gathered is None else self._line(np.asarray(gathered))

    def _line(self, busy: np.ndarray) -> str:
        """Returns the line about a slow host, or "" if no host is slow, or it was reported before.

        Args:
          busy: [devices], mean seconds of the host of each device.
        """
        each = np.array(
            [busy[self._owners == process].mean() for process in range(jax.process_count())]
        )
        slow = int(each.argmax())
        others = float(np.median(np.delete(each, slow)))
        if each[slow] < _SLOW_SECONDS or each[slow] < _SLOW_FACTOR * others:
            self._reported = -1
            return ""
        if slow == self._reported:  # It was reported, and every check since then found it slow.
            return ""
        self._reported = slow
        return (
            f"process {slow} ({self._names[f'{slow:06}']}) holds the others up: its host works at a"
            f" step for {each[slow]:.2f} s, the others' for {others:.2f} s"
        )


class StopConsensus:
    """Lets a signal that reached one process stop all processes after the same step.

    The processes vote at every step, on the device behind the step, and read the result one step
    later, so nobody waits. Where steps are long they also vote within a step, at a point at which
    all wait for each other anyway, and read the result at once.
    """

    def __init__(self) -> None:
        self._pending: jax.Array | None = None
        self._mesh = Mesh(np.asarray(jax.devices()), ("all",))
        self._split = NamedSharding(self._mesh, PartitionSpec("all"))
        whole = NamedSharding(self._mesh, PartitionSpec())
        # Adding 0 x step makes the vote wait for its turn behind the step: collectives of a CPU
        # must not overtake each other.
        self._count = jax.jit(lambda votes, step: jnp.max(votes) + 0 * step, out_shardings=whole)

    def cast(self, signals: list[int], step: jax.Array) -> int:
        """Casts this process's vote: its first signal, or 0.

        Returns:
          the result of the vote at the step before: a signal, or 0 to go on.
        """
        mine = signals[0] if signals else 0
        if jax.process_count() == 1:
            return mine
        before = self._pending
        votes = np.full(jax.local_device_count(), mine, np.int32)
        self._pending = self._count(
            jax.make_array_from_process_local_data(self._split, votes), step
        )
        return 0 if before is None else int(before)

    def at_once(self, signals: list[int]) -> int:
        """Votes and waits for the result: a signal, or 0 to go on.

        Nothing else may be queued on the devices.
        """
        mine = signals[0] if signals else 0
        if jax.process_count() == 1:
            return mine
        # Two collectives of a CPU must not overtake each other.
        jax.block_until_ready(self._pending)
        return int(np.max(multihost_utils.process_allgather(np.int32(mine))))
