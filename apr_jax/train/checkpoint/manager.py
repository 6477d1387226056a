"""Saves what a run needs to go on bit for bit, and what evaluation needs of it.

Orbax writes in the background and renames the folder of a step when it is whole, so a killed run
leaves no half step. `step_files` lists what a step holds, `retention` which steps are kept, and
`resume` reads them back.
"""

import json
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from apr_jax.errors import DiskError, LostProcess, UserError
from apr_jax.io.disk_errors import Muffled, check_writable, disk_errors, quiet
from apr_jax.io.lease import Lease
from apr_jax.io.storage import absolute, is_remote, write_text
from apr_jax.train.checkpoint.checksum import array_sums, json_sum
from apr_jax.train.checkpoint.resume import Saved, read_newest, set_aside
from apr_jax.train.checkpoint.retention import LastAndBest
from apr_jax.train.checkpoint.run import Run
from apr_jax.train.checkpoint.step_files import FOLDER, json_file, read_meta, without_params
from apr_jax.train.distributed import all_of, barrier
from apr_jax.train.state import TrainState


class Checkpoints:
    """The checkpoints of one workdir. As a context manager it waits for the last save.

    Args:
      workdir: folder of the run.
      run: is written into each checkpoint, and compared when one is restored.
      lease: lease of the workdir, which is checked before each save.
    """

    def __init__(self, workdir: Path, run: Run, lease: Lease | None = None):
        self._run = run
        self._lease = lease
        self._folder = absolute(workdir) / FOLDER
        with disk_errors(self._folder), quiet():
            self._folder.mkdir(parents=True, exist_ok=True)
            if not is_remote(self._folder):
                check_writable(self._folder)
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=LastAndBest(self._folder),
                    # They were left by killed runs: no other run writes here during our lease.
                    cleanup_tmp_directories=True,
                    save_root_metadata=False,
                ),
            )
        self._muffled = Muffled()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        del rest
        if kind is not None and issubclass(kind, LostProcess | DiskError):
            # Closing would wait for a save that never ends. Its threads go on failing until the
            # process ends, so they stay muffled.
            return
        with disk_errors(self._folder):
            self._manager.close()
        self._muffled.end()

    def save(
        self,
        state: TrainState,
        metrics: dict[str, float],
        data: dict[str, Any],
        unvalidated: bool = False,
    ) -> None:
        """Starts saving the state under its own step; once it returns, the state may be donated.

        Args:
          state: the state of training.
          metrics: JSON values. The step with the largest `retention.BEST` among them is the best.
          data: JSON state of the data iterator.
          unvalidated: whether a validation is due, whose metrics `complete` adds later.

        Raises:
          UserError: this save, or the one before that ran in the background, found the disk full;
            or the step is there already.
        """
        step = int(state.step)
        self._check_lease()
        folder = self._folder / str(step)
        # The first process has cleaned up what killed runs left. What the others see of a bucket
        # may be older than that.
        is_free = jax.process_index() > 0 or not folder.exists()
        if not all_of(is_free):
            raise UserError(f"checkpoint {folder}: is there already, and is not overwritten")

        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            state=ocp.args.StandardSave(without_params(state)),
            meta=ocp.args.JsonSave(self._meta(state, metrics, data, unvalidated)),
            data=ocp.args.JsonSave(data),
        )
        with disk_errors(self._folder):
            saved = self._manager.save(step, args=items)
        if not saved:
            steps = list(self._manager.all_steps())
            raise UserError(
                f"checkpoint {self._folder}: step {step} cannot follow the steps that are there"
                f" ({steps})"
            )

    def _meta(
        self,
        state: TrainState,
        metrics: dict[str, float],
        data: dict[str, Any],
        unvalidated: bool,
    ) -> dict[str, Any]:
        """Returns the JSON that describes a step, with sums of all that is saved."""
        meta = self._run.to_meta() | {
            "metrics": metrics,
            "unvalidated": unvalidated,
            "step": int(state.step),
            "sums": {
                "params": array_sums(state.params),
                "state": array_sums(without_params(state)),
            },
            "data_sum": json_sum(data),
        }
        return meta | {"meta_sum": json_sum(meta)}

    def complete(self, step: int, metrics: dict[str, float]) -> None:
        """Gives a step on disk the metrics that it was saved without.

        Only its small file `meta` is replaced, whole or not at all, so that the step stays readable
        whatever ends the process meanwhile.

        Raises:
          UserError: the disk is full.
        """
        self._check_lease()
        if jax.process_index() == 0:
            folder = self._folder / str(step)
            with disk_errors(self._folder):
                meta = read_meta(folder) | {"metrics": metrics, "unvalidated": False}
                meta["meta_sum"] = json_sum(meta)
                write_text(json_file(folder, "meta"), json.dumps(meta))
        barrier()  # The first process is done.

    def wait(self) -> None:
        """Waits until all saves are on disk."""
        with disk_errors(self._folder):
            self._manager.wait_until_finished()

    def restore_latest(self, blank: TrainState) -> Saved | None:
        """Restores the newest step that is not damaged; returns None if there is no step at all.

        A damaged step is reported in one line, and the step before it is tried. Once an older step
        was read, the damaged ones are moved to WORKDIR/damaged, so that they can be saved anew.
        Nothing is ever deleted for being unreadable. If something other than damage keeps a step
        from being read (memory, a permission, a device, a network), the run ends: going on from an
        older step would repeat work for nothing.

        Args:
          blank: a state of the wanted shapes and layout.

        Raises:
          UserError: the checkpoint is of another run, a step is whole but cannot be read here and
            now, or all steps are damaged.
        """
        saved, damaged = read_newest(self._folder, self._manager.all_steps(), self._run, blank)
        if damaged:
            set_aside(self._folder, damaged)
            self._manager.reload()
        return saved

    def _check_lease(self) -> None:
        """Raises LostLease if another run has taken over the folder."""
        if self._lease is not None:
            self._lease.check()
