"""The one training loop. Stages differ in the functions they pass.

The life of a step:
1. `advance(state, step)` gives the next state and its metrics, still on the device.
2. The metrics of the step before are written; too many bad steps in a row end the run, and the
   batch of the last of them is saved beside the state.
3. Every so often `validate(state)` is called, and the state saved.
4. SIGTERM, SIGHUP (a closed terminal) and Ctrl-C save and end the run, as soon as may be: the
   notice of a preemption is 30 s. A supervised step under way ends first; a rollout is thrown away
   when it ends, and a validation before its next batch: the next start does them again. Of several
   processes all end after the same step, whichever of them got the signal.
"""

import dataclasses
import io
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np

from apr_jax.errors import UnknownAnswers, UserError
from apr_jax.io.disk_errors import disk_errors
from apr_jax.io.storage import write_bytes
from apr_jax.train.checkpoint.manager import Checkpoints
from apr_jax.train.distributed import StopConsensus, StragglerDetector
from apr_jax.train.metrics.recorder import Numbers, Recorder
from apr_jax.train.state import TrainState

_EXIT_BASE = 128  # A run that a signal has ended exits with 128 + its number.
_REMEDY = (
    "mend what the lines of the verifier above say, or raise train.rl.reward.time_limit, and start"
    " the same command again"
)
# The signal that ends the run, or 0; all processes must ask, with nothing queued on the device.
Stopping = Callable[[], int]
Advance = Callable[[TrainState, int, Stopping], tuple[TrainState, dict[str, Any] | None]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage brings to the loop.

    Attributes:
      name: "sft" or "rl"; its settings are in `train.<name>`.
      steps: of the whole run.
      advance: one step: (state, its step as an int, stopping) -> state with step + 1, metrics. It
        must not wait for the state. If it gives the step up because the run is to stop, it returns
        the state it got, and None.
      save_every: steps between saves.
      max_consecutive_skipped: so many skipped updates in a row end the run.
      data_state: JSON state of the data iterator.
      batch: step -> what it learned from, on the host, for the two last steps; the step as the
        metrics count it.
      host_seconds: that this process's host worked at the last step, without waiting for a device
        or another process.
      validate: (state, stopping) -> metrics, logged with the prefix "validation_", or None if it
        gave up because the run is to stop; None for no validation.
      sample: a tree of the last validation as text; None for none.
      validate_every: steps between validations; the last state is validated too.
      validates_first: so is the state before the first step.
    """

    name: str
    steps: int
    advance: Advance
    save_every: int
    max_consecutive_skipped: int
    data_state: Callable[[], dict[str, Any]]
    batch: Callable[[int], dict[str, np.ndarray]]
    host_seconds: Callable[[], float]
    validate: Callable[[TrainState, Stopping], Numbers | None] | None = None
    sample: Callable[[], str] | None = None
    validate_every: int = 1
    validates_first: bool = True


class LastBatches:
    """The batches of the two last steps: metrics come a step late, and a bad batch must still be
    there then.
    """

    def __init__(self) -> None:
        self._kept: dict[int, dict[str, np.ndarray]] = {}

    def keep(self, step: int, batch: dict[str, np.ndarray]) -> None:
        self._kept = {number: kept for number, kept in self._kept.items() if number >= step - 1} | {
            step: batch
        }

    def of(self, step: int) -> dict[str, np.ndarray]:
        return self._kept[step]


class Loop:
    """The state on its way, and which step of it is saved.

    Args:
      state: to begin with.
      resumed: it was saved by an earlier start.
    """

    def __init__(
        self,
        stage: Stage,
        state: TrainState,
        checkpoints: Checkpoints,
        recorder: Recorder,
        workdir: Path,
        resumed: bool,
    ):
        self._stage, self._checkpoints, self._recorder, self._workdir = (
            stage,
            checkpoints,
            recorder,
            workdir,
        )
        self._state, self._step = state, int(state.step)
        self._saved = self._step if resumed else None
        self._due = False  # Whether the step is to be validated.
        self._scores: Numbers = {}  # What came of it.
        self._ended: UnknownAnswers | None = (
            None  # Why the run cannot go on, though its state is good.
        )
        self._consensus, self._stragglers = StopConsensus(), StragglerDetector()

    def run(self, unvalidated: bool = False) -> TrainState:
        """Takes the state to the last step, and leaves it saved.

        Args:
          unvalidated: the earlier start was stopped before the validation that was due.

        Raises:
          KeyboardInterrupt: on Ctrl-C, SystemExit: on SIGTERM (143) or SIGHUP (129); all after the
            state is saved.
          UserError: too many bad steps in a row (the last good parameters and the bad batch are
            saved), too many answers without a verdict (the state is saved), or the disk is full.
        """
        if self._stage.validate and (
            unvalidated or (self._saved is None and self._stage.validates_first)
        ):
            self._validate_first()
        with _stop_signals() as stop:
            while self._step < self._stage.steps:
                stopping, began = self._advance(stop), time.perf_counter()
                self._save(stopping or self._ended is not None)
                if self._ended is not None:
                    self._recorder.flush()
                    self._checkpoints.wait()
                    raise UserError(
                        f"training: after step {self._step}, {self._ended}; that step is saved;"
                        f" {_REMEDY}"
                    )
                if stopping:
                    self._checkpoints.wait()
                    self._recorder.tell(
                        f"stopped after step {self._step}; saved in"
                        f" {time.perf_counter() - began:.1f} s"
                    )
                    raise (
                        KeyboardInterrupt
                        if stopping == signal.SIGINT
                        else SystemExit(_EXIT_BASE + stopping)
                    )
        self._recorder.flush()
        self._checkpoints.wait()
        return self._state

    def _validate_first(self) -> None:
        """Validates the state that the run begins with; where it was saved without, line and
        checkpoint are completed.
        """
        self._due, self._scores = True, self._validate(lambda: 0)
        if self._ended is not None:
            kept = (
                "nothing was trained yet" if self._saved is None else f"step {self._step} is saved"
            )
            raise UserError(f"training: at the first validation, {self._ended}; {kept}; {_REMEDY}")
        if self._saved is None:
            self._recorder.record(self._step, self._scores, important=True)
            self._save(stopping=0)
        else:
            self._recorder.complete(self._step, self._scores)
            self._checkpoints.complete(self._step, self._scores)

    def _advance(self, signals: list[int]) -> int:
        """Takes a step, and validates it if that is due; returns the signal that ends the run, or
        0.
        """
        stage = self._stage

        def stopping() -> int:
            return self._consensus.at_once(signals)

        self._due, self._scores = False, {}
        try:
            self._state, metrics = stage.advance(self._state, self._step, stopping)
        except UnknownAnswers as error:  # Before the update: the state is that of the step before.
            self._ended = error
            return 0
        if metrics is None:
            return stopping()
        self._step += 1
        busy = stage.host_seconds()  # Before a validation, which verifies answers too.
        # Once: a signal that comes in while saving waits for the next step.
        stop = self._consensus.cast(signals, self._state.step)
        self._due = stage.validate is not None and (
            self._step == stage.steps or self._step % stage.validate_every == 0
        )
        if self._due and not stop:
            # Else the update under way would count as validation.
            jax.block_until_ready(self._state)
            self._scores = self._validate(stopping)
            stop = stopping()
        numbers = self._recorder.record(
            self._step, {**metrics, **self._scores}, important=self._due
        )
        self._check(self._step - 1, numbers)
        if line := self._stragglers.step(busy, self._state.step):
            self._recorder.tell(f"step {self._step}: {line}")
        return stop

    def _save(self, stopping: int | bool) -> None:
        """Saves the state if it is time, and is not saved yet."""
        now = (
            stopping
            or self._due
            or self._step == self._stage.steps
            or self._step % self._stage.save_every == 0
        )
        if not now or self._saved == self._step:
            return
        self._check(self._step, self._recorder.flush())
        with self._recorder.aside():
            self._write()
        self._saved = self._step

    def _write(self) -> None:
        unvalidated = self._due and not self._scores
        self._checkpoints.save(self._state, self._scores, self._stage.data_state(), unvalidated)

    def _validate(self, stopping: Stopping) -> Numbers:
        """The scores; none if the run is to stop."""
        assert self._stage.validate is not None
        with self._recorder.aside():
            try:
                scores = self._stage.validate(self._state, stopping)
            except UnknownAnswers as error:
                self._ended = error
                return {}
            if scores is None:
                return {}
            if self._stage.sample is not None:
                self._recorder.show_text(self._step, "validation_tree", self._stage.sample())
        return {f"validation_{name}": value for name, value in scores.items()}

    def _check(self, step: int, numbers: Numbers | None) -> None:
        """Ends the run if, by the numbers of `step`, too many updates in a row were bad."""
        if numbers and numbers.get("bad_in_a_row", 0) >= self._stage.max_consecutive_skipped:
            self._recorder.flush()
            self._write()
            self._checkpoints.wait()
            batch = self._stage.batch(step)
            count, optimizer = int(numbers["bad_in_a_row"]), f"train.{self._stage.name}.optimizer"
            path = _save_batch(step, batch, self._workdir)
            raise UserError(
                f"training: {count} updates in a row had a NaN or Inf loss or gradient, the last of"
                f" them in step {step}; the last good parameters are saved as step {self._step},"
                f" that step's batch is in {path}; lower {optimizer}.lr or {optimizer}.clip"
            )


def _save_batch(step: int, batch: dict[str, np.ndarray], workdir: Path) -> Path:
    """Saves the rows of this process; returns the file."""
    process = f".process{jax.process_index()}" if jax.process_count() > 1 else ""
    path = workdir / "bad_batch" / f"{step}{process}.npz"
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
        packed = io.BytesIO()
        np.savez(packed, **batch)  # type: ignore[arg-type]
        write_bytes(path, packed.getvalue())
    return path


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """The list that is yielded holds the signals that came in; a second one acts as if nobody had
    caught the first.
    """
    received: list[int] = []
    # Only the main thread may set handlers.
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    wanted = [signal.SIGINT, signal.SIGTERM]
    outlives_terminal = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # As under nohup.
    if not outlives_terminal:
        wanted.append(signal.SIGHUP)
    old = {number: signal.getsignal(number) for number in wanted}

    def restore() -> None:
        for number, handler in old.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        restore()

    for number in wanted:
        signal.signal(number, note)
    try:
        yield received
    finally:
        restore()
