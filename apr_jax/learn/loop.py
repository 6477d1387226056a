"""The one training loop. Stages differ in the functions they pass.

The life of a step:
1. `advance(state, step)` gives the next state and its metrics, still on the device.
2. The metrics of the step before are written; too many bad steps in a row end the run, and the batch of the last of them
   is saved beside the state.
3. Every so often `validate(state)` is called, and the state saved.
4. SIGTERM and Ctrl-C let the step under way finish, save, and end the run; of several processes all end after the same
   step, whichever of them got the signal.
"""

import dataclasses
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

from apr_jax.errors import UserError
from apr_jax.learn.checkpoint import Checkpoints
from apr_jax.learn.faults import disk_errors
from apr_jax.learn.metrics import Numbers, Recorder
from apr_jax.learn.processes import Pace, Votes
from apr_jax.learn.state import TrainState

EXIT_TERMINATED = 143


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage brings to the loop.

    Attributes:
      steps: of the whole run.
      advance: one step: (state, its step as an int) -> state with step + 1, metrics. It must not wait for the state.
      save_every: steps between saves.
      bad_steps: so many skipped updates in a row end the run.
      data_state: JSON state of the data iterator.
      batch: step -> what it learned from, on the host, for the two last steps; the step as the metrics count it.
      host_seconds: that this process's host worked at the last step, without waiting for a device or another process.
      validate: state -> metrics, logged with the prefix "validation_"; None for no validation.
      sample: a tree of the last validation as text; None for none.
      validate_every: steps between validations; the state before the first step and the last one are validated too.
    """

    steps: int
    advance: Callable[[TrainState, int], tuple[TrainState, dict[str, Any]]]
    save_every: int
    bad_steps: int
    data_state: Callable[[], dict[str, Any]]
    batch: Callable[[int], dict[str, np.ndarray]]
    host_seconds: Callable[[], float]
    validate: Callable[[TrainState], Numbers] | None = None
    sample: Callable[[], str] | None = None
    validate_every: int = 1


class LastBatches:
    """The batches of the two last steps: metrics come a step late, and a bad batch must still be there then."""

    def __init__(self) -> None:
        self._kept: dict[int, dict[str, np.ndarray]] = {}

    def keep(self, step: int, batch: dict[str, np.ndarray]) -> None:
        self._kept = {number: kept for number, kept in self._kept.items() if number >= step - 1} | {step: batch}

    def of(self, step: int) -> dict[str, np.ndarray]:
        return self._kept[step]


def run_loop(
    stage: Stage, state: TrainState, checkpoints: Checkpoints, recorder: Recorder, workdir: Path, resumed: bool
) -> TrainState:
    """Takes the state to the last step, and leaves it saved.

    Raises:
      KeyboardInterrupt: on Ctrl-C, SystemExit(143): on SIGTERM; both after the state is saved.
      UserError: too many bad steps in a row (the last good parameters and the bad batch are saved), or the disk is full.
    """
    step = int(state.step)
    votes, pace = Votes(), Pace()

    def check(step: int, numbers: Numbers | None) -> None:
        if numbers and numbers.get("bad_in_a_row", 0) >= stage.bad_steps:
            recorder.flush()
            checkpoints.save(state, {}, stage.data_state())
            checkpoints.wait()
            raise UserError(_bad_steps(int(numbers["bad_in_a_row"]), step, int(state.step), stage.batch(step), workdir))

    if not resumed and stage.validate:
        with recorder.aside():
            scores = _validate(stage, state, recorder)
        recorder.record(step, scores, important=True)
        recorder.flush()
        with recorder.aside():
            checkpoints.save(state, scores, stage.data_state())
    with _stop_signals() as stop:
        while step < stage.steps:
            state, metrics = stage.advance(state, step)
            step += 1
            last = step == stage.steps
            due = stage.validate is not None and (last or step % stage.validate_every == 0)
            scores = {}
            if due:
                jax.block_until_ready(state)  # Else the update under way would count as validation.
                with recorder.aside():
                    scores = _validate(stage, state, recorder)
            check(step - 1, recorder.record(step, {**metrics, **scores}, important=due))
            if line := pace.step(stage.host_seconds(), state.step):
                recorder.tell(f"step {step}: {line}")
            # Once: a signal that comes in while saving waits for the next step.
            stopping, began = votes.cast(stop, state.step), time.perf_counter()
            if due or last or stopping or step % stage.save_every == 0:
                check(step, recorder.flush())
                with recorder.aside():
                    checkpoints.save(state, scores, stage.data_state())
            if stopping:
                checkpoints.wait()
                recorder.tell(f"stopped after step {step}; saved in {time.perf_counter() - began:.1f} s")
                raise (KeyboardInterrupt if stopping == signal.SIGINT else SystemExit(EXIT_TERMINATED))
    recorder.flush()
    checkpoints.wait()
    return state


def _validate(stage: Stage, state: TrainState, recorder: Recorder) -> Numbers:
    assert stage.validate is not None
    scores = {f"validation_{name}": value for name, value in stage.validate(state).items()}
    if stage.sample is not None:
        recorder.show_text(int(state.step), "validation_tree", stage.sample())
    return scores


def _bad_steps(count: int, step: int, saved: int, batch: dict[str, np.ndarray], workdir: Path) -> str:
    """Saves the rows of this process, and says what happened."""
    process = f".process{jax.process_index()}" if jax.process_count() > 1 else ""
    path = workdir / "bad_batch" / f"{step}{process}.npz"
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            np.savez(file, **batch)  # type: ignore[arg-type]
    return (
        f"training: {count} updates in a row had a NaN or Inf loss or gradient, the last of them in step {step}; the last good "
        f"parameters are saved as step {saved}, that step's batch is in {path}; lower optimizer.lr or optimizer.clip"
    )


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """The list that is yielded holds the signals that came in; a second one acts as if nobody had caught the first."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Only the main thread may set handlers.
        yield received
        return
    wanted = (signal.SIGINT, signal.SIGTERM)
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
