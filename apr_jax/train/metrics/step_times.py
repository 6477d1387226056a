"""How the time of an RL step splits into rollout, host and update, measured without making a device
wait.

    step n - 1   ... update -------|
    step n          prompts, queued|-- rollout --|-- host --|---- update ---|
    step n + 1                                              prompts, queued |-- rollout ...

Nobody waits for an update: the next rollout is queued behind it, and starts when it ends. So a
thread of its own waits for the update's result and notes when it came, and the split of a step is
known only then: its metrics are `LazyMetric`, numbers that are read when the next step is under
way. Recording, validation and saves are between the steps, and in none of the parts."""

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
    """The marks of one step, to be set in the order of the methods; made when the step begins.

    Args:
      before: those of the step before; None for the first.
    """

    def __init__(self, before: "StepTimes | None"):
        self._before, self._began = before, time.perf_counter()
        self._rescored = 0.0

    def queued(self) -> None:
        """The rollout is queued on the device."""
        self._queued = time.perf_counter()

    def fetched(self) -> None:
        """The rollout's forest is on the host; the device idles from here on."""
        self._fetched = time.perf_counter()
        # The rollout waited for the update before it: that one has ended by now.
        free = self._before._ended() if self._before else self._began
        self._before = None
        self._rollout = self._fetched - max(self._queued, free)
        self._late = max(0.0, self._queued - max(self._began, free))

    @contextmanager
    def rescoring(self) -> Iterator[None]:
        """What happens inside is the device's work for the update, although the host waits for
        it.
        """
        began = time.perf_counter()
        yield
        self._rescored += time.perf_counter() - began

    def resumed(self) -> None:
        """The host is about to queue the update."""
        self._resumed = time.perf_counter()

    def updating(self, result: jax.Array) -> None:
        """The update is queued; `result` comes out of it and is donated to nobody."""

        def wait() -> None:
            # If the update failed, whoever reads its metrics hears of it.
            with suppress(Exception):
                jax.block_until_ready(result)
            self._end = time.perf_counter()

        self._waiting = threading.Thread(target=wait, name="end of an update", daemon=True)
        self._waiting.start()

    def update_seconds(self) -> float:
        """How long the device worked at the update; waits for its end."""
        return self._ended() - self._resumed + self._rescored

    def metrics(self) -> dict[str, Any]:
        """rollout_share, idle_share and update_share, which add up to 1, and step_seconds, of which
        they are shares.
        """
        late = {name: LazyMetric(functools.partial(self._share, name)) for name in _PARTS}
        return late | {"step_seconds": LazyMetric(lambda: sum(self._parts()))}

    def _share(self, name: str) -> float:
        parts = self._parts()
        return parts[_PARTS.index(name)] / sum(parts)

    def _parts(self) -> tuple[float, float, float]:
        """Seconds of rollout, host and update."""
        host = self._late + self._resumed - self._fetched - self._rescored
        return self._rollout, host, self.update_seconds()

    def _ended(self) -> float:
        self._waiting.join()
        return self._end
