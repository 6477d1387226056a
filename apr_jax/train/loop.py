"""The one training loop of both stages, which differ in the functions that they pass.

The life of a step:
1. `advance(state, step, stopping)` gives the next state and its metrics, still on the device.
2. The metrics of the step before are written. Too many skipped updates in a row end the run, and
   the batch of the last of them is saved beside the state.
3. At their intervals, `validate(state, stopping)` is called and the state is saved.
4. SIGTERM, SIGHUP (a closed terminal) and Ctrl-C save the state and end the run as soon as
   possible, because a preemption gives notice of 30 s only. A supervised step under way is
   finished. A rollout is thrown away once it has ended; the next start does it again. A validation
   ends before its next batch, with which the next start goes on. Several processes all end after
   the same step, whichever of them got the signal.
5. A run that does not move any more is ended by its watchdog.
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
from typing import Any, NoReturn

import jax
import numpy as np

from apr_jax.errors import UnknownAnswers, UserError
from apr_jax.io.disk_errors import disk_errors
from apr_jax.io.storage import write_bytes
from apr_jax.train.checkpoint import Checkpoints
from apr_jax.train.distributed import StopConsensus, StragglerDetector
from apr_jax.train.metrics.recorder import Numbers, Recorder
from apr_jax.train.state import TrainState
from apr_jax.train.validation_file import ValidationFile
from apr_jax.train.watchdog import Watchdog

_EXIT_BASE = 128  # A run that a signal has ended exits with 128 + the number of the signal.
_REMEDY = (
    "mend what the lines of the verifier say, above or in the log of the host that had these"
    " answers, or raise train.rl.reward.time_limit, and start the same command again"
)

# Returns the signal that ends the run, or 0. All processes must call it together, with nothing
# queued on the devices.
Stopping = Callable[[], int]
Advance = Callable[[TrainState, int, Stopping], tuple[TrainState, dict[str, Any] | None]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage brings to the loop.

    Attributes:
      name: "sft" or "rl"; the settings of the stage are in `train.<name>`.
      steps: steps of the whole run.
      advance: takes one step: (state, its step as an int, stopping) -> state with step + 1, and
        metrics. It must not wait for the state. If it gives the step up because the run is to stop,
        it returns the state that it got, and None.
      save_every: steps between saves.
      max_consecutive_skipped: the run ends after so many skipped updates in a row.
      data_state: returns the JSON state of the data iterator.
      batch: returns what a given one of the last two steps learned from, on the host; the steps
        are counted as in the metrics, from 1.
      host_seconds: returns for how long this process's host worked at the last step, without
        waiting for a device or another process.
      validate: (state, stopping, file) -> metrics, which are logged with the prefix "validation_",
        or None if it gave up because the run is to stop; then it goes on from the file later. None:
        the stage has no validation.
      sample: returns a tree of the last validation as text; None: there is none.
      validate_every: steps between validations; the last state is validated too.
      validates_first: whether the state before the first step is validated too.
    """

    name: str
    steps: int
    advance: Advance
    save_every: int
    max_consecutive_skipped: int
    data_state: Callable[[], dict[str, Any]]
    batch: Callable[[int], dict[str, np.ndarray]]
    host_seconds: Callable[[], float]
    validate: Callable[[TrainState, Stopping, ValidationFile], Numbers | None] | None = None
    sample: Callable[[], str] | None = None
    validate_every: int = 1
    validates_first: bool = True


class LastBatches:
    """The batches of the last two steps.

    Metrics are read one step late, and then the batch of a bad step must still be there.
    """

    def __init__(self) -> None:
        self._batches: dict[int, dict[str, np.ndarray]] = {}

    def keep(self, step: int, batch: dict[str, np.ndarray]) -> None:
        """Keeps the batch of `step` and that of the step before, and drops all older ones."""
        recent = {number: kept for number, kept in self._batches.items() if number >= step - 1}
        self._batches = recent | {step: batch}

    def of(self, step: int) -> dict[str, np.ndarray]:
        """Returns the batch of one of the last two steps."""
        return self._batches[step]


class Loop:
    """One run of the loop: the state of training, and what is still to do about it.

    Args:
      stage: what is trained.
      state: the state to begin with.
      checkpoints: where the state is saved.
      recorder: where the metrics go.
      watchdog: is told whenever the run moves.
      validation_file: where a validation keeps what it has found so far.
      workdir: folder of the run.
      resumed: whether an earlier start saved the state.
    """

    def __init__(
        self,
        stage: Stage,
        state: TrainState,
        checkpoints: Checkpoints,
        recorder: Recorder,
        watchdog: Watchdog,
        validation_file: ValidationFile,
        workdir: Path,
        resumed: bool,
    ):
        self._stage = stage
        self._checkpoints = checkpoints
        self._recorder = recorder
        self._watchdog = watchdog
        self._validation_file = validation_file
        self._workdir = workdir

        self._state = state
        self._step = int(state.step)
        self._saved = self._step if resumed else None  # The step that was saved last.
        self._due = False  # Whether this step is to be validated.
        self._scores: Numbers = {}  # The scores of that validation.
        # Set when too many answers got no verdict: the run ends, though its state is good.
        self._unknown_answers: UnknownAnswers | None = None
        self._consensus = StopConsensus()
        self._stragglers = StragglerDetector()

    def run(self, unvalidated: bool = False) -> TrainState:
        """Trains to the last step, and leaves the state saved.

        Args:
          unvalidated: whether the earlier start was stopped before a validation that was due.

        Raises:
          KeyboardInterrupt: on Ctrl-C; the state is saved.
          SystemExit: on SIGTERM (143) or SIGHUP (129); the state is saved.
          UserError: too many updates in a row were skipped (the last good parameters and the bad
            batch are saved), too many answers got no verdict (the state is saved), or the disk is
            full.
        """
        is_new_run = self._saved is None
        with _stop_signals() as signals:
            if self._stage.validate and (
                unvalidated or (is_new_run and self._stage.validates_first)
            ):
                stop = self._validate_first(signals)
                if stop:
                    self._end_by_signal(stop, time.perf_counter())

            while self._step < self._stage.steps:
                stop = self._advance(signals)
                began = time.perf_counter()
                self._save(now=bool(stop) or self._unknown_answers is not None)
                if self._unknown_answers is not None:
                    self._end_without_verdicts()
                if stop:
                    self._end_by_signal(stop, began)

        self._recorder.flush()
        self._checkpoints.wait()
        return self._state

    def _end_without_verdicts(self) -> NoReturn:
        """Raises UserError because too many answers got no verdict; the state is saved."""
        self._recorder.flush()
        self._checkpoints.wait()
        raise UserError(
            f"training: after step {self._step}, {self._unknown_answers}; that step is saved;"
            f" {_REMEDY}"
        )

    def _end_by_signal(self, stop: int, began: float) -> NoReturn:
        """Waits for the save and ends the run as the signal `stop` does.

        Args:
          stop: the signal.
          began: time at which the save began.
        """
        self._checkpoints.wait()
        seconds = time.perf_counter() - began
        self._recorder.tell(f"stopped after step {self._step}; saved in {seconds:.1f} s")
        if stop == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(_EXIT_BASE + stop)

    def _validate_first(self, signals: list[int]) -> int:
        """Validates the state with which the run begins.

        If an earlier start saved the state without its validation, the line of metrics and the
        checkpoint are completed. If the run is stopped meanwhile, they stay as they are; a state
        that was never saved is saved then.

        Args:
          signals: the signals that this process has got so far.

        Returns:
          the signal that ends the run, or 0.
        """

        def stopping() -> int:
            self._watchdog.moves()
            return self._consensus.at_once(signals)

        self._due = True
        self._scores = self._validate(stopping)
        if self._unknown_answers is not None:
            kept = (
                "nothing was trained yet" if self._saved is None else f"step {self._step} is saved"
            )
            raise UserError(
                f"training: at the first validation, {self._unknown_answers}; {kept}; {_REMEDY}"
            )

        stop = stopping()
        if self._saved is None:
            if self._scores:
                self._recorder.record(self._step, self._scores, important=True)
            self._save(now=bool(stop))
        elif self._scores:
            self._recorder.complete(self._step, self._scores)
            self._checkpoints.complete(self._step, self._scores)
        return stop

    def _advance(self, signals: list[int]) -> int:
        """Takes a step and, if that is due, validates the new state.

        Args:
          signals: the signals that this process has got so far.

        Returns:
          the signal that ends the run, or 0.
        """
        stage = self._stage

        def stopping() -> int:
            self._watchdog.moves()
            return self._consensus.at_once(signals)

        self._due = False
        self._scores = {}
        try:
            self._state, metrics = stage.advance(self._state, self._step, stopping)
        except UnknownAnswers as error:
            # It is raised before the update: the state is that of the step before.
            self._unknown_answers = error
            return 0
        if metrics is None:
            return stopping()
        self._step += 1

        # Read the host's seconds before the validation, whose verification overwrites them.
        busy = stage.host_seconds()
        # Ask once: a signal that comes in while saving waits for the next step.
        stop = self._consensus.cast(signals, self._state.step)
        self._due = stage.validate is not None and (
            self._step == stage.steps or self._step % stage.validate_every == 0
        )
        if self._due and not stop:
            # Without waiting, the update under way would count as time of the validation.
            jax.block_until_ready(self._state)
            self._scores = self._validate(stopping)
            stop = stopping()

        numbers = self._recorder.record(
            self._step, {**metrics, **self._scores}, important=self._due
        )
        self._check(self._step - 1, numbers)
        line = self._stragglers.step(busy, self._state.step)
        if line:
            self._recorder.tell(f"step {self._step}: {line}")
        self._watchdog.ends_step(self._step)
        return stop

    def _save(self, now: bool) -> None:
        """Saves the state if it is time, or if `now` is true, and it is not saved yet."""
        stage = self._stage
        is_last = self._step == stage.steps
        is_time = now or self._due or is_last or self._step % stage.save_every == 0
        if not is_time or self._saved == self._step:
            return
        self._check(self._step, self._recorder.flush())
        with self._recorder.aside(), self._watchdog.aside():
            self._write()
        self._saved = self._step

    def _write(self) -> None:
        """Starts writing a checkpoint of the state as it is."""
        unvalidated = self._due and not self._scores
        self._checkpoints.save(self._state, self._scores, self._stage.data_state(), unvalidated)

    def _validate(self, stopping: Stopping) -> Numbers:
        """Returns the scores of the state; none if the run is to stop."""
        assert self._stage.validate is not None
        with self._recorder.aside(), self._watchdog.aside():
            try:
                scores = self._stage.validate(self._state, stopping, self._validation_file)
            except UnknownAnswers as error:
                self._unknown_answers = error
                return {}
            if scores is None:
                return {}
            if self._stage.sample is not None:
                self._recorder.show_text(self._step, "validation_tree", self._stage.sample())
        return {f"validation_{name}": value for name, value in scores.items()}

    def _check(self, step: int, numbers: Numbers | None) -> None:
        """Ends the run if too many updates in a row were skipped.

        Args:
          step: a step whose metrics were fetched.
          numbers: its metrics; None if there are none yet.

        Raises:
          UserError: so many updates were skipped. State and batch are saved.
        """
        if not numbers or numbers.get("bad_in_a_row", 0) < self._stage.max_consecutive_skipped:
            return

        self._recorder.flush()
        self._write()
        self._checkpoints.wait()
        path = _save_batch(step, self._stage.batch(step), self._workdir)
        count = int(numbers["bad_in_a_row"])
        optimizer = f"train.{self._stage.name}.optimizer"
        raise UserError(
            f"training: {count} updates in a row had a NaN or Inf loss or gradient, the last of"
            f" them in step {step}; the last good parameters are saved as step {self._step},"
            f" that step's batch is in {path}; lower {optimizer}.lr or {optimizer}.clip"
        )


def _save_batch(step: int, batch: dict[str, np.ndarray], workdir: Path) -> Path:
    """Saves the rows of a batch that this process holds; returns the file."""
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
    """Catches the signals that stop a run; yields a list of those that came in.

    After the first signal the handlers from before are back, so that a second one acts at once.
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
