"""What the processes of one run tell each other. With one process every function here costs
nothing.

Every process runs the same program: it holds the rows of its own devices, and whatever decides
where the program goes (a signal, a reward, a checkpoint that cannot be read) is agreed on first, or
they would wait for each other for ever."""

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

_PACE_STEPS = 20
# Of a step, and of the others' time; below, nobody is called slow.
_SLOW_SECONDS, _SLOW_FACTOR = (
    0.05,
    2.0,
)

# In messages of Gloo and of the coordination service.
_SIGNS = (
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
    """Turns what collectives and barriers say when another process is gone into one line."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:  # Each transport has a type of its own.
        if jax.process_count() > 1 and any(sign in str(error) for sign in _SIGNS):
            raise LostProcess(
                f"process {jax.process_index()}: another process of this run is gone; what was"
                f" saved in {workdir} is kept; start all processes again, and they go on from there"
            ) from error
        raise


def held_rows(rows: int, mesh: Mesh) -> list[int]:
    """Which rows of a batch over `mesh` the devices of this process hold, in order."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((rows,))
    return sorted({row for (part,) in indices.values() for row in range(*part.indices(rows))})


def place(array: Any, sharding: NamedSharding) -> jax.Array:
    """Lays an array that every process has whole out on the mesh."""
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def fetch(tree: Any) -> Any:
    """A tree of arrays on the mesh, whole, in the memory of every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def of_first(values: np.ndarray) -> np.ndarray:
    """What the first process has."""
    if jax.process_count() == 1:
        return values
    return np.asarray(multihost_utils.broadcast_one_to_all(values))


def all_of(holds: bool) -> bool:
    """Whether it holds in all processes."""
    if jax.process_count() == 1:
        return holds
    return bool(np.all(multihost_utils.process_allgather(np.int32(holds))))


def merge(mine: dict[str, Any]) -> dict[str, Any]:
    """The JSON dicts of all processes as one: a checkpoint is written by one process for all."""
    if jax.process_count() == 1:
        return mine
    text = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    merged: dict[str, Any] = {}
    for row, size in zip(rows, sizes, strict=True):
        merged |= json.loads(bytes(row[:size]))
    return dict(sorted(merged.items()))


class StragglerDetector:
    """Names the process whose host holds the others up.

    A step takes all processes as long as the slowest one. What tells them apart is the time that a
    host works at a step alone, waiting for nobody: reading data, verifying answers. It is gathered
    behind every `_PACE_STEPS`-th step and read a step later, so nobody waits for it."""

    def __init__(self) -> None:
        self._alone = jax.process_count() == 1
        if self._alone:
            return
        self._names = merge({f"{jax.process_index():06}": socket.gethostname()})
        self._mesh = Mesh(np.asarray(jax.devices()), ("all",))
        self._split, whole = (
            NamedSharding(self._mesh, PartitionSpec(*axis)) for axis in (("all",), ())
        )
        self._gather = jax.jit(lambda busy, step: busy + 0 * step, out_shardings=whole)
        self._owners = np.array([device.process_index for device in jax.devices()])
        self._pending: jax.Array | None = None
        self._steps, self._busy, self._told = 0, 0.0, -1

    def step(self, seconds: float, step: jax.Array) -> str:
        """To be called once a step; the line to show, or "".

        Args:
          seconds: that this host worked at the step alone.
          step: on the device; what is gathered waits for it.
        """
        if self._alone:
            return ""
        before, self._pending = self._pending, None
        self._steps += 1
        self._busy += seconds
        if self._steps % _PACE_STEPS == 0:
            mine = np.full(jax.local_device_count(), self._busy / _PACE_STEPS, np.float32)
            self._pending = self._gather(
                jax.make_array_from_process_local_data(self._split, mine), step
            )
            self._busy = 0.0
        return "" if before is None else self._line(np.asarray(before))

    def _line(self, busy: np.ndarray) -> str:
        each = np.array(
            [busy[self._owners == process].mean() for process in range(jax.process_count())]
        )
        slow = int(each.argmax())
        others = float(np.median(np.delete(each, slow)))
        if each[slow] < _SLOW_SECONDS or each[slow] < _SLOW_FACTOR * others:
            self._told = -1
            return ""
        if slow == self._told:  # Once, until it has been as fast as the others again.
            return ""
        self._told = slow
        return (
            f"process {slow} ({self._names[f'{slow:06}']}) holds the others up: its host works at a"
            f" step for {each[slow]:.2f} s, the others' for {others:.2f} s"
        )


class StopConsensus:
    """Lets a signal that reached one process stop all of them after the same step.

    The processes vote at every step, on the device behind the step, and the vote is counted a step
    later: nobody waits. Where steps are long they also vote within one, where all wait for each
    other anyway, and read the result at once."""

    def __init__(self) -> None:
        self._pending: jax.Array | None = None
        self._mesh = Mesh(np.asarray(jax.devices()), ("all",))
        self._split, whole = (
            NamedSharding(self._mesh, PartitionSpec(*axis)) for axis in (("all",), ())
        )
        # The step makes it wait for its turn: collectives of a CPU must not overtake each other.
        self._count = jax.jit(lambda votes, step: jnp.max(votes) + 0 * step, out_shardings=whole)

    def cast(self, signals: list[int], step: jax.Array) -> int:
        """Casts this process's vote, its first signal or 0, and returns the result that is known
        now: a signal or 0.
        """
        mine = signals[0] if signals else 0
        if jax.process_count() == 1:
            return mine
        before, votes = self._pending, np.full(jax.local_device_count(), mine, np.int32)
        self._pending = self._count(
            jax.make_array_from_process_local_data(self._split, votes), step
        )
        return 0 if before is None else int(before)

    def at_once(self, signals: list[int]) -> int:
        """Votes and waits for the result, a signal or 0; nothing else may be queued on the
        devices.
        """
        mine = signals[0] if signals else 0
        if jax.process_count() == 1:
            return mine
        # Two collectives of a CPU must not overtake each other.
        jax.block_until_ready(self._pending)
        return int(np.max(multihost_utils.process_allgather(np.int32(mine))))
