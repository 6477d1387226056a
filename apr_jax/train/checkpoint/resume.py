"""What an interrupted run goes on from: its newest step that is not damaged.

`read_newest` tries the steps from the last one back. `set_aside` moves damaged steps out of the
way, so that they can be saved anew. docs/checkpoints.md says what each fault does.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from apr_jax.errors import UserError
from apr_jax.io.disk_errors import disk_errors, quiet
from apr_jax.io.library_errors import shows_damage, what_went_wrong
from apr_jax.io.storage import move
from apr_jax.train.checkpoint.checksum import changed, json_sum
from apr_jax.train.checkpoint.run import Run, check_same_run
from apr_jax.train.checkpoint.step_files import (
    read_json,
    read_meta,
    unreadable,
    version_error,
    without_params,
)
from apr_jax.train.distributed import all_of, barrier
from apr_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Saved:
    """What an interrupted run goes on from.

    Attributes:
      state: the state of training.
      data: JSON state of the data iterator.
      unvalidated: whether the run was stopped before a validation that was due at this step.
    """

    state: TrainState
    data: dict[str, Any]
    unvalidated: bool


@dataclasses.dataclass(frozen=True)
class _Contents:
    """All that is read of one step.

    Attributes:
      state: the state of training.
      data: JSON state of the data iterator.
      meta: everything else, see `step_files`.
    """

    state: TrainState
    data: dict[str, Any]
    meta: dict[str, Any]


class _Damaged(Exception):
    """A step is damaged; the message says in which way."""


def read_newest(
    folder: Path, steps: Sequence[int], run: Run, blank: TrainState
) -> tuple[Saved | None, list[int]]:
    """Reads the newest step that is not damaged, and reports each damaged one in a line.

    Args:
      folder: folder of the run's checkpoints.
      steps: all steps in it.
      run: the run that goes on.
      blank: a state of the wanted shapes and layout.

    Returns:
      what was read, or None if there is no step at all; and the damaged steps after it.

    Raises:
      UserError: the checkpoint is of another run, a step is whole but cannot be read here and now,
        or all steps are damaged.
    """
    damaged: list[int] = []
    for step in sorted(steps, reverse=True):
        step_folder = folder / str(step)
        try:
            contents = _read_in_all_processes(step_folder, run, blank)
        except _Damaged as damage:
            print(
                f"checkpoint {step_folder}: damaged ({damage}); going on from the step before",
                flush=True,
            )
            damaged.append(step)
            continue
        return Saved(contents.state, contents.data, contents.meta["unvalidated"]), damaged

    if damaged:
        raise UserError(
            f"checkpoint {folder}: all {len(damaged)} steps are damaged; move it away to"
            " start anew, or use another --workdir"
        )
    return None, damaged


def set_aside(folder: Path, steps: Sequence[int]) -> None:
    """Moves steps of a run to WORKDIR/damaged/<step>.<n>; all processes must call it.

    Args:
      folder: folder of the run's checkpoints.
      steps: the steps.
    """
    aside = folder.parent / "damaged"
    if jax.process_index() == 0:
        with disk_errors(aside):
            aside.mkdir(exist_ok=True)
            for step in steps:
                earlier = len(list(aside.glob(f"{step}.*")))
                move(folder / str(step), aside / f"{step}.{earlier}")
    barrier()  # The first process is done.


def _read_in_all_processes(folder: Path, run: Run, blank: TrainState) -> _Contents:
    """Reads a step and compares it with its sums; succeeds or fails in all processes alike.

    Raises:
      _Damaged: the step is damaged, for this or another process.
      UserError: the step is of another run, or cannot be read here and now.
    """
    contents, error = _read(folder, run, blank)

    # What follows is done by all processes together, so they first agree on how to go on.
    if not all_of(error is None or shows_damage(error)):
        raise unreadable(folder, error or OSError("by another process"))
    if not all_of(error is None):
        raise _Damaged(what_went_wrong(error) if error else "another process cannot read it")

    assert contents is not None
    difference = _difference(contents.state, contents.meta)
    if difference:
        raise _Damaged(difference)
    return contents


def _read(folder: Path, run: Run, blank: TrainState) -> tuple[_Contents | None, Exception | None]:
    """Reads a step in this process alone, without waiting for any other.

    Returns:
      the contents and None; or None and the error that kept them from being read.

    Raises:
      UserError: the step is of another run, or of another version of this library.
    """
    try:
        meta = read_meta(folder)
        data = read_json(folder, "data")
        if meta["data_sum"] != json_sum(data):
            raise ValueError("data is not what was saved")

        check_same_run(run, meta, folder)
        if "unvalidated" not in meta:
            raise version_error(folder)

        params = _read_arrays(folder / "params", blank.params)
        others = _read_arrays(folder / "state", without_params(blank))
        return _Contents(TrainState(params=params, **others), data, meta), None
    except UserError:
        raise
    # Orbax and TensorStore raise errors of many types for damaged files.
    except Exception as error:
        return None, error


def _read_arrays(folder: Path, blank: Any) -> Any:
    """Reads arrays of the shapes and the layout of `blank`."""
    # Not through the manager: there, processes would wait for one that has failed.
    with quiet():
        return ocp.StandardCheckpointHandler().restore(
            folder, args=ocp.args.StandardRestore(_abstract(blank))
        )


def _abstract(tree: Any) -> Any:
    """Returns the shapes, types and layout of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _difference(state: TrainState, meta: dict[str, Any]) -> str:
    """Names what of the state is not what was saved; returns "" if nothing is.

    All processes must call it, and all get the same result.
    """
    arrays = {"params": state.params, "state": without_params(state)}
    wrong = [
        item + path for item, sums in meta["sums"].items() for path in changed(arrays[item], sums)
    ]
    if wrong:
        return f"{wrong[0]} is not what was saved"
    if int(state.step) != meta["step"]:
        return f"holds step {int(state.step)}"
    return ""
