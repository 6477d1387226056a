"""The one training loop. Stages differ in the functions they pass.

The life of a step:
1. `advance(state, step)` gives the next state and its metrics, still on the device.
2. The metrics of the step before are written; too many bad steps in a row end the run.
3. Every so often `validate(state)` is called, and the state saved.
4. SIGTERM and Ctrl-C let the step under way finish, save, and end the run.
"""

import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from apr_jax.errors import UserError
from apr_jax.learn.checkpoint import Checkpoints
from apr_jax.learn.metrics import Numbers, Recorder
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
      validate: state -> metrics, logged with the prefix "validation_"; None for no validation.
      sample: a tree of the last validation as text; None for none.
      validate_every: steps between validations; the state before the first step and the last one are validated too.
    """

    steps: int
    advance: Callable[[TrainState, int], tuple[TrainState, dict[str, Any]]]
    save_every: int
    bad_steps: int
    data_state: Callable[[], dict[str, Any]]
    validate: Callable[[TrainState], Numbers] | None = None
    sample: Callable[[], str] | None = None
    validate_every: int = 1


def run_loop(
    stage: Stage, state: TrainState, checkpoints: Checkpoints, recorder: Recorder, resumed: bool
) -> TrainState:
    """Takes the state to the last step, and leaves it saved.

    Raises:
      KeyboardInterrupt: on Ctrl-C, SystemExit(143): on SIGTERM; both after the state is saved.
      UserError: too many bad steps in a row (the last good parameters are saved), or the disk is full.
    """
    step = int(state.step)
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
            with recorder.aside():
                scores = _validate(stage, state, recorder) if due else {}
            _check_bad(stage, state, checkpoints, recorder.record(step, {**metrics, **scores}, important=due))
            stopping = bool(stop)  # Read once: a signal that comes in while saving waits for the next step.
            if due or last or stopping or step % stage.save_every == 0:
                _check_bad(stage, state, checkpoints, recorder.flush())
                with recorder.aside():
                    checkpoints.save(state, scores, stage.data_state())
            if stopping:
                checkpoints.wait()
                raise (KeyboardInterrupt if stop[0] == signal.SIGINT else SystemExit(EXIT_TERMINATED))
    recorder.flush()
    checkpoints.wait()
    return state


def _validate(stage: Stage, state: TrainState, recorder: Recorder) -> Numbers:
    assert stage.validate is not None
    scores = {f"validation_{name}": value for name, value in stage.validate(state).items()}
    if stage.sample is not None:
        recorder.show_text(int(state.step), "validation_tree", stage.sample())
    return scores


def _check_bad(stage: Stage, state: TrainState, checkpoints: Checkpoints, numbers: Numbers | None) -> None:
    if numbers is None or numbers.get("bad_in_a_row", 0) < stage.bad_steps:
        return
    checkpoints.save(state, {}, stage.data_state())
    checkpoints.wait()
    raise UserError(
        f"training: {int(numbers['bad_in_a_row'])} steps in a row had a NaN or Inf loss or gradient "
        f"(step {int(state.step)}); the last good parameters are saved; lower optimizer.lr or optimizer.clip"
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
