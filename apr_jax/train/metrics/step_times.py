"""How the time of an RL step splits into rollout, host and update; no device waits for the measure.

    step n - 1   ... update -------|
    step n          prompts, queued|-- rollout --|-- host --|---- update ---|
    step n + 1                                              prompts, queued |-- rollout ...

Nobody waits for an update: the next rollout is queued behind it, and starts when the update ends.
So a separate thread waits for the result of the update and notes when it came. The split of a step
is known only then, so its metrics are of type `LazyMetric`, numbers that are computed when they are
read, which is while the next step is under way. Recording, validation and saves happen between the
steps and are in none of the parts.
"""

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax

_PARTS = ("rollout_share", "idle_share", "update_share")


class LazyMetric:
    """A number that is computed when it is read."""

    def __init__(self, compute: Callable[[], float]):
        self._compute = compute

    def __float__(self) -> float:
        return self._compute()


class StepTimes:
    """The times of one step, noted by calling the methods in their order.

    Args:
      before: times of the step before; None in the first step.
    """

    def __init__(self, before: "StepTimes | None"):
        self._before = before
        self._began = time.perf_counter()
        self._rescored = 0.0

    def queued(self) -> None:
        """Notes that the rollout is queued on the device."""
        self._queued = time.perf_counter()

    def fetched(self) -> None:
        """Notes that the forest of the rollout is on the host. From here on the device idles."""
        self._fetched = time.perf_counter()
        # The rollout waited for the update before it, so that update has ended by now.
        free = self._before._wait_for_end() if self._before else self._began
        self._before = None
        self._rollout = self._fetched - max(self._queued, free)
        # Seconds of this step for which the device idled before the rollout was queued.
        self._idle_before_rollout = max(0.0, self._queued - max(self._began, free))

    @contextmanager
    def rescoring(self) -> Iterator[None]:
        """Notes work of the device for the update, for which the host waits inside this context."""
        began = time.perf_counter()
        yield
        self._rescored += time.perf_counter() - began

    def resumed(self) -> None:
        """Notes that the host is about to queue the update."""
        self._resumed = time.perf_counter()

    def updating(self, result: jax.Array) -> None:
        """Notes that the update is queued.

        Args:
          result: an output of the update that is not donated.
        """

        def wait() -> None:
            # If the update failed, reading its metrics raises the error.
            with suppress(Exception):
                jax.block_until_ready(result)
            self._end = time.perf_counter()

        self._waiting = threading.Thread(target=wait, name="end of an update", daemon=True)
        self._waiting.start()

    def update_seconds(self) -> float:
        """Returns how long the device worked at the update; waits for its end."""
        return self._wait_for_end() - self._resumed + self._rescored

    def metrics(self) -> dict[str, Any]:
        """Returns step_seconds, and its parts rollout_share, idle_share and update_share.

        The parts add up to 1.
        """
        shares = {name: LazyMetric(functools.partial(self._share, name)) for name in _PARTS}
        return shares | {"step_seconds": LazyMetric(lambda: sum(self._parts()))}

    def _share(self, name: str) -> float:
        """Returns one part of the step as a share of all of it."""
        parts = self._parts()
        return parts[_PARTS.index(name)] / sum(parts)

    def _parts(self) -> tuple[float, float, float]:
        """Returns the seconds of rollout, host and update."""
        idle_after_rollout = self._resumed - self._fetched - self._rescored
        host = self._idle_before_rollout + idle_after_rollout
        return self._rollout, host, self.update_seconds()

    def _wait_for_end(self) -> float:
        """Waits for the end of the update and returns its time."""
        self._waiting.join()
        return self._end
