"""Checkpoints: what a run saves so that it goes on bit for bit, and what evaluation needs of it.

    WORKDIR/checkpoints/<step>/params   the weights, alone
                               state    optimizer and counters
                               meta     JSON: config, method, stage, tokenizer, metrics, sums of all
                               data     JSON: where the data iterator stands

Orbax writes in the background and renames the folder of a step when it is whole, so a killed run
leaves no half step. The two last steps are kept, and the best one by validation accuracy. Whatever
is read is compared with its sums (`checksum`), because neither Orbax nor TensorStore notices a
flipped bit inside an array. docs/checkpoints.md says what each fault does.
"""

import base64
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from apr_jax.compare import FREE, LENGTHS, differences
from apr_jax.config import ConfigError, Experiment, from_dict, to_dict
from apr_jax.errors import DiskError, LostProcess, UserError
from apr_jax.io.disk_errors import Muffled, check_writable, disk_errors, quiet
from apr_jax.io.json_files import write_json
from apr_jax.io.lease import Lease
from apr_jax.io.library_errors import shows_damage, what_went_wrong
from apr_jax.io.storage import absolute, as_path, is_remote, move, require_reachable
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.train.checkpoint.checksum import array_sums, changed, json_sum
from apr_jax.train.checkpoint.exported import SUFFIX, load_exported
from apr_jax.train.checkpoint.restored import Restored
from apr_jax.train.distributed import all_of
from apr_jax.train.state import TrainState

FOLDER = "checkpoints"
BEST = "validation_accuracy"  # The best step is the one in which this metric is largest.
_NOT_VALIDATED = -1.0  # The score of a step without that metric.
_LAST_STEPS_KEPT = 2
_REMEDY = "use the same settings, or another --workdir"


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same through a run, and is written into each of its checkpoints.

    Attributes:
      config: the experiment.
      method: the method whose demonstrations the model learned from.
      stage: "sft" or "rl".
      tokenizer: the tokenizer of the run.
      origin: digest of the parameters from which the run started, or "" if they were random.
    """

    config: Experiment
    method: str
    stage: str
    tokenizer: Tokenizer
    origin: str = ""


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
      meta: everything else, see the module's docstring.
    """

    state: TrainState
    data: dict[str, Any]
    meta: dict[str, Any]


class _Damaged(Exception):
    """A step is damaged; the message says in which way."""


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
                    preservation_policy=_LastAndBest(self._folder),
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
        try:
            # After these errors, closing would wait for a save that never ends.
            if kind is None or not issubclass(kind, LostProcess | DiskError):
                with disk_errors(self._folder):
                    self._manager.close()
        finally:
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
          metrics: JSON values. The step with the largest BEST among them is the best.
          data: JSON state of the data iterator.
          unvalidated: whether a validation is due, whose metrics `complete` adds later.

        Raises:
          UserError: this save, or the one before that ran in the background, found the disk full;
            or the step is there already.
        """
        step = int(state.step)
        self._check_lease()
        folder = self._folder / str(step)
        if folder.exists():
            raise UserError(f"checkpoint {folder}: is there already, and is not overwritten")

        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            state=ocp.args.StandardSave(_without_params(state)),
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
        meta = {
            "config": to_dict(self._run.config),
            "method": self._run.method,
            "stage": self._run.stage,
            "origin": self._run.origin,
            "tokenizer": _encode(self._run.tokenizer),
            "metrics": metrics,
            "unvalidated": unvalidated,
            "step": int(state.step),
            "sums": {
                "params": array_sums(state.params),
                "state": array_sums(_without_params(state)),
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
                meta = _read_meta(folder) | {"metrics": metrics, "unvalidated": False}
                meta["meta_sum"] = json_sum(meta)
                write_json(_json_file(folder, "meta"), meta)
        all_of(True)  # Waits until the first process is done.

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
        damaged: list[int] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            folder = self._folder / str(step)
            try:
                contents = self._read_in_all_processes(folder, blank)
            except _Damaged as damage:
                print(
                    f"checkpoint {folder}: damaged ({damage}); going on from the step before",
                    flush=True,
                )
                damaged.append(step)
                continue
            self._set_aside(damaged)
            return Saved(contents.state, contents.data, contents.meta["unvalidated"])

        if damaged:
            raise UserError(
                f"checkpoint {self._folder}: all {len(damaged)} steps are damaged; move it away to"
                " start anew, or use another --workdir"
            )
        return None

    def _read_in_all_processes(self, folder: Path, blank: TrainState) -> _Contents:
        """Reads a step and compares it with its sums; succeeds or fails in all processes alike.

        Raises:
          _Damaged: the step is damaged, for this or another process.
          UserError: the step is of another run, or cannot be read here and now.
        """
        contents, error = self._read(folder, blank)

        # What follows is done by all processes together, so they first agree on how to go on.
        if not all_of(error is None or shows_damage(error)):
            raise _unreadable(folder, error or OSError("by another process"))
        if not all_of(error is None):
            raise _Damaged(what_went_wrong(error) if error else "another process cannot read it")

        assert contents is not None
        difference = _difference(contents.state, contents.meta)
        if difference:
            raise _Damaged(difference)
        return contents

    def _read(self, folder: Path, blank: TrainState) -> tuple[_Contents | None, Exception | None]:
        """Reads a step in this process alone, without waiting for any other.

        Returns:
          the contents and None; or None and the error that kept them from being read.

        Raises:
          UserError: the step is of another run, or of another version of this library.
        """
        try:
            meta = _read_meta(folder)
            data = _read_json(folder, "data")
            if meta["data_sum"] != json_sum(data):
                raise ValueError("data is not what was saved")

            self._check_same_run(meta, folder)
            if "unvalidated" not in meta:
                raise version_error(folder)

            params = _read_arrays(folder / "params", blank.params)
            others = _read_arrays(folder / "state", _without_params(blank))
            return _Contents(TrainState(params=params, **others), data, meta), None
        except UserError:
            raise
        # Orbax and TensorStore raise errors of many types for damaged files.
        except Exception as error:
            return None, error

    def _set_aside(self, steps: list[int]) -> None:
        """Moves damaged steps to WORKDIR/damaged/<step>.<n>."""
        if not steps:
            return
        aside = self._folder.parent / "damaged"
        if jax.process_index() == 0:
            with disk_errors(aside):
                aside.mkdir(exist_ok=True)
                for step in steps:
                    earlier = len(list(aside.glob(f"{step}.*")))
                    move(self._folder / str(step), aside / f"{step}.{earlier}")
        all_of(True)  # Waits until the first process is done.
        self._manager.reload()

    def _check_lease(self) -> None:
        """Raises LostLease if another run has taken over the folder."""
        if self._lease is not None:
            self._lease.check()

    def _check_same_run(self, meta: dict[str, Any], folder: Path) -> None:
        """Raises UserError, which names what differs, if another run saved the step."""
        run = self._run
        wanted = {
            "stage": run.stage,
            "method": run.method,
            "tokenizer": _fingerprint(_encode(run.tokenizer)),
            "init": run.origin,
        }
        saved = {
            "stage": meta["stage"],
            "method": meta["method"],
            "tokenizer": _fingerprint(meta["tokenizer"]),
            "init": meta["origin"],
        }
        for name in wanted:
            if wanted[name] != saved[name]:
                raise UserError(
                    f"checkpoint {folder}: was saved with {name}={saved[name]!r}, not"
                    f" {wanted[name]!r}; {_REMEDY}"
                )

        settings_of_other_stage = "train.rl." if run.stage == "sft" else "train.sft."
        free = (*FREE, *LENGTHS, settings_of_other_stage)
        differing = [
            f"{name}={old!r} (now {new!r})"
            for name, old, new in differences(meta["config"], run.config, free)
        ]
        if differing:
            raise UserError(
                f"checkpoint {folder}: was saved with {', '.join(differing)}; {_REMEDY}"
            )


def load_checkpoint(path: str | Path) -> Restored:
    """Loads the weights of a run's best step, or of one given step; reads no optimizer state.

    Without a validation, the last step of a run counts as its best.

    Args:
      path: a workdir, one `checkpoints/<step>` in it, or a file that `apr export` wrote.

    Raises:
      UserError: there is no checkpoint, or it is damaged or cannot be read.
    """
    path = as_path(path)
    if path.suffix == SUFFIX:
        return load_exported(path)

    folder = _step_folder(absolute(path))
    try:
        meta = _read_meta(folder)
        params = _read_params(folder / "params")
        wrong = changed(params, meta["sums"]["params"])
        if wrong:
            raise ValueError(f"params{wrong[0]} is not what was saved")
        tokenizer = Tokenizer.from_bytes(base64.b64decode(meta["tokenizer"]))
        config = from_dict(meta["config"])
        return Restored(
            params=params,
            config=config,
            method=meta["method"],
            stage=meta["stage"],
            tokenizer=tokenizer,
            step=meta["step"],
            path=str(folder),
        )
    except ConfigError as error:
        raise UserError(
            f"checkpoint {folder}: is of another version of apr_jax ({error}); train again"
        ) from None
    # Orbax and TensorStore raise errors of many types for damaged files.
    except Exception as error:
        if not shows_damage(error):
            raise _unreadable(folder, error) from error
        others = [str(step) for step in _steps(folder.parent) if str(step) != folder.name]
        hint = f"; other steps there: {', '.join(others)}" if others else "; train again"
        raise UserError(f"checkpoint {folder}: damaged ({what_went_wrong(error)}){hint}") from None


def version_error(folder: Path) -> UserError:
    """Returns the error for a run that another version of this library saved."""
    return UserError(
        f"checkpoint {folder}: is of another version of apr_jax; use another --workdir"
    )


def _unreadable(folder: Path, error: Exception) -> UserError:
    """Returns the error for a step that is not known to be damaged, but cannot be read now."""
    return UserError(
        f"checkpoint {folder}: cannot be read here and now ({what_went_wrong(error)}); this is no"
        " damage, and nothing was changed; mend the cause and start the same command again"
    )


def _step_folder(path: Path) -> Path:
    """Finds the step that is meant by `path`: the step itself, or the best step of a run.

    Among equally good steps the last one is the best.

    Raises:
      UserError: there is no step, or one of a run's steps is damaged, so that the best of them is
        not known. No other step takes its place: it would silently be another model.
    """
    is_step = path.parent.name == FOLDER and path.name.isdigit() and path.is_dir()
    if is_step or (path / "meta").is_dir():
        return path
    folders = _step_folders(path)
    scores = {folder: _known_score(folder, folders) for folder in folders}
    return max(folders, key=lambda folder: (scores[folder], int(folder.name)))


def _known_score(folder: Path, folders: Sequence[Path]) -> float:
    """Reads how good a step of a run is; `folders` are all its steps.

    Raises:
      UserError: the step is damaged, or cannot be read here and now.
    """
    try:
        return _score(_read_meta(folder))
    except Exception as error:
        # A training under way has just deleted the step, because others are better.
        if not folder.is_dir():
            return _NOT_VALIDATED
        if not shows_damage(error):
            raise _unreadable(folder, error) from error
        others = ", ".join(str(other) for other in folders if other != folder)
        remedy = f"to take another step, name it ({others})" if others else "train again"
        raise UserError(
            f"checkpoint {folder}: damaged ({what_went_wrong(error)}), so which step of the run is"
            f" the best is not known; {remedy}"
        ) from None


def last_step(workdir: Path) -> Path:
    """Finds the folder of a run's last step, for `load_checkpoint`.

    The best step of a run is its most accurate one. Where a run learns to save tokens, that is not
    the one that is wanted.

    Raises:
      UserError: the run has no step.
    """
    return _step_folders(absolute(workdir))[-1]


def _step_folders(path: Path) -> list[Path]:
    """Lists the folders of all steps of a run, in the order of the steps.

    Raises:
      UserError: the run has no step.
    """
    steps = _steps(path / FOLDER)
    if not steps:
        require_reachable(path)
        raise UserError(
            f"checkpoint {path}: no such checkpoint; give a run's folder or one of its"
            f" {FOLDER}/<step>"
        )
    return [path / FOLDER / str(step) for step in steps]


def _score(meta: dict[str, Any]) -> float:
    """Returns how good a step is, by its `meta`."""
    return float(meta["metrics"].get(BEST, _NOT_VALIDATED))


def _steps(folder: Path) -> list[int]:
    """Lists the steps in a folder of checkpoints, in order; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.glob("*") if entry.name.isdigit())


def _json_file(folder: Path, item: str) -> Path:
    """Returns the file into which Orbax's JSON handler writes an item of a step."""
    return folder / item / "metadata"


def _read_json(folder: Path, item: str) -> dict[str, Any]:
    """Reads a JSON item of a step."""
    value: dict[str, Any] = json.loads(_json_file(folder, item).read_text())
    return value


def _read_meta(folder: Path) -> dict[str, Any]:
    """Reads the `meta` of a step; raises ValueError if it is not what was saved."""
    meta = _read_json(folder, "meta")
    if meta.pop("meta_sum", None) != json_sum(meta):
        raise ValueError("meta is not what was saved")
    return meta


def _difference(state: TrainState, meta: dict[str, Any]) -> str:
    """Names what of the state is not what was saved; returns "" if nothing is.

    All processes must call it, and all get the same result.
    """
    arrays = {"params": state.params, "state": _without_params(state)}
    wrong = [
        item + path for item, sums in meta["sums"].items() for path in changed(arrays[item], sums)
    ]
    if wrong:
        return f"{wrong[0]} is not what was saved"
    if int(state.step) != meta["step"]:
        return f"holds step {int(state.step)}"
    return ""


def _read_arrays(folder: Path, blank: Any) -> Any:
    """Reads arrays of the shapes and the layout of `blank`."""
    # Not through the manager: there, processes would wait for one that has failed.
    with quiet():
        return ocp.StandardCheckpointHandler().restore(
            folder, args=ocp.args.StandardRestore(_abstract(blank))
        )


def _read_params(folder: Path) -> Any:
    """Reads the weights of a step as numpy arrays, whatever their shapes."""
    reader = ocp.PyTreeCheckpointHandler()
    with quiet():
        tree = reader.metadata(folder).tree
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=kinds))


class _LastAndBest(preservation_policy.PreservationPolicy):
    """Keeps the last steps and the best one, among equally good ones the later.

    Steps whose score cannot be read are kept too, because one of them may be the best. The scores
    are read from `meta` and not given to Orbax: it could not open a folder in which the metrics of
    one step are damaged. The step that is being saved has no score yet, but is among the last.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        steps = [info.step for info in checkpoints]
        kept = set(sorted(steps)[-_LAST_STEPS_KEPT:])
        scores = {}
        for step in steps:
            try:
                scores[step] = _score(_read_meta(self._folder / str(step)))
            # It is damaged, cannot be read just now, or, as one of the last, is not written yet.
            except Exception:
                kept.add(step)
        if scores:
            kept.add(max(scores, key=lambda step: (scores[step], step)))
        return [step in kept for step in steps]


def _without_params(state: TrainState) -> dict[str, Any]:
    """Returns the fields of a state by name, all but the weights."""
    names = [field.name for field in dataclasses.fields(state) if field.name != "params"]
    return {name: getattr(state, name) for name in names}


def _abstract(tree: Any) -> Any:
    """Returns the shapes, types and layout of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _encode(tokenizer: Tokenizer) -> str:
    """Returns a tokenizer as text for JSON."""
    return base64.b64encode(tokenizer.to_bytes()).decode()


def _fingerprint(text: str) -> str:
    """Returns 16 hex digits that stand for a long text in a message."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
